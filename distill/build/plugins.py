"""The user's own parts."""

from __future__ import annotations

import importlib

from distill.base.errors import UserError
from distill.config.schema import KNOWN_BACKENDS, Config
from distill.evaluation.metrics import get_metric
from distill.rollout.base import get_backend


def import_plugins(config: Config) -> None:
    """Imports the user's modules, which register parts by name, and looks for those named.

    Raises:
      UserError: a module cannot be imported, or none registers a backend or metric of the config.
    """
    for name in config.plugins:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"plugins names {name!r}, which cannot be imported ({error}): it must be a module "
                "on PYTHONPATH"
            ) from None
    generation = config.policy.generation
    if generation.backend not in KNOWN_BACKENDS:
        maker = get_backend(generation.backend)
        if generation.async_steps and not getattr(maker, "samples_ahead", False):
            raise UserError(
                f"policy.generation.async_steps={generation.async_steps} samples during training, "
                f"but {generation.backend!r} does not say that it can (samples_ahead=True, an "
                "attribute of what is registered): set async_steps=0"
            )
    for name in config.evaluation.metrics:
        get_metric(name)
