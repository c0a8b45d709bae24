"""The decoder against transformers in torch, float32, on random weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from distill.base.sharding import make_mesh, param_shardings
from distill.data.tokenizer import character_tokenizer
from distill.models.checkpoints.export import export_model, hf_config_dict
from distill.models.checkpoints.load import load_model_config, load_params
from distill.models.facts import ModelConfig
from distill.models.transformer import Transformer
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

VOCABULARY, LENGTH = 64, 48
TOLERANCE = 1e-4

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
)
# With 128 original positions all three bands of the scaling (kept, blended, slowed) are in use.
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
PLAIN_ROPE = dict(rope_type="default", rope_theta=10000.0)
FAMILIES = {
    "qwen2": dict(class_name="Qwen2", rope_parameters=PLAIN_ROPE),
    "qwen3": dict(class_name="Qwen3", rope_parameters=PLAIN_ROPE, head_dim=16),
    "llama": dict(class_name="Llama", rope_parameters=LLAMA3_ROPE),
}
CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs here run once or twice on tiny arrays: nearly all their time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def case_name(case):
    return f"{case[0]}-{'tied' if case[1] else 'untied'}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A torch model, the folder it was saved in, and our model loaded from there."""

    torch_model: object
    folder: object
    config: ModelConfig
    hf_config: dict
    model: Transformer


@pytest.fixture(scope="module", params=CASES, ids=case_name)
def case(request, tmp_path_factory) -> Case:
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install torch")
    import transformers

    family, tied = request.param
    fields = dict(FAMILIES[family])
    class_name = fields.pop("class_name")
    torch.manual_seed(0)
    torch_config = getattr(transformers, f"{class_name}Config")(
        **SIZES, **fields, tie_word_embeddings=tied
    )
    torch_model = getattr(transformers, f"{class_name}ForCausalLM")(torch_config).eval()
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would hide them
        for parameter in torch_model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(case_name(request.param))
    torch_model.save_pretrained(folder)
    config, hf_config = load_model_config(folder)
    return Case(torch_model, folder, config, hf_config, load(folder, config))


def load(folder, config, mesh=None):
    def construct():
        return Transformer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

    graphdef, shapes = nnx.split(nnx.eval_shape(construct), nnx.Param)
    shardings = param_shardings(shapes, mesh) if mesh else None
    return nnx.merge(graphdef, load_params(folder, config, shapes, shardings, jnp.float32))


@jax.jit
def logits_of(model, *arrays):
    return model.logits(model(*arrays))


def torch_logits(model, tokens, mask=None, positions=None):
    import torch

    inputs = dict(input_ids=tokens, attention_mask=mask, position_ids=positions)
    tensors = {k: torch.tensor(np.asarray(v)) for k, v in inputs.items() if v is not None}
    with torch.no_grad():
        return model(**tensors).logits.numpy()


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, VOCABULARY, shape)


def test_left_padded_logits_equal_torch(case):
    tokens = random_tokens(4, LENGTH)
    mask = (np.arange(LENGTH) >= np.array([[0], [5], [20], [47]])).astype(np.int32)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    ours = logits_of(case.model, tokens, positions, mask)
    theirs = torch_logits(case.torch_model, tokens, mask, positions)
    assert theirs.std() > 1  # otherwise the tolerance would mean little
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[mask == 1], theirs[mask == 1], atol=TOLERANCE, rtol=0)


def test_greedy_tokens_equal_torch_generate(case):
    import torch

    prompts = [random_tokens(length, seed=length) for length in (11, 4, 7)]
    padded = torch.zeros(3, 11, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, 11 - len(prompt) :] = torch.tensor(prompt)
        mask[row, 11 - len(prompt) :] = 1
    expected = case.torch_model.generate(
        padded, attention_mask=mask, max_new_tokens=24, do_sample=False
    )[:, 11:]
    graphdef, weights = nnx.split(case.model, nnx.Param)
    ends = dict(eos_ids=(), pad_id=0, vocab_size=case.config.vocab_size)
    engine = Engine(graphdef, EngineConfig(max_length=48), **ends)
    params = SamplingParams(max_length=24, greedy=True)
    rollout, _ = engine.generate(weights, RolloutRequest(tuple(prompts), np.arange(3), params))
    np.testing.assert_array_equal(rollout.tokens_br, expected.numpy())


@pytest.mark.parametrize("max_shard_bytes", [5e9, 20_000], ids=["one-file", "sharded"])
def test_export_loads_in_transformers(case, tmp_path, max_shard_bytes):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "export"
    _, params = nnx.split(case.model, nnx.Param)
    export_model(
        folder,
        params,
        case.config,
        case.hf_config,
        character_tokenizer("0123"),
        jnp.float32,
        max_shard_bytes=max_shard_bytes,
    )
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_bytes == 20_000)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokens = random_tokens(1, LENGTH)
    # The same numbers as the model it was imported from, so the round trip loses nothing.
    np.testing.assert_array_equal(
        torch_logits(loaded, tokens), torch_logits(case.torch_model, tokens)
    )


def test_scratch_config_means_the_same_to_transformers(case, tmp_path):
    """A config.json written for a model from scratch describes the model to both sides."""
    from transformers import AutoModelForCausalLM

    written = hf_config_dict(case.config, eos_token_id=2, pad_token_id=0)
    assert ModelConfig.from_hf(json.loads(json.dumps(written)), "test") == case.config
    _, params = nnx.split(case.model, nnx.Param)
    folder = tmp_path / "scratch"
    tokenizer = character_tokenizer("0123")
    export_model(folder, params, case.config, written, tokenizer, jnp.float32)
    tokens = random_tokens(1, LENGTH)
    np.testing.assert_array_equal(
        torch_logits(AutoModelForCausalLM.from_pretrained(folder), tokens),
        torch_logits(case.torch_model, tokens),
    )


def test_sharded_loading_gives_the_same_logits(case):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model = load(case.folder, case.config, mesh)
    q_proj = model.layers.q_proj[...]
    assert q_proj.addressable_shards[0].data.shape == (2, 16, 2, case.config.head_width)
    assert model.embedding[...].addressable_shards[0].data.shape == (VOCABULARY // 2, 16)
    tokens = random_tokens(4, LENGTH)
    with jax.set_mesh(mesh):
        ours = logits_of(model, tokens)
    expected = torch_logits(case.torch_model, tokens)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)


def test_export_of_a_sharded_model_equals_the_original(case, tmp_path):
    _, params = nnx.split(load(case.folder, case.config, make_mesh(2, 2, 2)), nnx.Param)
    tokenizer = character_tokenizer("0123")
    folder = tmp_path / "export"
    export_model(folder, params, case.config, case.hf_config, tokenizer, jnp.float32)
    exported, original = (load_file(f / "model.safetensors") for f in (folder, case.folder))
    assert exported.keys() == original.keys()
    for key, value in exported.items():
        np.testing.assert_array_equal(value, original[key], err_msg=key)
