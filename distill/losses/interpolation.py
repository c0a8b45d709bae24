"""A target between student and teacher, which moves to the teacher as training goes on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill.base.errors import UserError
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
