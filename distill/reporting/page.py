"""The report as one HTML file that needs nothing else and asks nobody.

What models, data and folders are called and say is untrusted text: it is only data here (JSON in
which no tag can begin), the page's script makes text nodes of it, and the page allows no script but
its own, no network, and no images.
"""

from __future__ import annotations

import base64
import collections
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.base.files import to_json, write_atomically
from distill.reporting import curves
from distill.reporting.explain import explain
from distill.reporting.read import Run, read_run
from distill.reporting.verdict import verdict

REPORT = "report.html"
_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("elements.js", "charts.js", "rollouts.js", "page.js")


def write_report(
    workdirs: Sequence[Path], output: Path, reference: Path | None = None
) -> list[str]:
    """Writes one report of all runs; returns a line for each thing that it lacks.

    `reference` is the folder of a run that the others are compared with. UserError for a folder
    that holds no run.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    names = _names(runs, workdirs)
    compared = None if reference is None else read_run(reference)
    write_atomically(output, render(runs, names, compared))
    return [f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes]


def render(runs: Sequence[Run], names: Sequence[str], reference: Run | None = None) -> str:
    """The page of runs that are called by `names`."""
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    style, page = _asset("page.css"), _asset("page.html")
    for name, text in {
        "STYLE_HASH": _digest(style),
        "SCRIPT_HASH": _digest(script),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _embedded(_data(runs, names, reference)),  # last: nothing is looked for in it
    }.items():
        page = page.replace(f"{{{{{name}}}}}", text)
    return page


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _data(runs: Sequence[Run], names: Sequence[str], reference: Run | None) -> dict[str, Any]:
    return dict(
        charts=curves.draw(list(runs), reference),
        explanation=explain(runs, names),
        runs=[
            dict(
                name=name,
                step=run.step,
                results=run.results,
                verdict=_verdict(run, reference),
                rollouts=run.rollouts,
                config=run.config,
                environment=run.environment,
                notes=run.notes,
            )
            for name, run in zip(names, runs, strict=True)
        ],
    )


def _verdict(run: Run, reference: Run | None) -> str:
    diagnosis = run.diagnoses.get("student")
    return verdict(
        run.results,
        diagnosis.departures if diagnosis else None,
        next(iter(run.probe.values()), None),
        reference.results.get("student") if reference else None,
    )


def _embedded(data: dict[str, Any]) -> str:
    """JSON in ASCII, in which neither a tag nor a comment can begin or end."""
    text = to_json(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _digest(text: str) -> str:
    """As a content security policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _names(runs: Sequence[Run], workdirs: Sequence[Path]) -> list[str]:
    """Those of the folders; the whole paths of folders that are called alike."""
    count = collections.Counter(run.name for run in runs)
    return [
        run.name if count[run.name] == 1 else str(workdir)
        for run, workdir in zip(runs, workdirs, strict=True)
    ]
