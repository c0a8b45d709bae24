"""What is compared: methods, budgets, and the runs made of them, all as rows of tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs import arithmetic

STUDENT, TEACHER = "embedded:arithmetic-student", "embedded:arithmetic-teacher"
UPDATES, BATCH = 400, 64
SEEDS, FEW_SEEDS = 3, 5
# Distinct prompts; of the most, each is seen about once.
PROMPTS, MORE_PROMPTS = (384, 1536, 24000), (64, 6000)
FEW = 384  # where all methods and other learning rates are run, and more seeds
RATES = (1e-3, 5e-4)
LEARNING_RATE = 2e-3
GROUPS, GROUP_PROMPTS = 8, 1536  # where rewards are given: responses to a prompt, prompts
# The validation problems that choose where to stop, and how often they are asked.
VALIDATION, EVERY = 256, 50

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """How a student is trained.

    Attributes:
      title: for tables.
      phases: overrides of the config, for equal shares of the updates one after the other.
      teacher_samples: responses of the teacher to each prompt that are the fixed data; 0: the
        dataset's own responses.
    """

    title: str
    phases: tuple[Overrides, ...]
    teacher_samples: int = 0


def _distilled(lambda_: float, kl_type: str = "forward") -> Overrides:
    return {"distillation.lambda_": lambda_, "distillation.kl_type": kl_type}


def _rewarded(divergence: float, reward: float) -> Overrides:
    """Own responses in groups, with the weights of forward KL and reward."""
    return _distilled(1.0) | {
        "distillation.generate_strategy.num_generations": GROUPS,
        "distillation.objective.divergence": divergence,
        "distillation.objective.reward_advantage": reward,
        "reward.function": "accuracy",
    }


OFF, ON, GROUPED = "off_forward", "on_forward", "on_group_kl"
METHODS = {
    OFF: Method("off-policy, forward KL", (_distilled(0.0),)),
    ON: Method("on-policy, forward KL", (_distilled(1.0),)),
    "off_samples": Method("off-policy, 4 teacher samples a prompt", (_distilled(0.0),), 4),
    "on_jsd": Method("on-policy, JSD(0.5)", (_distilled(1.0, "jsd"),)),
    "on_reverse": Method("on-policy, reverse KL", (_distilled(1.0, "reverse"),)),
    "mix": Method("half of the batches each", (_distilled(0.5),)),
    "warm": Method("off-policy, then on-policy", (_distilled(0.0), _distilled(1.0))),
    "sft": Method(
        "SFT on the dataset's responses",
        ({"distillation.lambda_": 0.0, "distillation.hard_labels": True},),
    ),
    GROUPED: Method("forward KL, groups of 8", (_rewarded(1.0, 0.0),)),
    "on_group_both": Method("forward KL and reward", (_rewarded(1.0, 1.0),)),
    "on_group_reward": Method("reward", (_rewarded(0.0, 1.0),)),
}
MAIN = (OFF, ON)
# With their peak rates: at high ones the reward alone ruins the student.
REWARDS = ((GROUPED, LEARNING_RATE), ("on_group_both", LEARNING_RATE), ("on_group_reward", 2e-5))
REWARDS += (("on_group_reward", 1e-4),)
RIVALS = tuple(m for m in METHODS if m not in (*MAIN, *dict(REWARDS)))


@dataclasses.dataclass(frozen=True)
class Run:
    """One student trained by one method on so many distinct prompts.

    A seed changes the prompts, their order and the sampling, not the student to start from.
    """

    method: str
    prompts: int
    seed: int
    updates: int = UPDATES
    learning_rate: float = LEARNING_RATE

    @property
    def name(self) -> str:
        rate = "" if self.learning_rate == LEARNING_RATE else f"-rate{self.learning_rate:g}"
        return f"{self.method}-{self.prompts}{rate}-seed{self.seed}"


def all_runs() -> list[Run]:
    """In such an order that whatever is there at any time makes whole tables."""
    main = [[Run(m, n, seed) for n in PROMPTS for m in MAIN] for seed in range(SEEDS)]
    more = [[Run(m, n, seed) for n in MORE_PROMPTS for m in MAIN] for seed in range(SEEDS)]
    rivals = [[Run(m, FEW, seed) for m in RIVALS] for seed in range(SEEDS)]
    rates = [Run(m, FEW, 0, learning_rate=rate) for rate in RATES for m in MAIN]
    rewards = [
        Run(method, GROUP_PROMPTS, seed, learning_rate=rate)
        for some in (REWARDS[:3], REWARDS[3:])
        for seed in range(SEEDS)
        for method, rate in some
    ]
    queue = [main[0], more[0], rivals[0][:1], *main[1:], rivals[0][1:], rates]
    queue += [*more[1:], *rivals[1:], rewards]
    queue += [[Run(m, FEW, seed) for m in MAIN] for seed in range(SEEDS, FEW_SEEDS)]
    return [run for runs in queue for run in runs]


def config_of(run: Run, phase: int = 0) -> ConfigDict:
    """The config of one phase of a run, whose student and fixed data are still to be set."""
    phases = METHODS[run.method].phases
    config = common_config(run.seed)
    config.data.max_samples = run.prompts
    config.distillation.max_steps = run.updates // len(phases)
    config.policy.optimizer.learning_rate = run.learning_rate
    config.update_from_flattened_dict(phases[phase])
    return config


def common_config(seed: int) -> ConfigDict:
    """Of all commands."""
    config = arithmetic.get_config()
    config.seed, config.preflight = seed, False
    config.data.subset, config.data.validation.name = "distinct", "arithmetic"
    config.data.validation.max_samples = config.evaluation.batch_size = VALIDATION
    config.distillation.eval_steps = config.distillation.save_steps = EVERY
    config.distillation.logging_steps = 1
    config.checkpointing.keep = 1
    config.checkpointing.best_metric = "eval/student/accuracy"
    config.policy.train_global_batch_size = BATCH
    # Short sequences share rows, which changes no gradient and saves a third of the time.
    config.policy.sequence_packing.enabled = True
    config.policy.train_micro_batch_size = 48
    config.logger.progress_bar = False
    return config


def task_config(task: str, longest: int, updates: int, seed: int) -> ConfigDict:
    """Of a task of its own: the dataset of the plugin TASK_task, and nothing evaluated on the way.

    `longest`: tokens of a response at most.
    """
    config = common_config(seed)
    config.plugins = (f"benchmarks.evidence.{task}_task",)
    config.data.name = config.data.validation.name = task
    config.data.subset = ""
    config.data.validation.max_samples = config.distillation.eval_steps = 0
    config.checkpointing.best_metric = ""
    config.distillation.generate_strategy.max_length = longest
    config.distillation.max_steps = updates
    return config
