"""Continuous batching: a fixed number of slots, refilled from a queue as answers end.

The host schedules (schedule.py) and the device computes, a few tens of tokens per call. Prompts are
read in length buckets, one reading for all answers to a prompt; a free slot takes the next answer;
when the queue is empty, the answers still running move together and the batch gets narrower.
Attention reads every row of the cache to its own end (on TPUs), or all rows up to the bucket of the
longest running answer. The compiled programs are those of (prompt bucket, first reading or later)
and of (width), or of (width, cache bucket): few, and fixed once the slots are.

What an answer is depends on its request only, through its key: neither the slots nor the order nor
the other answers matter, but for the rounding of products of another shape.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from distill.base.errors import UserError
from distill.base.sharding import num_shards
from distill.models.decoding import LoopWeights, abstract_loop_weights, make_loop_weights
from distill.sampling import cache as caches
from distill.sampling import programs
from distill.sampling.attention import Kernel, resolve_attention
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout, RolloutRequest
from distill.sampling.schedule import Run, prompt_bucket, prompts_per_prefill

MAX_AUTO_SLOTS = 256  # per part; more rows gain little once products are efficient
STEPS_PER_CALL = 32
CACHE_BUCKETS = 4  # each twice as long as the one before; and three quarters of each
CACHE_MULTIPLE = 32
LONG_CACHE_MULTIPLE = 128  # lanes of a TPU, which otherwise would keep keys with positions first
SMALLEST_CACHE_BUCKET = 128


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
      max_length: prompt and response tokens of a row at most.
      num_slots: answers decoded at once, on all devices; 0: what the memory holds and the first
        request needs.
      cache_memory: bytes per device that the cache may take; with num_slots given, not looked at.
      int8: keep keys and values as 8-bit integers.
      attention: how the cache is read; see attention.py.
    """

    max_length: int
    num_slots: int = 0
    cache_memory: float = 4e9
    int8: bool = False
    attention: str | Kernel | None = None

    @property
    def cache_size(self) -> int:
        """Positions of a slot: a call's turns must fit behind the longest row."""
        size = self.max_length + STEPS_PER_CALL
        long = size > LONG_CACHE_MULTIPLE
        return _round_up(size, LONG_CACHE_MULTIPLE if long else CACHE_MULTIPLE)

    @property
    def cache_buckets(self) -> list[int]:
        """Positions that a call of the decode loop may read."""
        sizes = {
            _round_up(self.cache_size * quarters >> (i + 2), CACHE_MULTIPLE)
            for i in range(CACHE_BUCKETS)
            for quarters in (3, 4)
        }
        return sorted(s for s in sizes if s >= SMALLEST_CACHE_BUCKET) or [self.cache_size]


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
        self.config, self.pad_id, self.eos_ids = config, pad_id, eos_ids
        facts = programs.ModelFacts(graphdef, eos_ids, vocab_size, config.int8, config.attention)
        self._facts = facts
        self.num_slots, self._cache = 0, None  # slots per part
        self._make_cache = jax.jit(caches.empty_cache, static_argnums=range(6))
        self._prefill = jax.jit(functools.partial(programs.prefill_prompts, facts))
        self._make_loop_weights = jax.jit(lambda weights: make_loop_weights(facts.merge(weights)))
        self._insert = jax.jit(
            functools.partial(programs.insert_rows, facts), static_argnums=5, donate_argnums=0
        )
        self._decode = jax.jit(
            functools.partial(programs.decode_rows, facts),
            static_argnums=(5, 6, 7),
            donate_argnums=2,
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
            return Run(self, weights, request).finish()
        except BaseException:
            self.release()  # a donated cache may be gone
            raise

    def make_loop_weights(self, weights: nnx.State) -> LoopWeights:
        """What `decode` takes beside the weights; once per request."""
        return self._make_loop_weights(weights)

    def read(
        self, weights: nnx.State, tokens_pgs: np.ndarray, lengths_pg: np.ndarray
    ) -> programs.Prefilled:
        """Prefills right-padded prompts; returns at once."""
        return self._prefill(weights, tokens_pgs, lengths_pg)

    def insert(self, reading: programs.Prefilled, *rows: Any) -> programs.Chosen:
        """See `programs.insert_rows`."""
        self._cache, chosen = self._insert(self._cache, reading, *rows)
        return jax.device_get(chosen)

    def decode(
        self,
        weights: nnx.State,
        loop_weights: LoopWeights,
        rows: programs.Rows,
        stop_at: np.ndarray,
        params: SamplingParams,
    ) -> tuple[programs.Chosen, int]:
        """The rows' next tokens (t, p, w) and the number of turns; see `programs.decode_rows`."""
        size = self._positions_read(rows.lengths_pw.max())
        self._cache, chosen, turns = self._decode(
            weights, loop_weights, self._cache, rows, stop_at, params, size, STEPS_PER_CALL
        )
        return jax.device_get((chosen, turns))

    def move(self, source_mp: np.ndarray, target_mp: np.ndarray, count: int) -> None:
        """Copies `count` slots of each part onto others."""
        self._cache = self._move(self._cache, source_mp, target_mp, np.int32(count))

    def release(self) -> None:
        """Frees the cache until the next request."""
        self._cache = None

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        programs = self._make_loop_weights, self._prefill, self._insert, self._decode, self._move
        return sum(program._cache_size() for program in programs)

    def _positions_read(self, longest: int) -> int:
        """At most, of a row: a call of the decode loop is compiled for it."""
        head_width = self._cache.v_lpcksh.shape[-1]
        if resolve_attention(self.config.attention, head_width) != "xla":
            return self.config.cache_size  # every row is read to its own end
        return next(size for size in self.config.cache_buckets if size >= longest)

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
        model = self._facts.merge(weights)
        parts, slots = self._slots_for(model, num_rows)
        if slots > self.num_slots:
            self.num_slots, self._cache = slots, None
        if self._cache is None:
            self._cache = self._make_cache(
                model.config,
                parts,
                self.num_slots,
                self.config.cache_size,
                model.dtype,
                self.config.int8,
            )

    def cache_bytes(self, weights: nnx.State, num_rows: int) -> float:
        """Bytes per device of the cache that a request of `num_rows` rows calls for."""
        model = self._facts.merge(weights)
        _, slots = self._slots_for(model, num_rows)
        return slots * self._slot_bytes(model)

    def abstract_cache(self, weights: nnx.State, num_rows: int) -> caches.SlotCache:
        """Shapes of that cache, where `weights` are (shapes, too) on the current mesh."""
        model, config = self._facts.merge(weights), self.config
        sizes = *self._slots_for(model, num_rows), config.cache_size, model.dtype, config.int8
        cache = jax.eval_shape(functools.partial(caches.empty_cache, model.config, *sizes))
        mesh = jax.tree.leaves(weights)[0].sharding.mesh

        def placed(x, spec):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(placed, cache, caches.partition_specs(cache))

    def prefill_shape(
        self, weights: nnx.State, num_rows: int, num_generations: int, length: int
    ) -> tuple[int, int, int]:
        """Parts, prompts and tokens of the largest reading of prompts of this length."""
        parts, slots = self._slots_for(self._facts.merge(weights), num_rows)
        size = prompt_bucket(length)
        return parts, prompts_per_prefill(size, slots, num_generations), size

    def lower_prefill(self, weights: nnx.State, shape: tuple[int, int, int]) -> jax.stages.Lowered:
        """A reading of this shape, lowered for shapes of weights on the mesh."""
        tokens_pgs = jax.ShapeDtypeStruct(shape, np.int32)
        return self._prefill.lower(weights, tokens_pgs, jax.ShapeDtypeStruct(shape[:2], np.int32))

    def lower_decode(
        self, weights: nnx.State, num_rows: int, params: SamplingParams
    ) -> jax.stages.Lowered:
        """The decode loop at its widest and longest, lowered for shapes of weights on the mesh."""
        model, cache = self._facts.merge(weights), self.abstract_cache(weights, num_rows)
        _, parts, slots, *_ = cache.k_lpckhs.shape

        def of_rows(*more: int, dtype=np.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((parts, slots, *more), dtype)

        rows = programs.Rows(
            token_pw=of_rows(),
            lengths_pw=of_rows(),
            made_pw=of_rows(),
            limit_pw=of_rows(),
            key_pw2=of_rows(2, dtype=np.uint32),
            running_pw=of_rows(dtype=bool),
        )
        stop_at = jax.ShapeDtypeStruct((2,), np.int32)
        sizes = dataclasses.replace(params, max_length=1), self.config.cache_size, STEPS_PER_CALL
        loop_weights = abstract_loop_weights(model)
        return self._decode.lower(weights, loop_weights, cache, rows, stop_at, *sizes)

    def _slot_bytes(self, model) -> float:
        token = caches.bytes_per_token(model.config, model.dtype, self.config.int8)
        return token * self.config.cache_size / num_shards("act_kv_heads")

    def _slots_for(self, model, num_rows: int) -> tuple[int, int]:
        """Parts, and slots of each, for a request of `num_rows` rows."""
        parts = num_shards("batch")
        if self.config.num_slots:
            return parts, -(-self.config.num_slots // parts)
        slot = self._slot_bytes(model)
        held = int(self.config.cache_memory // slot)
        if held < 1:
            raise UserError(
                f"policy.generation.cache_memory={self.config.cache_memory / 1e9:g} GB holds no "
                f"slot of {self.config.cache_size} tokens, which takes {slot / 1e9:.3g} GB per "
                "device: raise it, or lower policy.max_total_sequence_length"
            )
        # A power of two: requests of about the same size find the programs compiled.
        rows = -(-num_rows // parts)
        return parts, min(held, MAX_AUTO_SLOTS, 1 << (rows - 1).bit_length())


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
