"""Attention of one query per row to the cache, each row read to its own end: a kernel for TPU.

The grid has a step for every block of positions that holds some of a row's, and no other; what the
steps are is worked out once, where the lengths are known. A block's index names layer and slot, so
that the kernel reads from the whole cache and nothing is sliced out of it first. Queries of a
key-value head's group are filled up to the 8 rows of a register.

Cache arrays are those of `models.cache.AttentionCache`, of one part (p = 1); w: slot, one of the
first few of the cache; i: step.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from distill.kernels.attention import AttentionSpec
from distill.kernels.attention.blockwise import cap_scores

LANES, SUBLANES = 128, 8

# What a step takes beside its transfers, by Pallas' documentation. A block smaller than what is
# transferred in that time would save nothing, and of a larger one more is read in vain.
STEP_SECONDS = 0.35e-6


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How the kernel runs.

    Attributes:
      block: positions read at a time, a multiple of 128; None: what a chip reads in `STEP_SECONDS`.
      interpret: False, True or pltpu.InterpretParams, as in Pallas.
    """

    block: int | None = None
    interpret: Any = False

    def plan(self, lengths_w: jax.Array, heads: int, width: int, size: int, dtype) -> Steps:
        """The steps of rows of these lengths.

        Args:
          lengths_w: positions of each row.
          heads, width, size, dtype: of a device's k_lpckhs.
        """
        block = self.block
        if block is None:
            step_bytes = int(STEP_SECONDS * _tpu_info().mem_bw_bytes_per_second)
            fitting = step_bytes // (2 * self.heads_of_core(heads) * width * dtype.itemsize)
            block = max(fitting // LANES, 1) * LANES
        block = min(block, size)
        # A row without positions takes a step, too, that writes its zeros.
        blocks_w = jnp.maximum(-(-lengths_w // block), 1)
        first_w = jnp.cumsum(blocks_w) - blocks_w
        most = len(lengths_w) * -(-size // block)
        slot_i = jnp.repeat(jnp.arange(len(lengths_w)), blocks_w, total_repeat_length=most)
        return Steps(slot_i, jnp.arange(most) - first_w[slot_i], jnp.sum(blocks_w), block)

    def heads_of_core(self, heads: int) -> int:
        """Two cores that are one device share the heads."""
        cores = 1 if self.interpret else _tpu_info().num_cores
        return heads // cores if heads % cores == 0 else heads


def _tpu_info():
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.get_tpu_info()


def can_tile(head_width: int) -> bool:
    """Whether heads fill whole registers: else, the compiler copies the cache to fill them up."""
    return head_width % 16 == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Slot and block, of `block` positions, of every step; those from `count` on are not taken."""

    slot_i: jax.Array
    block_i: jax.Array
    count: jax.Array
    block: int = dataclasses.field(metadata={"static": True})


def attend_cache(
    kernel: Kernel,
    q_wkgh: jax.Array,
    k_lpckhs: jax.Array,
    v_lpcksh: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    layer: jax.Array,
    lengths_w: jax.Array,
    steps: Steps,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """Attended values (w, k, g, h) and the log of the sum of exponentials (w, k, g), in float32.

    Args:
      q_wkgh: queries of each key-value head's group.
      k_lpckhs, v_lpcksh: in the queries' dtype, or int8 with scales.
      scales: k_scale_lpcks and v_scale_lpcks, or None.
      layer: its number.
      lengths_w: positions of each row; without any, it attends to zeros, of sum 0.
      steps: from `kernel.plan`, of the same lengths.
      spec: without a window; its sinks are the caller's, who has the sums.
    """
    # Imported here: Pallas is slow to import, and only TPUs need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (rows, heads, group, width), block = q_wkgh.shape, steps.block
    heads_of_core = kernel.heads_of_core(heads)
    padded = pl.cdiv(group, SUBLANES) * SUBLANES
    q_wkgh = jnp.pad(q_wkgh, ((0, 0), (0, 0), (0, padded - group), (0, 0)))

    def of_row(columns):
        block_shape = None, heads_of_core, padded, columns
        return pl.BlockSpec(block_shape, lambda core, i, layer, slot, *_: (slot[i], core, 0, 0))

    def of_cache(positions_last):
        def index(core, i, layer, slot, block_i, _):
            within = (0, block_i[i]) if positions_last else (block_i[i], 0)
            return layer[0], 0, slot[i], core, *within

        shape = (width, block) if positions_last else (block, width)
        return pl.BlockSpec((None, None, None, heads_of_core, *shape), index)

    # Of all heads: fewer might not fill a register.
    of_scales = pl.BlockSpec(
        (None, None, None, heads, block),
        lambda core, i, layer, slot, block_i, _: (layer[0], 0, slot[i], 0, block_i[i]),
    )
    # The layout that the compiler gives values whose heads do not fill the lanes: a free transpose.
    positions_last = width % LANES != 0
    values = jnp.swapaxes(v_lpcksh, -1, -2) if positions_last else v_lpcksh
    inputs = [
        (q_wkgh, of_row(width)),
        (k_lpckhs, of_cache(positions_last=True)),
        (values, of_cache(positions_last)),
    ]
    if scales is not None:
        inputs += [(scale_lpcks, of_scales) for scale_lpcks in scales]
    arrays, in_specs = zip(*inputs, strict=True)
    attended_wkgh, log_sum_wkg1 = pl.pallas_call(
        functools.partial(_kernel, spec=spec, block=block, positions_last=positions_last),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(heads // heads_of_core, steps.count),
            in_specs=in_specs,
            out_specs=[of_row(width), of_row(1)],
            scratch_shapes=[
                pltpu.VMEM((heads_of_core, padded, columns), jnp.float32)
                for columns in (1, 1, width)
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((rows, heads, padded, columns), jnp.float32)
            for columns in (width, 1)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(q_wkgh.shape, k_lpckhs, v_lpcksh),
        interpret=kernel.interpret,
    )(jnp.reshape(layer, 1).astype(jnp.int32), steps.slot_i, steps.block_i, lengths_w, *arrays)
    return attended_wkgh[:, :, :group], log_sum_wkg1[:, :, :group, 0]


def _cost(queries: tuple[int, ...], k_lpckhs: jax.Array, v_lpcksh: jax.Array):
    """Of a layer, if every row were full."""
    from jax.experimental import pallas as pl

    rows, heads, group, width = queries
    cached = rows * heads * k_lpckhs.shape[-1]  # keys
    return pl.CostEstimate(
        flops=4 * group * cached * width,
        transcendentals=group * cached,
        bytes_accessed=cached * width * (k_lpckhs.dtype.itemsize + v_lpcksh.dtype.itemsize),
    )


def _kernel(
    layer_ref,
    slot_ref,
    block_ref,
    lengths_ref,
    q_ref,
    k_ref,
    v_ref,
    *refs,
    spec: AttentionSpec,
    block: int,
    positions_last: bool,
):
    from jax.experimental import pallas as pl

    del layer_ref  # only the indices of blocks have it
    *scale_refs, attended_ref, log_sum_ref, max_ref, sum_ref, total_ref = refs
    core, step, num_heads = pl.program_id(0), pl.program_id(1), q_ref.shape[0]
    start, length = block_ref[step] * block, lengths_ref[slot_ref[step]]

    def in_row(shape, axis):
        return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < length

    @pl.when(start == 0)
    def _():
        max_ref[...] = jnp.full(max_ref.shape, -jnp.inf, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    @pl.when(start < length)
    def _():
        for head in range(num_heads):
            q_gh, k_hs, v = q_ref[head], k_ref[head].astype(q_ref.dtype), v_ref[head]
            # What stands behind the row's end, or the cache's, may be anything.
            v = jnp.where(in_row(v.shape, int(positions_last)), v.astype(q_gh.dtype), 0)
            scores_gs = jnp.dot(q_gh, k_hs, preferred_element_type=jnp.float32)
            scores_gs = scores_gs * spec.scale
            valid_gs = in_row(scores_gs.shape, 1)
            if scale_refs:
                head_of_all = pl.ds(core * num_heads + head, 1)
                k_scale_1s, v_scale_1s = (ref[head_of_all] for ref in scale_refs)
                scores_gs = scores_gs * k_scale_1s
            scores_gs = jnp.where(valid_gs, cap_scores(scores_gs, spec.soft_cap), -jnp.inf)
            old_max_g1 = max_ref[head]
            max_g1 = jnp.maximum(old_max_g1, jnp.max(scores_gs, axis=1, keepdims=True))
            kept_g1, weights_gs = jnp.exp(old_max_g1 - max_g1), jnp.exp(scores_gs - max_g1)
            max_ref[head] = max_g1
            sum_ref[head] = kept_g1 * sum_ref[head] + jnp.sum(weights_gs, axis=1, keepdims=True)
            if scale_refs:
                weights_gs = jnp.where(valid_gs, weights_gs * v_scale_1s, 0)
            total_ref[head] = kept_g1 * total_ref[head] + jax.lax.dot_general(
                weights_gs.astype(v.dtype),
                v,
                (((1,), (int(positions_last),)), ((), ())),
                preferred_element_type=jnp.float32,
            )

    @pl.when(start + block >= length)
    def _():
        sum_kg1 = sum_ref[...]
        # At least 1, but for a row without positions.
        attended_ref[...] = total_ref[...] / jnp.maximum(sum_kg1, 1.0)
        log_sum_ref[...] = max_ref[...] + jnp.log(sum_kg1)
