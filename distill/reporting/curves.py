"""Which curves a report shows, as data for its page."""

from __future__ import annotations

import dataclasses
from typing import Any

from distill.reporting.read import Points, Run

_MOST_POINTS = 1000  # of a curve: more than a screen can tell apart


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves in one picture.

    Attributes:
      title, unit: what the picture says of itself.
      metrics: label of a curve -> metric in the log.
      evaluated: label of a curve -> field of the held-out evaluations.
      is_log: whether the scale of the values is logarithmic.
    """

    title: str
    unit: str
    metrics: dict[str, str] = dataclasses.field(default_factory=dict)
    evaluated: dict[str, str] = dataclasses.field(default_factory=dict)
    is_log: bool = False


CHARTS = (
    Chart("Held-out accuracy", "share right, 95% interval", evaluated={"accuracy": "accuracy"}),
    Chart(
        "Held-out divergence",
        "nats per token of own responses",
        evaluated={"forward KL": "forward_kl", "reverse KL": "reverse_kl"},
    ),
    Chart("Training loss", "nats per token", {"loss": "loss"}),
    Chart(
        "Length of responses",
        "tokens, EOS counted",
        {"in training": "response_length"},
        {"held-out": "mean_length"},
    ),
    Chart(
        "Cut off", "share of held-out responses at the limit", evaluated={"cut off": "truncated"}
    ),
    Chart(
        "Log-probability of sampled tokens",
        "nats, mean",
        {"student": "student_log_prob", "teacher": "teacher_log_prob"},
    ),
    Chart(
        "How a teacher with another tokenizer cuts the responses",
        "share of their tokens",
        {
            "cut alike": "teacher/cut_alike",
            "in spans": "teacher/in_spans",
            "left out": "teacher/left_out",
        },
    ),
    Chart(
        "Gap between sampler and trainer",
        "nats on the same tokens",
        {"mean": "log_prob_gap", "largest": "log_prob_gap_max"},
        is_log=True,
    ),
    Chart(
        "Experts that the sampler picks and the trainer does not",
        "share of the sampler's",
        {"share": "routing_disagreement"},
    ),
    Chart(
        "Throughput",
        "tokens per second",
        {
            "whole step": "tokens_per_second/total",
            "training": "tokens_per_second/train",
            "generation": "generation/tokens_per_second",
        },
        is_log=True,
    ),
    Chart(
        "Time of a step",
        "seconds",
        {"step": "seconds/step", "train": "seconds/train", "generate": "seconds/generate"},
    ),
    Chart(
        "Gradient and update",
        "global norm",
        {"gradient": "grad_norm", "update": "update_norm"},
        is_log=True,
    ),
)


def draw(runs: list[Run], reference: Run | None = None) -> list[dict[str, Any]]:
    """The charts that have anything to show, as JSON.

    Args:
      reference: a run whose evaluations stand beside those of the others.
    """
    charts = []
    for chart in CHARTS:
        curves = [curve for i, run in enumerate(runs) for curve in _curves(chart, run, i)]
        if curves and reference is not None:
            for label, field in chart.evaluated.items():
                if points := _evaluated(reference, field):
                    curves.append(
                        dict(run=0, label=f"reference: {label}", points=points, marked=True)
                    )
        if curves:
            charts.append(
                dict(title=chart.title, unit=chart.unit, is_log=chart.is_log, curves=curves)
            )
    return charts


def _curves(chart: Chart, run: Run, number: int) -> list[dict[str, Any]]:
    curves = [
        dict(run=number, label=label, points=_thinned(run.series[name]))
        for label, name in chart.metrics.items()
        if name in run.series
    ]
    for label, field in chart.evaluated.items():
        if points := _evaluated(run, field):
            curves.append(dict(run=number, label=label, points=points, marked=True))
        if field in ("accuracy", "mean_length"):
            curves += [
                dict(run=number, label=role, level=numbers[field])
                for role, numbers in run.results.items()  # one of several is teacher/NAME
                if role.partition("/")[0] == "teacher" and numbers.get(field) is not None
            ]
    return curves


def _evaluated(run: Run, field: str) -> list[list[float]]:
    """From the base student on; with the interval, if the field has one."""

    def values(name: str) -> dict[int, float]:
        roles = ("base", "student")
        return dict(p for role in roles for p in run.series.get(f"eval/{role}/{name}", ()))

    low, high = values(f"{field}_low"), values(f"{field}_high")
    return [
        [step, value, low[step], high[step]] if step in low and step in high else [step, value]
        for step, value in sorted(values(field).items())
    ]


def _thinned(points: Points) -> Points:
    """Every so manyth point, and the last."""
    every = -(-len(points) // _MOST_POINTS)
    kept = points[::every]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
