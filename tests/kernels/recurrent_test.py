"""The gated delta rule and the short convolution, against their definitions in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_compiler import needs_tpu_compiler, temporary_bytes, tpu_mesh

from distill.base.mesh import make_mesh
from distill.base.sharding import named_sharding
from distill.kernels.recurrent import (
    causal_convolution,
    convolution_step,
    delta_rule_step,
    gated_delta_rule,
)

BATCH, KEY_HEADS, HEADS, KEY_WIDTH, VALUE_WIDTH = 2, 2, 4, 8, 6
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


def inputs(length, dtype="float32", seed=0):
    """Arguments of the rule; decays reach from almost none to almost all."""
    random = np.random.default_rng(seed)
    q, k = (random.normal(size=(BATCH, length, KEY_HEADS, KEY_WIDTH)) for _ in range(2))
    v = random.normal(size=(BATCH, length, HEADS, VALUE_WIDTH))
    log_decay = -np.exp(random.uniform(-6, 2, size=(BATCH, length, HEADS)))
    rate = random.uniform(size=(BATCH, length, HEADS))
    return [np.asarray(x, dtype) for x in (q, k, v, log_decay, rate)]


def defined(q, k, v, log_decay, rate, segment_ids=None):
    """Token by token, head by head."""
    batch, length, heads, _ = v.shape
    out, states = np.zeros_like(v), np.zeros((batch, heads, q.shape[-1], v.shape[-1]), v.dtype)
    for b, t, j in np.ndindex(batch, length, heads):
        i = j * q.shape[2] // heads
        if t and segment_ids is not None and segment_ids[b, t] != segment_ids[b, t - 1]:
            states[b, j] = 0
        query, key = (x[b, t, i] / np.sqrt((x[b, t, i] ** 2).sum() + 1e-6) for x in (q, k))
        state = states[b, j] * np.exp(log_decay[b, t, j])
        state += np.outer(key, rate[b, t, j] * (v[b, t, j] - key @ state))
        out[b, t, j] = query @ state / np.sqrt(len(query))
        states[b, j] = state
    return out, states


def segments(length):
    """Of one row that is whole, and of one with short segments, one of them of one token."""
    ids = np.ones((BATCH, length), np.int32)
    ids[1] = np.searchsorted([3, 4, 9, length - 2], np.arange(length), side="right")
    return ids


@functools.partial(jax.jit, static_argnames="chunk")
def chunked(*arrays, chunk):
    return gated_delta_rule(*arrays, chunk=chunk)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (7, 4), (16, 8), (21, 16), (21, 64)])
def test_chunks_equal_the_definition(length, chunk, packed):
    arrays = inputs(length)
    ids = (segments(length),) if packed else ()
    found = chunked(*arrays, *ids, chunk=chunk)
    expected = defined(*(x.astype(np.float64) for x in arrays), *ids)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE["float32"])


def test_tokens_one_by_one_equal_the_definition():
    arrays = inputs(9)
    state, step = jnp.zeros((BATCH, HEADS, KEY_WIDTH, VALUE_WIDTH)), jax.jit(delta_rule_step)
    expected, last = defined(*arrays)
    for t in range(9):
        out, state = step(*(x[:, t] for x in arrays), state)
        np.testing.assert_allclose(out, expected[:, t], atol=TOLERANCE["float32"])
    np.testing.assert_allclose(state, last, atol=TOLERANCE["float32"])


def test_tokens_without_rate_and_decay_change_no_state():
    arrays = inputs(10)
    arrays[3][:, 6:], arrays[4][:, 6:] = 0, 0
    _, state = chunked(*arrays, chunk=4)
    _, expected = chunked(*(x[:, :6] for x in arrays), chunk=4)
    np.testing.assert_allclose(state, expected, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_those_of_the_definition(packed):
    """In float64, where the definition is a scan of single tokens."""
    length = 13
    random = np.random.default_rng(1)
    weights = random.normal(size=(BATCH, length, HEADS, VALUE_WIDTH))
    state_weights = random.normal(size=(BATCH, HEADS, KEY_WIDTH, VALUE_WIDTH))
    ids = segments(length) if packed else np.ones((BATCH, length), np.int32)

    def one_by_one(*arrays):
        def step(state, t):
            begins = (t > 0) & (jnp.asarray(ids)[:, t] != jnp.asarray(ids)[:, t - 1])
            state = jnp.where(begins[:, None, None, None], 0, state)
            out, state = delta_rule_step(*(x[:, t] for x in arrays), state)
            return state, out

        state, out = jax.lax.scan(step, jnp.zeros_like(state_weights), jnp.arange(length))
        return jnp.moveaxis(out, 0, 1), state

    def gradient(rule):
        def loss(arrays):
            out, state = rule(*arrays)
            return (out * weights).sum() + (state * state_weights).sum()

        return jax.jit(jax.value_and_grad(loss))

    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in inputs(length, "float64")]
        found = gradient(functools.partial(gated_delta_rule, segment_ids_bt=ids, chunk=4))(arrays)
        expected = gradient(one_by_one)(arrays)
        values = defined(*map(np.asarray, arrays), ids)
        assert found[0] == pytest.approx(
            (values[0] * weights).sum() + (values[1] * state_weights).sum()
        )
        for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert x.dtype == jnp.float64
            np.testing.assert_allclose(x, y, atol=TOLERANCE["float64"] * 100)


@pytest.mark.parametrize("parts, packed", [(2, True), (4, True), (4, False)])
def test_positions_cut_over_devices(parts, packed):
    """Segments that end with a shard and within one, and one longer than a shard."""
    length = 20
    arrays = [jnp.asarray(x) for x in inputs(length)]
    ids = np.asarray(segments(length))
    ids[0] = np.arange(length) // 5
    weights = np.random.default_rng(1).normal(size=(BATCH, length, HEADS, VALUE_WIDTH))

    @jax.jit
    def run(*arrays):
        def loss(*arrays):
            out, state = gated_delta_rule(*arrays, ids if packed else None, chunk=4)
            return (out * weights).sum() + jnp.square(state).sum(), (out, state)

        return jax.value_and_grad(loss, range(5), has_aux=True)(*arrays)

    expected = run(*arrays)
    sizes = dict(data=1, tensor=2, context=parts)
    with jax.set_mesh(make_mesh(devices=jax.devices()[: 2 * parts], **sizes)):
        found = run(*arrays)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, atol=20 * TOLERANCE["float32"], rtol=1e-5)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=1, tensor=2), dict(fsdp=2, tensor=4)])
def test_sharded_equals_one_device(sizes):
    """Two heads cannot be cut four ways: then every device has all of them."""
    arrays = (*inputs(9), segments(9))
    count = np.prod(list(sizes.values()))
    with jax.set_mesh(make_mesh(devices=jax.devices()[:count], **sizes)):
        found = chunked(*arrays, chunk=4)
    for x, y in zip(found, chunked(*arrays, chunk=4), strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE["float32"])


def test_backward_pass_keeps_no_state_of_a_token():
    length = 64
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length)]

    def kept(rule):
        _, pullback = jax.eval_shape(lambda *x: jax.vjp(rule, *x), *arrays)
        return sum(x.size for x in jax.tree.leaves(pullback))

    state = BATCH * HEADS * KEY_WIDTH * VALUE_WIDTH
    assert kept(gated_delta_rule) < length * state / 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_convolution_equals_its_definition(length, packed):
    random = np.random.default_rng(2)
    x, taps = random.normal(size=(BATCH, length, 5)), random.normal(size=(5, 4))
    ids = np.zeros((BATCH, length), int)
    if packed:
        ids[1] = np.searchsorted([3, 4], np.arange(length), side="right")
    expected = np.zeros_like(x)
    for b, t, tap in np.ndindex(BATCH, length, 4):
        source = t - 3 + tap
        if source >= 0 and ids[b, source] == ids[b, t]:
            expected[b, t] += x[b, source] * taps[:, tap]
    expected /= 1 + np.exp(-expected)
    found = causal_convolution(jnp.float32(x), jnp.float32(taps), ids if packed else None)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE["float32"])
    if not packed:
        tail = jnp.zeros((BATCH, 3, 5))
        for t in range(length):
            out, tail = convolution_step(jnp.float32(x[:, t]), jnp.float32(taps), tail)
            np.testing.assert_allclose(out, expected[:, t], atol=TOLERANCE["float32"])


@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpu_forward_and_backward(topology):
    """Packed rows of Qwen3.5-4B's layers, over rows and heads."""
    batch, length, key_heads, heads, width = 4, 4096, 16, 32, 128
    mesh = tpu_mesh(topology, 2, 1, 2)
    of_heads, rows = ("batch", None, "act_heads", None), ("batch", None)
    shapes = [
        ((batch, length, key_heads, width), jnp.bfloat16, of_heads),
        ((batch, length, key_heads, width), jnp.bfloat16, of_heads),
        ((batch, length, heads, width), jnp.bfloat16, of_heads),
        ((batch, length, heads), jnp.float32, of_heads[:3]),
        ((batch, length, heads), jnp.float32, of_heads[:3]),
        ((batch, length), jnp.int32, rows),
    ]
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))
        for shape, dtype, axes in shapes
    ]

    def loss(*arrays):
        return jnp.square(gated_delta_rule(*arrays)[0].astype(jnp.float32)).sum()

    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss, argnums=range(5))).lower(*arrays).compile()
    states = batch * length * heads * width * width * 4 / 4  # of all tokens, of a device
    assert temporary_bytes(program) < states / 20
