"""The batch of every step: the student's own answers or fixed data, sampled ahead if asked.

Sampling ahead, the answers to the next step's prompts are generated in a thread while the current
step trains. They are stale by one update, never more, because only one batch is ever under way.
Everything that touches the trainer's devices, refits included, stays in the trainer's thread: two
threads that start programs on the same devices could start them in different orders on each.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from distill.batches.packing import Layout
from distill.batches.rows import Batch, make_batch
from distill.data.pipeline import PromptBatch
from distill.losses.objective import TopKScores, lambda_coin, sample_coins
from distill.rollout.base import RolloutBackend
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout, RolloutRequest

Measured = dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Draft:
    """Rows of one step that wait for their answers.

    Attributes:
      step: the update they are for.
      rows: prompts, each as often as it is answered.
      coins_b: True where the student answers.
      request: None if it answers nothing.
      position: of the data behind these rows.
      measured: of the refit.
    """

    step: int
    rows: PromptBatch
    coins_b: np.ndarray
    request: RolloutRequest | None
    position: Any
    measured: Measured


class BatchSource:
    """Makes the batch of a step: from the student's own answers or from the fixed data.

    Args:
      iterator: of PromptBatch, with `get_state`; not to be moved by others any more.
      backend: samples the answers.
      put: places a host's batch on the trainer's mesh.
      score: what a teacher that is not on the mesh knows of a rollout, from prompt tokens, prompt
        lengths and the rollout; None without one. Called where the rollout was sampled.
      params: how answers are sampled.
      num_generations: answers per prompt.
      seed: of coins and sampling.
      lambda_: probability that the student answers.
      per_sample: toss `lambda_` for every row instead of once per batch.
      response_width: columns of the responses.
      layout: of the microbatches.
      pad_id: fills rows after their end.

    Call `close` when done, whatever has happened.
    """

    def __init__(
        self,
        iterator,
        backend: RolloutBackend,
        put: Callable[[Batch], Batch],
        *,
        score: Callable[[np.ndarray, np.ndarray, Rollout], TopKScores] | None = None,
        params: SamplingParams,
        num_generations: int,
        seed: int,
        lambda_: float,
        per_sample: bool,
        response_width: int,
        layout: Layout,
        pad_id: int,
    ):
        self._iterator, self._backend, self._put = iterator, backend, put
        self._score = score
        self._params, self._num_generations, self._seed = params, num_generations, seed
        self._lambda, self._per_sample = lambda_, per_sample
        self._response_width, self._pad_id = response_width, pad_id
        self._make_batch = functools.partial(make_batch, layout=layout, pad_id=pad_id)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._ahead: tuple[_Draft, Future] | None = None
        self._position, self._rows = iterator.get_state(), np.zeros(0, np.int64)

    @property
    def rows(self) -> np.ndarray:
        """Rows of the dataset in the batch last handed out."""
        return self._rows

    @property
    def position(self) -> Any:
        """Of the data: a run that goes on from here gets the first batch not yet handed out."""
        return self._position

    def next(self, step: int, student_params) -> tuple[Batch, Measured]:
        """The batch of update `step` (from 0) and what its sampling measured.

        It is the one that is being sampled ahead, else one sampled now with `student_params`.

        Returns:
          The batch on the trainer's mesh; metrics named 'generation/...', all but staleness only if
          the student answered: staleness (updates between the sampler's weights and the trainer's),
          seconds (of generating), refit_seconds, tokens_per_second (response tokens, padding not
          counted), mean_length and max_length (tokens, EOS counted), truncated (share of answers
          cut at the length limit), and the backend's own.

        Raises:
          UserError, RunStopped: as they came from the backend, in whichever thread.
        """
        if self._ahead is None:
            draft = self._draw(step, student_params, version=step)
            rollout, scores, measured = self._answer(draft)
        else:
            (draft, future), self._ahead = self._ahead, None
            if draft.step != step:
                raise RuntimeError(f"the batch of update {draft.step} is under way, not of {step}")
            rollout, scores, measured = future.result()
        rows = draft.rows
        arrays = rows.prompt_tokens_bp, rows.prompt_lengths_b, rollout, draft.coins_b, scores
        batch = self._put(self._make_batch(*arrays))
        self._position, self._rows = draft.position, rows.row_b
        return batch, measured

    def sample_ahead(self, step: int, student_params) -> None:
        """Starts sampling the batch of update `step` with weights that lack the update before it.

        To be called before update `step - 1` is dispatched: that donates `student_params`, of which
        the sampler has its own copy on return.
        """
        if self._ahead is not None:
            raise RuntimeError("a batch is under way: another would be stale by more than 1 update")
        draft = self._draw(step, student_params, version=step - 1)
        self._ahead = draft, self._thread.submit(self._answer, draft)

    def answers_ahead(self) -> tuple[dict[str, np.ndarray], Measured]:
        """The answers that are being sampled ahead, once they are there, for `take_up`.

        They cannot be sampled again: their weights are gone. Empty if nothing is under way, or if
        its sampling failed, which `next` will say.
        """
        if self._ahead is None or self._ahead[1].exception() is not None:
            return {}, {}
        rollout, scores, measured = self._ahead[1].result()
        return {**vars(rollout), **(vars(scores) if scores is not None else {})}, measured

    def take_up(self, step: int, arrays: dict[str, np.ndarray], measured: Measured) -> None:
        """Goes on with saved `answers_ahead` to the prompts of update `step`."""
        _, rows, coins_b, position = self._draw_rows(step)
        draft = _Draft(step, rows, coins_b, None, position, measured)
        fields = {field.name for field in dataclasses.fields(Rollout)}
        rollout = Rollout(**{name: array for name, array in arrays.items() if name in fields})
        scores = {name: array for name, array in arrays.items() if name not in fields}
        future: Future = Future()
        future.set_result((rollout, TopKScores(**scores) if scores else None, measured))
        self._ahead = draft, future

    def close(self) -> None:
        """Waits for a generation under way, whose answers are dropped; its thread ends."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None

    def _draw(self, step: int, student_params, version: int) -> _Draft:
        """Takes the prompts of `step`, tosses its coins and, if it samples, refits the sampler."""
        prompts, rows, coins_b, position = self._draw_rows(step)
        if not coins_b.any():
            return _Draft(step, rows, coins_b, None, position, {"generation/staleness": 0.0})
        # The last update must have ended before the refit can begin: not part of its time.
        jax.block_until_ready(student_params)
        start = time.perf_counter()
        self._backend.refit(student_params, version=version)
        measured = {
            "generation/staleness": float(step - version),
            "generation/refit_seconds": time.perf_counter() - start,
        }
        lengths_b = prompts.prompt_lengths_b
        request = RolloutRequest(
            tuple(
                tokens_p[:length]
                for tokens_p, length in zip(prompts.prompt_tokens_bp, lengths_b, strict=True)
            ),
            prompts.index_b,
            self._params,
            num_generations=self._num_generations,
            seed=self._seed,
            step=step,
        )
        return _Draft(step, rows, coins_b, request, position, measured)

    def _draw_rows(self, step: int) -> tuple[PromptBatch, PromptBatch, np.ndarray, Any]:
        """The prompts of `step`, as often as each is answered, their coins, and what comes next."""
        prompts = next(self._iterator)
        rows = jax.tree.map(lambda x: np.repeat(x, self._num_generations, axis=0), prompts)
        return prompts, rows, self._toss(step, rows.index_b), self._iterator.get_state()

    def _answer(self, draft: _Draft) -> tuple[Rollout, TopKScores | None, Measured]:
        """Responses of all rows, scored if need be; the part that may run in the thread."""
        rollout, measured = self._respond(draft)
        if self._score is None:
            return rollout, None, measured
        rows, start = draft.rows, time.perf_counter()
        scores = self._score(rows.prompt_tokens_bp, rows.prompt_lengths_b, rollout)
        return rollout, scores, {**measured, "teacher/seconds": time.perf_counter() - start}

    def _respond(self, draft: _Draft) -> tuple[Rollout, Measured]:
        if draft.request is None:
            return self._fixed(draft.rows), draft.measured
        start = time.perf_counter()
        rollout, measured = self._backend.generate(draft.request)
        seconds = time.perf_counter() - start
        measured = {**draft.measured, **_describe(rollout, seconds), **measured}
        if not draft.coins_b.all():
            rollout = _select_rows(draft.coins_b, rollout, self._fixed(draft.rows))
        return rollout, measured

    def _toss(self, step: int, index_b: np.ndarray) -> np.ndarray:
        if self._per_sample:
            index_b = index_b.astype(np.uint32)
            return np.asarray(sample_coins(self._seed, step, index_b, self._lambda))
        return np.full(len(index_b), lambda_coin(self._seed, step, self._lambda))

    def _fixed(self, prompts: PromptBatch) -> Rollout:
        """The data's own responses in the form of a rollout."""
        tokens_br = prompts.response_tokens_br
        missing = self._response_width - tokens_br.shape[1]
        tokens_br = np.pad(tokens_br, ((0, 0), (0, max(missing, 0))), constant_values=self._pad_id)[
            :, : self._response_width
        ]
        zeros_br = np.zeros(tokens_br.shape, np.float32)
        return Rollout(
            tokens_br=tokens_br,
            lengths_b=prompts.response_lengths_b,
            log_probs_br=zeros_br,
            sampled_log_probs_br=zeros_br,
            stopped_b=np.ones(len(tokens_br), bool),
        )


def _describe(rollout: Rollout, seconds: float) -> Measured:
    """What any rollout tells, whichever backend made it."""
    tokens = rollout.lengths_b.sum()
    return {
        "generation/seconds": seconds,
        "generation/tokens_per_second": float(tokens / seconds),
        "generation/mean_length": float(rollout.lengths_b.mean()),
        "generation/max_length": float(rollout.lengths_b.max()),
        "generation/truncated": float(1.0 - rollout.stopped_b.mean()),
        "generation/repetition": repetition(rollout.tokens_br, rollout.lengths_b),
        # E[-log q] over samples of q; what temperature and truncation sample differs from q.
        "generation/entropy_estimate": float(-_masked_sum(rollout) / tokens),
    }


def _masked_sum(rollout: Rollout) -> float:
    mask_br = np.arange(rollout.log_probs_br.shape[1]) < rollout.lengths_b[:, None]
    return np.where(mask_br, rollout.log_probs_br, 0.0).sum(dtype=np.float64)


def repetition(tokens_br: np.ndarray, lengths_b: np.ndarray, n: int = 4) -> float:
    """Share of the n-grams of all answers that came earlier in the same answer."""
    windows = tokens_br.shape[1] - n + 1
    if windows < 1:
        return 0.0
    hashes = np.zeros((len(tokens_br), windows), np.uint64)
    for i in range(n):
        tokens = tokens_br[:, i : i + windows].astype(np.uint64)
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens + np.uint64(1)
    counts_b = np.maximum(lengths_b - n + 1, 0)
    # n-grams that reach beyond the end get the largest number and are sorted behind the others.
    valid = np.arange(windows) < counts_b[:, None]
    hashes = np.sort(np.where(valid, hashes >> np.uint64(1), np.uint64(2**64 - 1)), axis=1)
    repeats = (hashes[:, 1:] == hashes[:, :-1]) & valid[:, 1:]
    return float(repeats.sum() / max(counts_b.sum(), 1))


def _select_rows(coins_b: np.ndarray, sampled: Rollout, fixed: Rollout) -> Rollout:
    """Row by row the sampled response where the coin says so, else the fixed one."""

    def select(ours, theirs):
        return np.where(coins_b.reshape(-1, *[1] * (ours.ndim - 1)), ours, theirs)

    return jax.tree.map(select, sampled, fixed)
