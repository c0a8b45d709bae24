"""Continuous batching: a fixed number of slots, refilled from a queue as answers end.

The host schedules and the device computes, a few tens of tokens per call. Prompts are read in
length buckets, one reading for all answers to a prompt; a free slot takes the next answer; when the
queue is empty, the answers still running move together and the batch gets narrower. Attention reads
the cache up to the bucket of the longest running answer. The compiled programs are those of
(prompt bucket) and of (width, cache bucket): few, and fixed once the slots are.

What an answer is depends on its request only, through its key: neither the slots nor the order nor
the other answers matter, but for the rounding of products of another shape.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time

import jax
import numpy as np
from flax import nnx

from distill.errors import UserError
from distill.sampling import cache as caches
from distill.sampling import programs
from distill.sampling.choice import row_keys
from distill.sampling.request import Rollout, RolloutRequest
from distill.sharding import num_shards

MAX_AUTO_SLOTS = 256  # per part; more rows gain little once products are efficient
TURNS_PER_CALL = 32
INSERTED_PER_CALL = 16  # rows, per part
PREFILL_TOKENS = 4096  # of a reading, per part
SMALLEST_PROMPT_BUCKET = 16
CACHE_BUCKETS = 4  # each twice as long as the one before
CACHE_MULTIPLE = 32
SMALLEST_CACHE_BUCKET = 128
WIDTHS = 5  # each half as wide as the one before


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
      max_length: prompt and response tokens of a row at most.
      num_slots: answers decoded at once, on all devices; 0: what the memory holds and the first
        request needs.
      cache_memory: bytes per device that the cache may take; with num_slots given, not looked at.
      int8: keep keys and values as 8-bit integers.
    """

    max_length: int
    num_slots: int = 0
    cache_memory: float = 4e9
    int8: bool = False

    @property
    def cache_size(self) -> int:
        """Positions of a slot: a call's turns must fit behind the longest row."""
        return _round_up(self.max_length + TURNS_PER_CALL, CACHE_MULTIPLE)


class Engine:
    """Answers requests with a model's weights.

    Call it under the mesh (`jax.set_mesh`) that holds the weights, always the same.

    Args:
      graphdef: of the model, from `nnx.split(model, nnx.Param)`.
      config: sizes.
      eos_ids: any of these ends an answer.
      pad_id: fills answers after their end.
      vocab_size: number of real tokens; ids from there on are never chosen.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: EngineConfig,
        *,
        eos_ids: tuple[int, ...],
        pad_id: int,
        vocab_size: int,
    ):
        self.config, self._pad_id, self._eos_ids = config, pad_id, eos_ids
        facts = programs.ModelFacts(graphdef, eos_ids, vocab_size, config.int8)
        self._facts = facts
        self._slots, self._cache = 0, None  # slots per part
        self._make_cache = jax.jit(caches.empty_cache, static_argnums=range(6))
        self._prefill = jax.jit(functools.partial(programs.prefill_prompts, facts))
        self._insert = jax.jit(
            functools.partial(programs.insert_rows, facts), static_argnums=5, donate_argnums=0
        )
        self._decode = jax.jit(
            functools.partial(programs.decode_rows, facts),
            static_argnums=(4, 5, 6),
            donate_argnums=1,
        )
        # A partial, like the others: jit would share what it compiled among engines.
        self._move = jax.jit(functools.partial(caches.move), donate_argnums=0)

    def generate(
        self, weights: nnx.State, request: RolloutRequest
    ) -> tuple[Rollout, dict[str, float]]:
        """Answers every row of the request; see `RolloutBackend.generate`.

        Raises:
          UserError: a prompt leaves no room for an answer, or the memory holds no slot.
        """
        self._check(request)
        self._allocate(weights, request.num_rows)
        try:
            return _Run(self, weights, request).finish()
        except BaseException:
            self.release()  # a donated cache may be gone
            raise

    def release(self) -> None:
        """Frees the cache until the next request."""
        self._cache = None

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return sum(f._cache_size() for f in (self._prefill, self._insert, self._decode, self._move))

    def _check(self, request: RolloutRequest) -> None:
        for index, prompt in zip(request.prompt_index, request.prompts, strict=True):
            if not len(prompt):
                raise UserError(f"prompt {index} has no tokens: there is nothing to answer")
            if len(prompt) + request.params.max_length > self.config.max_length:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens, which with an answer of up to "
                    f"{request.params.max_length} exceed the cache's {self.config.max_length}: "
                    "raise policy.max_total_sequence_length or lower the answer's max_length"
                )

    def _allocate(self, weights: nnx.State, num_rows: int) -> None:
        """Makes the cache, once; again only for a request that more slots would serve faster."""
        parts = num_shards("batch")
        model = self._facts.merge(weights)
        if not self._slots or (not self.config.num_slots and self._slots < MAX_AUTO_SLOTS):
            slots = self._num_slots(model, -(-num_rows // parts), parts)
            if slots > self._slots:
                self._slots, self._cache = slots, None
        if self._cache is None:
            self._cache = self._make_cache(
                model.config,
                parts,
                self._slots,
                self.config.cache_size,
                model.dtype,
                self.config.int8,
            )

    def _num_slots(self, model, rows: int, parts: int) -> int:
        if self.config.num_slots:
            return -(-self.config.num_slots // parts)
        token = caches.bytes_per_token(model.config, model.dtype, self.config.int8)
        slot = token * self.config.cache_size / num_shards("act_kv_heads")
        held = int(self.config.cache_memory // slot)
        if held < 1:
            raise UserError(
                f"policy.generation.cache_memory={self.config.cache_memory / 1e9:g} GB holds no "
                f"slot of {self.config.cache_size} tokens, which takes {slot / 1e9:.3g} GB per "
                "device: raise it, or lower policy.max_total_sequence_length"
            )
        # A power of two: requests of about the same size find the programs compiled.
        return min(held, MAX_AUTO_SLOTS, 1 << (rows - 1).bit_length())


class _Run:
    """One request on its way through an engine: the host's side of every slot."""

    def __init__(self, engine: Engine, weights: nnx.State, request: RolloutRequest):
        self._engine, self._weights, self._request = engine, weights, request
        self._params = dataclasses.replace(request.params, max_length=1)  # limits are per row
        rows, length = request.num_rows, request.params.max_length
        self._limits = (
            np.minimum(request.max_lengths, length)
            if (request.max_lengths is not None)
            else np.full(rows, length)
        )
        repeats = request.num_generations
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
            tokens_br=np.full((rows, length), engine._pad_id, np.int32),
            lengths_b=np.zeros(rows, np.int32),
            log_probs_br=np.zeros((rows, length), np.float32),
            sampled_log_probs_br=np.zeros((rows, length), np.float32),
            stopped_b=np.zeros(rows, bool),
        )
        self._parts = num_shards("batch")
        slots = engine._slots
        self._row = np.full((self._parts, slots), -1)  # -1: idle
        self._token = np.zeros((self._parts, slots), np.int32)
        # Longest prompts first: readings then have little padding.
        order = sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i]))
        self._queue = collections.deque(order)
        # Rows of each part that have been read and wait for a slot: (reading, prompt in it, row).
        self._waiting = [collections.deque() for _ in range(self._parts)]
        self._widths = [max(1, slots >> i) for i in range(WIDTHS) if i == 0 or slots >> i >= 4]
        self._started = time.perf_counter()
        self._prefill_seconds = self._decode_seconds = self._wait_seconds = 0.0
        self._slot_turns = self._kept_turns = 0

    def finish(self) -> tuple[Rollout, dict[str, float]]:
        while self._queue or any(self._waiting) or self._running.any():
            self._refill()
            if self._running.any():
                self._decode()
        return self._rollout, self._measured()

    # ----------------------------------------------------------------------------- filling slots

    @property
    def _running(self) -> np.ndarray:
        return self._row >= 0

    @property
    def _refill_size(self) -> int:
        """Slots of a part that are worth the interruption once they are free."""
        return max(1, self._engine._slots // 8)

    def _refill(self) -> None:
        start = time.perf_counter()
        self._insert_waiting()
        repeats = self._request.num_generations
        while self._queue:
            free = (~self._running).sum(axis=1) - [len(rows) for rows in self._waiting]
            wanted = min(self._refill_size, len(self._queue) * repeats)
            if self._running.any() and free.max() < wanted or free.max() <= 0:
                break
            self._read(free)
            self._insert_waiting()
        self._prefill_seconds += time.perf_counter() - start

    def _read(self, free: np.ndarray) -> None:
        """Prefills the next prompts, as many as a reading takes and free slots can use."""
        prompts, repeats = self._request.prompts, self._request.num_generations
        size = _prompt_bucket(len(prompts[self._queue[0]]))
        most = max(1, min(self._refill_size, PREFILL_TOKENS // size))
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
        tokens_pgs = np.full((self._parts, most, size), self._engine._pad_id, np.int32)
        lengths_pg = np.ones((self._parts, most), np.int32)
        for part, indices in enumerate(taken):
            for g, index in enumerate(indices):
                lengths_pg[part, g] = len(prompts[index])
                tokens_pgs[part, g, : len(prompts[index])] = prompts[index]
        reading = self._engine._prefill(self._weights, tokens_pgs, lengths_pg)
        for part, indices in enumerate(taken):
            for g, index in enumerate(indices):
                rows = range(index * repeats, (index + 1) * repeats)
                self._waiting[part].extend((reading, g, row) for row in rows)

    def _insert_waiting(self) -> None:
        """Gives waiting rows the free slots, a call per reading and INSERTED_PER_CALL rows."""
        while True:
            fronts = [
                rows[0][0]
                for rows, free in zip(self._waiting, (~self._running).any(axis=1), strict=True)
                if rows and free
            ]
            if not fronts:
                return
            self._insert(fronts[0])

    def _insert(self, reading: programs.Prefilled) -> None:
        slots = self._engine._slots
        most = min(INSERTED_PER_CALL, slots)
        source = np.zeros((self._parts, most), np.int32)
        slot = np.full((self._parts, most), slots, np.int32)  # a slot that does not exist
        rows = np.full((self._parts, most), -1)
        for part, waiting in enumerate(self._waiting):
            free = np.flatnonzero(self._row[part] < 0)
            for i, free_slot in enumerate(free[:most]):
                if not waiting or waiting[0][0] is not reading:
                    break
                _, source[part, i], rows[part, i] = waiting.popleft()
                slot[part, i] = free_slot
        keys = np.where((rows >= 0)[:, :, None], self._keys[rows], 0)
        self._engine._cache, chosen = self._engine._insert(
            self._engine._cache, reading, source, slot, keys, self._params
        )
        chosen = jax.device_get(chosen)
        now = time.perf_counter() - self._started
        for part, i in zip(*np.nonzero(rows >= 0), strict=True):
            row = rows[part, i]
            self._wait_seconds += now
            self._row[part, slot[part, i]] = row
            self._token[part, slot[part, i]] = chosen.token[part, i]
            self._keep(row, jax.tree.map(lambda x: x[part, i : i + 1], chosen))  # noqa: B023
        self._free_ended()

    # ----------------------------------------------------------------------------------- decoding

    def _decode(self) -> None:
        start = time.perf_counter()
        width = self._narrow()
        row_pw = self._row[:, :width]
        running_pw, rows_b = row_pw >= 0, row_pw[row_pw >= 0]
        prompt_lengths = np.array([len(prompt) for prompt in self._request.prompts])

        def of_rows(values, fill=0):
            full = np.full((*row_pw.shape, *values.shape[1:]), fill, values.dtype)
            full[running_pw] = values[rows_b]
            return full

        made = self._rollout.lengths_b
        lengths = np.repeat(prompt_lengths, self._request.num_generations) + made - 1
        rows = programs.Rows(
            token_pw=self._token[:, :width],
            lengths_pw=of_rows(lengths.astype(np.int32)),
            made_pw=of_rows(made),
            limit_pw=of_rows(self._limits.astype(np.int32)),
            key_pw2=of_rows(self._keys),
            running_pw=running_pw,
        )
        size = next(s for s in self._cache_buckets() if s >= rows.lengths_pw.max())
        self._engine._cache, chosen, turns = self._engine._decode(
            self._weights,
            self._engine._cache,
            rows,
            np.array(self._stop_at(width), np.int32),
            self._params,
            size,
            TURNS_PER_CALL,
        )
        chosen, turns = jax.device_get((chosen, turns))
        kept_before = made.sum()
        for part, slot in zip(*np.nonzero(running_pw), strict=True):
            self._keep(
                self._row[part, slot],
                jax.tree.map(lambda x: x[:turns, part, slot], chosen),  # noqa: B023
            )
        self._token[:, :width] = chosen.token[turns - 1]
        self._free_ended()
        self._kept_turns += int(made.sum() - kept_before)
        self._slot_turns += int(turns) * self._parts * width
        self._decode_seconds += time.perf_counter() - start

    def _stop_at(self, width: int) -> tuple[int, int]:
        """Rows running, in all and in every part, at which the host can do something useful."""
        if self._queue or any(self._waiting):
            return int(self._running.sum()) - self._refill_size, 0
        narrower = [other for other in self._widths if other < width]
        return 0, narrower[0] if narrower else 0

    def _narrow(self) -> int:
        """The smallest width that holds every part's rows, which are moved into it."""
        if self._queue or any(self._waiting):
            return self._widths[0]
        most = int(self._running.sum(axis=1).max())
        width = min(width for width in self._widths if width >= most)
        outside = [np.flatnonzero(part[width:] >= 0) + width for part in self._row]
        count = max(map(len, outside))
        if count:
            # A part with fewer rows to move copies a slot onto itself.
            source = np.zeros((self._engine._slots, self._parts), np.int32)
            target = np.zeros_like(source)
            for part, sources in enumerate(outside):
                targets = np.flatnonzero(self._row[part, :width] < 0)[: len(sources)]
                source[: len(sources), part], target[: len(sources), part] = sources, targets
                self._row[part, targets] = self._row[part, sources]
                self._token[part, targets] = self._token[part, sources]
                self._row[part, sources] = -1
            self._engine._cache = self._engine._move(
                self._engine._cache, source, target, np.int32(count)
            )
        return width

    def _cache_buckets(self) -> list[int]:
        size = self._engine.config.cache_size
        halves = (_round_up(size >> i, CACHE_MULTIPLE) for i in reversed(range(CACHE_BUCKETS)))
        return [half for half in halves if half >= SMALLEST_CACHE_BUCKET] or [size]

    # ------------------------------------------------------------------------------------ results

    def _keep(self, row: int, chosen: programs.Chosen) -> None:
        """Adds a row's tokens up to its end."""
        rollout, made = self._rollout, self._rollout.lengths_b[row]
        count = min(len(chosen.token), self._limits[row] - made)
        ends = np.flatnonzero(np.isin(chosen.token[:count], self._engine._eos_ids))
        if len(ends):
            count = ends[0] + 1
            rollout.stopped_b[row] = True
        to = slice(made, made + count)
        rollout.tokens_br[row, to] = chosen.token[:count]
        rollout.log_probs_br[row, to] = chosen.log_prob[:count]
        rollout.sampled_log_probs_br[row, to] = chosen.sampled_log_prob[:count]
        rollout.lengths_b[row] += count

    def _free_ended(self) -> None:
        ended = self._rollout.stopped_b | (self._rollout.lengths_b >= self._limits)
        self._row[self._running & ended[self._row]] = -1

    def _measured(self) -> dict[str, float]:
        """What `RolloutBackend.generate` reports."""
        return {
            "generation/prefill_seconds": self._prefill_seconds,
            "generation/decode_seconds": self._decode_seconds,
            "generation/queue_wait": self._wait_seconds / self._request.num_rows,
            "generation/slot_occupancy": self._kept_turns / max(self._slot_turns, 1),
        }


_row_keys = jax.jit(row_keys)


def _prompt_bucket(length: int) -> int:
    """The next of 16, 32, 64, 96, 128, 192, 256, 384, ..."""
    power = max(SMALLEST_PROMPT_BUCKET, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 64 and length <= power * 3 // 4 else power


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
