"""Continuous batching: a fixed number of slots, refilled from a queue as responses end.

The host schedules (schedule.py) and the device computes, a few tens of tokens per call (slots.py).
Prompts are prefilled in length buckets, once for all responses to a prompt; a free slot takes the
next response; when the queue is empty, the responses still running move together and the batch gets
narrower. Attention reads every row of the cache to its own end (on TPUs), or all rows up to the
bucket of the longest running response. The compiled programs are those of (prompt bucket, first
prefill or later) and of (width), or of (width, cache bucket): few, and fixed once the slots are.

What a response is depends on its request only, through its key: neither the slots nor the order nor
the other responses matter, but for the rounding of products of another shape.
"""

from __future__ import annotations

import dataclasses

from flax import nnx

from distill.base.errors import UserError
from distill.base.mesh import use_row_mesh
from distill.base.sharding import num_shards, round_up
from distill.sampling.attention import Kernel
from distill.sampling.programs import ModelFacts
from distill.sampling.request import Rollout, RolloutRequest
from distill.sampling.schedule import Run
from distill.sampling.slots import STEPS_PER_CALL, Slots

MAX_AUTO_SLOTS = 256  # per part; more rows gain little once products are efficient
CACHE_BUCKETS = 4  # each twice as long as the one before; and three quarters of each
CACHE_MULTIPLE = 32
LONG_CACHE_MULTIPLE = 128  # lanes of a TPU, which otherwise would keep keys with positions first
SMALLEST_CACHE_BUCKET = 128


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
      num_slots: responses decoded at once, on all devices; 0: what the memory holds and the first
        request needs.
      cache_memory: bytes per device that the cache may take; with num_slots given, not looked at.
      attention: how the cache is read; see attention.py.
      records_routes: say which experts a mixture's tokens passed, in the column `routed_experts`.
      few_programs: for few requests of short responses, where programs for fewer rows would take
        longer to compile than they save.
    """

    max_length: int
    num_slots: int = 0
    cache_memory: float = 4e9
    int8: bool = False
    attention: str | Kernel | None = None
    records_routes: bool = False
    few_programs: bool = False

    @property
    def cache_size(self) -> int:
        """Positions of a slot: a call's decode steps must fit behind the longest row."""
        size = self.max_length + STEPS_PER_CALL
        long = size > LONG_CACHE_MULTIPLE
        return round_up(size, LONG_CACHE_MULTIPLE if long else CACHE_MULTIPLE)

    @property
    def cache_buckets(self) -> list[int]:
        """Positions that a call of the decode loop may read."""
        sizes = {
            round_up(self.cache_size * quarters >> (i + 2), CACHE_MULTIPLE)
            for i in range(CACHE_BUCKETS)
            for quarters in (3, 4)
        }
        return sorted(s for s in sizes if s >= SMALLEST_CACHE_BUCKET) or [self.cache_size]


class Engine:
    """Samples what requests ask for, with a model's weights.

    Call it under the mesh (`jax.set_mesh`) that holds the weights, always the same; devices that
    share rows there have rows of their own here. Any of `eos_ids` ends a response, which `pad_id`
    fills; ids from `vocab_size` on are never chosen.
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
        self.config, self._pad_id = config, pad_id
        facts = ModelFacts(
            graphdef, eos_ids, vocab_size, config.int8, config.attention, config.records_routes
        )
        self.slots = Slots(facts, config.cache_size, config.cache_buckets)

    def generate(
        self, weights: nnx.State, request: RolloutRequest
    ) -> tuple[Rollout, dict[str, float]]:
        """A response for every row of the request; see `RolloutBackend.generate`.

        Raises:
          UserError: a prompt leaves no room for a response, or the memory holds no slot.
        """
        self._check(request)
        with use_row_mesh():
            self.slots.allocate(weights, *self.slots_for(weights, request.num_rows))
            try:
                few_programs = self.config.few_programs
                return Run(self.slots, weights, request, self._pad_id, few_programs).finish()
            except BaseException:
                self.release()  # a donated cache may be gone
                raise

    def release(self) -> None:
        """Frees the cache until the next request."""
        self.slots.release()

    def _check(self, request: RolloutRequest) -> None:
        for index, prompt in zip(request.prompt_index, request.prompts, strict=True):
            if not len(prompt):
                raise UserError(f"prompt {index} has no tokens: there is nothing to respond to")
            if len(prompt) + request.params.max_length > self.config.max_length:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens, which with a response of up to "
                    f"{request.params.max_length} exceed the cache's {self.config.max_length}: "
                    "raise policy.max_total_sequence_length or lower the response's max_length"
                )

    def slots_for(self, weights: nnx.State, num_rows: int) -> tuple[int, int]:
        """Parts, and slots of each, for a request of `num_rows` rows."""
        parts = num_shards("batch")
        if self.config.num_slots:
            return parts, -(-self.config.num_slots // parts)
        slot = self.slots.slot_bytes(weights)
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
