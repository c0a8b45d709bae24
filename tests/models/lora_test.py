"""Adapters of every family, against the dense matrices that they stand for."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import partial_eval
from models_test import FAMILIES, OTHERS, SIZES
from tiny_models import model_config, random_model

from distill.base.errors import UserError
from distill.config.policy import Lora
from distill.models import lora
from distill.models.checkpoints.keys import mapped_params
from distill.models.facts import ModelConfig
from distill.models.families import FAMILIES as TABLE
from distill.models.quantization import quantize
from distill.models.transformer import Transformer

RANK = 2
CASES = FAMILIES | OTHERS
FIRST = {name.split()[0]: name for name in reversed(CASES)}  # one case of each family


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def shapes_of(config: ModelConfig, remat: str = "none"):
    options = dict(dtype=jnp.float32, param_dtype=jnp.float32, remat=remat)
    shapes = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options))
    return nnx.split(shapes, nnx.Param)


def random_adapters(params, settings: Lora, seed: int = 0) -> nnx.State:
    """With a second factor that is not zero."""
    shapes = lora.abstract_adapters(params, settings)
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), shapes)


def dense(params, adapters, scale: float) -> nnx.State:
    """The parameters with every adapter's product added, in float64."""
    flat, factors = dict(nnx.to_flat_state(params)), dict(nnx.to_flat_state(adapters))
    for path in {path[:-1] for path in factors}:
        a, b = (np.float64(factors[*path, name].get_value()) for name in "ab")
        base = np.float64(flat[path].get_value())
        leading = a.ndim + b.ndim - 2 - base.ndim
        added = np.zeros(base.shape)
        for index in np.ndindex(base.shape[:leading]):
            added[index] = np.tensordot(a[index], b[index], axes=1)
        flat[path] = flat[path].replace(jnp.asarray(base + scale * added, jnp.float32))
    return nnx.from_flat_state(list(flat.items()))


def test_every_family_has_a_case():
    assert FIRST.keys() == TABLE.keys()


def config_of(family: str) -> ModelConfig:
    from transformers import AutoConfig

    fields = SIZES | CASES[FIRST[family]]
    return ModelConfig.from_hf(AutoConfig.for_model(family, **fields).to_dict(), "here")


def logits_of(graph, params, adapters):
    model = nnx.merge(graph, lora.attach(params, adapters))
    tokens_bt = np.random.default_rng(1).integers(1, 60, (2, 16))
    return model.logits(model(tokens_bt))


@pytest.mark.parametrize("family", FIRST)
def test_every_familys_logits_depend_on_every_adapter(family):
    """Traced, not run: of what the logits are computed, both factors of each matrix are part."""
    config = config_of(family)
    graph, params = shapes_of(config)
    adapters = lora.abstract_adapters(params, Lora(rank=RANK))
    adapted = {path[:-1] for path, _ in nnx.to_flat_state(adapters)}
    expected = {
        tuple(path.split("/"))
        for path, (row, _) in mapped_params(config, params).items()
        if "layer" in row.stacked and path.endswith("_proj")
    }
    assert adapted == expected
    traced = jax.make_jaxpr(functools.partial(logits_of, graph))(params, adapters)
    _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True])
    assert all(used) and len(used) == len(jax.tree.leaves((params, adapters)))


@pytest.mark.parametrize("family", ["qwen2", "gpt_oss", "qwen3_5_moe_text"])
def test_logits_are_those_of_the_dense_matrices(family):
    """And every factor has a gradient: of attention, recurrence, experts and what they share."""
    graph, params = random_model(config_of(family), std=0.2)
    adapters = random_adapters(params, Lora(rank=RANK, alpha=3.0))

    @jax.jit
    def evaluate(params, adapters):
        def loss(adapters):
            logits_btv = logits_of(graph, params, adapters)
            return jnp.sum(logits_btv[..., 0]), logits_btv

        (_, logits_btv), gradients = jax.value_and_grad(loss, has_aux=True)(adapters)
        return logits_btv, gradients

    logits_btv, gradients = evaluate(params, adapters)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.abs(gradient.get_value()).max() > 0, path
    nothing = jax.tree.map(jnp.zeros_like, adapters)
    expected_btv, _ = evaluate(dense(params, adapters, 3.0 / RANK), nothing)
    np.testing.assert_allclose(logits_btv, expected_btv, rtol=2e-4, atol=2e-4)
    assert np.abs(logits_btv - evaluate(params, nothing)[0]).max() > 0.01


@pytest.mark.parametrize(
    ("base", "inputs"), [((5, 2, 3), 1), ((2, 3, 4), 2), ((3, 2, 5, 4), 1), ((6, 5), 1)]
)
def test_gradients_are_those_of_a_dense_reparametrisation_in_float64(base, inputs):
    """dL/da = scale dL/dw b' and dL/db = scale a' dL/dw, with axes that count matrices or none."""
    random, leading, scale = np.random.default_rng(0), max(len(base) - 3, 0), 0.7
    middle = leading + inputs
    shapes = base, (*base[:middle], RANK), (*base[:leading], RANK, *base[middle:])
    with jax.enable_x64(True):
        w, a, b = (jnp.asarray(random.normal(size=shape)) for shape in shapes)

        def loss(w):
            return jnp.sum(jnp.sin(w) * jnp.arange(w.size).reshape(w.shape))

        def adapted(factors):
            return loss(lora.weight(lora.Adapted(w, *factors, scale), jnp.float64))

        found = jax.grad(adapted)((a, b))
        number, rows = math.prod(base[:leading]), math.prod(base[leading:middle])
        a, b = a.reshape(number, rows, RANK), b.reshape(number, RANK, -1)
        gradient = jax.grad(loss)(w + scale * (a @ b).reshape(base)).reshape(number, rows, -1)
        expected = gradient @ b.transpose(0, 2, 1), a.transpose(0, 2, 1) @ gradient
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == np.float64
            np.testing.assert_allclose(ours.ravel(), scale * theirs.ravel(), rtol=1e-10)


@pytest.fixture(scope="module")
def small():
    return random_model(model_config("qwen3", num_layers=1))


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8"])
def test_adapters_change_no_bit_at_first(small, base):
    graph, params = small
    if base == "int8":
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: quantize(
                model_config("qwen3", num_layers=1),
                jax.tree_util.keystr(path, simple=True, separator="/"),
                x,
            ),
            params,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
    else:
        params = jax.tree.map(lambda x: x.astype(base), params)
    shapes = lora.abstract_adapters(small[1], Lora(rank=RANK))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: x.update(sharding=place), shapes)
    adapters = lora.make_adapters(shapes, seed=3)
    other = lora.make_adapters(shapes, seed=4)
    for path, param in nnx.to_flat_state(adapters):
        same = np.array_equal(param.get_value(), dict(nnx.to_flat_state(other))[path].get_value())
        assert same == (path[-1] == "b")  # zero whatever the seed
    tokens_bt = np.random.default_rng(3).integers(1, 30, (2, 5))

    @jax.jit
    def logits(params):
        model = nnx.merge(graph, params)
        return model.logits(model(tokens_bt))

    expected = np.asarray(logits(params))
    np.testing.assert_array_equal(logits(lora.attach(params, adapters)), expected)
    merged = lora.merged(lora.attach(params, adapters), jnp.float32)
    np.testing.assert_array_equal(logits(merged), expected)


def test_no_merged_matrix_outlives_its_layer():
    """With remat=dots, all that the backward pass holds is of activations and factors."""
    config = model_config("qwen3", model_width=40, num_layers=3)
    graph, params = shapes_of(config, remat="dots")
    adapters = lora.abstract_adapters(params, Lora(rank=RANK))

    def backward(params, adapters, tokens_bt):
        def hidden(adapters):
            return nnx.merge(graph, lora.attach(params, adapters))(tokens_bt)

        return jax.vjp(hidden, adapters)[1]

    held = jax.eval_shape(backward, params, adapters, jax.ShapeDtypeStruct((1, 5), jnp.int32))
    of_weights = {x.shape for x in jax.tree.leaves(params) if x.ndim > 2}
    sizes = {math.prod(shape) for shape in of_weights}
    found = [x.shape for x in jax.tree.leaves(held) if math.prod(x.shape) in sizes]
    # The frozen weights themselves, once each.
    assert len(found) <= len([x for x in jax.tree.leaves(params) if x.ndim > 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=17), "rank=17 exceeds a side of layers/.*_proj, a matrix of .* leave .* out of"),
        (dict(rank=2, targets=("q_proj", "qproj")), "names qproj: .* down_proj, .*all-linear"),
        (dict(rank=2, targets=("embedding",)), "names embedding: the student's layers have"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(small, settings, message):
    with pytest.raises(UserError, match=message):
        lora.abstract_adapters(small[1], Lora(**settings))


def test_targets_are_the_key_tables_names(small):
    adapters = lora.abstract_adapters(small[1], Lora(rank=2, targets=("q_proj", "down_proj")))
    assert {path[-2] for path, _ in nnx.to_flat_state(adapters)} == {"q_proj", "down_proj"}
