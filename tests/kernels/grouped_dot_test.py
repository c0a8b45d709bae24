"""Products of sorted rows with their group's matrix, and their gradients, against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels.grouped_dot import grouped_dot


@pytest.mark.parametrize("implementation", ["ragged", "blockwise"])
@pytest.mark.parametrize(
    "sizes", [(5, 0, 40, 3), (0, 0, 0, 7), (1,), (16, 32, 16, 0), (0, 1, 0, 0, 33, 2)]
)
def test_equals_a_loop_over_the_groups(implementation, sizes):
    random = np.random.default_rng(0)
    x_mk = random.normal(size=(sum(sizes), 6)).astype(np.float32)
    w_gkn = random.normal(size=(len(sizes), 6, 4)).astype(np.float32)
    c_mn = random.normal(size=(sum(sizes), 4)).astype(np.float32)

    def loss(x_mk, w_gkn):
        y_mn = grouped_dot(x_mk, w_gkn, jnp.array(sizes), implementation=implementation)
        return jnp.sum(y_mn * c_mn), y_mn

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y_mn), (dx_mk, dw_gkn) = grad(x_mk, w_gkn)
    stops = np.cumsum(sizes)
    for group, (start, stop) in enumerate(zip(stops - sizes, stops, strict=True)):
        x, w, c = x_mk[start:stop], w_gkn[group], c_mn[start:stop]
        np.testing.assert_allclose(y_mn[start:stop], x @ w, atol=1e-5)
        np.testing.assert_allclose(dx_mk[start:stop], c @ w.T, atol=1e-5)
        np.testing.assert_allclose(dw_gkn[group], x.T @ c, atol=1e-5)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="'dense' is unknown: choose ragged or blockwise"):
        grouped_dot(jnp.ones((1, 1)), jnp.ones((1, 1, 1)), jnp.ones(1, int), implementation="dense")
