"""The device's side of an engine: the cache of all slots, and the compiled programs on it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from distill.base.sharding import num_shards
from distill.models.decoding import LoopWeights, abstract_loop_weights, make_loop_weights
from distill.sampling import cache as caches
from distill.sampling import programs
from distill.sampling.attention import reads_buckets
from distill.sampling.choice import SamplingParams

STEPS_PER_CALL = 32


class Slots:
    """Slots of a fixed size, of which each holds a row of tokens.

    Args:
      facts: what the programs are compiled for.
      size: positions of a slot: a call's decode steps must fit behind the longest row.
      buckets: positions that a call of the decode loop may read, where it reads all rows alike.
    """

    def __init__(self, facts: programs.ModelFacts, size: int, buckets: list[int]):
        self.facts, self.size, self._buckets = facts, size, buckets
        self.count = 0  # of every part
        self.cache: caches.Cache | None = None
        self._make_cache = jax.jit(caches.make_cache, static_argnums=range(6))
        # Keys and values of right-padded prompts, of arrays (p, g, s) and (p, g); returns at once.
        self.prefill = jax.jit(functools.partial(programs.prefill_prompts, facts))
        # What `decode` takes beside the weights; once per request.
        self.make_loop_weights = jax.jit(lambda weights: make_loop_weights(facts.merge(weights)))
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

    # ------------------------------------------------------------------------------------- memory

    def allocate(self, weights: nnx.State, parts: int, count: int) -> None:
        """Makes the cache, once; again only for more slots than there were."""
        if count > self.count:
            self.count, self.cache = count, None
        if self.cache is None:
            config, *sizes = self._sizes(weights, parts, self.count)
            self.cache = self._make_cache(config, *sizes)
            if not reads_buckets(self.facts.attention, self.cache, config.kinds):
                self._buckets = [self.size]

    def release(self) -> None:
        """Frees the cache until the next request."""
        self.cache = None

    def slot_bytes(self, weights: nnx.State) -> float:
        """Bytes of a slot on each of the devices that share it."""
        parts = num_shards("batch")
        cache = jax.eval_shape(lambda: caches.make_cache(*self._sizes(weights, parts, 1)))
        return caches.shard_bytes(cache)

    def abstract_cache(self, weights: nnx.State, parts: int, count: int) -> caches.Cache:
        """Shapes of a cache, where `weights` are (shapes, too) on the current mesh."""
        sizes = self._sizes(weights, parts, count)
        cache = jax.eval_shape(functools.partial(caches.make_cache, *sizes))
        mesh = jax.tree.leaves(weights)[0].sharding.mesh

        def placed(x, spec):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(placed, cache, caches.partition_specs(cache))

    def _sizes(self, weights: nnx.State, parts: int, count: int) -> tuple:
        model = self.facts.merge(weights)
        return model.config, parts, count, self.size, model.dtype, self.facts.int8

    # ------------------------------------------------------------------------------- computations

    def insert(self, prefilled: programs.Prefilled, *rows: Any) -> programs.Chosen:
        """See `programs.insert_rows`."""
        self.cache, chosen = self._insert(self.cache, prefilled, *rows)
        return jax.device_get(chosen)

    def decode(
        self,
        weights: nnx.State,
        loop_weights: LoopWeights,
        rows: programs.Rows,
        stop_at: np.ndarray,
        params: SamplingParams,
    ) -> tuple[programs.Chosen, int]:
        """The rows' next tokens (t, p, w) and the number of steps; see `programs.decode_rows`."""
        # Positions read of a row, at most: the loop is compiled for it.
        size = next(size for size in self._buckets if size >= rows.lengths_pw.max())
        self.cache, chosen, steps = self._decode(
            weights, loop_weights, self.cache, rows, stop_at, params, size, STEPS_PER_CALL
        )
        return jax.device_get((chosen, steps))

    def move(self, source_mp: np.ndarray, target_mp: np.ndarray, count: int) -> None:
        """Copies `count` slots of each part onto others."""
        self.cache = self._move(self.cache, source_mp, target_mp, np.int32(count))

    # ------------------------------------------------------------------- for who only compiles them

    def lower_prefill(self, weights: nnx.State, shape: tuple[int, int, int]) -> jax.stages.Lowered:
        """A prefill of this shape, lowered for shapes of weights on the mesh."""
        tokens_pgs = jax.ShapeDtypeStruct(shape, np.int32)
        return self.prefill.lower(weights, tokens_pgs, jax.ShapeDtypeStruct(shape[:2], np.int32))

    def lower_decode(
        self, weights: nnx.State, parts: int, count: int, params: SamplingParams
    ) -> jax.stages.Lowered:
        """The decode loop at its widest and longest, lowered for shapes of weights on the mesh."""

        def of_rows(*more: int, dtype=np.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((parts, count, *more), dtype)

        rows = programs.Rows(
            token_pw=of_rows(),
            lengths_pw=of_rows(),
            made_pw=of_rows(),
            limit_pw=of_rows(),
            key_pw2=of_rows(2, dtype=np.uint32),
            running_pw=of_rows(dtype=bool),
        )
        return self._decode.lower(
            weights,
            abstract_loop_weights(self.facts.merge(weights)),
            self.abstract_cache(weights, parts, count),
            rows,
            jax.ShapeDtypeStruct((2,), np.int32),
            params,
            self.size,
            STEPS_PER_CALL,
        )
