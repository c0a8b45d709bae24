"""The batch of every step: the student's own responses or fixed data, sampled ahead if asked.

Sampling ahead, responses to the prompts of later steps are generated in a thread while the current
step trains. Those of `step` have the weights that `step - async_steps` updates made, whether or not
newer ones are there: no bit depends on which thread is faster. Everything that touches the
trainer's devices, refits included, stays in the trainer's thread: two threads that start programs
on the same devices could start them in different orders on each.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
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
from distill.rollout.base import RolloutBackend, generate_checked
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
Sampled = tuple[Parts, Measured]


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
      async_steps: updates by which a batch may be stale: so many are sampled ahead.
      max_steps: updates of the run; for later ones nothing is sampled ahead.

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
        async_steps: int = 0,
        max_steps: int = 0,
        pad_id: int,
    ):
        self._iterator, self._backend, self._put = iterator, backend, put
        self._teachers, self._pad_id = teachers, pad_id
        self._dialogues, self._reward, self._weigh = dialogues, reward, weigh
        self._params, self._num_generations, self._seed = params, num_generations, seed
        self._lambda, self._mix = lambda_, mix
        self._async_steps, self._max_steps = async_steps, max_steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        # Batches under way: their updates, where the data go on behind them, and what they will be.
        self._ahead: deque[tuple[int, Any, Future]] = deque()
        self._refitted: int | None = None  # updates that the sampler's weights had
        self.position, self.rows = iterator.get_state(), np.zeros(0, np.int64)

    def next(self, step: int, student_params) -> tuple[Batch, Measured]:
        """The batch of update `step` (from 0) and what its sampling measured.

        It is the one that is being sampled ahead, else one sampled now with `student_params`. Of
        any is told the staleness, updates between the sampler's weights and the trainer's; and if
        the student responded, what `describe_rollout` and the backend say. With these weights, up
        to `async_steps` further batches begin, before the update is dispatched that donates them.

        Raises:
          UserError, RunStopped: as they came from the backend, in whichever thread.
        """
        if self._ahead:
            _, position, future = self._ahead.popleft()
            parts, measured = future.result()
        else:
            position, finish = self._begin(step, student_params, version=step)
            parts, measured = finish()
        batch = self._put(self._laid_out(parts))
        self.position, self.rows = position, np.concatenate([part["row"] for part in parts])
        end = min(step + self._async_steps + 1, self._max_steps)
        for later in range(step + 1 + len(self._ahead), end):
            ahead, finish = self._begin(later, student_params, version=step)
            self._ahead.append((later, ahead, self._thread.submit(finish)))
        return batch, measured

    def sequences_ahead(self, step: int) -> tuple[dict[str, np.ndarray], list[Measured]]:
        """The sequences of `step` and on that are being sampled ahead: their weights are gone.

        Waits for them. They end before a batch whose sampling failed, which `next` will say.
        """
        arrays, measured = dict[str, np.ndarray](), list[Measured]()
        for begun, _, future in self._ahead:
            if begun != step + len(measured) or future.exception() is not None:
                break
            parts, of_batch = future.result()
            for number, part in enumerate(parts, len(measured) * len(parts)):
                suffix = f"/{number}" * (number > 0)
                arrays |= {name + suffix: values for name, values in part.arrays().items()}
            measured.append(of_batch)
        return arrays, measured

    def take_up(self, step: int, arrays: dict[str, np.ndarray], measured: list[Measured]) -> None:
        """Goes on with saved `sequences_ahead` of `step`, unless they are staler than allowed."""
        columns: list[dict[str, np.ndarray]] = [{} for _ in measured for _ in self._teachers]
        for key, values in arrays.items():
            name, _, number = key.partition("/")
            columns[int(number or 0)][name] = values
        parts = map(Sequences.of_arrays, columns)
        for begun, of_batch in enumerate(measured, step):
            if of_batch["generation/staleness"] > self._async_steps:
                break
            next(self._iterator)
            future: Future = Future()
            future.set_result(([next(parts) for _ in self._teachers], of_batch))
            self._ahead.append((begun, self._iterator.get_state(), future))

    def close(self) -> None:
        """Waits for a generation under way, whose responses are dropped; its thread ends."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def _begin(self, step: int, student_params, version: int) -> tuple[Any, Callable[[], Sampled]]:
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
        if version != self._refitted:
            self._backend.refit(student_params, version)
            self._refitted = version
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
            version=version,
            turns=self._dialogues and self._dialogues(fixed["row"]),
        )
        return position, functools.partial(self._sample, request, fixed, coins_b, measured)

    def _toss(self, step: int, index_b: np.ndarray) -> np.ndarray:
        if self._mix == "both":
            return np.ones(len(index_b), bool)
        if self._mix == "sample":
            return np.asarray(sample_coins(self._seed, step, np.uint32(index_b), self._lambda))
        return np.full(len(index_b), lambda_coin(self._seed, step, self._lambda))

    def _sample(
        self, request: RolloutRequest, fixed: Sequences, coins_b: np.ndarray, measured: Measured
    ) -> Sampled:
        """The student's sequences where the coin says so, else the fixed ones."""
        start = time.perf_counter()
        rollout, by_backend = generate_checked(self._backend, request)
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

    def _scored(self, sequences: Sequences, measured: Measured) -> Sampled:
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
        repeated = (repeated_t for part in parts for repeated_t in part.split("repeated"))
        most = sum(not repeated_t.any() for repeated_t in repeated)
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
