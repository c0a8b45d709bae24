"""The map's first question with larger models and text: word problems, for one accelerator.

    python -m benchmarks.evidence.word_problems --output=runs/word_problems --plan=gpu:h200x1
    python -m benchmarks.evidence.word_problems --output=runs/word_problems

Hardware: one accelerator. The first command makes models of random weights and prints what memory
and time the runs take at the least: a teacher of 96M weights and a student of 10M learn the task,
and the student then by each method, in three seeds. On an H200 at its full rate that is 0.06 hours
of updates; compilation, evaluation and what is lost of the rate come on top. The second command
makes the runs that are missing, and prints their table.

No result is stated here, because none has been measured yet. `--size=small` is the same in little,
five minutes on a core: models that solve nothing, to see that it runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from benchmarks.evidence.report import (
    Cell,
    Row,
    Table,
    estimate,
    gain,
    interval,
    kept_row,
    markdown,
    points,
)
from benchmarks.evidence.runs import METHODS, OFF, ON
from benchmarks.evidence.word_problems_task import HELD_OUT, TASK
from distill.config import cli, default_config

if TYPE_CHECKING:
    from benchmarks.evidence.held_out import HeldOut

TEACHER, START, RANDOM = "teacher", "start", "random"
SFT = "sft"
COMPARED = (OFF, ON, "on_reverse", SFT)


@dataclasses.dataclass(frozen=True)
class Size:
    """Layers, width and heads of the models, and what they learn from.

    `updates` are the teacher's, those of the student to begin with, and those of every method.
    """

    models: dict[str, tuple[int, int, int]]
    vocabulary: int
    updates: tuple[int, int, int]
    batch: int
    prompts: tuple[int, ...]
    seeds: int
    held_out: int = HELD_OUT


SIZES = {
    "full": Size(
        models={TEACHER: (10, 768, 12), START: (4, 384, 6)},
        vocabulary=2048,
        updates=(6000, 600, 400),
        batch=128,
        prompts=(384, 1536, 24000),
        seeds=3,
    ),
    "small": Size(
        models={TEACHER: (2, 64, 4), START: (1, 32, 2)},
        vocabulary=512,
        updates=(20, 10, 4),
        batch=16,
        prompts=(64,),
        seeds=1,
        held_out=32,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A student that is trained, or one of the models that all come from."""

    method: str
    prompts: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        known = self.method in (TEACHER, START)
        return self.method if known else f"{self.method}-{self.prompts}-seed{self.seed}"


def all_runs(size: Size) -> list[Run]:
    compared = [
        Run(method, prompts, seed)
        for seed in range(size.seeds)
        for prompts in size.prompts
        for method in COMPARED
    ]
    return [Run(TEACHER), Run(START), *compared]


def config_of(run: Run, size: Size, output: Path) -> ConfigDict:
    config = default_config()
    config.seed, config.preflight, config.logger.progress_bar = run.seed, False, False
    config.plugins = (f"benchmarks.evidence.{TASK}_task",)
    config.data.name = config.data.validation.name = TASK
    config.data.max_samples, config.data.shuffle = run.prompts, True
    config.data.validation.split, config.data.validation.max_samples = "test", size.held_out
    config.evaluation.batch_size = size.held_out
    config.distillation.kl_type, config.distillation.eval_steps = "forward", 0
    config.distillation.logging_steps = config.checkpointing.keep = 1
    config.distillation.generate_strategy.max_length = 128
    config.policy.max_total_sequence_length = 224
    config.policy.train_global_batch_size = config.policy.train_micro_batch_size = size.batch
    config.policy.sequence_packing.enabled = True
    config.policy.optimizer.schedule = "cosine"
    teacher_updates, start_updates, updates = size.updates
    config.distillation.teacher_model_path = str(output / TEACHER / "student")
    if run.method in (TEACHER, START):
        config.policy.model_name = str(output / RANDOM / run.method)
        config.distillation.max_steps = teacher_updates if run.method == TEACHER else start_updates
        config.policy.optimizer.learning_rate = 6e-4
    else:
        config.policy.model_name = str(output / START / "student")
        config.distillation.max_steps = updates
        config.policy.optimizer.learning_rate = 3e-4
    (overrides,) = METHODS[run.method if run.method in COMPARED else SFT].phases
    config.update_from_flattened_dict(overrides)
    config.distillation.save_steps = config.distillation.max_steps
    return config


def make_random_models(size: Size, output: Path) -> None:
    """Those that are missing, with a tokenizer of the task's text."""
    from benchmarks.evidence.word_problems_task import WordProblems
    from distill.build.scratch import make_random_model, make_tokenizer

    tokenizer = None
    for seed, (name, (layers, width, heads)) in enumerate(size.models.items()):
        folder = output / RANDOM / name
        if (folder / "tokenizer_config.json").exists():
            continue
        tokenizer = tokenizer or make_tokenizer(
            f"bpe:{size.vocabulary}", WordProblems(max_samples=5000)
        )
        make_random_model(
            folder,
            tokenizer,
            num_layers=layers,
            model_width=width,
            num_heads=heads,
            num_kv_heads=heads,
            max_positions=512,
            vocab_size=size.vocabulary,
            seed=seed,
        )


def print_plan(size: Size, output: Path, topology: str) -> None:
    """The time of all updates at the least, and what runs alike need, without training."""
    from distill.planning import run as planning

    make_random_models(size, output)
    seconds: dict[str, float] = {}
    runs = all_runs(size)
    for run in runs:
        if run.method in seconds:
            continue
        config = config_of(run, size, output)
        # Of the same shapes as the trained ones, which may not be there yet.
        config.distillation.teacher_model_path = str(output / RANDOM / TEACHER)
        if run.method != TEACHER:
            config.policy.model_name = str(output / RANDOM / START)
        print(f"\n== {run.method}, {config.distillation.max_steps} updates")
        made = planning.plan(config, topology)
        seconds[run.method] = made.seconds * config.distillation.max_steps
    hours = sum(seconds[run.method] for run in runs) / 3600
    print(f"\n{len(runs)} runs: at least {hours:.2g} hours of updates on {topology}")


def perform_all(size: Size, output: Path) -> list[Row]:
    """A killed call is repeated with the same command."""
    import jax

    from benchmarks.evidence.held_out import HeldOut

    make_random_models(size, output)
    rows, held_out = [], HeldOut(config_of(Run(START), size, output))
    for run in all_runs(size):
        make = functools.partial(_perform, run, size, output, held_out)
        row = kept_row(output / "rows" / f"{run.name}.json", make)
        print(f"{run.name}: {row['right'].count('1')} of {len(row['right'])}", flush=True)
        rows.append(dataclasses.asdict(run) | row)
        jax.clear_caches()  # of programs that no other run will call
    return rows


def _perform(run: Run, size: Size, output: Path, held_out: HeldOut) -> Row:
    """Which held-out problems the trained model solves greedily."""
    import distill

    if not (output / run.name / "student").exists():
        distill.train(config_of(run, size, output), output / run.name)
    said = held_out.responses(output / run.name / "student", greedy=True)
    return dict(right="".join(str(int(held_out.is_correct(*each))) for each in said))


def make_table(rows: Sequence[Row]) -> Table:
    table: Table = [("", "prompts", "seeds", "accuracy", "above off-policy")]
    cells: dict[tuple[str, int | None], Cell] = {}
    for row in rows:
        cell = cells.setdefault((row["method"], row["prompts"]), Cell({}))
        cell.rows[row["seed"]] = row
    for (method, prompts), cell in cells.items():
        shown = interval(estimate(cell.right()))
        if method in (TEACHER, START):
            table.append((method, "-", "-", shown, "-"))
            continue
        more = "-" if method == OFF else points(gain(cell, cells[OFF, prompts]))
        table.append((METHODS[method].title, f"{prompts}", f"{len(cell.rows)}", shown, more))
    return table


def main() -> None:
    size = SIZES[size_flag.value]
    output = Path(output_flag.value).absolute() / size_flag.value  # sizes share no models
    if plan_flag.value:
        print_plan(size, output, plan_flag.value)
    else:
        print(markdown(make_table(perform_all(size, output))))


if __name__ == "__main__":
    output_flag = flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    plan_flag = flags.DEFINE_string("plan", None, "Only print what it costs on this topology.")
    size_flag = flags.DEFINE_enum("size", "full", [*SIZES], "Of models and runs.")
    cli.run(main)
