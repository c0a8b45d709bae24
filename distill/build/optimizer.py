"""AdamW with warm-up and clipping, as one optax chain."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from distill.config.schema import Optimizer


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


def build_optimizer(section: Optimizer, max_steps: int) -> optax.GradientTransformation:
    """Clip by global norm (0 is off), then AdamW; norms and biases are not decayed."""
    norm = section.max_grad_norm
    clip = optax.clip_by_global_norm(norm) if norm else optax.identity()
    adamw = optax.adamw(
        build_schedule(section, max_steps),
        b1=section.beta1,
        b2=section.beta2,
        eps=section.eps,
        weight_decay=section.weight_decay,
        mask=_is_matrix,
    )
    return optax.chain(clip, adamw)


def _is_matrix(params):
    """True for weights that mix features: by name, since stacking adds a layer dimension."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any("norm" in str(key) or "bias" in str(key) for key in path), params
    )
