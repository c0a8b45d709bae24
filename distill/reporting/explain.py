"""Why a run helps, or does not: charts by position and tables of its own responses, as data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from distill.evaluation.diagnosis import BACK, NUCLEUS
from distill.evaluation.table import ROLES
from distill.evaluation.token_values import TOP
from distill.reporting.read import DEPARTURES, MEANS, PROBED, Diagnosis, Run

# Title, unit, and the column of positions of each label; without a label, a curve for each role.
_CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Teacher's perplexity", "of the model's own responses", {"": "surprise"}),
    ("Where the loss is", "share of the divergence", {"": "loss"}),
    ("Off the teacher's path", "share of responses that have left it", {"": "left"}),
    ("Entropy", "nats", {"teacher": "entropy_p", "student": "entropy_q"}),
    (
        f"The {TOP} likeliest tokens",
        "share that both have, and its mass",
        {"overlap": "overlap", "teacher's mass": "mass_p", "student's mass": "mass_q"},
    ),
)
_CLASSES = {"end": "end of the response", "style": "style words"}
_MOST = 100.0  # nats, of which the exponential is still a number to draw

_Known = Sequence[tuple[int, str, Diagnosis]]  # number of the run, label, what is known of it


def explain(runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The charts and tables that have anything to show."""

    def label(run_name: str, rest: str) -> str:
        return " · ".join(filter(None, [run_name if len(runs) > 1 else "", rest]))

    named = list(zip(names, runs, strict=True))
    known = [
        (number, label(name, role), run.diagnoses[role])
        for number, (name, run) in enumerate(named)
        for role in ROLES
        if role in run.diagnoses
    ]
    probes = [
        (label(name, teacher) or "held-out prompts", probe)
        for name, run in named
        for teacher, probe in run.probe.items()
    ]
    tables = list(_tables(known))
    if probes:
        verdicts = " ".join(probe["verdict"] for _, probe in probes)
        rows = [_row(label, probe, PROBED) for label, probe in probes]
        columns = ["accuracy", *PROBED]
        tables.append(dict(title="The probe", caption=verdicts, columns=columns, rows=rows))
    return dict(charts=_charts(known), tables=tables)


def _charts(known: _Known) -> list[dict[str, Any]]:
    last = {number: (number, label, diagnosis) for number, label, diagnosis in known}
    charts = []
    for title, unit, columns in _CHARTS:
        curves = [
            dict(run=number, label=text or label, points=_points(diagnosis, column))
            for number, label, diagnosis in (known if "" in columns else last.values())
            for text, column in columns.items()
        ]
        curves = [curve for curve in curves if curve["points"]]
        if curves:
            unit = f"{unit}, by position"
            is_log = "surprise" in columns.values()
            charts.append(dict(title=title, unit=unit, is_log=is_log, axis="token", curves=curves))
    return charts


def _points(diagnosis: Diagnosis, column: str) -> list[list[float]]:
    values = zip(diagnosis.positions["start"], diagnosis.positions[column], strict=True)
    known = [(start, x) for start, x in values if start is not None and x is not None]
    return [[start, _perplexity(x) if column == "surprise" else x] for start, x in known]


def _tables(known: _Known) -> Iterator[dict[str, Any]]:
    if not known:
        return
    yield dict(
        title="Student and teacher on the model's own responses",
        caption=f"Overlap: how many of the teacher's {TOP} likeliest tokens are among the "
        f"student's {TOP}; mass: what either model gives to these together.",
        columns=["responses of", *MEANS],
        rows=[_row(label, d.means, MEANS) for _, label, d in known],
    )
    yield dict(
        title="Leaving the teacher's path",
        caption=f"A token leaves it where likelier tokens hold {NUCLEUS:.0%} of the teacher's "
        f"probability. The student is back when none of the next {BACK} tokens leaves it.",
        columns=["responses of", *DEPARTURES],
        rows=[_row(label, d.departures, DEPARTURES) for _, label, d in known],
    )
    shares = [(label, what, d) for _, label, d in known for what in ("tokens", "loss")]
    yield dict(
        title="Share of the loss by kind of token",
        caption="The loss is the run's divergence. Style words are those of manner, such as: so, "
        "first, wait.",
        columns=["kind", *(f"{label}: {what}" for label, what, _ in shares)],
        rows=[
            [_CLASSES.get(kind, kind), *(_percent(d.classes[kind][what]) for _, what, d in shares)]
            for kind in known[0][2].classes
        ],
    )
    _, label, last = known[-1]
    yield dict(
        title="Prompts with most of the loss",
        caption=f"Half of the loss ({label}) is in {_percent(last.half)} of the prompts.",
        columns=["prompt", "share of the loss"],
        rows=[[question, _percent(share)] for question, share in last.prompts],
    )


def _row(label: str, values: dict[str, Any], columns: dict[str, str]) -> list[str]:
    return [label, *(_shown(name, values[name]) for name in columns.values())]


def _shown(name: str, value: float | None) -> str:
    if value is not None and name == "surprise":
        return f"{_perplexity(value):.3g}"
    return f"{value:.3g}" if value is not None and "entropy" in name else _percent(value)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _perplexity(surprise: float) -> float:
    return math.exp(min(surprise, _MOST))
