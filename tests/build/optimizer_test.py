"""Schedule, clipping and decay; every optimizer on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distill.base.mesh import make_mesh
from distill.base.sharding import optimizer_shardings, param_shardings
from distill.build.models import on_mesh
from distill.build.optimizer import build_optimizer, build_schedule
from distill.config.policy import OPTIMIZERS, Optimizer
from distill.run.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 + 0.5**1.5, 0.5]),
    ],
)
def test_first_update_moves_and_the_peak_is_reached_after_warmup(kind, expected):
    schedule = build_schedule(Optimizer(learning_rate=1.0, schedule=kind, warmup_steps=4), 8)
    assert [float(schedule(step)) for step in range(7)] == pytest.approx(expected)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_short_warmup(warmup_steps):
    schedule = build_schedule(Optimizer(learning_rate=3.0, warmup_steps=warmup_steps), 10)
    assert [float(schedule(step)) for step in (0, 1, 9)] == [3.0] * 3


def make(weight_decay: float, max_grad_norm: float):
    decays = dict(beta1=0.0, beta2=0.0, eps=1.0, weight_decay=weight_decay)
    section = Optimizer(learning_rate=1.0, warmup_steps=0, max_grad_norm=max_grad_norm, **decays)
    return build_optimizer(section, max_steps=10)


def test_norms_and_biases_do_not_decay():
    params = {"q_proj": jnp.ones((2, 2)), "q_bias": jnp.ones(2), "ffn_norm": jnp.ones((3, 2))}
    optimizer = make(weight_decay=0.5, max_grad_norm=0.0)
    grads = {name: jnp.zeros_like(value) for name, value in params.items()}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["q_proj"], -0.5)
    np.testing.assert_array_equal(updates["q_bias"], 0.0)
    np.testing.assert_array_equal(updates["ffn_norm"], 0.0)


def test_gradient_is_clipped_by_its_global_norm():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    optimizer = make(weight_decay=0.0, max_grad_norm=1.0)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # With both betas 0 and eps 1, Adam's update is g / (|g| + 1).
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6 / 1.6, -0.8 / 1.8])


def toy_params() -> nnx.State:
    """A matrix large enough to be factored, of two layers; an embedding; a norm."""
    axes = {
        "layers": {"up_proj": ("layers", "embed", "ffn"), "ffn_norm": ("layers", None)},
        "embedding": ("vocab", "embed"),
    }
    shapes = {
        "layers": {"up_proj": (2, 128, 256), "ffn_norm": (2, 128)},
        "embedding": (256, 128),
    }
    random = np.random.default_rng(0)
    flat = [
        (path, nnx.Param(jnp.asarray(random.normal(0, 1, shape), jnp.float32), logical_axes=names))
        for (path, shape), (_, names) in zip(
            nnx.to_flat_state(nnx.State(shapes)), nnx.to_flat_state(nnx.State(axes)), strict=True
        )
    ]
    return nnx.from_flat_state(flat)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_on_a_mesh_and_from_a_checkpoint(name, tmp_path):
    """Two updates on eight devices are those on one, though the state was saved between them."""
    section = Optimizer(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    optimizer = build_optimizer(section, max_steps=10)
    params = toy_params()
    grads = jax.tree.map(jnp.cos, params)
    grads["layers"]["ffn_norm"] = jax.tree.map(jnp.zeros_like, grads["layers"]["ffn_norm"])

    def update(params, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    alone = params, optimizer.init(params)
    for _ in range(2):
        alone = jax.jit(update)(*alone)
    np.testing.assert_array_equal(
        alone[0]["layers"]["ffn_norm"].get_value(), params["layers"]["ffn_norm"].get_value()
    )
    mesh = make_mesh(2, 2, 2)
    layout = param_shardings(params, mesh)
    placed = jax.device_put(params, layout)
    abstract = jax.eval_shape(optimizer.init, placed)
    moments = on_mesh(abstract, optimizer_shardings(abstract, placed, mesh))
    shardings = layout, jax.tree.map(lambda x: x.sharding, moments)
    with jax.set_mesh(mesh):
        init = jax.jit(optimizer.init, out_shardings=shardings[1])
        step = jax.jit(update, out_shardings=shardings)
        placed, state = step(placed, init(placed))
        checkpoints = Checkpoints(tmp_path, keep=1)
        checkpoints.save(1, state, {})
        checkpoints.close()
        restored = Checkpoints(tmp_path, keep=1).restore(1, moments)
        for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
            assert ours.size <= 256 or not ours.sharding.is_fully_replicated
        placed, _ = step(placed, restored)
    for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(alone[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    held = sum(x.size for x in jax.tree.leaves(abstract))
    weights = sum(x.size for x in jax.tree.leaves(params))
    most = {"adamw": 2, "adafactor": 0.05, "lion": 1, "muon": 1.5, "sgd": 1}
    assert held <= most[name] * weights + 20


def test_muon_makes_every_layers_matrix_orthogonal_and_leaves_the_rest_to_adam():
    params = toy_params()
    options = dict(learning_rate=1.0, warmup_steps=0, weight_decay=0.0, max_grad_norm=0.0)
    muon = build_optimizer(Optimizer(name="muon", **options), 10)
    adam = optax.scale_by_adam(nesterov=True)
    updates, plain = (
        jax.jit(lambda x, each=each: each.update(x, each.init(x), x)[0])(params)
        for each in (muon, adam)
    )
    for matrix in updates["layers"]["up_proj"].get_value() / (0.2 * 256**0.5):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert 0.5 < values.min() and values.max() < 1.3
    for path in ("embedding",), ("layers", "ffn_norm"):
        ours, theirs = (dict(nnx.to_flat_state(x))[path].get_value() for x in (updates, plain))
        np.testing.assert_allclose(ours, -theirs, rtol=1e-5)
