"""The host's side of the engine: which response has which slot, and what is computed next."""

from __future__ import annotations

import collections
import dataclasses
import time

import jax
import numpy as np
from flax import nnx

from distill.base import processes
from distill.base.sharding import num_shards
from distill.base.status import how_far
from distill.sampling import programs
from distill.sampling.choice import row_keys
from distill.sampling.request import Rollout, RolloutRequest, Turns
from distill.sampling.slots import STEPS_PER_CALL, Slots

INSERTED_PER_CALL = 16  # rows, per part
PREFILL_TOKENS = 4096  # of a prefill, per part
SMALLEST_PROMPT_BUCKET = 16
# Up to so many tokens, most programs for fewer rows would compile longer than they save.
SHORT_RESPONSE = 128


class Run:
    """One request on its way through the slots."""

    def __init__(
        self,
        slots: Slots,
        weights: nnx.State,
        request: RolloutRequest,
        pad_id: int,
        few_programs: bool = False,
    ):
        self._slots, self._weights, self._request = slots, weights, request
        self._pad_id = pad_id
        self._loop_weights = slots.make_loop_weights(weights)
        self._params = dataclasses.replace(request.params, max_length=1)  # limits are per row
        rows, length = request.num_rows, request.params.max_length
        self._limits = request.limits.copy()
        repeats = request.num_generations
        self._prompt_lengths = np.repeat([len(prompt) for prompt in request.prompts], repeats)
        self._keys = np.asarray(
            jax.random.key_data(
                _row_keys(
                    *(np.asarray(x).astype(np.uint32) for x in (request.seed, request.step)),
                    np.repeat(request.prompt_index, repeats).astype(np.uint32),
                    np.tile(np.arange(repeats, dtype=np.uint32), len(request.prompts)),
                )
            )
        )
        self._rollout = Rollout(
            tokens_br=np.full((rows, length), pad_id, np.int32),
            lengths_b=np.zeros(rows, np.int32),
            log_probs_br=np.zeros((rows, length), np.float32),
            sampled_log_probs_br=np.zeros((rows, length), np.float32),
            stopped_b=np.zeros(rows, bool),
        )
        # Of dialogues: whose turn has ended and who waits, where it began, and what is to be read.
        self._asked, self._begun = np.zeros(rows, bool), np.zeros(rows, np.int32)
        self._given: dict[int, np.ndarray] = {}
        self._sampled_br = np.ones((rows, length), bool)
        # Where they are recorded: experts that the prompts' tokens passed, and the rows' tokens.
        self._of_prompts: dict[int, np.ndarray] = {}
        self._picked_brm: np.ndarray | None = None
        self._parts = num_shards("batch")
        count = slots.count
        self._row = np.full((self._parts, count), -1)  # -1: idle
        # Longest prompts first: prefills then have little padding.
        order = sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i]))
        self._queue = collections.deque(order)
        # Rows of each part that are prefilled and want a slot: (prefilled, prompt in it, row).
        self._waiting: list[collections.deque[tuple[programs.Prefilled, int, int]]]
        self._waiting = [collections.deque() for _ in range(self._parts)]
        # Slots that a first prefill fills: the later ones are of `_refill_size`, for most requests.
        self._at_first = self._refill_size if few_programs and rows > count else count
        self._widths = [count] if few_programs else _widths(count, length)
        self._started = time.perf_counter()
        self._prefill_seconds = self._decode_seconds = self._wait_seconds = 0.0
        self._slot_steps = self._kept_steps = 0

    def finish(self) -> tuple[Rollout, dict[str, float]]:
        while self._queue or any(self._waiting) or self._taken.any():
            self._refill()
            if self._request.between is not None:
                self._request.between()
            how_far(f"{self._num_finished} of {self._request.num_rows} responses")
            if self._request.turns is not None:
                self._take_replies(self._request.turns)
            if self._running.any():
                self._decode()
        how_far("")
        rollout = self._rollout if self._picked_brm is None else self._with_routes(self._picked_brm)
        if self._request.turns is None:
            return rollout, self._measured()
        columns = dict(sampled=self._sampled_br, weight=self._sampled_br.astype(np.float32))
        columns |= rollout.columns
        return dataclasses.replace(rollout, columns=columns), self._measured()

    @property
    def _num_finished(self) -> int:
        waiting = len(self._queue) * self._request.num_generations + sum(map(len, self._waiting))
        return self._request.num_rows - waiting - int(self._taken.sum())

    # ----------------------------------------------------------------------------- filling slots

    @property
    def _taken(self) -> np.ndarray:
        return self._row >= 0

    @property
    def _running(self) -> np.ndarray:
        return self._taken & ~self._asked[self._row]

    @property
    def _refill_size(self) -> int:
        """Slots of a part that are worth the interruption once they are free."""
        return max(1, self._slots.count // 8)

    def _refill(self) -> None:
        start = time.perf_counter()
        self._insert_waiting()
        repeats = self._request.num_generations
        # Where nothing waits for it, few large prefills.
        at_once = self._refill_size if self._taken.any() else self._at_first
        while self._queue:
            free = (~self._taken).sum(axis=1) - [len(rows) for rows in self._waiting]
            wanted = min(self._refill_size, len(self._queue) * repeats)
            if self._running.any() and free.max() < wanted or free.max() <= 0:
                break
            self._prefill(free, at_once)
            self._insert_waiting()
        self._prefill_seconds += time.perf_counter() - start

    def _prefill(self, free: np.ndarray, slots: int) -> None:
        """Prefills each part's next prompts, responses to which fill at most so many slots."""
        prompts, repeats = self._request.prompts, self._request.num_generations
        size = prompt_bucket(len(prompts[self._queue[0]]))
        most = prompts_per_prefill(size, slots, repeats)
        taken: list[list[int]] = [[] for _ in range(self._parts)]
        free = free.copy()
        while self._queue:
            room = [
                part for part in range(self._parts) if len(taken[part]) < most and free[part] > 0
            ]
            if not room:
                break
            part = max(room, key=lambda part: free[part])
            taken[part].append(self._queue.popleft())
            free[part] -= repeats
        tokens_pgs = np.full((self._parts, most, size), self._pad_id, np.int32)
        lengths_pg = np.ones((self._parts, most), np.int32)
        for part, indices in enumerate(taken):
            for g, index in enumerate(indices):
                lengths_pg[part, g] = len(prompts[index])
                tokens_pgs[part, g, : len(prompts[index])] = prompts[index]
        prefilled = self._slots.prefill(self._weights, tokens_pgs, lengths_pg)
        for part, indices in enumerate(taken):
            for g, index in enumerate(indices):
                rows = range(index * repeats, (index + 1) * repeats)
                self._waiting[part].extend((prefilled, g, row) for row in rows)
        if prefilled.picked_pgsm is not None:
            self._record_prompts(taken, jax.device_get(prefilled.picked_pgsm))

    def _insert_waiting(self) -> None:
        """Gives waiting rows the free slots, a call per prefill and INSERTED_PER_CALL rows."""
        while True:
            fronts = [
                rows[0][0]
                for rows, free in zip(self._waiting, np.any(~self._taken, axis=1), strict=True)
                if rows and free
            ]
            if not fronts:
                return
            self._insert(fronts[0])

    def _insert(self, prefilled: programs.Prefilled) -> None:
        count = self._slots.count
        most = min(INSERTED_PER_CALL, count)
        source = np.zeros((self._parts, most), np.int32)
        slot = np.full((self._parts, most), count, np.int32)  # a slot that does not exist
        rows = np.full((self._parts, most), -1)
        for part, waiting in enumerate(self._waiting):
            free = np.flatnonzero(self._row[part] < 0)
            for i, free_slot in enumerate(free[:most]):
                if not waiting or waiting[0][0] is not prefilled:
                    break
                _, source[part, i], rows[part, i] = waiting.popleft()
                slot[part, i] = free_slot
        keys = np.where((rows >= 0)[:, :, None], self._keys[rows], 0)
        chosen = self._slots.insert(prefilled, source, slot, keys, self._params)
        now = time.perf_counter() - self._started
        for part, i in zip(*np.nonzero(rows >= 0), strict=True):
            row = rows[part, i]
            self._wait_seconds += now
            self._row[part, slot[part, i]] = row
            self._keep(row, jax.tree.map(lambda x: x[part, i : i + 1], chosen))  # noqa: B023
        self._free_ended()

    # ----------------------------------------------------------------------------------- decoding

    def _decode(self) -> None:
        start = time.perf_counter()
        width = self._narrow()
        row_pw, running_pw = self._row[:, :width], self._running[:, :width]
        taken_pw, rows_b = row_pw >= 0, row_pw[row_pw >= 0]

        def of_rows(values):
            full = np.zeros((*row_pw.shape, *values.shape[1:]), values.dtype)
            full[taken_pw] = values[rows_b]
            return full

        made, tokens_br = self._rollout.lengths_b, self._rollout.tokens_br
        lengths = self._prompt_lengths + made - 1
        rows = programs.Rows(
            token_pw=of_rows(tokens_br[np.arange(len(made)), made - 1]),
            lengths_pw=of_rows(lengths.astype(np.int32)),
            made_pw=of_rows(made),
            limit_pw=of_rows(self._limits),
            key_pw2=of_rows(self._keys),
            running_pw=running_pw,
            given_pwt=self._given_next(row_pw),
        )
        stop_at = np.array(self._stop_at(width), np.int32)
        chosen, steps = self._slots.decode(
            self._weights, self._loop_weights, rows, stop_at, self._params
        )
        kept_before = made.sum()
        for part, slot in zip(*np.nonzero(running_pw), strict=True):
            self._keep(
                self._row[part, slot],
                jax.tree.map(lambda x: x[:steps, part, slot], chosen),  # noqa: B023
            )
        self._free_ended()
        self._kept_steps += int(made.sum() - kept_before)
        self._slot_steps += int(steps) * self._parts * width
        self._decode_seconds += time.perf_counter() - start

    def _stop_at(self, width: int) -> tuple[int, int]:
        """Rows running, in all and in every part, at which the host can do something useful."""
        if self._queue or any(self._waiting) or self._request.turns is not None:
            return int(self._running.sum()) - self._refill_size, 0
        narrower = [other for other in self._widths if other < width]
        return 0, narrower[0] if narrower else 0

    def _narrow(self) -> int:
        """The smallest width that holds every part's rows, which are moved into it."""
        if self._queue or any(self._waiting):
            return self._widths[0]
        most = int(self._taken.sum(axis=1).max())
        width = min(width for width in self._widths if width >= most)
        outside = [np.flatnonzero(part[width:] >= 0) + width for part in self._row]
        count = max(map(len, outside))
        if count:
            # A part with fewer rows to move copies a slot onto itself.
            source = np.zeros((self._slots.count, self._parts), np.int32)
            target = np.zeros_like(source)
            for part, sources in enumerate(outside):
                targets = np.flatnonzero(self._row[part, :width] < 0)[: len(sources)]
                source[: len(sources), part], target[: len(sources), part] = sources, targets
                self._row[part, targets] = self._row[part, sources]
                self._row[part, sources] = -1
            self._slots.move(source, target, count)
        return width

    # ------------------------------------------------------------------------------------ results

    def _keep(self, row: int, chosen: programs.Chosen) -> None:
        """Adds a row's tokens up to its end."""
        rollout, made = self._rollout, self._rollout.lengths_b[row]
        count = min(len(chosen.token), self._limits[row] - made)
        read = self._read(row, made, count)
        ends = np.flatnonzero(np.isin(chosen.token[read:count], self._slots.facts.eos_ids))
        if len(ends):
            count = read + ends[0] + 1
        to, sampled = slice(made, made + count), slice(made + read, made + count)
        rollout.tokens_br[row, to] = chosen.token[:count]
        rollout.log_probs_br[row, sampled] = chosen.log_prob[read:count]
        rollout.sampled_log_probs_br[row, sampled] = chosen.sampled_log_prob[read:count]
        if self._picked_brm is not None and chosen.picked is not None:
            self._picked_brm[row, to] = chosen.picked[:count]
        rollout.lengths_b[row] += count
        if len(ends) and self._request.turns is not None:
            self._asked[row] = True
            if processes.is_first():
                turn_t = rollout.tokens_br[row, self._begun[row] : to.stop].copy()
                self._request.turns.ask(row, turn_t)
        elif len(ends):
            rollout.stopped_b[row] = True

    def _record_prompts(self, taken: list[list[int]], picked_pgsm: np.ndarray) -> None:
        """Of prompts `taken` by every part: a token has the experts with which it was predicted."""
        if self._picked_brm is None:
            shape = *self._rollout.tokens_br.shape, picked_pgsm.shape[-1]
            self._picked_brm = np.full(shape, -1, picked_pgsm.dtype)
        repeats = self._request.num_generations
        for part, indices in enumerate(taken):
            for g, index in enumerate(indices):
                picked_sm = picked_pgsm[part, g, : len(self._request.prompts[index])]
                first_1m = np.full_like(picked_sm[:1], -1)
                self._of_prompts[index] = np.concatenate([first_1m, picked_sm[:-1]])
                self._picked_brm[index * repeats : (index + 1) * repeats, 0] = picked_sm[-1]

    def _with_routes(self, picked_brm: np.ndarray) -> Rollout:
        repeats = self._request.num_generations
        of_prompts = [self._of_prompts[row // repeats] for row in range(self._request.num_rows)]
        return dataclasses.replace(
            self._rollout,
            columns=dict(routed_experts=picked_brm),
            prompt_columns=dict(routed_experts=of_prompts),
        )

    def _free_ended(self) -> None:
        ended = self._rollout.stopped_b | (self._rollout.lengths_b >= self._limits)
        self._row[self._running & ended[self._row]] = -1

    # ---------------------------------------------------------------------------------- dialogues

    def _take_replies(self, turns: Turns) -> None:
        """Rows whose dialogues go on read the other side's tokens next; the others have ended."""
        if not self._asked.any():
            return

        def replies() -> list[tuple[int, list[int] | None]]:
            came = turns.replies(wait=not self._running.any())
            return [(int(row), None if said is None else said.tolist()) for row, said in came]

        for row, said in processes.from_first(replies):
            self._asked[row], made = False, self._rollout.lengths_b[row]
            if said is None:
                self._rollout.stopped_b[row] = True
            elif made + len(said) < self._limits[row]:
                self._given[row] = np.array(said, np.int32)
                self._begun[row] = made + len(said)
            else:
                self._limits[row] = made  # no room for another turn
        self._free_ended()

    def _given_next(self, row_pw: np.ndarray) -> np.ndarray | None:
        """What the rows read in the next steps; None where there are no dialogues."""
        if self._request.turns is None:
            return None
        given_pwt = np.full((*row_pw.shape, STEPS_PER_CALL), -1, np.int32)
        for part, slot in zip(*np.nonzero(row_pw >= 0), strict=True):
            tokens_t = self._given.get(row_pw[part, slot], ())[:STEPS_PER_CALL]
            given_pwt[part, slot, : len(tokens_t)] = tokens_t
        return given_pwt

    def _read(self, row: int, made: int, count: int) -> int:
        """How many of a row's next tokens are the other side's, which are its own no more."""
        if row not in self._given:
            return 0
        tokens_t = self._given.pop(row)
        read = min(len(tokens_t), count)
        if read < len(tokens_t):
            self._given[row] = tokens_t[read:]
        self._sampled_br[row, made : made + read] = False
        return read

    def _measured(self) -> dict[str, float]:
        """What `RolloutBackend.generate` reports."""
        return {
            "generation/prefill_seconds": self._prefill_seconds,
            "generation/decode_seconds": self._decode_seconds,
            "generation/queue_wait": self._wait_seconds / self._request.num_rows,
            "generation/slot_occupancy": self._kept_steps / max(self._slot_steps, 1),
        }


_row_keys = jax.jit(row_keys)


def _widths(count: int, longest: int) -> list[int]:
    """Rows of the decode programs, for so many slots and responses up to so long."""
    shares = (2, 8) if longest <= SHORT_RESPONSE else (2, 4, 8, 16)
    return list(dict.fromkeys([count, *(max(1, count // share) for share in shares)]))


def prompts_per_prefill(size: int, slots: int, num_generations: int) -> int:
    """Prompts of a bucket that a part prefills at once, responses to which fill `slots` slots."""
    return max(1, min(-(-slots // num_generations), PREFILL_TOKENS // size))


def prompt_bucket(length: int) -> int:
    """The next of 16, 32, 64, 96, 128, 192, 256, 384, ..."""
    power = max(SMALLEST_PROMPT_BUCKET, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 64 and length <= power * 3 // 4 else power
