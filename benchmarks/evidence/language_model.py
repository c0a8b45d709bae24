"""A real language model that has lost layers learns to write again, from its own whole.

    pip install gguf
    python -m benchmarks.evidence.language_model --output=runs/language_model
    python -m benchmarks.evidence --report

The first command makes the teacher, SmolLM2-135M-Instruct, from a Python package, and a student of
22 of its 30 layers. From that it trains the students that are missing, and writes
docs/results/language_model.json. The second makes the page of that.

All training prompts and the teacher's samples to them, which are the fixed data, are made once. A
seed changes their order and the student's own samples.
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
UPDATES, BATCH, HELD_OUT, SEEDS = 50, 8, 64, 3
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


def run_config(method: str, seed: int, output: Path) -> ConfigDict:
    config = common_config(output, "samples.jsonl")
    config.seed = seed
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
    runs = [(method, seed) for seed in range(SEEDS) for method in METHODS]
    for method, seed in [(START, 0), *runs]:
        folder = output / (method if method == START else f"{method}-seed{seed}")
        make = functools.partial(_perform, method, seed, folder, reader)
        row = kept_row(output / "rows" / f"{folder.name}.json", make)
        print(f"{folder.name}: {row['seconds'] / 60:.1f} minutes of updates", flush=True)
        rows.append(dict(method=method, seed=seed, **row))
    write_rows(ROWS, rows)


def _perform(method: str, seed: int, folder: Path, reader: Reader) -> Row:
    import distill

    if method == START:
        return _cost(folder) | reader.measure(folder)
    if not (folder / "student").exists():
        distill.train(run_config(method, seed, folder.parent), folder)
    return _cost(folder) | reader.measure(folder / "student")


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


Runs = dict[int, Row]  # of one method, by seed


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

    def estimate(self, runs: Runs, reference: Runs | None = None) -> Estimate:
        """The share or mean, or how much more than the reference's of the same seeds.

        Its interval is by bootstrap over seeds and, apart from that, over prompts.
        """
        seeds = sorted(runs.keys() & reference.keys()) if reference else list(runs)
        prompts = len(runs[seeds[0]][self.whose][self.name])
        draws = resampled(len(seeds)), resampled(prompts)
        evenly = np.ones((1, len(seeds))), np.ones((1, prompts))
        (value,), drawn_r = (
            self._mean(runs, seeds, *weights)
            - (self._mean(reference, seeds, *weights) if reference else 0)
            for weights in (evenly, draws)
        )
        return Estimate(float(value), *map(float, np.quantile(drawn_r, (0.025, 0.975))))

    def _mean(
        self, runs: Runs, seeds: Sequence[int], seeds_rs: np.ndarray, prompts_rp: np.ndarray
    ) -> np.ndarray:
        """[r], with seeds and prompts weighted; a longer response has more of the tokens."""

        def total(name: str) -> np.ndarray:
            values_sp = np.array([runs[seed][self.whose][name] for seed in seeds])
            return ((seeds_rs @ values_sp) * prompts_rp).sum(axis=1)

        if self.per_token:
            return total(self.name) / total("tokens")
        return total(self.name) / (seeds_rs.sum(axis=1) * prompts_rp.sum(axis=1))

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


def by_method(rows: Sequence[Row]) -> dict[str, Runs]:
    found: dict[str, Runs] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["seed"]] = row
    return found


def make_table(rows: Sequence[Row]) -> Table:
    """A line for each measure, a column for each student, and what on-policy data changed."""
    found = by_method(rows)
    table: Table = [
        ("", *(TITLES[name] for name in found), "the teacher", "on-policy less off-policy")
    ]
    for measure in MEASURES:
        shown = [measure.show(measure.estimate(runs)) for runs in found.values()]
        itself = "-"
        if measure.name not in DIVERGENCES:  # its responses were read with every student
            its = dataclasses.replace(measure, whose=TEACHERS)
            itself = measure.show(its.estimate(found[START]))
        more = measure.estimate(found[ON], found[OFF])
        table.append((measure.title, *shown, itself, measure.show(more, "+")))
    return table


def make_texts(rows: Sequence[Row]) -> str:
    """The first responses of every method's first student, sampled."""
    firsts = [row for row in rows if row["seed"] == 0]
    lines = [
        f"    {TITLES[row['method']]}: {' '.join(row['texts'][number].split())}"
        for number in range(len(rows[0]["texts"]))
        for row in firsts
    ]
    return "\n".join(lines)


def situations(rows: Sequence[Row]) -> Table:
    """Which data, by the forward KL on own responses and on the teacher's."""
    found, lines = by_method(rows), []
    seeds = len(found[ON].keys() & found[OFF].keys())
    for measure in MEASURES:
        if measure.name != DIVERGENCES[0]:
            continue
        more = measure.estimate(found[ON], found[OFF])
        advice = TITLES[ON] if more.high < 0 else TITLES[OFF] if more.low > 0 else "either"
        values = (f"{measure.estimate(found[name]).value:.2f}" for name in (ON, OFF))
        effect = f"{' against '.join(values)}: {measure.show(more, '+')}, {seeds} seeds"
        question = f"a language model that lost layers, {UPDATES} updates: on-policy or off-policy?"
        lines.append((question, advice, f"{measure.title}: {effect}"))
    return lines


def main() -> None:
    perform_all(Path(output_flag.value).absolute())


if __name__ == "__main__":
    output_flag = flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    cli.run(main)
