"""Schedule, clipping and decay."""

import jax.numpy as jnp
import numpy as np
import pytest

from distill.build.optimizer import build_optimizer, build_schedule
from distill.config.schema import Optimizer


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
