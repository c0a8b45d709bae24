"""A target between student and teacher, which moves to the teacher as training goes on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from distill.base.errors import UserError
from distill.base.sharding import in_device_memory
from distill.kernels.linear_divergence import Head


def interpolated(
    hidden_s: jax.Array,
    head_s: Head,
    hidden_t: jax.Array,
    head_t: Head,
    share: jax.Array,
    vocab_size: int,
) -> tuple[jax.Array, Head]:
    """Hidden states and head of the target of TAID: logits (1 - share) s + share u.

    Its distribution is softmax of that, s and u being the student's and the teacher's logits; no
    gradient goes through s there (TAID, arXiv:2501.16937, eq. 3). Logits are linear in the
    hidden states, so that the two heads under each other are a teacher like any other.
    """
    if head_s.soft_cap is not None or head_t.soft_cap is not None:
        raise UserError(
            "distillation.objective.target_start interpolates logits, and those of this student or "
            "teacher pass through a soft cap: set it to 1"
        )
    scaled = (1 - share) * hidden_s, share * hidden_t
    hidden = jnp.concatenate([x.astype(hidden_t.dtype) for x in scaled], axis=-1)
    weights = [head.cut(vocab_size).weights_dv.astype(hidden.dtype) for head in (head_s, head_t)]
    return hidden, Head(jnp.concatenate(weights, axis=0))


@dataclasses.dataclass(frozen=True)
class Target:
    """The teacher's share of the target, which grows to 1 (TAID, arXiv:2501.16937).

    Attributes:
      start: the share at first; 1: there is nothing but the teacher.
      steps: after which the linear schedule is at 1.
      pace: of the adaptive schedule; 0: it is linear.
    """

    start: float = 1.0
    steps: int = 1
    pace: float = 0.0

    def share(self, step: jax.Array, opt_state: optax.OptState) -> jax.Array | None:
        """The share at a step; None where it is all."""
        if self.start == 1:
            return None
        if self.pace:
            return in_device_memory(optax.tree.get(opt_state, "target_share"))
        return self.linear(step)

    def linear(self, step: jax.Array) -> jax.Array:
        return self.start + (1 - self.start) * jnp.minimum(step / self.steps, 1.0)
