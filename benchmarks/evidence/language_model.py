"""A real language model that has lost layers learns to write again, from its own whole.

    pip install gguf
    python -m benchmarks.evidence.language_model --output=runs/language_model
    python -m benchmarks.evidence --report

The first command makes the teacher, SmolLM2-135M-Instruct, from a Python package, and a student of
22 of its 30 layers. From that it trains the students that are missing, and writes
docs/results/language_model.json. The second makes the page of that.

All training prompts and the teacher's samples to them, which are the fixed data, are made once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks.evidence.report import (
    DOCS,
    Estimate,
    Row,
    Table,
    kept_row,
    resampled,
    write_rows,
)
from benchmarks.evidence.runs import Overrides
from configs import smollm2
from distill.base.files import write_atomically
from distill.config import cli

if TYPE_CHECKING:
    from benchmarks.evidence.reader import Reader

ROWS = DOCS / "results/language_model.json"
UPDATES, BATCH, HELD_OUT = 50, 8, 64
LAYERS = {"teacher": 30, "start": 22}
TEACHER, START = LAYERS
OWN, TEACHERS = "own", "teachers"  # whose responses are read

OFF, ON = "off", "on"
METHODS: dict[str, tuple[str, Overrides]] = {
    ON: ("on-policy, forward KL", {}),
    "on_reverse": ("on-policy, reverse KL", {"distillation.kl_type": "reverse"}),
    OFF: ("off-policy, forward KL", {"distillation.lambda_": 0.0}),
}
TITLES = {START: "student before"} | {name: title for name, (title, _) in METHODS.items()}
DIVERGENCES = ("forward", "reverse")


def common_config(output: Path, data: str) -> ConfigDict:
    """Of the layers in configs/smollm2.py, on two cores; `data` is a file in `output`."""
    config = smollm2.get_config("layers")
    config.preflight = config.logger.progress_bar = False
    config.policy.model_name = str(output / START)
    config.distillation.teacher_model_path = str(output / TEACHER)
    config.distillation.max_steps = UPDATES
    config.policy.train_global_batch_size = config.policy.train_micro_batch_size = BATCH
    config.distillation.eval_steps = 0
    config.distillation.save_steps = UPDATES // 2
    config.distillation.logging_steps = config.checkpointing.keep = 1
    config.data.path, config.data.split = str(output / data), "all"
    config.data.validation.max_samples = 0
    return config


def run_config(method: str, output: Path) -> ConfigDict:
    config = common_config(output, "samples.jsonl")
    config.update_from_flattened_dict(METHODS[method][1])
    return config


def perform_all(output: Path) -> None:
    """A killed call is repeated with the same command: its runs go on where they were."""
    from benchmarks.evidence.reader import Reader

    _prepare(output)
    config = common_config(output, "samples.jsonl")
    config.data.validation.path = str(output / "held_out.jsonl")
    config.data.validation.max_samples = HELD_OUT
    reader, rows = Reader(config), []
    for name in TITLES:
        make = functools.partial(_perform, name, output, reader)
        row = kept_row(output / "rows" / f"{name}.json", make)
        print(f"{name}: {row['seconds'] / 60:.1f} minutes of updates", flush=True)
        rows.append(dict(method=name, **row))
    write_rows(ROWS, rows)


def _perform(name: str, output: Path, reader: Reader) -> Row:
    import distill

    if name == START:
        return _cost(output / name) | reader.measure(output / name)
    if not (output / name / "student").exists():
        distill.train(run_config(name, output), output / name)
    return _cost(output / name) | reader.measure(output / name / "student")


def _prepare(output: Path) -> None:
    """The models, the prompts, and the teacher's samples; those that are missing."""
    from benchmarks.smollm2 import convert, download
    from distill.generate import generate

    output.mkdir(parents=True, exist_ok=True)
    for name, layers in LAYERS.items():
        if not (output / name / "tokenizer_config.json").exists():
            convert(download(output), output / name, layers)
    lines = Path(smollm2.get_config().data.path).read_text().splitlines(keepends=True)
    write_atomically(output / "held_out.jsonl", "".join(lines[:HELD_OUT]))
    write_atomically(output / "prompts.jsonl", "".join(lines[HELD_OUT:][: UPDATES * BATCH]))
    if not (output / "samples.jsonl").exists():
        begin = time.perf_counter()
        config = common_config(output, "prompts.jsonl")
        generate(config, str(output / TEACHER), output / "samples.jsonl")
        print(f"the teacher's samples: {time.perf_counter() - begin:.0f} s", flush=True)


def _cost(folder: Path) -> Row:
    """Of the updates, by the clock, without compilation and loading; zero of the start."""
    if not (log := folder / "metrics.jsonl").exists():
        return dict(seconds=0.0, tokens=0)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line for line in steps if "seconds/step" in line]
    return dict(
        seconds=round(sum(line["seconds/step"] for line in steps)),
        tokens=round(sum(line["tokens"] for line in steps)),
    )


@dataclasses.dataclass(frozen=True)
class Measure:
    """A line of the table.

    Attributes:
      whose: the student's own responses or the teacher's.
      name: what is counted.
      per_token: of all tokens; otherwise of all responses.
    """

    title: str
    whose: str
    name: str
    per_token: bool = True

    def estimate(self, row: Row, reference: Row | None = None) -> Estimate:
        """The share or mean, or how much more than the reference's; bootstrap over prompts."""
        draws = resampled(len(row[self.whose]["tokens"]))
        whole, drawn = self._mean(row, np.ones_like(draws[:1])), self._mean(row, draws)
        if reference:
            whole = whole - self._mean(reference, np.ones_like(draws[:1]))
            drawn = drawn - self._mean(reference, draws)
        return Estimate(float(whole[0]), *map(float, np.quantile(drawn, (0.025, 0.975))))

    def _mean(self, row: Row, weights_rp: np.ndarray) -> np.ndarray:
        read = row[self.whose]
        of = read["tokens"] if self.per_token else np.ones(len(read["tokens"]))
        return (weights_rp @ np.array(read[self.name])) / (weights_rp @ np.array(of))

    def show(self, x: Estimate, sign: str = "") -> str:
        if self.name in DIVERGENCES:
            return f"{x.value:{sign}.2f} ({x.low:{sign}.2f} to {x.high:{sign}.2f})"
        low, high = (f"{100 * limit:{sign}.1f}" for limit in (x.low, x.high))
        return f"{x.value:{sign}.1%} ({low} to {high})"


MEASURES = (
    Measure("forward KL, own responses", OWN, "forward"),
    Measure("reverse KL, own responses", OWN, "reverse"),
    Measure("forward KL, the teacher's responses", TEACHERS, "forward"),
    Measure("reverse KL, the teacher's responses", TEACHERS, "reverse"),
    Measure("tokens that the teacher finds absurd", OWN, "absurd"),
    Measure("responses at the limit", OWN, "cut", per_token=False),
    Measure("responses that loop", OWN, "loops", per_token=False),
)


def make_table(rows: Sequence[Row]) -> Table:
    """A line for each measure, a column for each student, and what on-policy data changed."""
    found = {row["method"]: row for row in rows}
    table: Table = [
        ("", *(TITLES[name] for name in found), "the teacher", "on-policy less off-policy")
    ]
    for measure in MEASURES:
        shown = [measure.show(measure.estimate(row)) for row in found.values()]
        itself = "-"
        if measure.name not in DIVERGENCES:  # its responses were read with every student
            its = dataclasses.replace(measure, whose=TEACHERS)
            itself = measure.show(its.estimate(found[START]))
        more = measure.estimate(found[ON], found[OFF])
        table.append((measure.title, *shown, itself, measure.show(more, "+")))
    return table


def make_texts(rows: Sequence[Row]) -> str:
    """The first responses of every student, sampled."""
    lines = [
        f"    {TITLES[row['method']]}: {' '.join(row['texts'][number].split())}"
        for number in range(len(rows[0]["texts"]))
        for row in rows
    ]
    return "\n".join(lines)


def situations(rows: Sequence[Row]) -> Table:
    """Which data, by the forward KL on own responses and on the teacher's."""
    found, lines = {row["method"]: row for row in rows}, []
    for measure in MEASURES:
        if measure.name != DIVERGENCES[0]:
            continue
        more = measure.estimate(found[ON], found[OFF])
        advice = TITLES[ON] if more.high < 0 else TITLES[OFF] if more.low > 0 else "either"
        values = (f"{measure.estimate(found[name]).value:.2f}" for name in (ON, OFF))
        effect = f"{' against '.join(values)}: {measure.show(more, '+')}, 1 seed"
        question = f"a language model that lost layers, {UPDATES} updates: on-policy or off-policy?"
        lines.append((question, advice, f"{measure.title}: {effect}"))
    return lines


def main() -> None:
    perform_all(Path(output_flag.value).absolute())


if __name__ == "__main__":
    output_flag = flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    cli.run(main)
