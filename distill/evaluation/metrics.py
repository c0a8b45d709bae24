"""Metrics of the user's own of responses to held-out prompts, found by name.

A metric looks at all responses of an evaluation and needs neither a teacher nor a reference:

    @register_metric("brevity")
    def brevity(responses):
        return {"words": sum(len(each.text.split()) for each in responses) / len(responses)}

`evaluation.metrics=brevity` then adds brevity/words to results, log and table.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from distill.base.errors import RunStopped
from distill.base.registry import Registry
from distill.data.base import Example


@dataclasses.dataclass(frozen=True)
class Response:
    """A model's greedy response to one held-out prompt.

    Attributes:
      example: the prompt, and what the data has of its answer.
      text: without special tokens.
      tokens: ids, int32, with the EOS.
      log_probs: of these under the model, in nats, float32.
      stopped: whether it came to its end, rather than to the length limit.
    """

    example: Example
    text: str
    tokens: np.ndarray
    log_probs: np.ndarray
    stopped: bool


Metric = Callable[[Sequence[Response]], Mapping[str, float]]

METRICS = Registry("evaluation.metrics", "distill.evaluation.metrics.register_metric")


def register_metric(name: str) -> Callable[[Metric], Metric]:
    """Decorator: makes a function of all responses available as `evaluation.metrics=name`.

    UserError when the name is taken.
    """
    return METRICS.register(name, takes=("responses",))


def measure(names: Sequence[str], responses: Sequence[Response]) -> dict[str, float | None]:
    """What the metrics say, as METRIC/NUMBER; a number that is not finite is None.

    Raises:
      RunStopped: a metric fails, or does not return numbers by name.
    """
    values: dict[str, float | None] = {}
    for name in names:
        try:
            found = METRICS.get(name)(responses)
        except Exception as error:  # whatever the user's code raises
            raise RunStopped(
                f"the metric {name!r} failed: {type(error).__name__}: {error}; correct it"
            ) from error
        if not isinstance(found, Mapping) or not all(map(_is_number, found.values())):
            raise RunStopped(
                f"the metric {name!r} returned {str(found)[:100]}: it must return a dict of "
                "numbers by name"
            )
        for key, value in found.items():
            values[f"{name}/{key}"] = float(value) if math.isfinite(value) else None
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real | np.number)
