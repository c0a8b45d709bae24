"""The sweeps as Pallas kernels for TPU: every logit is read from memory once per sweep.

A grid of (token blocks, vocabulary blocks), the latter innermost. Within a block, strips of 16
tokens are walked one vector register's width of columns (128 lanes) at a time, so that intermediate
values stay in registers. Sums over the vocabulary are kept lane by lane, and lanes are combined
once at the end of a row, by the formula that also combines shards (sweeps.relative_to).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distill.kernels.linear_divergence.sweeps import (
    MASKED,
    SeparateProducts,
    Statistics,
    relative_to,
    row_operands,
    statistics_of,
    sum_names,
)
from distill.kernels.linear_divergence.token_losses import PointwiseLoss, terms_and_slopes

LANES = 128
STRIP = 16  # tokens; the rows of one bfloat16 register, two of float32
VMEM_LIMIT = 60 << 20  # bytes of fast memory for the products: all these chips have 64 MiB or more


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a block of logits in fast memory.

    K3 holds most: two float32 inputs and an output of up to float32, each twice (one being computed
    on, one in flight): 6 * 4 * 256 * 1024 bytes = 6 MiB of the 16 MiB that a kernel may use on the
    smallest chip (v5e). A block of 1 MiB is well above what a transfer needs to reach full speed.
    """

    block_tokens: int = 256
    block_columns: int = 1024

    def fitted(self, num_tokens: int, width: int) -> Config:
        """No larger than the arrays, rounded up to whole registers."""
        return Config(
            min(self.block_tokens, _round_up(num_tokens, STRIP)),
            min(self.block_columns, _round_up(width, LANES)),
        )

    def grid(self, num_tokens: int, width: int) -> tuple[int, int]:
        return pl.cdiv(num_tokens, self.block_tokens), pl.cdiv(width, self.block_columns)


def choose_products(hidden: list, num_sums: int) -> Config:
    """As many tokens at a time as fast memory holds: heads are read once for each such block.

    Twice (being computed on, in flight): hidden states, blocks of the heads, blocks of logits; and
    once the logits before they are stored, and the sums. The compiler's own share is a quarter of
    the limit, and more than was seen.
    """
    num_tokens, columns = hidden[0].shape[0], 256
    row_bytes = sum(x.shape[1] * x.dtype.itemsize for x in hidden)
    for tokens in (1024, 512, 256):
        logits_bytes = 4 * tokens * columns * len(hidden)
        sums_bytes = 4 * tokens * LANES * num_sums
        needed = 2 * (tokens + columns) * row_bytes + 3 * logits_bytes + sums_bytes
        if needed < 3 * VMEM_LIMIT // 4 and tokens * _num_cores() <= _round_up(num_tokens, 256):
            return Config(tokens, columns)
    return Config(128, LANES)


def choose_gradient_products(hidden_s_cd, has_teacher: bool) -> Config | None:
    """All tokens of a chunk at a time, or None where fast memory does not hold them.

    Twice: hidden states, their gradient, blocks of logits, of the head, and of its gradient, which
    comes in and goes out; once the gradient by the logits in both dtypes, and the two products
    before they are added.
    """
    num_tokens, model_width = hidden_s_cd.shape
    columns, item = 256, hidden_s_cd.dtype.itemsize
    resident = (2 * item + 12) * hidden_s_cd.size
    per_column = (12 + 8 * has_teacher + item) * num_tokens + (20 + 2 * item) * model_width
    fits = resident + columns * per_column < 3 * VMEM_LIMIT // 4
    # Two cores would both add to the hidden states' gradient.
    possible = num_tokens % STRIP == 0 and _num_cores() == 1
    return Config(num_tokens, columns) if fits and possible else None


def _num_cores() -> int:
    """Cores that share a chip's work as one device: blocks of tokens are dealt out to them."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    return getattr(device, "num_cores", None) or 1


@dataclasses.dataclass(frozen=True)
class Sweeps(SeparateProducts):
    """sweeps.Sweeps for TPU. `interpret`: False, True or pltpu.InterpretParams, as in Pallas."""

    config: Config = Config()
    products: Config | None = None  # None: choose_products
    interpret: Any = False
    # 1024 tokens at V=151936: the head's gradient is read and written once per chunk, which such a
    # chunk hides behind its product on all chips but v6e.
    budget_bytes: int = 1600 << 20
    bytes_per_logit: int = 10  # both models in float32, the gradient in bfloat16 where it is stored
    row_multiple: int = 128

    def logits_and_statistics(
        self,
        hidden_s_cd,
        head_s_dv,
        hidden_t_cd,
        head_t_dv,
        targets_c,
        num_columns,
        *,
        temperature: float,
    ) -> tuple[jax.Array, jax.Array | None, Statistics]:
        """The matrix products with K1 at their end, while a block of logits is still at hand."""
        hidden, heads = _present(hidden_s_cd, hidden_t_cd), _present(head_s_dv, head_t_dv)
        num_tokens, width = len(targets_c), min(head_dv.shape[1] for head_dv in heads)
        names = sum_names(len(heads), temperature)
        config = self.products or choose_products(hidden, len(names))
        config = config.fitted(num_tokens, width)
        logits_specs = [_logits_spec(config, head_dv.shape[1]) for head_dv in heads]
        num_products = num_tokens * width * sum(hidden_cd.shape[1] for hidden_cd in hidden)
        *logits, table = pl.pallas_call(
            functools.partial(_products_kernel, names=names, temperature=temperature),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=config.grid(num_tokens, width),
                in_specs=[_row_spec(config, hidden_cd.shape[1]) for hidden_cd in hidden]
                + [_head_spec(config, head_dv.shape[0]) for head_dv in heads]
                + [_row_spec(config, 1)],
                out_specs=[*logits_specs, _row_spec(config, LANES)],
                scratch_shapes=[_accumulator(config)] * len(names),
            ),
            out_shape=[
                jax.ShapeDtypeStruct((num_tokens, columns), jnp.float32)
                for columns in (*(head_dv.shape[1] for head_dv in heads), LANES)
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * num_products,
                transcendentals=num_tokens * width * len(heads),
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*hidden, *heads))
                + 4 * num_tokens * width * len(heads),
            ),
            interpret=self.interpret,
        )(jnp.reshape(num_columns, 1), *hidden, *heads, targets_c[:, None])
        logits_s_cv, logits_t_cv = logits if len(logits) == 2 else (*logits, None)
        return logits_s_cv, logits_t_cv, statistics_of(table, names)

    def term_sums(
        self, loss, logits_s_cv, logits_t_cv, targets_c, num_columns, statistics
    ) -> tuple[jax.Array, jax.Array]:
        """K2: the pointwise loss and its slope."""
        table = self._sums(
            functools.partial(_term_sums_kernel, loss=loss),
            _present(logits_s_cv, logits_t_cv),
            [targets_c[:, None], row_operands(statistics)],
            num_columns,
            num_sums=2,
            transcendentals=3,
        )
        return table[:, 0], table[:, 1]

    def gradient(
        self,
        loss,
        logits_s_cv,
        logits_t_cv,
        targets_c,
        num_columns,
        statistics,
        slope_sum_c,
        weights_c,
        *,
        dtype,
    ) -> jax.Array:
        """K3, written over the student's logits where the dtype allows."""
        logits = _present(logits_s_cv, logits_t_cv)
        config = self.config.fitted(*logits_s_cv.shape)
        return self._call(
            functools.partial(_gradient_kernel, loss=loss),
            logits,
            [
                targets_c[:, None],
                row_operands(statistics, slope_sum_c, weights_c / loss.temperature),
            ],
            num_columns,
            config=config,
            width=logits_s_cv.shape[1],
            out_shape=jax.ShapeDtypeStruct(logits_s_cv.shape, dtype),
            out_spec=_logits_spec(config, logits_s_cv.shape[1]),
            input_output_aliases={1: 0} if self._in_place(dtype) else {},
            transcendentals=3,
        )

    def gradient_products(
        self,
        loss,
        logits_s_cv,
        logits_t_cv,
        targets_c,
        num_columns,
        statistics,
        slope_sum_c,
        weights_c,
        hidden_s_cd,
        head_s_dv,
        head_gradient_dv,
    ) -> tuple[jax.Array, jax.Array]:
        """K3 with the products that consume its gradient, which then is never stored."""
        rows = targets_c, num_columns, statistics, slope_sum_c, weights_c
        model = hidden_s_cd, head_s_dv, head_gradient_dv
        config = choose_gradient_products(hidden_s_cd, logits_t_cv is not None)
        if config is None:
            return super().gradient_products(loss, logits_s_cv, logits_t_cv, *rows, *model)
        logits = _present(logits_s_cv, logits_t_cv)
        operands = row_operands(statistics, slope_sum_c, weights_c / loss.temperature)
        inputs = *logits, targets_c[:, None], operands, hidden_s_cd.T, head_s_dv, head_gradient_dv
        head_spec = _head_spec(config, head_s_dv.shape[0])
        num_logits = logits_s_cv.size
        return pl.pallas_call(
            functools.partial(_gradient_products_kernel, loss=loss, upcast=bool(self.interpret)),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=config.grid(*logits_s_cv.shape),
                in_specs=[_logits_spec(config, x.shape[1]) for x in logits]
                + [_row_spec(config, 1), _row_spec(config, operands.shape[1])]
                + [_whole(hidden_s_cd.shape[::-1]), head_spec, head_spec],
                out_specs=[head_spec, _whole(hidden_s_cd.shape)],
                scratch_shapes=[
                    pltpu.VMEM((config.block_tokens, config.block_columns), jnp.float32)
                ],
            ),
            out_shape=[
                jax.ShapeDtypeStruct(head_s_dv.shape, jnp.float32),
                jax.ShapeDtypeStruct(hidden_s_cd.shape, jnp.float32),
            ],
            input_output_aliases={len(inputs): 0},  # the head's gradient; number 0 is num_columns
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            cost_estimate=pl.CostEstimate(
                flops=4 * num_logits * hidden_s_cd.shape[1],
                transcendentals=3 * num_logits * len(logits),
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs)
                + 4 * (head_s_dv.size + hidden_s_cd.size),
            ),
            interpret=self.interpret,
        )(jnp.reshape(num_columns, 1), *inputs)

    def _in_place(self, dtype) -> bool:
        # InterpretParams reads past the end of an aliased array that blocks do not divide.
        return dtype == jnp.float32 and not isinstance(self.interpret, pltpu.InterpretParams)

    def _sums(self, kernel, logits, rows, num_columns, *, num_sums: int, transcendentals: int):
        """Sums over the vocabulary, as the first columns of a (tokens, LANES) table."""
        num_tokens, width = logits[0].shape[0], min(x.shape[1] for x in logits)
        config = self.config.fitted(num_tokens, width)
        return self._call(
            kernel,
            logits,
            rows,
            num_columns,
            config=config,
            width=width,
            out_shape=jax.ShapeDtypeStruct((num_tokens, LANES), jnp.float32),
            out_spec=_row_spec(config, LANES),
            scratch_shapes=[_accumulator(config)] * num_sums,
            transcendentals=transcendentals,
        )

    def _call(
        self,
        kernel,
        logits,
        rows,
        num_columns,
        *,
        config: Config,
        width: int,
        out_shape,
        out_spec,
        scratch_shapes=(),
        input_output_aliases=None,
        transcendentals: int,
    ):
        """kernel(num_columns, *logits, *rows, output, *scratch) on every block of tokens and
        columns up to `width`; `transcendentals` are counted per logit."""
        num_tokens = logits[0].shape[0]
        num_logits = num_tokens * width * len(logits)
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=config.grid(num_tokens, width),
                in_specs=[_logits_spec(config, x.shape[1]) for x in logits]
                + [_row_spec(config, x.shape[1]) for x in rows],
                out_specs=out_spec,
                scratch_shapes=scratch_shapes,
            ),
            out_shape=out_shape,
            input_output_aliases=input_output_aliases or {},
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=15 * num_logits,
                transcendentals=transcendentals * num_logits,
                bytes_accessed=4 * num_logits + out_shape.size * out_shape.dtype.itemsize,
            ),
            interpret=self.interpret,
        )(jnp.reshape(num_columns, 1), *logits, *rows)


def _logits_spec(config: Config, columns: int) -> pl.BlockSpec:
    # One model's array may be wider than the other's, whose last block then stands still.
    last = pl.cdiv(columns, config.block_columns) - 1
    block = config.block_tokens, config.block_columns
    return pl.BlockSpec(block, lambda i, j, _: (i, jnp.minimum(j, last)))


def _whole(shape: tuple[int, int]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda i, j, _: (0, 0))


def _head_spec(config: Config, model_width: int) -> pl.BlockSpec:
    return pl.BlockSpec((model_width, config.block_columns), lambda i, j, _: (0, j))


def _accumulator(config: Config):
    return pltpu.VMEM((config.block_tokens, LANES), jnp.float32)


def _row_spec(config: Config, columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((config.block_tokens, columns), lambda i, j, _: (i, 0))


def _products_kernel(num_columns_ref, *refs, names: tuple[str, ...], temperature: float):
    num_models = 2 if "max_t" in names else 1
    hidden_refs, refs = refs[:num_models], refs[num_models:]
    head_refs, (targets_ref, *refs) = refs[:num_models], refs[num_models:]
    logits_refs, refs = refs[:num_models], refs[num_models:]
    for hidden_ref, head_ref, logits_ref in zip(hidden_refs, head_refs, logits_refs, strict=True):
        logits_ref[...] = jnp.dot(
            hidden_ref[...], head_ref[...], preferred_element_type=jnp.float32
        )
    operands = *logits_refs, targets_ref, *refs
    _statistics_kernel(num_columns_ref, *operands, names=names, temperature=temperature)


def _statistics_kernel(num_columns_ref, *refs, names: tuple[str, ...], temperature: float):
    *logits_refs, targets_ref, table_ref = refs[: -len(names)]
    block = _block_columns(logits_refs[0])
    totals = dict(zip(names, refs[-len(names) :], strict=True))
    models = "st"[: len(logits_refs)]

    @pl.when(pl.program_id(1) == 0)
    def _():
        for name, total_ref in totals.items():
            total_ref[...] = jnp.full_like(total_ref, MASKED if name.startswith("max") else 0.0)

    def update(rows):
        """Adds the columns of this block to the sums of a strip of tokens, lane by lane."""
        total = {name: ref[rows, :] for name, ref in totals.items()}
        columns = list(_columns(block, targets_ref[rows, :]))
        raw = {
            model: [ref[rows, lanes] for lanes, *_ in columns]
            for model, ref in zip(models, logits_refs, strict=True)
        }
        exists = [column < num_columns_ref[0] for _, column, _ in columns]
        scaled = {
            model: [
                jnp.where(there, x / temperature, MASKED)
                for there, x in zip(exists, raw[model], strict=True)
            ]
            for model in models
        }
        maxima = {
            model: functools.reduce(jnp.maximum, scaled[model], total[f"max_{model}"])
            for model in models
        }
        total = relative_to(maxima, total, temperature)
        for k, (_, _, is_target) in enumerate(columns):
            shifted = {model: scaled[model][k] - total[f"max_{model}"] for model in models}
            weight = {model: jnp.exp(shifted[model]) for model in models}
            for model in models:
                total[f"sum_{model}"] += weight[model]
                total[f"target_{model}"] += jnp.where(is_target, raw[model][k], 0.0)
                if temperature != 1.0:
                    total[f"plain_sum_{model}"] += jnp.exp(temperature * shifted[model])
            if len(models) == 2:
                difference = shifted["t"] - shifted["s"]
                total["cross_forward"] += weight["t"] * difference
                total["cross_reverse"] -= weight["s"] * difference
        for name, ref in totals.items():
            ref[rows, :] = total[name]

    def combine(rows):
        """The lanes into the first one, then all sums into the table."""
        total = {name: ref[rows, :] for name, ref in totals.items()}
        maxima = {model: jnp.max(total[f"max_{model}"], axis=1, keepdims=True) for model in models}
        total = relative_to(maxima, total, temperature)
        _write_table(
            table_ref,
            rows,
            [x if name.startswith("max") else _lane_sum(x) for name, x in total.items()],
        )

    _for_each_strip(table_ref, update)
    pl.when(_is_last_block())(lambda: _for_each_strip(table_ref, combine))


def _term_sums_kernel(num_columns_ref, *refs, loss: PointwiseLoss):
    *logits_refs, targets_ref, rows_ref, table_ref, terms_ref, slopes_ref = refs
    block = _block_columns(logits_refs[0])

    @pl.when(pl.program_id(1) == 0)
    def _():
        terms_ref[...] = jnp.zeros_like(terms_ref)
        slopes_ref[...] = jnp.zeros_like(slopes_ref)

    def update(rows):
        terms, slopes = terms_ref[rows, :], slopes_ref[rows, :]
        for lanes, column, is_target in _columns(block, targets_ref[rows, :]):
            log_q, log_p = _log_probs(logits_refs, rows_ref[rows, :], rows, lanes, loss.temperature)
            term, slope = terms_and_slopes(loss, log_p, log_q, is_target)
            exists = column < num_columns_ref[0]
            terms += jnp.where(exists, term, 0.0)
            slopes += jnp.where(exists, slope, 0.0)
        terms_ref[rows, :], slopes_ref[rows, :] = terms, slopes

    def combine(rows):
        sums = [_lane_sum(ref[rows, :]) for ref in (terms_ref, slopes_ref)]
        _write_table(table_ref, rows, sums)

    _for_each_strip(table_ref, update)
    pl.when(_is_last_block())(lambda: _for_each_strip(table_ref, combine))


def _gradient_kernel(num_columns_ref, *refs, loss: PointwiseLoss):
    *logits_refs, targets_ref, rows_ref, gradient_ref = refs
    block = _block_columns(logits_refs[0])

    def write(rows):
        operands = rows_ref[rows, :]
        slope_sum, weight = operands[:, -2:-1], operands[:, -1:]
        for lanes, column, is_target in _columns(block, targets_ref[rows, :]):
            log_q, log_p = _log_probs(logits_refs, operands, rows, lanes, loss.temperature)
            _, slope = terms_and_slopes(loss, log_p, log_q, is_target)
            gradient = weight * (slope - jnp.exp(log_q) * slope_sum)
            # A token without weight has no say, whatever its slopes.
            counts = (column < num_columns_ref[0]) & (weight != 0)
            gradient = jnp.where(counts, gradient, 0.0)
            gradient_ref[rows, lanes] = gradient.astype(gradient_ref.dtype)

    _for_each_strip(gradient_ref, write)


def _gradient_products_kernel(num_columns_ref, *refs, loss: PointwiseLoss, upcast: bool):
    *operand_refs, hidden_ref, head_ref, sum_ref, head_gradient_ref, hidden_gradient_ref, dz_ref = (
        refs
    )
    _gradient_kernel(num_columns_ref, *operand_refs, dz_ref, loss=loss)
    first_column, _ = _block_columns(dz_ref)
    column = first_column + jax.lax.broadcasted_iota(jnp.int32, head_ref.shape, 1)
    # Behind the head's end there may be anything, NaN too.
    head = jnp.where(column < num_columns_ref[0], head_ref[...], 0).astype(head_ref.dtype)
    operands = dz_ref[...].astype(head_ref.dtype), head, hidden_ref[...]
    if upcast:  # XLA's CPU backend, where kernels are interpreted, refuses these bfloat16 products
        operands = [x.astype(jnp.float32) for x in operands]
    gradient, head, hidden = operands

    @pl.when(pl.program_id(1) == 0)
    def _():
        hidden_gradient_ref[...] = jnp.zeros_like(hidden_gradient_ref)

    hidden_gradient_ref[...] += jax.lax.dot_general(
        gradient, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    head_gradient_ref[...] = sum_ref[...] + jnp.dot(
        hidden, gradient, preferred_element_type=jnp.float32
    )


def _for_each_strip(block_ref, function) -> None:
    def step(i, _):
        function(pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP))

    jax.lax.fori_loop(0, block_ref.shape[0] // STRIP, step, None)


def _block_columns(block_ref) -> tuple[jax.Array, int]:
    """Number of a block's first column, and of its columns; to be asked outside of any loop."""
    return pl.program_id(1) * block_ref.shape[1], block_ref.shape[1]


def _columns(block, targets_c1):
    """Per register's width of a block: its lanes, their column numbers, and which are targets."""
    first_column, num_columns = block
    lane = jax.lax.broadcasted_iota(jnp.int32, (targets_c1.shape[0], LANES), 1)
    for start in range(0, num_columns, LANES):
        column = first_column + start + lane
        yield pl.ds(start, LANES), column, column == targets_c1


def _log_probs(logits_refs, operands, rows, lanes, temperature: float):
    """(log_q, log_p) of a strip's lanes; log_p is None without a teacher."""
    log_q, log_p = None, None
    for i, ref in enumerate(logits_refs):
        largest, log_sum = operands[:, 2 * i : 2 * i + 1], operands[:, 2 * i + 1 : 2 * i + 2]
        log_prob = (ref[rows, lanes] / temperature - largest) - log_sum
        log_q, log_p = (log_prob, None) if i == 0 else (log_q, log_prob)
    return log_q, log_p


def _write_table(table_ref, rows, columns: list) -> None:
    lane = jax.lax.broadcasted_iota(jnp.int32, (STRIP, LANES), 1)
    table = jnp.zeros((STRIP, LANES), jnp.float32)
    for i, column in enumerate(columns):
        table = jnp.where(lane == i, column, table)
    table_ref[rows, :] = table


def _lane_sum(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _is_last_block():
    return pl.program_id(1) == pl.num_programs(1) - 1


def _present(logits_s_cv, logits_t_cv) -> list[jax.Array]:
    return [logits_s_cv] if logits_t_cv is None else [logits_s_cv, logits_t_cv]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
