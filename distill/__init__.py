"""On-policy distillation of language models in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.trainer import Result, train

__all__ = ["Result", "train"]


def __getattr__(name: str) -> Any:
    # Lazy, so that configs and answer-checking processes do not import JAX.
    if name in __all__:
        from distill import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
