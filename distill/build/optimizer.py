"""Optimizers by name, with warm-up and clipping, each as one optax chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from distill.build.objective import build_objective
from distill.config.policy import Optimizer
from distill.config.schema import Config
from distill.losses.interpolation import Target
from distill.models.primitives import matrix_axes

_MOMENTUM = 0.99  # of an adaptive target's schedule


def build_schedule(section: Optimizer, max_steps: int) -> Callable:
    """Linear warm-up to the learning rate, then constant, or cosine or linear down to 0."""
    peak, warmup_steps = section.learning_rate, section.warmup_steps
    decay_steps = max(max_steps - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps),
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay_steps),
    }[section.schedule]()
    if warmup_steps == 0:
        return after
    # The first update already moves: step 0 uses 1/warmup of the peak, not 0.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
    return optax.join_schedules([warmup, after], [warmup_steps])


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """The optimizer of a run, whose state also has the schedule of an adaptive target."""
    steps = config.distillation.max_steps
    return with_schedule(
        build_optimizer(config.policy.optimizer, steps), build_objective(config).target
    )


def build_optimizer(section: Optimizer, max_steps: int) -> optax.GradientTransformation:
    """Clip by global norm (0 is off), then the named rule; norms and biases are not decayed."""
    norm = section.max_grad_norm
    clip = optax.clip_by_global_norm(norm) if norm else optax.identity()
    steps = optax.chain(
        _direction(section),
        optax.add_decayed_weights(section.weight_decay, _is_matrix),
        optax.scale_by_learning_rate(build_schedule(section, max_steps)),
    )
    return optax.chain(clip, steps)


def _direction(section: Optimizer) -> optax.GradientTransformation:
    """What a gradient becomes before weight decay and learning rate."""
    b1, b2, eps = section.beta1, section.beta2, section.eps
    directions: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.scale_by_adam(b1, b2, eps),
        # Without the parameters' scale: a learning rate means what it means elsewhere.
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
        ),
        "lion": lambda: optax.scale_by_lion(b1, b2),
        "muon": lambda: optax.contrib.muon(
            -1.0,  # leaves the sign and the size to the chain
            beta=b1,
            eps=eps,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=0.2,  # as large as Adam's steps (2502.16982)
        ),
        "sgd": lambda: optax.trace(b1),
    }
    return directions[section.name]()


def _muon_axes(params):
    """Which axes of the layers' matrices are inputs and outputs; None: left to Adam."""

    def axes(param: nnx.Variable) -> nnx.Variable:
        names = param.get_metadata()["logical_axes"]
        if (found := matrix_axes(names)) is None:
            return param.replace(None)
        leading, inputs = found
        middle = leading + inputs
        return param.replace(
            optax.contrib.MuonDimensionNumbers(
                tuple(range(leading, middle)), tuple(range(middle, len(names)))
            )
        )

    return jax.tree.map(axes, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _is_matrix(params):
    """True for weights that mix features: by name, since stacking adds a layer dimension."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any("norm" in str(key) or "bias" in str(key) for key in path), params
    )


class _Schedule(NamedTuple):
    """The next step's share of an adaptive target, and what the one after it depends on."""

    target_share: jax.Array
    updates: jax.Array
    loss: jax.Array
    momentum: jax.Array


def with_schedule(
    optimizer: optax.GradientTransformation, target: Target
) -> optax.GradientTransformation:
    """The optimizer, with an adaptive schedule in its state: saved, resumed and skipped alike.

    TAID's algorithm 1: with d = (last loss - loss) / last loss and m = 0.99 m + 0.01 d, the share a
    becomes a + pace sigmoid(m) (1 - a), or that of the linear schedule if it is larger.
    """
    if target.start == 1 or not target.pace:
        return optimizer

    def first(params) -> _Schedule:
        del params
        none, zero = jnp.full((), jnp.inf), jnp.zeros(())
        return _Schedule(jnp.full((), target.start), jnp.zeros((), jnp.int32), none, zero)

    def following(updates, state: _Schedule, params=None, *, value: jax.Array, **more):
        del params, more
        is_first, share, count = jnp.isinf(state.loss), state.target_share, state.updates + 1
        change = jnp.where(is_first, 0.0, (state.loss - value) / (state.loss + 1e-15))
        momentum = _MOMENTUM * state.momentum + (1 - _MOMENTUM) * change
        grown = share + target.pace * jax.nn.sigmoid(momentum) * (1 - share)
        share = jnp.maximum(jnp.where(is_first, share, grown), target.linear(count))
        return updates, _Schedule(jnp.minimum(share, 1.0), count, value, momentum)

    return optax.chain(optimizer, optax.GradientTransformationExtraArgs(first, following))
