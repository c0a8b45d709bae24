"""A network with its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and its weights: `nnx.merge(graph, params)` is the module.

    Attributes:
      graph: the network.
      params: its weights.
      on_devices: their layouts while they are used, where `params` are in host memory in between;
        None: they are used where they are.
    """

    graph: nnx.GraphDef
    params: Any
    on_devices: Any = None

    def fetch(self) -> Any:
        """The weights where they can be used; a copy lives as long as the caller holds it."""
        if self.on_devices is None:
            return self.params
        return jax.device_put(self.params, self.on_devices)
