"""On-policy distillation of language models in JAX."""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# transformers is here for tokenizers; that PyTorch is missing is no news to anybody.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if TYPE_CHECKING:
    from distill.evaluate import evaluate_checkpoint
    from distill.export import export_checkpoint
    from distill.trainer import Result, train

__all__ = ["Result", "evaluate_checkpoint", "export_checkpoint", "train"]


def __getattr__(name: str) -> Any:
    # Lazy, so that configs and processes that check answers do not import JAX.
    homes = {"evaluate_checkpoint": "evaluate", "export_checkpoint": "export"}
    if name in __all__:
        return getattr(importlib.import_module(f"distill.{homes.get(name, 'trainer')}"), name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
