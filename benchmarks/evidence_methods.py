"""What benchmarks/evidence.py compares: students, methods, budgets, and the runs made of them."""

from __future__ import annotations

import dataclasses
from typing import Any

UPDATES = 300
BATCH = 64
# Of methods that use again what a teacher did once, and of runs that are twice as long.
MORE_UPDATES = 2 * UPDATES
# A quarter of the teacher's tokens.
SMALL_BUDGET = UPDATES // 4
LEARNING_RATE = 2e-3
OTHER_RATES = (1e-3, 4e-3)
# In runs that are longer or have another rate.
FEW_METHODS = ("off_policy_forward", "on_policy_forward", "on_policy_reverse")
# Self-training: how often the student answers anew, and how many answers to a prompt.
ROUNDS, GENERATIONS = 3, 4
# Response positions are counted in groups that begin here.
POSITIONS = (0, 8, 16, 24, 32, 40)

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """How a student is trained.

    Attributes:
      title: for tables.
      data: whose responses the fixed data has: 'labels' (the dataset's), 'teacher', 'own'.
      overrides: of configs/arithmetic.py, besides those of all runs.
    """

    title: str
    data: str
    overrides: Overrides

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher scores the tokens that are trained on."""
        return not self.overrides.get("distillation.hard_labels", False)


def _supervised(title: str, data: str) -> Method:
    return Method(title, data, {"distillation.hard_labels": True, "distillation.lambda_": 0.0})


def _distilled(title: str, lambda_: float, kl_type: str, **more) -> Method:
    keys = {"distillation.lambda_": lambda_, "distillation.kl_type": kl_type, **more}
    return Method(title, "labels", keys)


METHODS = {
    "sft": _supervised("SFT on labels", "labels"),
    "sequence_kd": _supervised("sequence-level KD", "teacher"),
    "off_policy_forward": _distilled("off-policy forward KL", 0.0, "forward"),
    "mix_forward": _distilled("mix: lambda_ 0.5, forward KL", 0.5, "forward"),
    "on_policy_forward": _distilled("on-policy forward KL", 1.0, "forward"),
    "on_policy_reverse": _distilled("on-policy reverse KL", 1.0, "reverse"),
    "on_policy_jsd": _distilled("on-policy JSD(0.5)", 1.0, "jsd"),
    "self_training": _supervised("self-training, no teacher", "own"),
}
# Fixed data is scored once and its scores are kept: a budget of teacher tokens can be reused.
CACHED = "off_policy_forward_cached"
METHODS[CACHED] = dataclasses.replace(
    METHODS["off_policy_forward"], title="off-policy forward KL, scores kept"
)
# What the teacher did for them can be used again and again.
KEPT = ("sequence_kd", CACHED)

# Weights in the table's words, and where the student comes from: an embedded model, or random
# weights, trained on labels as configs/sft.py:arithmetic_student trains the embedded one.
STUDENTS = {"112k": "embedded:arithmetic-student", "33k": ""}
FIRST_STUDENT = "112k"
SMALL_SHAPE = ("--tokenizer=characters:arithmetic", "--layers=2", "--width=32", "--heads=2")
SMALL_STUDENT: Overrides = {
    "distillation.eval_steps": 0,
    "checkpointing.export_dtype": "float32",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One student trained by one method.

    Attributes:
      student, method: keys of STUDENTS and METHODS; method 'base' is the student as it comes.
      budget: 'updates', 'teacher' (the same teacher's tokens, more updates), 'small' (a quarter of
        the teacher's tokens), 'long' (twice the updates) or 'rate' (another learning rate).
      updates: of the student.
      prompts: distinct examples that training may use.
    """

    student: str
    method: str
    budget: str
    seed: int
    updates: int
    prompts: int
    learning_rate: float = LEARNING_RATE

    @property
    def name(self) -> str:
        rate = f"-{self.learning_rate:g}" if self.budget == "rate" else ""
        return f"{self.student}-{self.budget}-{self.method}{rate}-seed{self.seed}"

    def overrides(self, updates: int) -> Overrides:
        """Of configs/arithmetic.py, for `updates` of this run's updates."""
        return {
            **common_overrides(self.seed),
            **METHODS[self.method].overrides,
            "distillation.max_steps": updates,
            "policy.optimizer.learning_rate": self.learning_rate,
            "data.max_samples": self.prompts,
        }


def common_overrides(seed: int) -> Overrides:
    """Of all commands: the run's own data from a file, and no evaluation on the way."""
    return {
        "seed": seed,
        "preflight": False,
        "distillation.eval_steps": 0,
        "distillation.save_steps": 0,
        "distillation.logging_steps": 1,
        "data.name": "jsonl",
        "data.split": "all",
        "data.validation.max_samples": 0,
        "logger.progress_bar": False,
    }


def all_runs(seeds: int) -> list[Run]:
    """Seed by seed, so that what is there at any time compares all methods."""
    runs = []
    for seed in range(seeds):
        # The smaller student learns so little that more seeds of it would say nothing more.
        for student in STUDENTS if seed == 0 else (FIRST_STUDENT,):
            if seed == 0:
                runs.append(Run(student, "base", "updates", 0, 0, 0))
            runs += _equal_updates(student, seed)
        runs += _kept(FIRST_STUDENT, "teacher", seed, MORE_UPDATES, UPDATES * BATCH)
    return runs + _long(FIRST_STUDENT) + _small_budget(FIRST_STUDENT) + _other_rates(FIRST_STUDENT)


def _equal_updates(student: str, seed: int) -> list[Run]:
    """Every example is seen once."""
    methods = (method for method in METHODS if method != CACHED)
    return [Run(student, m, "updates", seed, UPDATES, UPDATES * BATCH) for m in methods]


def _kept(student: str, budget: str, seed: int, updates: int, answers: int) -> list[Run]:
    """What a teacher did once for `answers` is used in all `updates`."""
    return [Run(student, method, budget, seed, updates, answers) for method in KEPT]


def _small_budget(student: str) -> list[Run]:
    answers = SMALL_BUDGET * BATCH
    methods = [method for method in METHODS if METHODS[method].has_teacher and method != CACHED]
    anew = [Run(student, method, "small", 0, SMALL_BUDGET, answers) for method in methods]
    return _kept(student, "small", 0, UPDATES, answers) + anew


def _long(student: str) -> list[Run]:
    """Does it go on like this?"""
    size = MORE_UPDATES, MORE_UPDATES * BATCH
    return [Run(student, method, "long", 0, *size) for method in FEW_METHODS]


def _other_rates(student: str) -> list[Run]:
    """Would another learning rate have changed the order?"""
    return [
        dataclasses.replace(run, budget="rate", learning_rate=rate)
        for rate in OTHER_RATES
        for run in _equal_updates(student, 0)
        if run.method in FEW_METHODS
    ]
