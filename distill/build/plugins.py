"""The user's own parts."""

from __future__ import annotations

import importlib
import traceback

from distill.base.errors import UserError
from distill.base.registry import describe, own_keys
from distill.config.method import ENVIRONMENTS
from distill.config.policy import KNOWN_BACKENDS
from distill.config.schema import Config
from distill.data.base import DATASETS, PASSED
from distill.evaluation.grading import get_grader
from distill.evaluation.metrics import METRICS
from distill.losses.metrics import get_step_metric
from distill.rollout.base import BACKENDS
from distill.rollout.environment import get_environment
from distill.rollout.rewards import get_reward


def import_plugins(config: Config) -> None:
    """Imports the user's modules, which register parts by name, and looks for those named.

    Raises:
      UserError: a module cannot be imported, or none registers a part that the config names, or a
        key of `plugin.*`.
    """
    for name in config.plugins:
        try:
            importlib.import_module(name)
        except UserError as error:
            raise UserError(f"plugins names {name!r}: {error}") from None
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            # The last place below import_module in the user's code: a wrong name has none.
            frames = traceback.extract_tb(error.__traceback__)[2:]
            frames = [each for each in frames if not each.filename.startswith("<frozen importlib")]
            place = f", at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
            raise UserError(
                f"plugins names {name!r}, which cannot be imported ({describe(error)}{place}): it "
                "must be a module on PYTHONPATH, written as my_plugin or my_package.my_plugin"
            ) from None
    generation, backend = config.policy.generation, config.policy.generation.backend
    if generation.backend not in KNOWN_BACKENDS:
        maker = BACKENDS.get(generation.backend)
        steps, most = generation.async_steps, int(getattr(maker, "samples_ahead", 0))
        if steps > most:
            raise UserError(
                f"policy.generation.async_steps={steps} samples during training, but "
                f"{generation.backend!r} does not say that it can (samples_ahead={steps}, an "
                f"attribute of what is registered): set async_steps={most}"
            )
    if config.environment.name not in ("", *ENVIRONMENTS):
        get_environment(config.environment.name)
    get_grader(config.evaluation.grading)
    get_reward(config.reward.function)
    for name in config.evaluation.metrics:
        METRICS.get(name)
    for name in config.logger.step_metrics:
        get_step_metric(name)
    _check_keys(config, backend)


def _check_keys(config: Config, backend: str) -> None:
    """Raises UserError for a key of `plugin.*` that nobody reads."""
    if not config.plugin:
        return
    known: dict[str, type] = {}
    for name in {config.data.name, config.data.validation.name or config.data.name}:
        known |= own_keys(DATASETS.get(name), PASSED)
    if backend not in KNOWN_BACKENDS:
        known |= own_keys(BACKENDS.get(backend), ("parts",))
    if config.environment.name not in ("", *ENVIRONMENTS):
        known |= own_keys(get_environment(config.environment.name), ("example",))
    if unknown := [name for name in config.plugin if name not in known]:
        raise UserError(
            f"unknown config key 'plugin.{unknown[0]}': no data source, backend or environment of "
            "this config has such a parameter with a default; known are "
            f"{', '.join(known) or 'none'}"
        )
