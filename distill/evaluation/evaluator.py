"""Held-out evaluation: greedy accuracy with intervals, and divergences to the teacher.

Divergences are measured where distillation minimises them: on the evaluated model's own greedy
responses to held-out prompts, in nats per response token, over the whole vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from distill.base import processes
from distill.config import schema
from distill.data.base import DatasetInterface
from distill.data.prompts import Prompts
from distill.data.tokenizer import Vocabulary
from distill.evaluation.answers import OPEN
from distill.evaluation.grading import Grader, wilson_interval
from distill.evaluation.metrics import Response, measure
from distill.evaluation.token_values import Compared, TokenReader, Values
from distill.models.model import Model
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine
from distill.sampling.request import Rollout, RolloutRequest, Turns


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of one model on the held-out prompts.

    Attributes:
      accuracy: share of greedy responses that are right, of prompts whose answer is known; None
        if there are none.
      accuracy_low, accuracy_high: its Wilson 95% interval.
      examples: prompts evaluated.
      graded: prompts whose answer is known.
      forward_kl, reverse_kl: KL(teacher || model) and KL(model || teacher), nats per response
        token of the model's own responses; of several teachers, summed with their weights, per
        token that any of them is asked about; None without a teacher. Of one with another
        tokenizer, per token that both cut alike.
      mean_length: response tokens, EOS counted.
      truncated: share of responses cut at the length limit.
      metrics: numbers of the user's own, by METRIC/NUMBER; and of several teachers, by
        TEACHER/forward_kl and TEACHER/reverse_kl, on the prompts that each is asked about.
    """

    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    examples: int
    graded: int
    forward_kl: float | None
    reverse_kl: float | None
    mean_length: float
    truncated: float
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name, as in results.json."""
        fields = dataclasses.asdict(self)
        return fields | fields.pop("metrics")


@dataclasses.dataclass(frozen=True)
class Responses:
    """A model's responses to the held-out prompts, in their order.

    Attributes:
      rollout: their tokens.
      texts: without special tokens; of dialogues, their last turns.
      correct: whether each is right; None where the data has no answer.
      values: of their tokens, by number of the response, where they were asked for.
    """

    rollout: Rollout
    texts: list[str]
    correct: list[bool | None]
    values: Mapping[int, Values]


class Evaluator:
    """Evaluates models on one set of held-out prompts.

    Args:
      dataset: source of the examples, which may bring its own checker.
      vocabulary: of all models that are evaluated.
      make_engine: the engine that samples from a model, of its graph.
      dialogues: environments for rows of the dataset; None: a response is all there is.
      teachers: weights by name, in the order of `prompts.by_teacher`.
      own: evaluators of those with another tokenizer, in their own tokens.
    """

    def __init__(
        self,
        dataset: DatasetInterface,
        prompts: Prompts,
        vocabulary: Vocabulary,
        settings: schema.Evaluation,
        *,
        max_length: int,
        make_engine: Callable[[nnx.GraphDef], Engine],
        read: TokenReader,
        dialogues: Callable[[np.ndarray], Turns] | None = None,
        teachers: Mapping[str, float] | None = None,
        own: Mapping[str, Evaluator] | None = None,
    ):
        self.dataset, self.prompts, self.vocabulary = dataset, prompts, vocabulary
        self._dialogues, self._teachers, self._own = dialogues, teachers or {"": 1.0}, own or {}
        self.settings, self.read = settings, read
        self.greedy = SamplingParams(max_length=max_length, greedy=True)
        self._engine_for = functools.cache(make_engine)  # keeps what it has compiled

    def of_teacher(self, number: int) -> Evaluator:
        """One of the prompts that a teacher is asked about, with what is compiled already."""
        if (own := self._own.get([*self._teachers][number])) is not None:
            return own
        other = copy.copy(self)
        other.prompts, other._teachers = self.prompts.by_teacher[number], {"": 1.0}
        other.__dict__.pop("num_graded", None)
        return other

    def __call__(
        self, model: Model, *teachers: Model | None, reads_tokens: bool = False
    ) -> tuple[Evaluation, Responses]:
        """The evaluation, and the greedy responses that it is about.

        `teachers` are what the model is compared with; None where one is not on the mesh.
        """
        fetched = Model(model.graph, model.fetch())
        rollout = self.respond(fetched.graph, fetched.params, self.greedy)
        texts = decode_responses(self.vocabulary.tokenizer, rollout)
        correct = self.grade(texts)
        models = [fetched if teacher is model else teacher for teacher in teachers]
        compared, values = self.read(
            fetched,
            dict(zip(self._teachers, models, strict=True)),
            self.prompts,
            rollout,
            reads_tokens=reads_tokens,
        )
        responses = Responses(rollout, texts, correct, values)
        (forward_kl, reverse_kl), by_teacher = self._divergences(compared, rollout)
        evaluation = Evaluation(
            **_accuracy(responses.correct),
            forward_kl=forward_kl,
            reverse_kl=reverse_kl,
            examples=len(texts),
            mean_length=float(np.mean(rollout.lengths_b)),
            truncated=1.0 - float(np.mean(rollout.stopped_b)),
            metrics=by_teacher | self._measure(responses),
        )
        return evaluation, responses

    def respond(self, graph: nnx.GraphDef, params, sampling: SamplingParams) -> Rollout:
        """A model's responses to the prompts, in their order."""
        engine = self._engine_for(graph)
        request = RolloutRequest(
            tuple(self.prompts.prompt_tokens),
            np.arange(len(self.prompts)),
            sampling,
            turns=self._dialogues and self._dialogues(self.prompts.rows),
        )
        rollout, _ = engine.generate(params, request)
        engine.release()
        return rollout

    def grade(self, texts: list[str]) -> list[bool | None]:
        """Whether each response is right; None where the data has no answer.

        Every process checks its share.
        """
        examples = [self.dataset[int(row)] for row in self.prompts.rows]
        # Some templates open the thinking in the prompt.
        tokenizer = self.vocabulary.tokenizer
        thinking = [opens_thinking(tokenizer, tokens) for tokens in self.prompts.prompt_tokens]
        said = [
            f"{OPEN}{text}" if opened else text
            for opened, text in zip(thinking, texts, strict=True)
        ]
        mine, settings = processes.share(len(texts)), self.settings
        with Grader(settings.grading, settings.answer_timeout) as grader:
            shares = processes.gather(grader.grade(self.dataset, examples[mine], said[mine]))
        correct: list[bool | None] = [None] * len(texts)
        for process, verdicts in enumerate(shares):
            correct[process :: len(shares)] = verdicts
        return correct

    @functools.cached_property
    def num_graded(self) -> int:
        """Prompts whose answer is known."""
        return sum(self.dataset[int(row)].answer is not None for row in self.prompts.rows)

    def summary(self) -> str:
        """One line about the prompts."""
        missing = len(self.prompts) - self.num_graded
        note = f"; {missing} have no answer and do not count for accuracy" if missing else ""
        return self.prompts.summary() + note

    def _divergences(
        self, compared: Mapping[str, Compared], rollout: Rollout
    ) -> tuple[tuple[float | None, float | None], dict[str, float | None]]:
        """Forward and reverse KL to all teachers, and to each of several by its name."""
        total = np.zeros(2, np.float32)
        by_teacher: dict[str, float | None] = {}
        is_asked_b = np.zeros(len(self.prompts), bool)
        asked = zip(self._teachers.items(), self.prompts.by_teacher, strict=True)
        for (name, weight), prompts in asked:
            if name not in compared:
                continue
            own_b = np.isin(self.prompts.rows, prompts.rows)
            is_asked_b |= own_b
            own = jax.tree.map(lambda x, own_b=own_b: x[own_b], rollout)
            sums, tokens = compared[name]
            if prompts.recut is not None:  # of the others, nothing is known
                sums = sums * np.float32(own.num_sampled / max(tokens, 1))
            total += np.float32(weight) * sums
            if name:
                forward_kl, reverse_kl = _mean(sums, own)
                by_teacher |= {f"{name}/forward_kl": forward_kl, f"{name}/reverse_kl": reverse_kl}
        if not is_asked_b.any():
            return (None, None), {}
        return _mean(total, jax.tree.map(lambda x: x[is_asked_b], rollout)), by_teacher

    def _measure(self, responses: Responses) -> dict[str, float | None]:
        """What the user's own metrics say, in the first process."""
        if not self.settings.metrics:
            return {}

        def measure_all() -> dict[str, float | None]:
            rollout, listed = responses.rollout, []
            for i, row in enumerate(self.prompts.rows):
                kept = slice(rollout.lengths_b[i])
                tokens, log_probs = rollout.tokens_br[i, kept], rollout.log_probs_br[i, kept]
                stopped, example = bool(rollout.stopped_b[i]), self.dataset[int(row)]
                listed.append(Response(example, responses.texts[i], tokens, log_probs, stopped))
            return measure(self.settings.metrics, listed)

        return processes.from_first(measure_all)


def _mean(sums: np.ndarray, rollout: Rollout) -> tuple[float, float]:
    # In float32 and by the reciprocal, as XLA divides by one number: logs stay comparable.
    forward_kl, reverse_kl = (sums * (1 / np.float32(rollout.num_sampled))).tolist()
    return forward_kl, reverse_kl


def _accuracy(correct: list[bool | None]) -> dict[str, Any]:
    graded = [verdict for verdict in correct if verdict is not None]
    if not graded:
        return dict(accuracy=None, accuracy_low=None, accuracy_high=None, graded=0)
    rate, (low, high) = sum(graded) / len(graded), wilson_interval(sum(graded), len(graded))
    return dict(accuracy=rate, accuracy_low=low, accuracy_high=high, graded=len(graded))


def opens_thinking(tokenizer, prompt_tokens: np.ndarray) -> bool:
    """Whether a prompt ends with the opening of the response's thinking."""
    end = tokenizer.decode(prompt_tokens[-8:].tolist())
    return str(end).rstrip().endswith(OPEN)


def decode_responses(tokenizer, rollout: Rollout) -> list[str]:
    """Texts without special tokens; of dialogues, their last turns."""
    rows = zip(rollout.tokens_br, rollout.last_turn_b, rollout.lengths_b, strict=True)
    kept = [tokens_r[start:length].tolist() for tokens_r, start, length in rows]
    return tokenizer.batch_decode(kept, skip_special_tokens=True)
