"""The decoder against itself: masks, cache, dtypes, remat, initial weights, frequencies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import model_config

from distill.models.transformer import REMAT_POLICIES, Transformer

VOCABULARY = 64
CONFIG = model_config(
    "qwen3",
    vocab_size=VOCABULARY,
    model_width=32,
    head_width=16,
    ffn_width=48,
    tied=False,
    max_positions=128,
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs here run once or twice on tiny arrays: nearly all their time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def construct(config, remat="none", dtype=jnp.float32):
    return Transformer(config, dtype=dtype, param_dtype=jnp.float32, remat=remat, rngs=nnx.Rngs(0))


@jax.jit
def hidden_of(model, *arrays):
    return model(*arrays)


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, VOCABULARY, shape)


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


@pytest.mark.parametrize("tied", [True, False])
def test_compute_dtype_and_stored_dtype_are_separate(tied):
    config = dataclasses.replace(CONFIG, tied=tied)

    def outputs():
        model = construct(config, dtype=jnp.bfloat16)
        hidden = model(jnp.zeros((1, 4), jnp.int32))
        stored = nnx.state(model)
        return stored, hidden, model.head().weights_dv, model.logits(hidden)

    stored, hidden, head, logits = jax.eval_shape(outputs)
    assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype(jnp.float32)}
    assert hidden.dtype == head.dtype == jnp.bfloat16
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
        graphdef, params = nnx.split(nnx.eval_shape(lambda: construct(config)), nnx.Param)
        forward = jax.make_jaxpr(lambda params: nnx.merge(graphdef, params)(random_tokens(1, 4)))
        return len(str(forward(params)).splitlines())

    assert operations(2) == operations(6)
