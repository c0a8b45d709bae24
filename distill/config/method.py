"""What is learned: the sections `distillation`, `teacher`, `reward` and `environment`."""

from __future__ import annotations

import dataclasses

from distill.config.keys import LONGEST, MOST_ROWS, content, fixed, free, key, section
from distill.config.policy import PRECISIONS, VllmTeacher

ENVIRONMENTS = ("python_tool", "self_check")
# Teachers that are the student: its weights, their moving average, or those that it started from.
IN_STATE = ("self", "ema")
OF_STUDENT = (*IN_STATE, "start")
_WITHOUT_TEACHER = {"cross_entropy", "policy_gradient", "advantage"}  # built-in terms and weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateStrategy:
    max_length: int = key(1024, "response tokens at most, EOS counted", low=1, high=LONGEST)
    temperature: float = key(1.0, "sampling temperature", low=1e-4)
    decoding_method: str = key("sample", "token choice", choices=("greedy", "sample"))
    top_k: int = key(0, "keep the k likeliest tokens; 0 is off", low=0)
    top_p: float = key(1.0, "keep the smallest set with this probability; 1 is off", low=0, high=1)
    min_p: float = key(0.0, "keep tokens above this share of the likeliest's", low=0, high=1)
    num_generations: int = fixed(1, "responses sampled per prompt", low=1, high=MOST_ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a token's loss is: a weighted sum; names may be those that a plugin registers."""

    divergence: float = key(1.0, "weight of the divergence from the teacher, kl_type", low=0)
    cross_entropy: float = key(0.0, "weight of -log q of the response's token", low=0)
    teacher_advantage: float = key(
        0.0, "weight of the policy gradient with advantage log p - log q of the token", low=0
    )
    reward_advantage: float = key(
        0.0, "weight of the policy gradient with the rewards' advantages", low=0
    )
    ratio_clip: float = key(
        0.0, "PPO's clip of the policy gradient's ratio, such as 0.2; 0: off", low=0
    )
    importance_clip: float = key(
        0.0,
        "of the policy gradient alone: weigh tokens by new / sampler's probability, at most this",
        low=0,
    )
    divergence_clip: float = key(
        0.0, "most that an entry of the vocabulary adds to a token's divergence; 0: off", low=0
    )
    entropy_threshold: float = key(
        0.0, "nats; forward KL is added where the teacher's entropy is above; 0: off", low=0
    )
    target_start: float = key(
        1.0, "teacher's share of the target's logits at first, growing to 1; 1: off", low=0, high=1
    )
    target_pace: float = key(
        0.0, "how much faster that share grows while the loss falls, such as 0.0005", low=0, high=1
    )
    proximal_share: float = key(
        1.0, "teacher's share of a target mixed with the student; 1: off", low=1e-6, high=1
    )
    position_discount: float = key(
        1.0, "token i of a response counts this to the power of i", low=1e-6, high=1
    )
    horizon: int = key(0, "tokens of a response that count, from its first; 0: all", low=0)
    skip_tokens: tuple[str, ...] = key((), "tokens that are not trained on, such as <think>")
    terms: tuple[str, ...] = key(
        (), "added, NAME or NAME:COEFFICIENT: cross_entropy, policy_gradient or any divergence"
    )
    weights: tuple[str, ...] = key((), "what a token's loss is multiplied by, such as advantage")

    @property
    def parts(self) -> set[str]:
        """Names of the added terms and of the weights."""
        return {*(text.partition(":")[0] for text in self.terms), *self.weights}

    @property
    def reads_teacher(self) -> bool:
        """Whether anything in it reads a teacher."""
        return bool(self.divergence or self.teacher_advantage or self.parts - _WITHOUT_TEACHER)

    @property
    def reads_advantages(self) -> bool:
        """Whether anything in it reads the tokens' column of that name."""
        return bool(self.reward_advantage or self.parts & {"policy_gradient", "advantage"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    teacher_model_path: str = content(
        "",
        "folder, hub id (ID@REVISION) or embedded:NAME; self, ema or start: the student itself, "
        "its moving average, or what it was",
    )
    lambda_: float = key(1.0, "probability that a batch is student-generated", low=0, high=1)
    mix: str = key(
        "batch",
        "toss lambda_ per batch or per sample; both: every prompt with both responses",
        choices=("batch", "sample", "both"),
    )
    kl_type: str = key(
        "forward",
        "forward, reverse, mixed, jsd, skew_forward, skew_reverse, or one that a plugin registers",
    )
    kl_type_on_data: str = key("", "divergence on the data's responses; '' is kl_type")
    mixed_kl_weight: float = key(0.5, "weight of forward KL in mixed", low=0, high=1)
    jsd_beta: float = key(0.5, "weight of the teacher in the JSD mixture", low=0, high=1)
    skew_alpha: float = key(0.1, "share of the other model in skewed KLs", low=0, high=1)
    kl_temperature: float = key(1.0, "divides both models' logits in the loss", low=1e-4)
    kl_temperature_squared: bool = key(False, "multiply the loss by kl_temperature squared")
    hard_labels: bool = key(False, "cross-entropy on the fixed data (SFT); needs no teacher")
    objective: Objective = section(Objective)
    loss_implementation: str = free(
        "auto",
        "linear-divergence implementation",
        choices=("auto", "reference", "chunked", "pallas"),
    )
    generate_strategy: GenerateStrategy = section(GenerateStrategy)
    max_steps: int = key(1000, "optimizer updates", low=1)
    eval_steps: int = free(100, "updates between evaluations; 0: only first and last", low=0)
    save_steps: int = free(100, "updates between checkpoints; 0: only the last", low=0)
    logging_steps: int = free(10, "updates between log lines", low=1)
    max_skipped_steps: int = free(
        10, "steps in a row whose loss or gradient may be NaN or infinite, and skipped", low=0
    )

    @property
    def has_teacher(self) -> bool:
        """Whether anything in the objective reads one."""
        return self.objective.reads_teacher and not self.hard_labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """What responses are worth; advantages are made of it in groups of num_generations."""

    function: str = key(
        "",
        "accuracy (1 for a right response, by evaluation.grading), environment (the sum of its "
        "replies' rewards) or a plugin's; '': none",
    )
    standardize: bool = key(
        False, "divide advantages by the standard deviation of their group's rewards (GRPO)"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    backend: str = key("local", "where the teacher runs", choices=("local", "vllm"))
    vllm: VllmTeacher = section(VllmTeacher)
    precision: str = key(
        "bfloat16",
        "dtype of weights and compute; int8: weights in 8 bits, compute in bfloat16",
        choices=(*PRECISIONS, "int8"),
    )
    offload: str = free(
        "none",
        "weights in host memory: host: between uses; layers: streamed layer by layer when used",
        choices=("none", "host", "layers"),
    )
    split_over_data: bool = free(False, "split weights over mesh.data too, not only mesh.fsdp")
    ema_decay: float = fixed(
        0.0, "of teacher_model_path=ema, the share kept in each update, such as 0.99", low=0, high=1
    )
    alignment: str = key(
        "none",
        "none: it has the student's tokenizer; dense: another, and is compared where both cut the "
        "same bytes; spans: and by policy gradient where they cut otherwise",
        choices=("none", "dense", "spans"),
    )
    scores: str = free(
        "", "folder of python -m distill.generate --scores, in place of the teacher; '': none"
    )
    system_prompt: str = content("", "system message that the teacher reads; '' is the student's")
    prompt_template: str = content(
        "",
        "text with {problem} that it reads, with {response}, {answer} of the data or {feedback}, a "
        "right response of the group and an environment's replies; '' is the student's",
    )
    template_arguments: tuple[str, ...] = content(
        (), "NAME=VALUE, variables of its chat template beside data.template_arguments"
    )

    @property
    def dtype(self) -> str:
        """What the teacher computes in."""
        return "bfloat16" if self.precision == "int8" else self.precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneTeacher(Teacher):
    """One of several teachers: NAME is what metrics and results call it.

    They stand in place of `teacher` and `distillation.teacher_model_path`, whose keys they share.
    """

    model: str = content("", "what distillation.teacher_model_path may be")
    prompts: tuple[str, ...] = key(
        (), "COLUMN=VALUE, by which rows of the data it is asked about; several: any; (): all rows"
    )
    weight: float = key(
        1.0, "what its tokens' losses are multiplied by; below 0: a reference to move away from"
    )

    @property
    def in_state(self) -> bool:
        """Whether it is a part of the train state."""
        return self.model in IN_STATE

    @property
    def storage(self) -> tuple[str, str, bool, str]:
        """How its weights are held: teachers of one model and the same storage share them."""
        return self.precision, self.offload, self.split_over_data, self.scores

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the data by which it is asked."""
        return tuple(rule.partition("=")[0] for rule in self.prompts)


class Teachers(dict[str, OneTeacher]):
    """Sections `teachers.NAME`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """What replies to the student's turns; a rollout is then a dialogue."""

    name: str = key(
        "",
        "python_tool, self_check, or one that a plugin registers; '' is none: a response is all",
    )
    max_turns: int = key(8, "turns of the student in a dialogue", low=1)
    timeout: float = key(30.0, "seconds that a reply may take", low=0.1)
    max_failures: float = key(
        0.1, "share of dialogues whose environment may fail before the run stops", low=0, high=1
    )
    call: str = key(
        r"<tool_call>(.*?)</tool_call>\s*$",
        "for python_tool: regular expression that finds the expression in a turn",
    )
