"""What the student's responses are worth: a plugin's function, or the verdict of the grader."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np

from distill.base import processes
from distill.base.errors import RunStopped, UserError
from distill.config.schema import Config
from distill.data.base import DatasetInterface
from distill.data.prompts import Prompts
from distill.data.sequences import Sequences
from distill.evaluation.answers import OPEN
from distill.evaluation.evaluator import opens_thinking
from distill.evaluation.grading import Grader
from distill.rollout.rewards import (
    ACCURACY,
    ENVIRONMENT,
    ask_each,
    describe_rewards,
    get_reward,
    group_advantages,
)

Rewarded = tuple[Sequences, dict[str, float]]


def build_reward(
    config: Config,
    dataset: DatasetInterface,
    prompts: Prompts,
    tokenizer,
    cleanup: contextlib.ExitStack,
) -> Callable[[Sequences], Rewarded]:
    """What adds the columns `reward` and `advantage` to sampled sequences, and says what it saw.

    Without reward.function it adds nothing. A plugin's function is asked about an empty response to
    the first prompt, so that it fails before any model is loaded.

    Raises:
      UserError: a prompt has no answer to be right, or the function fails or gives no number.
    """
    name, standardize = config.reward.function, config.reward.standardize
    generations = config.distillation.generate_strategy.num_generations
    if not name:
        return lambda sequences: (sequences, {})
    function = get_reward(name)
    if name == ACCURACY:
        _check_answers(dataset, prompts)
        grading = config.evaluation.grading, config.evaluation.answer_timeout
        grader = cleanup.enter_context(Grader(*grading))
    elif function is not None:
        try:
            ask_each(function, [dataset[int(prompts.rows[0])]], [""])
        except RunStopped as error:
            raise UserError(f"reward.function={name}: {error}") from None

    def score(sequences: Sequences) -> list[float]:
        examples = [dataset[int(row)] for row in sequences["row"]]
        if name == ENVIRONMENT:
            return sequences["reward"].tolist()
        pairs = zip(sequences.split("tokens"), sequences.split("sampled"), strict=True)
        # Of dialogues, the last turn.
        starts = [(tokens_t, 1 + np.flatnonzero(~is_t).max()) for tokens_t, is_t in pairs]
        cut = [(tokens_t[:start], tokens_t[start:].tolist()) for tokens_t, start in starts]
        texts = tokenizer.batch_decode([response for _, response in cut], skip_special_tokens=True)
        texts = [
            f"{OPEN}{text}" if opens_thinking(tokenizer, prompt) else text
            for (prompt, _), text in zip(cut, texts, strict=True)
        ]
        if function is not None:
            return ask_each(function, examples, texts)
        return [float(bool(verdict)) for verdict in grader.grade(dataset, examples, texts)]

    def reward(sequences: Sequences) -> Rewarded:
        start = time.perf_counter()
        # A time limit may decide, so that only one process is asked.
        rewards_b = np.array(processes.from_first(lambda: score(sequences)), np.float32)
        advantages_b = group_advantages(rewards_b, generations, standardize=standardize)
        advantage = np.repeat(advantages_b, sequences.lengths_b)
        measured = describe_rewards(rewards_b, generations)
        measured["reward/seconds"] = time.perf_counter() - start
        return sequences.with_columns(reward=rewards_b, advantage=advantage), measured

    return reward


def _check_answers(dataset: DatasetInterface, prompts: Prompts) -> None:
    """Raises UserError unless every prompt has an answer that a response can be compared with."""
    rows = [int(row) for row in prompts.rows]
    if missing := [row for row in rows if dataset[row].answer is None]:
        raise UserError(
            f"reward.function=accuracy needs answers, and {len(missing)} of {len(rows)} prompts "
            f"have none (first {dataset[missing[0]].id}): set data.answer_column, or name "
            "a reward of a plugin"
        )
