"""The batch of every step: the student's own responses or fixed data, sampled ahead if asked.

Sampling ahead, the responses to the next step's prompts are generated in a thread while the current
step trains. They are stale by one update, never more, because only one batch is ever under way.
Everything that touches the trainer's devices, refits included, stays in the trainer's thread: two
threads that start programs on the same devices could start them in different orders on each.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from distill.base import processes
from distill.batches.coins import lambda_coin, sample_coins
from distill.batches.packing import Layout
from distill.batches.rows import Batch, in_place_of, make_batch
from distill.data.sequences import Sequences, concatenate
from distill.rollout.base import RolloutBackend, check_rollout
from distill.rollout.environment import Dialogues
from distill.rollout.metrics import describe_rollout
from distill.sampling.choice import SamplingParams
from distill.sampling.request import RolloutRequest

Measured = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a teacher is asked of a batch.

    Attributes:
      about: whether it is asked about each sequence.
      weight: what the losses of its tokens are multiplied by.
      score: columns that a teacher by scores adds; called where the sequences were sampled.
      view: what it reads of sequences; None: the same.
    """

    layout: Layout
    about: Callable[[Sequences], np.ndarray] = lambda sequences: np.ones(len(sequences), bool)
    weight: float = 1.0
    score: Callable[[Sequences], Mapping[str, np.ndarray]] | None = None
    view: Callable[[Sequences], Sequences | None] = lambda _: None

    def scored(self, sequences: Sequences) -> Sequences:
        """With the teacher's columns, in the places of the sequences' own tokens."""
        if self.score is None:
            return sequences
        view = self.view(sequences)
        columns = self.score(sequences if view is None else view)
        if view is not None:
            starts_b = np.cumsum(view.lengths_b) - view.lengths_b
            token_n = np.repeat(starts_b, sequences.lengths_b) + in_place_of(sequences, view)
            columns = {name: values_n[token_n] for name, values_n in columns.items()}
        return sequences.with_columns(**columns)


# The sequences of a batch, once for every teacher that is asked about them.
Parts = list[Sequences]


class BatchSource:
    """Makes the batch of every step. Call `close` when done, whatever has happened.

    Args:
      iterator: of Sequences, with `get_state`; not to be moved by others any more.
      put: places a host's batch on the trainer's mesh.
      reward: adds columns to the sequences of a rollout, and says what it measured.
      dialogues: environments for rows of the dataset; None: a response is all there is.
      weigh: sets how much tokens count.
      lambda_: probability that the student responds.
      mix: toss `lambda_` once per 'batch' or for every row ('sample'); 'both': no toss, a batch has
        the fixed and the sampled response to every prompt.

    Attributes:
      rows: of the dataset, in the batch last handed out.
      position: of the data: a run that goes on from here gets the first batch not yet handed out.
    """

    def __init__(
        self,
        iterator,
        backend: RolloutBackend,
        put: Callable[[Batch], Batch],
        *,
        teachers: Sequence[Asked],
        reward: Callable[[Sequences], tuple[Sequences, Measured]] = lambda x: (x, {}),
        dialogues: Callable[[np.ndarray], Dialogues] | None = None,
        weigh: Callable[[Sequences], Sequences] = lambda x: x,
        params: SamplingParams,
        num_generations: int,
        seed: int,
        lambda_: float,
        mix: str = "batch",
        pad_id: int,
    ):
        self._iterator, self._backend, self._put = iterator, backend, put
        self._teachers, self._pad_id = teachers, pad_id
        self._dialogues, self._reward, self._weigh = dialogues, reward, weigh
        self._params, self._num_generations, self._seed = params, num_generations, seed
        self._lambda, self._mix = lambda_, mix
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        # The update that a batch is under way for, where the data go on behind it, and the batch.
        self._ahead: tuple[int, Any, Future] | None = None
        self.position, self.rows = iterator.get_state(), np.zeros(0, np.int64)

    def next(self, step: int, student_params) -> tuple[Batch, Measured]:
        """The batch of update `step` (from 0) and what its sampling measured.

        It is the one that is being sampled ahead, else one sampled now with `student_params`. Of
        any is told the staleness, updates between the sampler's weights and the trainer's; and if
        the student responded, what `describe_rollout` and the backend say.

        Raises:
          UserError, RunStopped: as they came from the backend, in whichever thread.
        """
        if self._ahead is None:
            position, finish = self._begin(step, student_params, version=step)
            parts, measured = finish()
        else:
            (begun, position, future), self._ahead = self._ahead, None
            if begun != step:
                raise RuntimeError(f"the batch of update {begun} is under way, not of {step}")
            parts, measured = future.result()
        batch = self._put(self._laid_out(parts))
        self.position, self.rows = position, np.concatenate([part["row"] for part in parts])
        return batch, measured

    def sample_ahead(self, step: int, student_params) -> None:
        """Starts sampling the batch of update `step` with weights that lack the update before it.

        To be called before that one is dispatched: it donates `student_params`.
        """
        if self._ahead is not None:
            raise RuntimeError("a batch is under way: another would be stale by more than 1 update")
        position, finish = self._begin(step, student_params, version=step - 1)
        self._ahead = step, position, self._thread.submit(finish)

    def sequences_ahead(self) -> tuple[dict[str, np.ndarray], Measured]:
        """The sequences that are being sampled ahead, once they are there: their weights are gone.

        Empty if nothing is under way, or if its sampling failed, which `next` will say.
        """
        if self._ahead is None or self._ahead[-1].exception() is not None:
            return {}, {}
        parts, measured = self._ahead[-1].result()
        arrays = {
            name + f"/{number}" * (number > 0): values
            for number, part in enumerate(parts)
            for name, values in part.arrays().items()
        }
        return arrays, measured

    def take_up(self, step: int, arrays: dict[str, np.ndarray], measured: Measured) -> None:
        """Goes on with saved `sequences_ahead`, which are those of update `step`."""
        next(self._iterator)
        by_teacher: list[dict[str, np.ndarray]] = [{} for _ in self._teachers]
        for key, values in arrays.items():
            name, _, number = key.partition("/")
            by_teacher[int(number or 0)][name] = values
        future: Future = Future()
        future.set_result((list(map(Sequences.of_arrays, by_teacher)), measured))
        self._ahead = step, self._iterator.get_state(), future

    def close(self) -> None:
        """Waits for a generation under way, whose responses are dropped; its thread ends."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None

    def _begin(
        self, step: int, student_params, version: int
    ) -> tuple[Any, Callable[[], tuple[Parts, Measured]]]:
        """Takes the prompts of `step`, tosses its coins and, if it samples, refits the sampler.

        Returns where the data go on, and what is left to do, which may be done in the thread.
        """
        prompts, position = next(self._iterator), self._iterator.get_state()
        fixed = prompts.take(np.repeat(np.arange(len(prompts)), self._num_generations))
        coins_b = self._toss(step, fixed["index"])
        if not coins_b.any():
            return position, lambda: self._scored(fixed, {"generation/staleness": 0.0})
        # The last update must have ended before the refit can begin: not part of its time.
        jax.block_until_ready(student_params)
        start = time.perf_counter()
        self._backend.refit(student_params, version=version)
        measured = {
            "generation/staleness": float(step - version),
            "generation/refit_seconds": time.perf_counter() - start,
        }
        request = RolloutRequest(
            tuple(prompts.prompts().split("tokens")),
            prompts["index"],
            self._params,
            num_generations=self._num_generations,
            seed=self._seed,
            step=step,
            turns=self._dialogues and self._dialogues(fixed["row"]),
        )
        return position, functools.partial(self._sample, request, fixed, coins_b, measured)

    def _toss(self, step: int, index_b: np.ndarray) -> np.ndarray:
        if self._mix == "both":
            return np.ones(len(index_b), bool)
        if self._mix == "sample":
            index_b = index_b.astype(np.uint32)
            return np.asarray(sample_coins(self._seed, step, index_b, self._lambda))
        return np.full(len(index_b), lambda_coin(self._seed, step, self._lambda))

    def _sample(
        self, request: RolloutRequest, fixed: Sequences, coins_b: np.ndarray, measured: Measured
    ) -> tuple[Parts, Measured]:
        """The student's sequences where the coin says so, else the fixed ones."""
        start = time.perf_counter()
        made = self._backend.generate(request)
        check_rollout(self._backend, request, made)
        rollout, by_backend = made
        seconds = time.perf_counter() - start
        measured = {**measured, **describe_rollout(rollout, seconds), **by_backend}
        sampled = rollout.sequences(fixed)
        if isinstance(turns := request.turns, Dialogues):
            reward_b, by_environment = processes.from_first(
                lambda: (turns.reward_b.tolist(), turns.measured())
            )
            sampled = sampled.with_columns(reward=np.array(reward_b, np.float32))
            measured |= by_environment
        sampled, rewarded = self._reward(sampled)
        sequences = concatenate([fixed, sampled])
        if self._mix != "both":
            sequences = sequences.take(np.arange(len(fixed)) + len(fixed) * coins_b)
        return self._scored(sequences, {**measured, **rewarded})

    def _scored(self, sequences: Sequences, measured: Measured) -> tuple[Parts, Measured]:
        """The sequences by teacher, with what each knows of them by scores."""
        start, parts = time.perf_counter(), []
        asked_before_b = np.zeros(len(sequences), bool)
        for teacher in self._teachers:
            about_b = teacher.about(sequences)
            part = sequences.with_columns(
                weight=sequences["weight"] * np.float32(teacher.weight),
                repeated=np.repeat(asked_before_b, sequences.lengths_b),
            )
            parts.append(teacher.scored(part.take(np.flatnonzero(about_b))))
            asked_before_b |= about_b
        known = {name for part in parts for name in part.columns}
        if known - {*sequences.columns, "weight", "repeated"}:
            measured = {**measured, "teacher/seconds": time.perf_counter() - start}
        return parts, measured

    def _laid_out(self, parts: Parts) -> Batch:
        """As many rows for each teacher as if it were asked about all sequences."""
        most = int(sum(len(part) - _num_repeated(part) for part in parts))
        return tuple(
            rows
            for number, (teacher, part) in enumerate(zip(self._teachers, parts, strict=True))
            for rows in make_batch(
                self._weigh(part),
                layout=teacher.layout,
                pad_id=self._pad_id,
                view=teacher.view(part) if teacher.score is None else None,
                teacher=number,
                most=most,
            )
        )


def _num_repeated(part: Sequences) -> int:
    return sum(bool(repeated_t.any()) for repeated_t in part.split("repeated"))
