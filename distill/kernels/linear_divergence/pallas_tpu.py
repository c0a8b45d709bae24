"""The sweeps as Pallas kernels for TPU: every logit is read from memory once per sweep.

Here is how the kernels are called: blocks, memory, costs. Their bodies are in
pallas_tpu_kernels.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distill.base.sharding import round_up
from distill.kernels.linear_divergence import pallas_tpu_kernels as kernels
from distill.kernels.linear_divergence import sweeps
from distill.kernels.linear_divergence.pallas_tpu_kernels import LANES, STRIP
from distill.kernels.linear_divergence.sweeps import (
    Logits,
    PerTerm,
    Projection,
    Statistics,
    gradient_operands,
    row_operands,
    statistics_of,
    sum_names,
    term_sums_of,
)
from distill.kernels.linear_divergence.token_losses import TermSum


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
            min(self.block_tokens, round_up(num_tokens, STRIP)),
            min(self.block_columns, round_up(width, LANES)),
        )

    def grid(self, num_tokens: int, width: int) -> tuple[int, int]:
        return pl.cdiv(num_tokens, self.block_tokens), pl.cdiv(width, self.block_columns)

    def logits_blocks(self, columns: int) -> pl.BlockSpec:
        # One model's array may be wider than the other's, whose last block then stands still.
        last = pl.cdiv(columns, self.block_columns) - 1
        block = self.block_tokens, self.block_columns
        return pl.BlockSpec(block, lambda i, j, _: (i, jnp.minimum(j, last)))

    def row_blocks(self, columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.block_tokens, columns), lambda i, j, _: (i, 0))

    def head_blocks(self, model_width: int) -> pl.BlockSpec:
        return pl.BlockSpec((model_width, self.block_columns), lambda i, j, _: (0, j))

    def hidden_blocks(self, model_width: int) -> pl.BlockSpec:
        # The next block is fetched only after all columns of this one: a short wait, half the
        # memory.
        block = self.block_tokens, model_width
        return pl.BlockSpec(block, lambda i, j, _: (i, 0), pipeline_mode=pl.Buffered(1))

    def accumulator(self):
        return pltpu.VMEM((self.block_tokens, LANES), jnp.float32)


def choose_products(hidden: Sequence, num_sums: int) -> Config:
    """As many tokens at a time as fast memory holds: heads are read once for each such block.

    Once: hidden states, logits before they are stored, the sums; twice (being computed on, in
    flight): blocks of the heads and of logits.
    """
    num_cores, limit = _chip()
    num_tokens, columns = hidden[0].shape[0], 256
    row_bytes = sum(x.shape[1] * x.dtype.itemsize for x in hidden)
    per_token = row_bytes + 12 * columns * len(hidden) + 4 * LANES * num_sums
    for num_blocks in range(num_cores, num_tokens // LANES + num_cores, num_cores):
        tokens = round_up(pl.cdiv(num_tokens, num_blocks), STRIP)
        if tokens * per_token + 2 * columns * row_bytes < _usable(limit):
            return Config(tokens, columns)
    return Config(LANES, LANES)


def choose_gradient_products(
    student: Projection, num_tokens: int, num_models: int
) -> Config | None:
    """All tokens of a chunk at a time, or None where fast memory does not hold them.

    Once: hidden states, their gradient, the gradient by the logits in both dtypes, the two products
    before they are added; twice: blocks of logits, of the head, and of its gradient, which comes in
    and goes out.
    """
    num_cores, limit = _chip()
    model_width, item = student.head_dv.shape[0], student.head_dv.dtype.itemsize
    columns = 256
    resident = (item + 8) * num_tokens * model_width
    per_column = (8 * num_models + 4 + item) * num_tokens + (2 * item + 20) * model_width
    fits = resident + columns * per_column < _usable(limit)
    # Two cores would both add to the hidden states' gradient.
    possible = num_tokens % STRIP == 0 and num_cores == 1
    return Config(num_tokens, columns) if fits and possible else None


def _usable(limit: int) -> int:
    # The compiler's own share is a quarter of the limit, and more than was seen.
    return 3 * limit // 4


def _chip() -> tuple[int, int]:
    """(cores that share a chip's work as one device, bytes of fast memory for the products).

    Blocks of tokens are dealt out to the cores. Interpreted kernels get what the smallest has.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if device.platform != "tpu":
        return 1, 60 << 20
    chip = pltpu.get_tpu_info()  # knows of described chips, too
    return chip.num_cores, chip.vmem_capacity_bytes // 16 * 15


@dataclasses.dataclass(frozen=True)
class Sweeps(sweeps.Sweeps):
    """sweeps.Sweeps for TPU. `interpret`: False, True or pltpu.InterpretParams, as in Pallas."""

    config: Config = Config()
    products: Config | None = None  # None: choose_products
    interpret: Any = False
    # 2048 tokens at V=151936: the head's gradient is read and written once per chunk.
    budget_bytes: int = 2400 << 20
    # Where the gradient is stored: both models in float32, the gradient in bfloat16, and what the
    # compiler reports beyond them (see logits_memory): 3.1 GB in all at 1024 tokens.
    bytes_per_logit: int = 16
    row_multiple: int = 128

    def largest_chunk(self, student: Projection, teacher: Projection | None, columns: int) -> int:
        """Longer if `gradient_products` is fused, as long as that is possible."""
        smallest = super().largest_chunk(student, teacher, columns)
        num_models = 1 if teacher is None else 2
        largest = self._tokens_within_budget(4 * num_models * columns)
        for num_tokens in range(largest, smallest, -self.row_multiple):
            if choose_gradient_products(student, num_tokens, num_models):
                return num_tokens
        return smallest

    def logits_memory(
        self, num_tokens: int, student: Projection, teacher: Projection | None
    ) -> list[jax.Array] | None:
        """None where the gradient is stored; else all memory is what the loop carries, no gaps.

        Logits made within the loop are laid out apart from the head's gradient, which it carries:
        with gaps, 0.7 GB of them at 1792 tokens. Besides, the compiler reports as wasted what it
        does not find alive within one computation, the loop's body or what is around it.
        """
        models = [model for model in (student, teacher) if model is not None]
        stored = choose_gradient_products(student, num_tokens, len(models)) is None
        # Pallas' plain interpreter wants blocks to divide arrays that are written in place.
        if stored or self.interpret is True:
            return None
        return [jax.lax.empty((num_tokens, x.head_dv.shape[1]), jnp.float32) for x in models]

    def logits_and_statistics(
        self,
        student: Projection,
        teacher: Projection | None,
        targets_c,
        num_columns,
        memory: list[jax.Array] | None,
        *,
        temperature: float,
        entropy: bool = False,
    ) -> tuple[Logits, Statistics]:
        """The matrix products with K1 at their end, while a block of logits is still at hand."""
        models = [student] if teacher is None else [student, teacher]
        hidden, heads, soft_caps = zip(*models, strict=True)
        num_tokens, width = len(targets_c), min(head_dv.shape[1] for head_dv in heads)
        names = sum_names(len(models), temperature, entropy)
        config = self.products or choose_products(hidden, len(names))
        config = config.fitted(num_tokens, width)
        grid = config.grid(num_tokens, width)
        num_logits = num_tokens * width * len(models)
        inputs = [(x, config.hidden_blocks(x.shape[1])) for x in hidden]
        inputs += [(x, config.head_blocks(x.shape[0])) for x in heads]
        inputs += [(targets_c[:, None], config.row_blocks(1))]
        first = len(inputs)
        inputs += [(x, pl.BlockSpec(memory_space=pl.ANY)) for x in memory or ()]
        *logits_cv, table = _call(
            functools.partial(
                kernels.products_kernel, soft_caps=soft_caps, names=names, temperature=temperature
            ),
            grid,
            num_columns,
            inputs,
            [_output(num_tokens, x.shape[1], config.logits_blocks) for x in heads]
            + [_output(num_tokens, LANES, config.row_blocks)],
            aliases={first + i: i for i in range(len(memory or ()))},
            scratch_shapes=[config.accumulator()] * len(names),
            vmem_limit_bytes=_chip()[1],
            flops=2 * num_tokens * width * sum(x.shape[1] for x in hidden),
            transcendentals=num_logits,
            # Heads once for each block of tokens.
            bytes_accessed=_bytes(*hidden) + grid[0] * _bytes(*heads) + 4 * num_logits,
            interpret=self.interpret,
        )
        logits_t_cv = None if teacher is None else logits_cv[1]
        logits = Logits(logits_cv[0], logits_t_cv, targets_c, num_columns, student.soft_cap)
        return logits, statistics_of(table, names)

    def term_sums(self, loss: TermSum, logits: Logits, statistics: Statistics) -> PerTerm:
        """K2: every term and its slope."""
        num_tokens, width = len(logits.targets_c), min(x_cv.shape[1] for x_cv in logits.models)
        config = self.config.fitted(num_tokens, width)
        (table,) = self._sweep(
            functools.partial(kernels.term_sums_kernel, loss=loss),
            config,
            width,
            logits,
            row_operands(statistics),
            _output(num_tokens, LANES, config.row_blocks),
            scratch_shapes=[config.accumulator()] * 2 * len(loss.terms),
        )
        return term_sums_of(table, loss)

    def gradient(
        self, loss: TermSum, logits: Logits, statistics: Statistics, factors: PerTerm, *, dtype
    ) -> jax.Array:
        """K3, written over the student's logits where the dtype allows."""
        num_tokens, width = logits.student_cv.shape
        config = self.config.fitted(num_tokens, width)
        (gradient_cv,) = self._sweep(
            functools.partial(kernels.gradient_kernel, loss=loss, soft_cap=logits.soft_cap),
            config,
            width,
            logits,
            gradient_operands(loss, statistics, factors),
            _output(num_tokens, width, config.logits_blocks, dtype),
            aliases={0: 0} if self._in_place(dtype) else {},
        )
        return gradient_cv

    def gradient_products(
        self, loss, logits, statistics, factors: PerTerm, student: Projection, head_gradient_dv
    ) -> tuple[jax.Array, jax.Array]:
        """K3 with the products that consume its gradient, which then is never stored."""
        hidden_cd, head_dv, soft_cap = student
        config = choose_gradient_products(student, len(hidden_cd), len(logits.models))
        if config is None:
            rows = logits, statistics, factors
            return super().gradient_products(loss, *rows, student, head_gradient_dv)
        head_blocks = config.head_blocks(head_dv.shape[0])
        operands = gradient_operands(loss, statistics, factors)
        inputs = _sweep_inputs(config, logits, operands)
        inputs += [
            (hidden_cd.T, _whole(hidden_cd.shape[::-1])),
            (head_dv, head_blocks),
            (head_gradient_dv, head_blocks),
        ]
        num_logits = logits.student_cv.size
        dz_block = pltpu.VMEM((config.block_tokens, config.block_columns), jnp.float32)
        head_gradient_dv, hidden_gradient_cd = _call(
            functools.partial(
                kernels.gradient_products_kernel,
                loss=loss,
                soft_cap=soft_cap,
                upcast=bool(self.interpret),
            ),
            config.grid(*logits.student_cv.shape),
            logits.num_columns,
            inputs,
            [
                (jax.ShapeDtypeStruct(head_dv.shape, jnp.float32), head_blocks),
                _output(len(hidden_cd), len(head_dv), lambda _: _whole(hidden_cd.shape)),
            ],
            aliases={len(inputs) - 1: 0},
            scratch_shapes=[dz_block],
            # Every block adds to the gradient of all hidden states.
            semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=_chip()[1],
            flops=4 * num_logits * hidden_cd.shape[1],
            transcendentals=3 * num_logits * len(logits.models),
            bytes_accessed=_bytes(*(x for x, _ in inputs)) + 4 * (head_dv.size + hidden_cd.size),
            interpret=self.interpret,
        )
        return head_gradient_dv, hidden_gradient_cd

    def _in_place(self, dtype) -> bool:
        # InterpretParams reads past the end of an aliased array that blocks do not divide.
        return dtype == jnp.float32 and not isinstance(self.interpret, pltpu.InterpretParams)

    def _sweep(
        self, kernel, config: Config, width: int, logits: Logits, operands, output, **options
    ):
        """kernel(num_columns, *logits, targets, operands, output, *scratch) on every block of
        tokens and columns up to `width`."""
        num_tokens = len(logits.targets_c)
        num_logits = num_tokens * width * len(logits.models)
        return _call(
            kernel,
            config.grid(num_tokens, width),
            logits.num_columns,
            _sweep_inputs(config, logits, operands),
            [output],
            flops=15 * num_logits,
            transcendentals=3 * num_logits,
            bytes_accessed=4 * num_logits + _bytes(output[0]),
            interpret=self.interpret,
            **options,
        )


def _call(
    kernel,
    grid: tuple[int, int],
    num_columns,
    inputs: list,
    outputs: list,
    *,
    aliases=None,
    scratch_shapes=(),
    semantics=("parallel", "arbitrary"),
    vmem_limit_bytes: int | None = None,
    interpret,
    **cost: int,
) -> list[jax.Array]:
    """kernel(num_columns, *inputs, *outputs, *scratch) over the grid.

    Inputs are pairs of an array and its blocks, outputs of a shape and its blocks; `aliases` say
    which input is written over by which output.
    """
    arrays, in_specs = zip(*inputs, strict=True)
    out_shape, out_specs = zip(*outputs, strict=True)
    aliases = {1 + i: output for i, output in (aliases or {}).items()}  # number 0 is num_columns
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
        ),
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=vmem_limit_bytes
        ),
        cost_estimate=pl.CostEstimate(**cost),
        interpret=interpret,
    )(jnp.reshape(num_columns, 1), *arrays)


def _sweep_inputs(config: Config, logits: Logits, operands) -> list:
    """What K2 and K3 read: logits of the models, and what they know of each token."""
    inputs = [(x_cv, config.logits_blocks(x_cv.shape[1])) for x_cv in logits.models]
    rows = logits.targets_c[:, None], operands
    return inputs + [(x, config.row_blocks(x.shape[1])) for x in rows]


def _output(num_tokens: int, columns: int, blocks_of, dtype=jnp.float32) -> tuple:
    return jax.ShapeDtypeStruct((num_tokens, columns), dtype), blocks_of(columns)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    # Never exchanged for another block, so there is no second one to fetch.
    return pl.BlockSpec(shape, lambda i, j, _: (0, 0), pipeline_mode=pl.Buffered(1))


def _bytes(*arrays) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
