"""The sweeps as Pallas kernels for NVIDIA GPUs from Hopper on (Mosaic GPU).

A thread block of one warpgroup (128 threads) has one token, and walks along its row in tiles. Bulk
copies bring the next tiles of both models into shared memory while one is computed on; a few blocks
share a multiprocessor, so that the waits of one are filled by the others. Sums over the vocabulary
are kept lane by lane, some lanes per thread, in registers; lanes are combined once at the end of
the row, by the formula that also combines shards (sweeps.relative_to).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from distill.kernels.linear_divergence import sweeps
from distill.kernels.linear_divergence.mosaic_gpu_primitives import lowerable
from distill.kernels.linear_divergence.sweeps import (
    MASKED,
    Logits,
    PerTerm,
    Statistics,
    add_columns,
    gradient_operands,
    relative_to,
    row_operands,
    statistics_of,
    sum_names,
    term_sums_of,
    weigh_slopes,
)
from distill.kernels.linear_divergence.token_losses import TermSum, terms_and_slopes

# Columns: a bulk copy starts at a multiple of 16 bytes, and its size is one.
ALIGNMENT = 32
OUTPUT_SLOTS = 2  # tiles of output: one being written by the threads, one on its way to memory


@dataclasses.dataclass(frozen=True)
class Config:
    """How a row is walked along: `tile` columns are fetched at a time, `lanes` of them computed at
    a time; of each model, `stages` tiles are on their way or being computed on."""

    tile: int
    lanes: int
    stages: int

    def __post_init__(self):
        if self.lanes % 128 or self.tile % self.lanes or self.stages < 1:
            raise ValueError(f"{self}: 128 must divide lanes, which must divide tile; stages >= 1")


def choose_config(sweep: str, num_models: int, output_bytes: int) -> Config:
    """Sizes with which four blocks share a multiprocessor; from arithmetic, nothing was measured.

    Of its 228 KiB of shared memory a block then has 57 KiB; CUDA takes 1 KiB of them, reductions
    2 KiB. `statistics` rescales its sums once per tile, so a tile is several times its lanes: 16
    KiB for 2048 columns of both models, 3 stages. The others compute a tile in one piece, because
    the time to compile grows faster than the number of operations (JSD in eight pieces: minutes):
    8 KiB for 1024 columns, 4 stages, and at most 8 KiB of output.

    By Little's law 30 KiB per multiprocessor must be on their way to keep an H200's memory busy
    (4.8 TB/s, 132 multiprocessors, 0.8 us); a single stage in each of four blocks is as much.
    """
    tile, lanes = (2048, 512) if sweep == "statistics" else (1024, 1024)
    budget = (54 << 10) - OUTPUT_SLOTS * tile * output_bytes
    return Config(tile, lanes, stages=min(4, budget // (num_models * tile * 4)))


@dataclasses.dataclass(frozen=True)
class Sweeps(sweeps.Sweeps):
    """sweeps.Sweeps for NVIDIA GPUs. `interpret`: None, or Mosaic GPU's InterpretGPUParams.

    Logits whose width is not a multiple of ALIGNMENT are copied into arrays where it is.
    """

    config: Config | None = None  # None: choose_config
    interpret: Any = None
    budget_bytes: int = 1600 << 20  # 1024 tokens at V=151936: several blocks per multiprocessor
    bytes_per_logit: int = 10  # both models in float32, the gradient in bfloat16
    row_multiple: int = 1

    def statistics(
        self, logits: Logits, *, temperature: float, entropy: bool = False
    ) -> Statistics:
        """K1: an online softmax of both models."""
        names = sum_names(len(logits.models), temperature, entropy)
        table_cn = self._run(
            "statistics",
            functools.partial(_statistics_kernel, names=names, temperature=temperature),
            logits,
            output=_table(logits, len(names)),
            transcendentals=1 if temperature == 1.0 else 2,
        )
        return statistics_of(table_cn, names)

    def term_sums(self, loss: TermSum, logits: Logits, statistics: Statistics) -> PerTerm:
        """K2: every term and its slope."""
        table_cn = self._run(
            "term_sums",
            functools.partial(_term_sums_kernel, loss=loss),
            logits,
            row_operands(statistics),
            output=_table(logits, 2 * len(loss.terms)),
            transcendentals=3,
        )
        return term_sums_of(table_cn, loss)

    def gradient(
        self, loss: TermSum, logits: Logits, statistics: Statistics, factors: PerTerm, *, dtype
    ) -> jax.Array:
        """K3, written over the student's logits where the dtype allows."""
        width = logits.student_cv.shape[1]
        gradient_cv = self._run(
            "gradient",
            functools.partial(_gradient_kernel, loss=loss, soft_cap=logits.soft_cap),
            logits,
            gradient_operands(loss, statistics, factors),
            output=jax.ShapeDtypeStruct((len(logits.targets_c), _aligned_width(width)), dtype),
            transcendentals=3,
        )
        return gradient_cv[:, :width]

    def _run(self, sweep: str, kernel, logits: Logits, *rows, output, transcendentals: int):
        """kernel(models' logits, (targets, *rows), num_columns, output, **scratch), references all,
        once per token.

        An `output` as wide as the student's logits is one of columns, else one of sums.
        `transcendentals` are counted per logit.
        """
        models = [_aligned(x_cv) for x_cv in logits.models]
        column_dtype = output.dtype if output.shape == models[0].shape else None
        output_bytes = column_dtype.itemsize if column_dtype else 0
        config = self.config or choose_config(sweep, len(models), output_bytes)
        in_place = column_dtype == models[0].dtype

        def body(logits_refs, rows_refs, num_columns_ref, output_ref=None):
            output_ref = logits_refs[0] if in_place else output_ref
            operands = logits_refs, rows_refs, num_columns_ref, output_ref
            scratch = _scratch(config, len(models), column_dtype)
            pl.run_scoped(functools.partial(kernel, *operands, lanes=config.lanes), **scratch)

        # What plgpu.kernel calls, without its detour through custom_vmap: references, which are
        # written in place, are allowed here, and so is a cost (which Mosaic GPU ignores as yet).
        run = pl.kernel(
            body,
            out_type=() if in_place else output,
            mesh=plgpu.Mesh(grid=output.shape[:1], grid_names=("token",)),
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
            cost_estimate=_cost(models, output, transcendentals),
            interpret=self.interpret or False,
            name=sweep,
        )
        rest = (logits.targets_c, *rows), jnp.reshape(logits.num_columns, 1)
        if not in_place:
            return run(models, *rest)
        # XLA copies the logits first if they are used afterwards.
        student_ref = jax.new_ref(models[0], memory_space=plgpu.GMEM)
        run([student_ref, *models[1:]], *rest)
        return jax.freeze(student_ref)


def _statistics_kernel(
    logits_refs, rows_refs, num_columns_ref, table_ref, *, tiles, ready, lanes, names, temperature
):
    models = "st"[: len(logits_refs)]
    num_columns = num_columns_ref[0]
    totals = {
        name: jnp.full(lanes, MASKED if name.startswith("max") else 0.0, jnp.float32)
        for name in names
        if not name.startswith("target")
    }

    def add(tile: _Tile, totals):
        """Adds a tile's columns to the sums, lane by lane."""
        blocks = list(tile.blocks(lanes))
        scaled = {
            model: [
                jnp.where(column < num_columns, logits[i] * (1.0 / temperature), MASKED)
                for column, logits in blocks
            ]
            for i, model in enumerate(models)
        }
        return add_columns(totals, scaled, temperature)

    num_tiles = pl.cdiv(num_columns, tiles.shape[-1])
    totals = _over_tiles(logits_refs, tiles, ready, num_tiles, add, totals)
    maxima = {model: jnp.max(totals[f"max_{model}"]) for model in models}
    totals = relative_to(maxima, totals, temperature)
    token = lax.axis_index("token")
    target = rows_refs[0][token]
    has_target = (target >= 0) & (target < num_columns)
    for model, ref in zip(models, logits_refs, strict=True):
        logit = ref[token, jnp.where(has_target, target, 0)]
        totals[f"target_{model}"] = jnp.where(has_target, logit, 0.0)
    for i, name in enumerate(names):
        table_ref[token, i] = jnp.sum(totals[name]) if totals[name].ndim else totals[name]


def _term_sums_kernel(
    logits_refs, rows_refs, num_columns_ref, table_ref, *, tiles, ready, lanes, loss
):
    num_columns = num_columns_ref[0]
    row = _Row.read(rows_refs, loss, len(logits_refs), lanes)

    def add(tile: _Tile, sums):
        for column, logits in tile.blocks(lanes):
            terms, slopes = row.terms_and_slopes(column, row.log_probs(logits))
            exists = column < num_columns
            sums = [
                x + jnp.where(exists, y, 0.0) for x, y in zip(sums, terms + slopes, strict=True)
            ]
        return sums

    num_tiles = pl.cdiv(num_columns, tiles.shape[-1])
    zeros = jnp.zeros(lanes, jnp.float32)
    sums = [zeros] * 2 * len(loss.terms)
    sums = _over_tiles(logits_refs, tiles, ready, num_tiles, add, sums)
    for i, lane_sums in enumerate(sums):
        table_ref[lax.axis_index("token"), i] = jnp.sum(lane_sums)


def _gradient_kernel(
    logits_refs,
    rows_refs,
    num_columns_ref,
    gradient_ref,
    *,
    tiles,
    ready,
    output_tiles,
    lanes,
    loss,
    soft_cap,
):
    num_columns = num_columns_ref[0]
    row = _Row.read(rows_refs, loss, len(logits_refs), lanes)
    factors = row.operands[-2 * len(loss.terms) :]
    factors = list(zip(factors[::2], factors[1::2], strict=True))
    width = min(ref.shape[1] for ref in logits_refs)

    def write(tile: _Tile, _):
        output_tile = output_tiles.at[lax.rem(tile.index, OUTPUT_SLOTS)]
        plgpu.wait_smem_to_gmem(OUTPUT_SLOTS - 1, wait_read_only=True)
        for k, (column, logits) in enumerate(tile.blocks(lanes)):
            log_probs = row.log_probs(logits)
            _, slopes = row.terms_and_slopes(column, log_probs)
            place = logits[0], soft_cap, column, num_columns
            gradient = weigh_slopes(slopes, log_probs[0], factors, *place)
            output_tile[pl.ds(k * lanes, lanes)] = gradient.astype(gradient_ref.dtype)
        plgpu.commit_smem()
        first_column = tile.index * tiles.shape[-1]
        store = functools.partial(_store, output_tile, gradient_ref, first_column)
        _with_tile_size(store, tile.index, tiles.shape[-1], width)

    num_tiles = pl.cdiv(width, tiles.shape[-1])
    _over_tiles(logits_refs, tiles, ready, num_tiles, write, None)
    _store_zeros(output_tiles, gradient_ref, width)
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Columns of a row in shared memory, one reference per model."""

    index: jax.Array
    logits_refs: list

    def blocks(self, lanes: int):
        """Per `lanes` columns: their numbers, and the logits of every model."""
        (size,) = self.logits_refs[0].shape
        lane = lax.broadcasted_iota(jnp.int32, (lanes,), 0)
        for start in range(0, size, lanes):
            logits = [ref[pl.ds(start, lanes)] for ref in self.logits_refs]
            yield self.index * size + start + lane, logits


@dataclasses.dataclass(frozen=True)
class _Row:
    """What K2 and K3 know of a token: its target, `row_operands`, and the loss."""

    target: jax.Array
    operands: list
    temperature: float
    loss_and_slope: Callable

    @classmethod
    def read(cls, rows_refs, loss: TermSum, num_models: int, lanes: int) -> _Row:
        targets_ref, operands_ref = rows_refs
        token = lax.axis_index("token")
        operands = [operands_ref[token, i] for i in range(operands_ref.shape[1])]
        log_prob = jax.ShapeDtypeStruct((lanes,), jnp.float32)
        is_target = jax.ShapeDtypeStruct((lanes,), jnp.bool_)
        log_p = log_prob if num_models == 2 else None
        function = functools.partial(terms_and_slopes, loss)
        loss_and_slope = lowerable(function, log_p, log_prob, is_target)
        return cls(targets_ref[token], operands, loss.temperature, loss_and_slope)

    def log_probs(self, logits: list) -> list[jax.Array]:
        """Student's, teacher's if there is one."""
        return [
            (x * (1.0 / self.temperature) - self.operands[2 * i]) - self.operands[2 * i + 1]
            for i, x in enumerate(logits)
        ]

    def terms_and_slopes(self, column, log_probs):
        log_q, log_p = log_probs if len(log_probs) == 2 else (*log_probs, None)
        return self.loss_and_slope(log_p, log_q, column == self.target)


def _over_tiles(logits_refs, tiles, ready, num_tiles, body: Callable, carry):
    """carry = body(tile, carry) for this token's first `num_tiles` tiles; copies run ahead."""
    _, stages, size = tiles.shape
    width = min(ref.shape[1] for ref in logits_refs)
    token = lax.axis_index("token")

    def fetch(index):
        slot = lax.rem(index, stages)

        def copy(num_columns: int):
            for model, ref in enumerate(logits_refs):
                plgpu.copy_gmem_to_smem(
                    ref.at[token, pl.ds(index * size, num_columns)],
                    tiles.at[model, slot, pl.ds(0, num_columns)],
                    ready.at[slot],
                    # Without this, not one contiguous copy, but one of at most 256 columns.
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

        _with_tile_size(copy, index, size, width)

    def step(index, carry):
        slot = lax.rem(index, stages)
        plgpu.barrier_wait(ready.at[slot])
        refs = [tiles.at[model, slot] for model in range(len(logits_refs))]
        carry = body(_Tile(index, refs), carry)
        pl.when(index + stages < num_tiles)(lambda: fetch(index + stages))
        return carry

    for index in range(stages):
        pl.when(index < num_tiles)(functools.partial(fetch, jnp.int32(index)))
    return lax.fori_loop(0, num_tiles, step, carry)


def _with_tile_size(function: Callable, index, size: int, width: int) -> None:
    """function(number of columns of the tile): it must be static, and the last tile has fewer."""
    num_whole, rest = divmod(width, size)
    if not rest:
        function(size)
    elif not num_whole:
        function(rest)
    else:
        lax.cond(index < num_whole, lambda: function(size), lambda: function(rest))


def _store(output_tile, output_ref, first_column, num_columns: int) -> None:
    # Not a column too many: it would be the next token's, or not yet read where this is in place.
    plgpu.copy_smem_to_gmem(
        output_tile.at[pl.ds(0, num_columns)],
        output_ref.at[lax.axis_index("token"), pl.ds(first_column, num_columns)],
    )


def _store_zeros(output_tiles, output_ref, start: int) -> None:
    """Zeros in the columns from `start` on: those the teacher's array does not have."""
    size, width = output_tiles.shape[1], output_ref.shape[1]
    if start == width:
        return
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    output_tiles[0, :] = jnp.zeros(size, output_tiles.dtype)
    plgpu.commit_smem()
    for first_column in range(start, width, size):
        _store(output_tiles.at[0], output_ref, first_column, min(size, width - first_column))


def _aligned(logits_cv) -> jax.Array:
    missing = _aligned_width(logits_cv.shape[1]) - logits_cv.shape[1]
    return jnp.pad(logits_cv, ((0, 0), (0, missing))) if missing else logits_cv


def _aligned_width(width: int) -> int:
    return -(-width // ALIGNMENT) * ALIGNMENT


def _table(logits: Logits, num_sums: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((logits.student_cv.shape[0], num_sums), jnp.float32)


def _scratch(config: Config, num_models: int, output_dtype) -> dict:
    scratch = dict(
        tiles=plgpu.SMEM((num_models, config.stages, config.tile), jnp.float32),
        ready=plgpu.Barrier(num_arrivals=num_models, num_barriers=config.stages),
    )
    if output_dtype is not None:
        scratch["output_tiles"] = plgpu.SMEM((OUTPUT_SLOTS, config.tile), output_dtype)
    return scratch


def _cost(models: list, output, transcendentals: int) -> pl.CostEstimate:
    num_logits = len(models) * models[0].shape[0] * min(x_cv.shape[1] for x_cv in models)
    return pl.CostEstimate(
        flops=15 * num_logits,
        transcendentals=transcendentals * num_logits,
        bytes_accessed=4 * num_logits + math.prod(output.shape) * output.dtype.itemsize,
    )
