"""Every implementation of attention against the definition: values, gradients, meshes, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels.attention import attention
from distill.kernels.attention.api import splash
from distill.kernels.attention.blockwise import blockwise_attention

# By dtype: of values and gradients that are of the order of one.
TOLERANCES = {"float32": 2e-5, "bfloat16": 4e-2}
IMPLEMENTATIONS = {
    "blockwise": functools.partial(blockwise_attention, block=32),
    "splash": functools.partial(splash, interpret=True),
}


def arrays(batch, length, num_heads, num_kv_heads, width, dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(batch, length, heads, width) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    shapes.append(shapes[0])
    return [
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    ]


def segments(batch, length, longest, seed=0):
    """Rows packed with segments of mixed length, the rest of a row being padding, 0."""
    random = np.random.default_rng(seed)
    ids_bt = np.zeros((batch, length), np.int32)
    for row in ids_bt:
        start, number = 0, 1
        while (size := int(random.integers(1, longest))) + start <= length:
            row[start : start + size] = number
            start, number = start + size, number + 1
    return jnp.asarray(ids_bt)


def value_and_gradients(function, q, k, v, cotangent, ids_bt, window):
    @jax.jit
    def run(q, k, v):
        attended, pull = jax.vjp(lambda *x: function(*x, ids_bt, window=window), q, k, v)
        return attended, *pull(cotangent)

    return [np.asarray(x, np.float32) for x in run(q, k, v)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_and_gradients(name, window, packed, dtype):
    # 150 positions are no multiple of any block; three query heads share a key-value head.
    *inputs, cotangent = arrays(2, 150, 6, 2, 16, dtype)
    ids_bt = segments(2, 150, 60) if packed else None
    options = inputs, cotangent, ids_bt, window
    expected = value_and_gradients(
        functools.partial(attention, implementation="reference"), *inputs, *options[1:]
    )
    ours = value_and_gradients(IMPLEMENTATIONS[name], *inputs, *options[1:])
    for ours_one, expected_one in zip(ours, expected, strict=True):
        np.testing.assert_allclose(
            ours_one, expected_one, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype]
        )
