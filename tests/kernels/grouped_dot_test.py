"""Products of sorted rows with their group's matrix, and their gradients, against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels.grouped_dot import grouped_dot


@pytest.mark.parametrize("implementation", ["ragged", "blockwise", "batched"])
@pytest.mark.parametrize(
    "sizes", [(5, 0, 40, 3), (0, 0, 0, 7), (1,), (16, 32, 16, 0), (0, 1, 0, 0, 33, 2)]
)
def test_equals_a_loop_over_the_groups(implementation, sizes):
    random = np.random.default_rng(0)
    x_mk = random.normal(size=(sum(sizes), 6)).astype(np.float32)
    w_gpkn = random.normal(size=(len(sizes), 2, 6, 4)).astype(np.float32)
    c_mpn = random.normal(size=(sum(sizes), 2, 4)).astype(np.float32)

    def loss(x_mk, w_gpkn):
        y_mpn = grouped_dot(x_mk, w_gpkn, jnp.array(sizes), implementation=implementation)
        return jnp.sum(y_mpn * c_mpn), y_mpn

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y_mpn), (dx_mk, dw_gpkn) = grad(x_mk, w_gpkn)
    stops = np.cumsum(sizes)
    for group, (start, stop) in enumerate(zip(stops - sizes, stops, strict=True)):
        x, w_pkn, c_pmn = x_mk[start:stop], w_gpkn[group], c_mpn[start:stop].swapaxes(0, 1)
        np.testing.assert_allclose(y_mpn[start:stop].swapaxes(0, 1), x @ w_pkn, atol=1e-5)
        dx = np.sum(c_pmn @ w_pkn.swapaxes(1, 2), axis=0)
        np.testing.assert_allclose(dx_mk[start:stop], dx, atol=1e-5)
        np.testing.assert_allclose(dw_gpkn[group], x.T @ c_pmn, atol=1e-5)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="'dense' is unknown: choose ragged, blockwise, batched"):
        grouped_dot(jnp.ones((1, 1)), jnp.ones((1, 1, 1)), jnp.ones(1, int), implementation="dense")
