"""The decoder against transformers in torch, float32, on random weights; and against itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from distill.models.config import ModelConfig, RopeScaling
from distill.models.hf import export_model, hf_config_dict, load_model_config, load_params
from distill.models.transformer import (
    REMAT_POLICIES,
    Transformer,
    init_cache,
    rope_frequencies,
)
from distill.sharding import make_mesh, param_shardings
from distill.tokenizer import character_tokenizer

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
    max_position_embeddings=128,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
)
# With 32 original positions the three bands of the scaling (kept, blended, slowed) are all in use.
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
PLAIN_ROPE = dict(rope_type="default", rope_theta=10000.0)
FAMILIES = {
    "qwen2": dict(class_name="Qwen2", rope_parameters=PLAIN_ROPE),
    "qwen3": dict(class_name="Qwen3", rope_parameters=PLAIN_ROPE, head_dim=16),
    "llama": dict(class_name="Llama", rope_parameters=LLAMA3_ROPE),
}
CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]


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


def construct(config, remat="none", dtype=jnp.float32):
    return Transformer(config, dtype=dtype, param_dtype=jnp.float32, remat=remat, rngs=nnx.Rngs(0))


def abstract(config):
    return nnx.split(nnx.eval_shape(lambda: construct(config)), nnx.Param)


def load(folder, config, mesh=None, dtype=jnp.float32):
    graphdef, shapes = abstract(config)
    shardings = param_shardings(shapes, mesh) if mesh else None
    return nnx.merge(graphdef, load_params(folder, config, shapes, shardings, dtype))


@jax.jit
def logits_of(model, *arrays):
    return model.logits(model(*arrays))


@jax.jit
def hidden_of(model, *arrays):
    return model(*arrays)


def torch_logits(model, tokens, mask=None, positions=None):
    import torch

    inputs = dict(input_ids=tokens, attention_mask=mask, position_ids=positions)
    tensors = {k: torch.tensor(np.asarray(v)) for k, v in inputs.items() if v is not None}
    with torch.no_grad():
        return model(**tensors).logits.numpy()


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, VOCABULARY, shape)


# ---- against torch ----


def test_logits_equal_torch(case):
    tokens = random_tokens(2, LENGTH)
    expected = torch_logits(case.torch_model, tokens)
    assert expected.std() > 1  # otherwise the tolerance would mean little
    np.testing.assert_allclose(logits_of(case.model, tokens), expected, atol=TOLERANCE, rtol=0)


def test_left_padded_logits_equal_torch(case):
    tokens = random_tokens(3, 12)
    mask = (np.arange(12) >= np.array([[0], [5], [11]])).astype(np.int32)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    ours = logits_of(case.model, tokens, positions, mask)
    theirs = torch_logits(case.torch_model, tokens, mask, positions)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[mask == 1], theirs[mask == 1], atol=TOLERANCE, rtol=0)


@jax.jit
def next_token(model, tokens, new_lengths, cache):
    hidden, cache = model.extend(tokens, new_lengths, cache)
    last = jnp.take_along_axis(hidden, (new_lengths - 1)[:, None, None], axis=1)
    return jnp.argmax(model.logits(last), axis=-1), cache


def greedy(model, prompts, count):
    """Greedy continuations of ragged prompts, through the cache."""
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = init_cache(model.config, len(prompts), lengths.max() + count, jnp.float32)
    token, cache = next_token(model, tokens, lengths, cache)
    generated = [token]
    for _ in range(count - 1):
        token, cache = next_token(model, token, np.ones_like(lengths), cache)
        generated.append(token)
    return np.concatenate(generated, axis=1)


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
    np.testing.assert_array_equal(greedy(case.model, prompts, 24), expected.numpy())


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


# ---- against itself ----

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=VOCABULARY,
    num_layers=2,
    model_width=32,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    ffn_width=48,
    tied=False,
    qkv_bias=False,
    qk_norm=True,
    rms_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    max_positions=128,
)


def randomised(config, **options):
    """Weights large enough that every part of the model shows in the outputs."""
    random = np.random.default_rng(1)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: construct(config, **options)), nnx.Param)

    def value(x):
        return jnp.asarray(0.2 * random.standard_normal(x.shape) + (x.ndim < 3), x.dtype)

    return nnx.merge(graphdef, jax.tree.map(value, shapes))


@pytest.fixture(scope="module")
def model():
    return randomised(CONFIG)


def test_later_tokens_do_not_change_earlier_outputs(model):
    tokens = random_tokens(1, 12)
    changed = tokens.copy()
    changed[0, 7] = (tokens[0, 7] + 1) % VOCABULARY
    difference = np.abs(hidden_of(model, tokens) - hidden_of(model, changed)).max(axis=-1)[0]
    assert (difference[:7] == 0).all()
    assert (difference[7:] > 1e-3).all()


def test_segments_do_not_see_each_other(model):
    first, second = random_tokens(1, 5), random_tokens(1, 6, seed=1)
    packed = np.concatenate([first, second, np.zeros((1, 1), int)], axis=1)
    segments = np.array([[1] * 5 + [2] * 6 + [0]])
    positions = np.array([[*range(5), *range(6), 0]])
    hidden = hidden_of(model, packed, positions, segments)
    np.testing.assert_allclose(hidden[:, :5], hidden_of(model, first), atol=1e-5)
    np.testing.assert_allclose(hidden[:, 5:11], hidden_of(model, second), atol=1e-5)


def test_cached_decoding_equals_the_full_forward(model):
    """Ragged prompts, then single tokens, one row stopping early; caches donated at each call."""
    tokens = random_tokens(3, 12)
    full = np.asarray(hidden_of(model, tokens))
    extend = jax.jit(lambda *args: model.extend(*args), donate_argnums=2)
    lengths = np.array([5, 2, 4])
    prompts = np.where(np.arange(5) < lengths[:, None], tokens[:, :5], 0)
    empty = init_cache(CONFIG, 3, 12, jnp.float32)
    hidden, cache = extend(prompts, lengths, empty)
    assert empty.k_lbskh.is_deleted()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], full[row, :length], atol=1e-5)
    for step in range(6):
        new = np.array([1, 1, int(step < 2)])
        hidden, cache = extend(tokens[np.arange(3), lengths][:, None], new, cache)
        for row in np.flatnonzero(new):
            np.testing.assert_allclose(hidden[row, 0], full[row, lengths[row]], atol=1e-5)
        lengths = lengths + new
    np.testing.assert_array_equal(cache.lengths_b, [11, 8, 6])


def test_tokens_beyond_the_cache_are_dropped(model):
    tokens = random_tokens(1, 6)
    extend = jax.jit(model.extend)
    _, cache = extend(tokens[:, :4], np.array([4]), init_cache(CONFIG, 1, 4, jnp.float32))
    _, after = extend(tokens[:, 4:], np.array([0]), cache)
    np.testing.assert_array_equal(after.k_lbskh, cache.k_lbskh)
    np.testing.assert_array_equal(after.v_lbskh, cache.v_lbskh)
    np.testing.assert_array_equal(after.lengths_b, [4])


@pytest.mark.parametrize("tied", [True, False])
def test_compute_dtype_and_stored_dtype_are_separate(tied):
    config = dataclasses.replace(CONFIG, tied=tied)

    def outputs():
        model = construct(config, dtype=jnp.bfloat16)
        tokens, cache = jnp.zeros((1, 4), jnp.int32), init_cache(config, 1, 4, jnp.bfloat16)
        hidden = model(tokens)
        stored = nnx.state(model)
        return stored, (hidden, model.head(), *model.extend(tokens, 4, cache)), model.logits(hidden)

    stored, (hidden, head, cached_hidden, cache), logits = jax.eval_shape(outputs)
    assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype(jnp.float32)}
    assert hidden.dtype == cached_hidden.dtype == head.dtype == jnp.bfloat16
    assert cache.k_lbskh.dtype == cache.v_lbskh.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert head.shape == (CONFIG.model_width, VOCABULARY)


def test_bfloat16_stays_near_float32():
    exact, coarse = randomised(CONFIG), randomised(CONFIG, dtype=jnp.bfloat16)
    tokens = random_tokens(2, 12)
    error = np.abs(hidden_of(exact, tokens) - hidden_of(coarse, tokens).astype(jnp.float32))
    assert 1e-4 < error.mean() < 3e-2


def loss_and_gradient(remat):
    graphdef, params = nnx.split(randomised(CONFIG, remat=remat), nnx.Param)

    def loss(params):
        return jnp.square(nnx.merge(graphdef, params)(random_tokens(2, 8))[..., 0]).mean()

    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    return traced.lower().compile()(params), str(traced.jaxpr)


@pytest.fixture(scope="module")
def plain_loss_and_gradient():
    return loss_and_gradient("none")


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES.keys() - {"none"}))
def test_remat_changes_neither_loss_nor_gradient(remat, plain_loss_and_gradient):
    expected, plain_program = plain_loss_and_gradient
    found, program = loss_and_gradient(remat)
    assert "remat" in program and "remat" not in plain_program
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="'half' is not one of none, full, dots"):
        construct(CONFIG, remat="half")


def test_initial_weights():
    config = dataclasses.replace(CONFIG, num_layers=8, qkv_bias=True)
    layers = jax.jit(lambda: construct(config))().layers
    assert np.std(layers.q_proj[...]) == pytest.approx(0.02, rel=0.05)
    for residual in (layers.o_proj, layers.down_proj):
        assert np.std(residual[...]) == pytest.approx(0.02 / 4, rel=0.05)
    assert (layers.attention_norm[...] == 1).all() and (layers.q_bias[...] == 0).all()
    assert np.abs(layers.up_proj[0] - layers.up_proj[1]).max() > 0.01


def test_program_does_not_grow_with_depth():
    def operations(num_layers):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        graphdef, params = abstract(config)
        forward = jax.make_jaxpr(lambda params: nnx.merge(graphdef, params)(random_tokens(1, 4)))
        return len(str(forward(params)).splitlines())

    assert operations(2) == operations(6)


def test_llama3_frequencies_have_three_bands():
    plain = rope_frequencies(CONFIG)
    scaling = RopeScaling(8.0, 1.0, 4.0, original_max_positions=32)
    scaled = rope_frequencies(dataclasses.replace(CONFIG, rope_scaling=scaling))
    ratio = plain / scaled
    assert ratio[0] == 1
    assert 1 < ratio[1] < 8
    np.testing.assert_allclose(ratio[2:], 8, rtol=1e-6)
