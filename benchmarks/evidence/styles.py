"""Several right styles of response, and a small student that cannot keep them apart.

    python -m benchmarks.evidence.styles --output=runs/styles
    python -m benchmarks.evidence --report

The first command trains a teacher that knows all styles, a student that has seen them, and from
that the students that are missing, and writes docs/results/styles.json. The second makes the page
of that.

A problem is the sum of three numbers of two digits, worked from the left, from the right, from both
ends, or tens and units apart. In the data each style has a quarter of the problems, by chance.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks.evidence.report import (
    DOCS,
    Cell,
    Estimate,
    Row,
    Table,
    estimate,
    gain,
    interval,
    kept_row,
    percent,
    points,
    resampled,
    situation,
    write_rows,
)
from benchmarks.evidence.runs import TEACHER, Overrides, task_config
from benchmarks.evidence.styles_task import ALL, HELD_OUT, LEFT, STYLES, TASK, TENS, style_of
from distill.config import cli

if TYPE_CHECKING:
    from benchmarks.evidence.held_out import HeldOut

ROWS = DOCS / "results/styles.json"
LONGEST, SEEDS = 48, 3
UPDATES, TEACHER_UPDATES, START_UPDATES = 200, 1200, 800
NONE = "-"
LETTERS = {name: name[0] for name in STYLES} | {"": NONE}  # in rows


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: overrides of the config, how many times the updates, and seeds."""

    title: str
    overrides: Overrides
    times: int = 1
    seeds: int = SEEDS


SFT = {"distillation.lambda_": 0.0, "distillation.hard_labels": True}
OFF, OFF_REVERSE, ON, ON_REVERSE = "off", "off_reverse", "on", "on_reverse"
ON_LONG, ON_REVERSE_LONG, SUPERVISED = "on_long", "on_reverse_long", "sft"
METHODS = {
    OFF: Method("off-policy, forward KL", {"distillation.lambda_": 0.0}),
    OFF_REVERSE: Method(
        "off-policy, reverse KL", {"distillation.lambda_": 0.0, "distillation.kl_type": "reverse"}
    ),
    ON: Method("on-policy, forward KL", {}),
    ON_REVERSE: Method("on-policy, reverse KL", {"distillation.kl_type": "reverse"}),
    ON_LONG: Method("on-policy, forward KL, three times the updates", {}, times=3, seeds=1),
    ON_REVERSE_LONG: Method(
        "on-policy, reverse KL, three times the updates",
        {"distillation.kl_type": "reverse"},
        times=3,
        seeds=1,
    ),
    SUPERVISED: Method("SFT on all styles", SFT),
    **{
        f"sft_{style}": Method(f"SFT on one style, {style}", SFT | {"data.subset": style}, seeds=1)
        for style in (LEFT, TENS)
    },
    "sft_long": Method("SFT on all styles, five times the updates", SFT, times=5, seeds=1),
}
START, HALFWAY, GENERALIST = "start", "halfway", "teacher"
MODELS = {
    START: "student before",
    HALFWAY: "the teacher after its first half",
    GENERALIST: "the teacher",
}


def config_of(updates: int, seed: int = 0) -> ConfigDict:
    config = task_config(TASK, LONGEST, updates, seed)
    config.data.subset = ALL
    config.distillation.save_steps = 0
    return config


def model_config(name: str, output: Path) -> ConfigDict:
    """Of the student to begin with, or of a half of the teacher's training, with its own cosine."""
    config = config_of(START_UPDATES if name == START else TEACHER_UPDATES // 2)
    config.update_from_flattened_dict(SFT)
    if name != START:
        halfway = str(output / HALFWAY / "student")
        config.policy.model_name = halfway if name == GENERALIST else TEACHER
        config.policy.optimizer.learning_rate = 1e-3
    return config


def run_config(method: str, seed: int, output: Path) -> ConfigDict:
    row = METHODS[method]
    config = config_of(row.times * UPDATES, seed)
    config.policy.model_name = str(output / START / "student")
    config.distillation.teacher_model_path = str(output / GENERALIST / "student")
    config.update_from_flattened_dict(row.overrides)
    return config


def perform_all(output: Path) -> None:
    """A killed call is repeated with the same command."""
    import jax

    from benchmarks.evidence.held_out import HeldOut

    config = config_of(UPDATES)
    config.data.validation.split, config.data.validation.max_samples = "test", HELD_OUT
    held_out, rows = HeldOut(config), []
    runs = [(name, 0, model_config(name, output)) for name in MODELS]
    runs += [
        (method, seed, run_config(method, seed, output))
        for seed in range(SEEDS)
        for method in METHODS
        if seed < METHODS[method].seeds
    ]
    for name, seed, config in runs:
        folder = output / (name if name in MODELS else f"{name}-seed{seed}")
        make = functools.partial(_perform, config, folder, held_out)
        row = kept_row(output / "rows" / f"{folder.name}.json", make)
        print(f"{folder.name}: {row['right'].count('1')} of {HELD_OUT}", flush=True)
        rows.append(dict(method=name, seed=seed, **row))
        jax.clear_caches()  # of programs that no other run will call
    write_rows(ROWS, rows)


def _perform(config: ConfigDict, folder: Path, held_out: HeldOut) -> Row:
    """What is solved at temperature 1 and greedily, and the styles of two samples to each."""
    import distill

    if not (folder / "student").exists():
        distill.train(config, folder)
    sampled, greedy = (
        held_out.responses(folder / "student", greedy=greedy) for greedy in (False, True)
    )
    right, greedily = (
        "".join(str(int(held_out.is_correct(*each))) for each in said[:HELD_OUT])
        for said in (sampled, greedy)
    )
    styles = "".join(LETTERS[style_of(example.prompt, text)] for example, text in sampled)
    return dict(right=right, greedy=greedily, styles=styles)


class Students(Cell):
    """Students of a method, with the styles of their samples: two to each problem."""

    def greedy(self) -> Cell:
        return Cell({seed: dict(right=row["greedy"]) for seed, row in self.rows.items()})

    def letters(self) -> tuple[np.ndarray, np.ndarray]:
        """Twice [seeds, problems], of the first samples, which are graded, and the second."""
        both = np.array([list(row["styles"]) for row in self.rows.values()])
        first, second = np.split(both, 2, axis=1)
        return first, second

    def entropy(self) -> Estimate:
        """Of a student's styles, in bits, samples without one left out; the mean over seeds."""
        first, _ = self.letters()
        is_style_ksp = np.array([first == LETTERS[name] for name in STYLES], float)
        seeds, problems = (resampled(size) for size in first.shape)
        drawn_sr = _bits(is_style_ksp @ problems.T)
        drawn = np.einsum("sr,rs->r", drawn_sr, seeds)
        value = _bits(is_style_ksp.mean(axis=2)).mean()
        return Estimate(float(value), *map(float, np.quantile(drawn, (0.025, 0.975))))

    def agreement(self) -> float:
        """How often both samples to a problem have the same style, where both have one."""
        first, second = self.letters()
        return float((first == second)[(first != NONE) & (second != NONE)].mean())

    def of_style(self, style: str) -> tuple[float, float]:
        """Its share of the samples, and how many of these are right; '' is none of all."""
        is_style_sp = self.letters()[0] == LETTERS[style]
        right = self.right()[is_style_sp]
        return float(is_style_sp.mean()), float(right.mean()) if len(right) else float("nan")


def _bits(shares_k: np.ndarray) -> np.ndarray:
    """Entropy over the first axis, of shares that need not sum to one."""
    p_k = shares_k / shares_k.sum(axis=0)
    return -(p_k * np.log2(np.where(p_k > 0, p_k, 1))).sum(axis=0)


def students(rows: Sequence[Row]) -> dict[str, Students]:
    """By method, and the models that they come from; of those that were run."""
    by_method = {
        name: {row["seed"]: row for row in rows if row["method"] == name} for name in titles()
    }
    return {name: Students(by_seed) for name, by_seed in by_method.items() if by_seed}


def titles() -> dict[str, str]:
    return MODELS | {name: method.title for name, method in METHODS.items()}


def make_table(rows: Sequence[Row]) -> Table:
    header = "", "seeds", "accuracy, sampled", "above off-policy", "accuracy, greedy"
    table: Table = [(*header, "entropy of styles, bits", "in no style")]
    found = students(rows)
    for name, cell in found.items():
        bits = cell.entropy()
        table.append(
            (
                titles()[name],
                str(len(cell.rows)) if name in METHODS else "-",
                interval(estimate(cell.right())),
                points(gain(cell, found[OFF])) if name in METHODS and name != OFF else "-",
                interval(estimate(cell.greedy().right())),
                f"{bits.value:.2f} ({bits.low:.2f} to {bits.high:.2f})",
                percent(cell.of_style("")[0]),
            )
        )
    return table


def make_style_table(rows: Sequence[Row]) -> Table:
    """Each style's share of the samples, and how many of these are right."""
    header = "share, right", *STYLES, "none", "same style twice"
    table: Table = [header]
    for name, cell in students(rows).items():
        of_styles = [cell.of_style(style) for style in (*STYLES, "")]
        shown = [f"{percent(n)}, {percent(right)}" if n else "-" for n, right in of_styles]
        table.append((titles()[name], *shown, percent(cell.agreement())))
    return table


def situations(rows: Sequence[Row]) -> Table:
    """On-policy or not, which divergence, and one style instead of all."""
    found, said = students(rows), titles()
    text = "several right styles, a small student, sampled"
    compared = {
        "on-policy or off-policy?": (ON, OFF),
        "reverse KL on own responses?": (ON_REVERSE, ON),
        "the same with three times the updates?": (ON_REVERSE_LONG, ON_LONG),
        "reverse KL on fixed responses?": (OFF_REVERSE, OFF),
        "data of one style?": (f"sft_{LEFT}", SUPERVISED),
    }
    return [
        situation(
            f"{text}: {question}",
            (found[first], found[second]),
            (said[first], said[second]),
            found[START].rows[0],
        )
        for question, (first, second) in compared.items()
    ]


def main() -> None:
    perform_all(Path(output_flag.value).absolute())


if __name__ == "__main__":
    output_flag = flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    cli.run(main)
