"""On-policy distillation of language models in JAX."""

import os
from typing import TYPE_CHECKING, Any

# transformers is here for tokenizers; that PyTorch is missing is no news to anybody.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if TYPE_CHECKING:
    from distill.trainer import Result, train

__all__ = ["Result", "train"]


def __getattr__(name: str) -> Any:
    # Lazy, so that configs and answer-checking processes do not import JAX.
    if name in __all__:
        from distill import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
