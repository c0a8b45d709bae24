"""How much does on-policy data buy over off-policy distillation, where, and at what cost?

    python -m benchmarks.evidence --output=runs/evidence [--only=TEXT] [--seeds=3]
    python -m benchmarks.evidence --output=runs/evidence --report

The first command trains every student of evidence_methods.py with `distill.main` and
`distill.generate`, evaluates each in the same way, and writes a row for it to OUTPUT/rows. What is
done is not done again, and a run that was interrupted goes on. `--only` takes the runs whose names
have TEXT. The second command makes docs/results/evidence.json of all rows, the tables in
docs/results.md and the plots in docs/images; without rows in OUTPUT, from the JSON as it is.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from benchmarks.evidence_methods import (
    BATCH,
    GENERATIONS,
    METHODS,
    MORE_UPDATES,
    ROUNDS,
    SMALL_SHAPE,
    SMALL_STUDENT,
    STUDENTS,
    UPDATES,
    Overrides,
    Run,
    all_runs,
    common_overrides,
)
from distill.base.errors import UserError
from distill.base.files import write_atomically
from distill.config import cli
from distill.data.arithmetic import ArithmeticDataset
from distill.data.base import Example


def main() -> None:
    if not output_flag.value:
        raise UserError("pass --output=FOLDER, where the runs go")
    output = Path(output_flag.value).absolute()
    if report_flag.value:
        from benchmarks.evidence_report import make_report

        make_report(output)
        return
    runs = [run for run in all_runs(seeds_flag.value) if only_flag.value in run.name]
    if not runs:
        raise UserError(f"--only={only_flag.value} names no run; such as: {all_runs(1)[1].name}")
    for run in runs:
        if not row_path(output, run).exists():
            perform(output, run)


def row_path(output: Path, run: Run) -> Path:
    return output / "rows" / f"{run.name}.json"


def perform(output: Path, run: Run) -> None:
    """Trains and evaluates a student, and writes its row."""
    from benchmarks.evidence_measures import evaluate_student, training_numbers

    folder = output / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    start = find_student(output, run.student)
    row, student = vars(run), start
    if run.method != "base":
        student, files = train(output, folder, run, start)
        row = {**row, **training_numbers(folder, run, files)}
    row = {**row, **evaluate_student(student)}
    row_path(output, run).parent.mkdir(exist_ok=True)
    write_atomically(row_path(output, run), json.dumps(row) + "\n")
    print(f"{run.name}: {sum(row['greedy']['right'])} of {sum(row['greedy']['count'])}", flush=True)


def train(output: Path, folder: Path, run: Run, start: str) -> tuple[str, list[Path]]:
    """The trained student, and the files with answers that models wrote for it."""
    labels = write_labels(output, run.seed)
    data = METHODS[run.method].data
    if data == "own":
        return self_train(folder, run, start, labels)
    files = [teacher_answers(output, run.seed, labels)] if data == "teacher" else []
    path = files[0] if files else labels
    return distil(folder, "training", run.overrides(run.updates), start, path), files


def self_train(folder: Path, run: Run, student: str, labels: Path) -> tuple[str, list[Path]]:
    """SFT on those of the student's own answers that are right, some prompts after the others."""
    prompts, files = labels.read_text().splitlines()[: run.prompts], []
    for i in range(ROUNDS):
        asked, answers = folder / f"asked-{i}.jsonl", folder / f"answers-{i}.jsonl"
        asked.write_text("\n".join(prompts[i::ROUNDS]) + "\n")
        overrides = {
            **common_overrides(run.seed),
            "distillation.generate_strategy.num_generations": GENERATIONS,
        }
        generate(folder, answers, overrides, asked, student)
        right = keep_right(answers, folder / f"right-{i}.jsonl")
        updates = run.updates * (i + 1) // ROUNDS - run.updates * i // ROUNDS
        overrides = {**run.overrides(updates), "data.max_samples": None}
        student = distil(folder, f"training-{i}", overrides, student, right)
        files.append(answers)
    return student, files


def keep_right(answers: Path, path: Path) -> Path:
    """The lines whose responses are right."""
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    dataset = ArithmeticDataset()
    kept = [x for x in lines if dataset.is_correct(Example(**x), x["response"])]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return path


def write_labels(output: Path, seed: int) -> Path:
    """Examples of all levels in random order, as many as the longest run takes."""
    path = output / "data" / f"labels-{seed}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset = ArithmeticDataset("train", seed)
        rows = random.Random(seed).sample(range(len(dataset)), MORE_UPDATES * BATCH)
        examples = (dataset[row] for row in rows)
        write_atomically(path, "".join(json.dumps(vars(x)) + "\n" for x in examples))
    return path


def teacher_answers(output: Path, seed: int, labels: Path) -> Path:
    """The teacher's answers to as many prompts of a seed as any run takes of them."""
    folder = output / "data" / f"teacher-{seed}"
    folder.mkdir(exist_ok=True)
    path = folder / "answers.jsonl"
    overrides = {**common_overrides(seed), "data.max_samples": UPDATES * BATCH}
    generate(folder, path, overrides, labels, "embedded:arithmetic-teacher")
    return path


def find_student(output: Path, name: str) -> str:
    """Where the student is that all methods start from, which may have to be made."""
    if STUDENTS[name]:
        return STUDENTS[name]
    folder = output / "students" / name
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = "configs/sft.py:arithmetic_student", folder / "random"
    if not weights.exists():
        command(folder, "distill.scratch", config, {}, f"--output={weights}", *SMALL_SHAPE)
    overrides = {**SMALL_STUDENT, "policy.model_name": str(weights)}
    return train_once(folder, "training", config, overrides)


def distil(folder: Path, name: str, overrides: Overrides, student: str, data: Path) -> str:
    keys = {**overrides, "policy.model_name": student, "data.path": str(data)}
    return train_once(folder, name, "configs/arithmetic.py", keys)


def train_once(folder: Path, name: str, config: str, overrides: Overrides) -> str:
    """The student of a run that is made or goes on if it is not done."""
    workdir = folder / name
    if not (workdir / "student").exists():
        command(folder, "distill.main", config, overrides, f"--workdir={workdir}")
    if not (workdir / "student").exists():
        raise UserError(f"{workdir} was interrupted: the same command goes on with it")
    return str(workdir / "student")


def generate(folder: Path, path: Path, overrides: Overrides, prompts: Path, model: str) -> None:
    if not path.exists():
        keys, arguments = {**overrides, "data.path": str(prompts)}, [f"--model={model}"]
        arguments.append(f"--output={path}")
        command(folder, "distill.generate", "configs/arithmetic.py", keys, *arguments)


def command(folder: Path, module: str, config: str, overrides: Overrides, *arguments: str) -> None:
    """Runs a command of the product; `commands.jsonl` gets what it took, `log.txt` what it said."""
    keys = [f"--config.{key}={value}" for key, value in overrides.items() if value is not None]
    line = [sys.executable, "-m", module, f"--config={config}", *arguments, *keys]
    # Programs are compiled once for all runs.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "../../compiled")}
    began, cpu = time.perf_counter(), _cpu_seconds()
    with (folder / "log.txt").open("a") as log:
        status = subprocess.run(
            line, stdout=log, stderr=log, env={**os.environ, **cache}
        ).returncode
    if status:
        raise UserError(f"{module} ended with status {status}: see {folder / 'log.txt'}")
    seconds = {"wall": time.perf_counter() - began, "cpu": _cpu_seconds() - cpu}
    with (folder / "commands.jsonl").open("a") as file:
        file.write(json.dumps({"command": line[2:], **seconds}) + "\n")


def _cpu_seconds() -> float:
    """Of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    output_flag = flags.DEFINE_string("output", None, "Folder of the runs.")
    only_flag = flags.DEFINE_string("only", "", "Only runs whose names have this text.")
    seeds_flag = flags.DEFINE_integer("seeds", 3, "Runs of every method.", lower_bound=1)
    report_flag = flags.DEFINE_bool("report", False, "Make tables and plots of what is there.")
    cli.run(main)
