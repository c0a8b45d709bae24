"""AdamW with warm-up and clipping, as one optax chain."""

from __future__ import annotations

import jax
import optax


def make_schedule(learning_rate: float, kind: str, warmup_steps: int, max_steps: int):
    """Linear warm-up to `learning_rate`, then constant, or cosine or linear down to 0."""
    decay_steps = max(max_steps - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay_steps),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, decay_steps),
    }[kind]()
    if warmup_steps == 0:
        return after
    # The first update already moves: step 0 uses 1/warmup of the peak, not 0.
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    schedule,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    """Clip by global norm (0 is off), then AdamW; norms and biases are not decayed."""
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
    adamw = optax.adamw(
        schedule, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=_is_matrix
    )
    return optax.chain(clip, adamw)


def _is_matrix(params):
    """True for weights that mix features: by name, since stacking adds a layer dimension."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any("norm" in str(key) or "bias" in str(key) for key in path), params
    )
