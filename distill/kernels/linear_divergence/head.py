"""The output head of a model, and what becomes of its logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """Logits are `soft_cap * tanh(. / soft_cap)` of hidden states times `weights_dv`."""

    weights_dv: jax.Array
    soft_cap: float | None = dataclasses.field(default=None, metadata=dict(static=True))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., v) in float32 whatever the dtype of the hidden states (..., d) and of the head."""
        products = jnp.einsum(
            "...d,dv->...v", hidden, self.weights_dv, preferred_element_type=jnp.float32
        )
        return capped(products, self.soft_cap)

    def cut(self, vocab_size: int) -> Head:
        """The head of the first ids."""
        return dataclasses.replace(self, weights_dv=self.weights_dv[:, :vocab_size])


def capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def through_cap(gradient: jax.Array, logits: jax.Array, soft_cap: float | None) -> jax.Array:
    """The gradient by the logits before the cap, from that by the capped ones."""
    if soft_cap is None:
        return gradient
    ratio = logits * (1.0 / soft_cap)
    return gradient * ((1.0 - ratio) * (1.0 + ratio))
