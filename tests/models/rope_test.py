"""Scalings of rotary embeddings: frequencies against transformers, and what is refused."""

import numpy as np
import pytest
from models_config_test import LLAMA3, read, without

from benchmarks.hf_config import rope_scaling
from distill.base.errors import UserError
from distill.models.rope import Rope

LONG = {"short_factor": [1.0 + i / 8 for i in range(32)], "long_factor": [9.0] * 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3["rope_scaling"],
    "yarn": YARN,
    "yarn_untruncated": YARN | {"truncate": False, "beta_fast": 8.0, "attention_factor": 1.3},
    "yarn_mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5},
    "yarn_of_lengths": {"rope_type": "yarn", "factor": None, "beta_slow": 2.0}
    | {"original_max_position_embeddings": 2048},
    "longrope": {"type": "longrope", **LONG, "original_max_position_embeddings": 4096},
    "longrope_factors": {"rope_type": "longrope", **LONG, "factor": 4.0, "attention_factor": 1.2},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name):
    pytest.importorskip("torch", reason="torch is the reference; pip install torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    written = without(LLAMA3, "rope_scaling", "rope_theta")
    parameters = SCALINGS[name] | {"rope_theta": 5e5}
    theirs = LlamaConfig(**written, rope_parameters=dict(parameters))
    kind = theirs.rope_parameters["rope_type"]
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    config = read(written | {"rope_parameters": parameters})
    found, factor = config.kinds["full"].rotary.frequencies()
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    np.testing.assert_allclose(found, expected.numpy(), rtol=3e-6)
    plain, _ = read(written | {"rope_theta": 5e5}).kinds["full"].rotary.frequencies()
    assert (name == "dynamic") == np.array_equal(found, plain)
    assert read(written | {"rope_theta": 5e5, "rope_scaling": rope_scaling(config.rope)}) == config


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (SCALINGS["longrope"], 4096),
        (YARN | {"llama_4_scaling_beta": 0.1}, 512),
        (YARN, 131072),
        (SCALINGS["dynamic"], 131072),
    ],
)
def test_positions_end_where_frequencies_change_with_the_length(scaling, positions):
    assert read(LLAMA3 | {"rope_scaling": scaling}).max_positions == positions


BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def test_layer_types_have_ropes_of_their_own():
    gemma = LLAMA3 | {"model_type": "qwen3", "architectures": None, "use_sliding_window": True}
    gemma = without(gemma, "rope_theta", "rope_scaling", "mlp_bias", "pretraining_tp")
    config = read(
        gemma | {"sliding_window": 64, "max_window_layers": 3, "rope_parameters": BY_TYPE}
    )
    assert {name: kind.rotary.rope.theta for name, kind in config.kinds.items()} == {
        "full": 1e6,
        "sliding": 1e4,
    }
    assert config.sliding_rope == Rope(1e4) and config.rope.scaling.factor == 8.0
    with pytest.raises(UserError, match="rope_parameters: the required field full_attention is"):
        read(gemma | {"rope_parameters": {"sliding_attention": {}}})
    with pytest.raises(UserError, match="full_attention: the required field rope_theta is missing"):
        read(gemma | {"rope_parameters": BY_TYPE | {"full_attention": {"factor": 8.0}}})
    with pytest.raises(UserError, match="factor is not supported beside entries of layer types"):
        read(gemma | {"rope_parameters": BY_TYPE | {"factor": 2.0}})


def test_a_family_with_two_ropes_has_both_in_rope_parameters():
    gemma = {"model_type": "gemma3_text", "hidden_size": 8, "intermediate_size": 8}
    gemma |= {"num_hidden_layers": 2, "rope_parameters": {"rope_theta": 1e5}}
    with pytest.raises(UserError, match="rope_parameters=.* must have an entry for each layer typ"):
        read(gemma)


def test_longrope_has_a_factor_for_every_pair():
    short = SCALINGS["longrope"] | {"short_factor": [1.0] * 31}
    with pytest.raises(UserError, match="short_factor has 31 numbers, the 64 rotated channels of"):
        read(LLAMA3 | {"rope_scaling": short})
