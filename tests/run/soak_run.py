"""The run that soak_test.py watches: `python soak_run.py KIND WORKDIR STEPS` prints JSON lines."""

import contextlib
import ctypes
import json
import os
import sys
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict
from tiny_runs import tiny_config

import distill
from distill.run import progress as metrics

TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
BATCH = 32  # dialogues of a step
COMPILED = "/jax/core/compile/backend_compile_duration"


def resident_bytes() -> int:
    """What is in use: what was freed may stay with the allocator for thousands of updates."""
    if TRIM is not None:
        TRIM(0)
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def count_threads() -> int:
    """Without TensorStore's pool: how many workers a save finds idle, and starts, is chance."""
    names = []
    for folder in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            names.append((folder / "comm").read_text().strip())
    return len(names) - names.count("ts_pool_worker")


def yardstick() -> None:
    """A fixed piece of Python's work."""
    for _ in range(4):
        json.loads(json.dumps({str(i): [i] for i in range(300)}))


def updates(steps: int) -> ConfigDict:
    """Of tiny random models: many, and each soon done."""
    config = tiny_config(max_steps=steps, save_steps=100, logging_steps=10, lambda_=0.75)
    config.distillation.eval_steps = steps // 3
    return config


def dialogues(steps: int) -> ConfigDict:
    """Of two turns with the calculator, for each of `BATCH` prompts a step."""
    config = tiny_config(max_steps=steps, save_steps=10, logging_steps=1)
    config.policy.model_name = "embedded:arithmetic-student"  # one that ends its turns
    config.distillation.teacher_model_path = "embedded:tools-teacher"
    config.policy.train_global_batch_size = config.policy.train_micro_batch_size = BATCH
    config.policy.max_total_sequence_length = 36
    config.distillation.generate_strategy.max_length = 24
    config.policy.generation.num_slots = 8  # few programs, and slots that are used again
    config.data.validation.max_samples = 0
    config.environment.name, config.environment.max_turns = "python_tool", 2
    config.environment.call = r"(\d[-+*\d]*)"  # the first numbers that the student writes
    return config


def main() -> None:
    make_config, workdir, steps = globals()[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3])
    programs, begun = [], [0.0]
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: programs.append(event) if event == COMPILED else None
    )
    begin_step, end_step = metrics.Progress.begin_step, metrics.Progress.end_step

    def begin(self, *arguments):
        begin_step(self, *arguments)
        begun[0] = time.thread_time()

    def end(self, step, *arguments):
        end_step(self, step, *arguments)
        ended = time.thread_time()
        yardstick()
        sample = dict(
            step=step,
            seconds=ended - begun[0],
            yardstick_seconds=time.thread_time() - ended,
            resident_bytes=resident_bytes(),
            threads=count_threads(),
            files=len(os.listdir("/proc/self/fd")),
            programs=len(programs),
        )
        print(json.dumps(sample))

    metrics.Progress.begin_step, metrics.Progress.end_step = begin, end
    distill.train(make_config(steps), workdir)


if __name__ == "__main__":
    main()
