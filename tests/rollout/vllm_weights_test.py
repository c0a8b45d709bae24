"""What a server loads at a refit is what the trainer's probe computes with."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import model_config, random_model

from benchmarks.hf_config import hf_config_dict
from distill.base.errors import RunStopped
from distill.base.mesh import make_mesh
from distill.base.sharding import batch_parts, param_shardings
from distill.data.tokenizer import Vocabulary, character_tokenizer
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.load import load_params
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import ModelConfig
from distill.rollout.vllm.probe import Probe
from distill.rollout.vllm.weights import HEAD, ServerExport, WeightsFolder, rehearse

VOCAB_SIZE, PADDED = 13, 16
TIED = model_config(vocab_size=PADDED, head_width=4, max_positions=24)
UNTIED = dataclasses.replace(TIED, family="qwen3", tied=False, qkv_bias=False, qk_norm="head")
TOKENIZER = character_tokenizer("0123456789+")


def random_student(config: ModelConfig, dtype=jnp.float32):
    return random_model(config, std=0.5, dtype=dtype)


@pytest.fixture(params=[TIED, UNTIED], ids=["tied", "untied"])
def student(request, tmp_path):
    """(folder it came from, graph, parameters)."""
    config = request.param
    graph, params = random_student(config)
    hf_config = hf_config_dict(config, eos_token_id=1, pad_token_id=0)
    export_model(tmp_path / "student", params, config, hf_config, TOKENIZER, jnp.float32)
    return tmp_path / "student", graph, params


def make_folder(student, tmp_path) -> WeightsFolder:
    export = ServerExport(
        student[0],
        Vocabulary(TOKENIZER, VOCAB_SIZE, (1, 5)),
        max_length=32,
        dtype=jnp.float32,
    )
    return WeightsFolder(tmp_path / "vllm", export)


def with_the_old_head(folder: WeightsFolder, params, probe: Probe) -> np.ndarray:
    """What a server says in the rehearsal that takes all new weights but the head."""
    kept = folder.folder / "kept-head"
    folder.export.write(kept, params, lambda key, x: x if key == HEAD else rehearse(key, x))
    return as_a_server_computes(kept, probe.tokens_bt)


def make_probe(graph, mesh=None, **options) -> Probe:
    options = {"max_gap": 0.1, "float32": True, **options}
    parts = 1 if mesh is None else batch_parts(mesh)
    return Probe(graph, vocab_size=VOCAB_SIZE, max_length=24, row_multiple=parts, **options)


def as_a_server_computes(folder: Path, tokens_bt) -> np.ndarray:
    """Log-probabilities of tokens 1.. by whatever the folder says, its padding being none."""
    config, _ = load_model_config(folder)
    graph, abstract = random_student(config)
    params = load_params(folder, config, abstract, None, jnp.float32)
    model = nnx.merge(graph, params)
    log_probs_btv = jax.nn.log_softmax(model.logits(model(tokens_bt)))
    return np.take_along_axis(np.asarray(log_probs_btv)[:, :-1], tokens_bt[:, 1:, None], -1)[..., 0]


def test_servers_get_an_untied_head_and_no_padding_rows(student, tmp_path):
    folder = make_folder(student, tmp_path).write(student[2], 7)
    config, hf_config = load_model_config(folder)
    assert (config.tied, config.vocab_size, config.max_positions) == (False, VOCAB_SIZE, 33)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 5]
    probe = make_probe(student[1])
    np.testing.assert_allclose(
        as_a_server_computes(folder, probe.tokens_bt), probe.expected(student[2]), atol=2e-5
    )


def test_rehearsal_is_the_same_model_on_both_sides(student, tmp_path):
    folder = make_folder(student, tmp_path)
    probe = make_probe(student[1])
    expected = probe.expected_in_rehearsal(student[2])
    computed = as_a_server_computes(folder.write_rehearsal(student[2]), probe.tokens_bt)
    np.testing.assert_allclose(computed, expected, atol=2e-5)
    # It is far from the true weights, and from those with the old head.
    assert np.abs(expected - probe.expected(student[2])).mean() > 0.5
    assert np.abs(expected - with_the_old_head(folder, student[2], probe)).mean() > 0.5
    folder.drop_rehearsal()
    assert not (tmp_path / "vllm" / "rehearsal").exists()


def test_rehearsal_tells_a_kept_head_from_bfloat16(student, tmp_path):
    """A server that computes more precisely than the trainer passes; one with the old head not."""
    dtype = jnp.bfloat16
    graph, params = random_student(load_model_config(student[0])[0], dtype)
    export = ServerExport(
        student[0], Vocabulary(TOKENIZER, VOCAB_SIZE, (1,)), max_length=32, dtype=dtype
    )
    folder = WeightsFolder(tmp_path / "vllm", export)
    probe = make_probe(graph, float32=False, max_gap=9.0)
    expected = probe.expected_in_rehearsal(params)
    measured = as_a_server_computes(folder.write_rehearsal(params), probe.tokens_bt)
    before = measured + 1.0, probe.expected(params)
    gap = probe.check("http://s", measured, expected, before, far_apart=True)
    assert 1e-4 < gap < 0.1
    with pytest.raises(RunStopped, match="output head"):
        kept = with_the_old_head(folder, params, probe)
        probe.check("http://s", kept, expected, before, far_apart=True)


def test_probe_on_a_mesh(student):
    _, graph, params = student
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    expected = make_probe(graph).expected(params)
    with jax.set_mesh(mesh):
        probe = make_probe(graph, mesh)
        sharded = probe.expected(jax.device_put(params, param_shardings(params, mesh)))
    np.testing.assert_allclose(sharded, expected, atol=2e-5)


def test_two_versions_are_kept(student, tmp_path):
    folder = make_folder(student, tmp_path)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "mine").mkdir()
    for version in (3, 4, 11, 12, 12):
        assert folder.write(student[2], version).name == f"{version:08d}"
    left = sorted(path.name for path in (tmp_path / "vllm").iterdir())
    assert left == ["00000011", "00000012", "mine"]
