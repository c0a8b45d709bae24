"""What a layer's attention computes: one value for training, prefill, decoding and planning."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Causal attention, apart from the sizes of its arrays; hashable, a static argument of jit.

    Attributes:
      scale: of the scores, before the soft-cap.
      window: tokens that a token attends to, itself included; None: all before it.
      soft_cap: scores s become c tanh(s / c) with this c; None: they stay.
      sinks: each query head has a learned score that takes part in the softmax and has no value.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
