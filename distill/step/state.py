"""What a run trains, and all that its updates need."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx

from distill.models.lora import attach

Params = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The student and all that its updates need.

    Attributes:
      step: batches seen, skipped ones included; the optimizer counts its own updates.
      trainable: parameters or adapters (`models.lora`) that updates change, float32; gradients
        and `opt_state` are of them.
      frozen: parameters that no update changes, stored as they come; none in full training.
    """

    step: jax.Array
    trainable: Params
    opt_state: optax.OptState
    frozen: Params = dataclasses.field(default_factory=lambda: nnx.State({}))

    @property
    def params(self) -> Params:
        """All parameters of the student, as its graph takes them."""
        return whole_params(self.trainable, self.frozen)

    @property
    def saved(self) -> TrainState:
        """What a checkpoint holds: what is frozen is loaded again from where it came."""
        return dataclasses.replace(self, frozen=nnx.State({}))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AveragedState(TrainState):
    """A train state with the moving average of its trainable parameters, float32."""

    average: Params = None


def whole_params(trainable: Params, frozen: Params) -> Params:
    """One tree of both; differentiable by the trainable ones."""
    return attach(frozen, trainable) if frozen else trainable
