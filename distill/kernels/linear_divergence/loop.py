"""The loop over chunks of tokens: no array of [T, V] on any platform.

Gradients are made in the forward pass, where a chunk's logits exist anyway; recomputing them in a
backward pass would run the teacher's head twice. That is possible because the differentiable result
is one scalar: the backward pass only multiplies by its cotangent.

On a mesh, all of it runs under shard_map: tokens over the axes that hold batches, the vocabulary
over the tensor axis. Heads are gathered once before the loop; the head's gradient is summed over
the token shards once after it; inside, only numbers per token cross devices (for a loss of whole
rows, the chunk's logits too).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill.base.sharding import mesh_axes, num_shards, partition_spec
from distill.kernels.linear_divergence import block as blocks
from distill.kernels.linear_divergence.shared import SharedHead
from distill.kernels.linear_divergence.sweeps import Projection, Sweeps
from distill.kernels.linear_divergence.token_losses import (
    RowLoss,
    TokenValues,
    weights_of,
)

LANES = 128  # of a TPU: a shard's columns are a multiple, so that none straddles a tile
# The walk ends with a whole chunk, so more chunks compute fewer tokens without weight; below the
# smallest, reading the heads takes longer than their products.
MOST_EVEN_CHUNKS, SMALLEST_EVEN_CHUNK = 8, 512


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change from chunk to chunk; static.

    `chunk` counts tokens over all devices; None means as many as `sweeps` has memory for.
    """

    sweeps: Sweeps
    vocab_size: int
    chunk: int | None
    soft_cap_s: float | None
    soft_cap_t: float | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What is cut into chunks, (T, ...) each: hidden states, targets (-1: none), loss weights.

    `teacher_t` is the teacher's hidden states, a TopK, or None; `columns` are by name what the
    loss's own weights read.
    """

    hidden_s_td: jax.Array
    teacher_t: Any
    targets_t: jax.Array
    weights_t: jax.Array
    columns: dict[str, jax.Array]


def token_values(loss, options: Options, tokens: Tokens, head_s_dv, head_t_dv):
    """Forward only: (TokenValues, weighted loss), (T,) each."""

    def local(tokens, head_s_dv, head_t_dv):
        def chunk_values(carry, chunk):
            block = _block(options, loss, chunk, head_s_dv, head_t_dv)
            weighing = chunk.weights_t, chunk.columns
            return carry, blocks.values(loss, options.sweeps, block, *weighing)

        size = _chunk_size(options, loss, tokens, head_s_dv, head_t_dv)
        return _weighted(_walk_chunks(chunk_values, None, tokens, size)[1], tokens.weights_t)

    outputs = _on_shards(options, local, tokens, head_s_dv, head_t_dv, _token_spec())
    return _first(outputs, tokens.targets_t.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear_token_loss(
    loss, options: Options, tokens: Tokens, head_s_dv: jax.Array, head_t_dv: jax.Array | None
) -> tuple[jax.Array, TokenValues]:
    """The sum of the weighted losses and the values per token; differentiable by the student's two.

    Without differentiation this forward-only body runs; with it, `_forward_with_gradients` does.
    """
    values, losses_t = token_values(loss, options, tokens, head_s_dv, head_t_dv)
    return jnp.sum(losses_t), values


def _forward_with_gradients(loss, options, tokens, head_s_dv, head_t_dv):
    hidden_dtype, sweeps = tokens.hidden_s_td.dtype, options.sweeps

    def local(tokens, head_s_dv, head_t_dv):
        def chunk_step(carry, chunk):
            head_gradient_dv, memory = carry
            block = _block(options, loss, chunk, head_s_dv, head_t_dv, memory)
            values, head_gradient_dv, hidden_gradient_cd = blocks.values_and_gradients(
                loss,
                sweeps,
                block,
                chunk.weights_t,
                chunk.columns,
                _projections(options, chunk, head_s_dv, head_t_dv)[0],
                head_gradient_dv,
            )
            if not block.vocab_axes:
                hidden_gradient_cd = hidden_gradient_cd.astype(hidden_dtype)
            memory = None if memory is None else block.logits.models
            return (head_gradient_dv, memory), (values, hidden_gradient_cd)

        size = _chunk_size(options, loss, tokens, head_s_dv, head_t_dv)
        memory = None  # with one chunk, there is no loop to carry it
        if size < tokens.targets_t.shape[0]:
            models = _projections(options, tokens, head_s_dv, head_t_dv)
            memory = sweeps.logits_memory(size, *models)
        start = jnp.zeros(head_s_dv.shape, jnp.float32), memory
        (head_gradient_dv, _), outputs = _walk_chunks(chunk_step, start, tokens, size)
        values, hidden_gradient_td = outputs
        if vocab_axes := mesh_axes("act_vocab"):
            hidden_gradient_td = jax.lax.psum(hidden_gradient_td, vocab_axes)
        head_gradient_dv = _sum_over_token_shards(head_gradient_dv).astype(head_s_dv.dtype)
        values = _weighted(values, tokens.weights_t)
        return values, hidden_gradient_td.astype(hidden_dtype), head_gradient_dv

    out_specs = _token_spec(), _token_spec(), _head_gradient_spec(head_s_dv.shape[0])
    values, hidden_gradient_td, head_gradient_dv = _on_shards(
        options, local, tokens, head_s_dv, head_t_dv, out_specs
    )
    values, hidden_gradient_td = _first((values, hidden_gradient_td), tokens.targets_t.shape[0])
    head_gradient_dv = _with_columns(head_gradient_dv, head_s_dv.shape[1])
    values, losses_t = values
    return (jnp.sum(losses_t), values), (hidden_gradient_td, head_gradient_dv)


def _backward(loss, options, gradients, cotangents):
    loss_cotangent, _ = cotangents
    hidden_gradient_td, head_gradient_dv = (
        (loss_cotangent * gradient).astype(gradient.dtype) for gradient in gradients
    )
    # None is a zero cotangent: teacher, targets and weights are constants of the loss.
    return Tokens(hidden_gradient_td, None, None, None, None), head_gradient_dv, None


linear_token_loss.defvjp(_forward_with_gradients, _backward)


def _block(options: Options, loss, chunk: Tokens, head_s_dv, head_t_dv, memory=None):
    temperature, vocab_axes = loss.temperature, mesh_axes("act_vocab")
    width = head_s_dv.shape[1]
    student, teacher = _projections(options, chunk, head_s_dv, head_t_dv)
    outcomes = chunk.teacher_t if head_t_dv is None else None
    first_column = jax.lax.axis_index(vocab_axes) * width if vocab_axes else 0
    num_columns = jnp.clip(options.vocab_size - first_column, 0, width).astype(jnp.int32)
    if isinstance(head_t_dv, SharedHead):
        assert teacher is not None
        of_targets = chunk.targets_t - first_column, temperature, vocab_axes
        outcomes, teacher = head_t_dv.outcomes(teacher.logits(), *of_targets), None
    logits, statistics = options.sweeps.logits_and_statistics(
        student,
        teacher,
        chunk.targets_t - first_column,
        num_columns,
        memory,
        temperature=temperature,
        entropy=any(getattr(x, "teacher_entropy", False) for x in weights_of(loss)),
    )
    return blocks.Block(
        logits=logits,
        outcomes=outcomes,
        statistics=blocks.combined(statistics, temperature, vocab_axes),
        temperature=temperature,
        first_column=first_column,
        vocab_size=options.vocab_size,
        vocab_axes=vocab_axes,
    )


def _projections(
    options: Options, tokens: Tokens, head_s_dv, head_t_dv
) -> tuple[Projection, Projection | None]:
    """Student and teacher, None for one without logits."""
    teacher = None
    if head_t_dv is not None:
        weights_dv = head_t_dv.weights_dv if isinstance(head_t_dv, SharedHead) else head_t_dv
        teacher = Projection(tokens.teacher_t, weights_dv, options.soft_cap_t)
    return Projection(tokens.hidden_s_td, head_s_dv, options.soft_cap_s), teacher


def _walk_chunks(step: Callable, carry, tokens: Tokens, size: int):
    """`step(carry, chunk) -> (carry, outputs)` over chunks of `size` tokens, outputs joined.

    The walk ends behind the last token that has weight; the outputs of what it does not reach are
    0. A ragged end is filled with zeros (weights of zero among them) and cut off the outputs.
    """
    num_tokens = tokens.targets_t.shape[0]
    num_chunks = -(-num_tokens // size)
    tokens = jax.tree.map(lambda x: _padded(x, size * num_chunks), tokens)
    last = jnp.max(jnp.where(tokens.weights_t != 0, 1 + jnp.arange(size * num_chunks), 0))
    if token_axes := mesh_axes("token"):
        last = jax.lax.pmax(last, token_axes)  # all devices make the same steps

    def take(number):
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
        return jax.tree.map(lambda x: cut(x, number * size), tokens)

    def walk(number, state):
        carry, outputs = state
        carry, chunk_outputs = step(carry, take(number))

        def write(x, x_c):
            return jax.lax.dynamic_update_slice_in_dim(x, x_c, number * size, axis=0)

        return carry, jax.tree.map(write, outputs, chunk_outputs)

    shapes = jax.eval_shape(lambda carry: step(carry, take(0))[1], carry)
    outputs = jax.tree.map(lambda x: jnp.zeros((size * num_chunks, *x.shape[1:]), x.dtype), shapes)
    carry, outputs = jax.lax.fori_loop(0, -(-last // size), walk, (carry, outputs))
    return carry, _first(outputs, num_tokens)


def _weighted(values, weights_t: jax.Array):
    """0 for tokens without weight, of which the walk reaches some."""
    return jax.tree.map(lambda x_t: jnp.where(weights_t != 0, x_t, 0.0), values)


def _chunk_size(options: Options, loss, tokens: Tokens, head_s_dv, head_t_dv) -> int:
    """Tokens per chunk on this device: as asked, or evenly as many as fit and pay."""
    num_tokens = tokens.targets_t.shape[0]
    if options.chunk is not None:
        return min(num_tokens, -(-options.chunk // num_shards("token")))
    columns = head_s_dv.shape[1]
    if isinstance(loss, RowLoss):  # it gathers them
        columns *= num_shards("act_vocab")
    models = _projections(options, tokens, head_s_dv, head_t_dv)
    largest = min(
        options.sweeps.largest_chunk(*models, columns),
        max(SMALLEST_EVEN_CHUNK, -(-num_tokens // MOST_EVEN_CHUNKS)),
    )
    unit = options.sweeps.row_multiple if largest >= options.sweeps.row_multiple else 1
    num_chunks = -(-num_tokens // largest)
    even = -(-num_tokens // num_chunks)
    return min(num_tokens, -(-even // unit) * unit)


def _on_shards(options: Options, local: Callable, tokens: Tokens, head_s_dv, head_t_dv, out_specs):
    """local(tokens, head_s, head_t), on a mesh with this device's tokens and columns."""
    if jax.sharding.get_abstract_mesh().empty:
        return local(tokens, head_s_dv, head_t_dv)
    num_tokens = tokens.targets_t.shape[0]
    token_shards, vocab_shards = num_shards("token"), num_shards("act_vocab")
    size = -(-num_tokens // token_shards) * token_shards
    tokens = jax.tree.map(lambda x: _padded(x, size), tokens)
    if vocab_shards > 1:
        # Cut alike, whatever their own padding: a shard has the same ids of both models.
        unit, places = LANES * vocab_shards, options.vocab_size
        if isinstance(head_t_dv, SharedHead):
            places = max(places, head_t_dv.weights_dv.shape[1])
        columns = -(-places // unit) * unit
        cut = functools.partial(_with_columns, columns=columns)
        head_s_dv, head_t_dv = jax.tree.map(cut, (head_s_dv, head_t_dv))
    # Whole in d: this is where a sharded head is gathered, once.
    head_spec = partition_spec((None, "act_vocab"))
    return jax.shard_map(
        local,
        in_specs=(_token_spec(), head_spec, head_spec),
        out_specs=out_specs,
        check_vma=False,
    )(tokens, head_s_dv, head_t_dv)


def _token_spec() -> PartitionSpec:
    return partition_spec(("token",))


def _scatter_axes(model_width: int) -> tuple[str, ...]:
    """Mesh axes that shard both tokens and the head's rows, where they divide those."""
    axes = tuple(axis for axis in mesh_axes("embed") if axis in mesh_axes("token"))
    return axes if axes and model_width % num_shards("embed") == 0 else ()


def _head_gradient_spec(model_width: int) -> PartitionSpec:
    rows = "embed" if _scatter_axes(model_width) else None
    return partition_spec((rows, "act_vocab"))


def _sum_over_token_shards(head_gradient_dv):
    """Summed over the shards of tokens, each device keeping the rows that it holds of the head."""
    scatter_axes = _scatter_axes(head_gradient_dv.shape[0])
    if scatter_axes:
        head_gradient_dv = jax.lax.psum_scatter(
            head_gradient_dv, scatter_axes, scatter_dimension=0, tiled=True
        )
        # XLA for TPUs may else try to scatter once behind a loop of microbatches, and fail (libtpu
        # 0.0.42, while_loop_all_reduce_code_motion).
        head_gradient_dv = jax.lax.optimization_barrier(head_gradient_dv)
    sum_axes = tuple(axis for axis in mesh_axes("token") if axis not in scatter_axes)
    return jax.lax.psum(head_gradient_dv, sum_axes) if sum_axes else head_gradient_dv


def _first(tree, num_tokens: int):
    return jax.tree.map(lambda x: x[:num_tokens], tree)


def _padded(x, num_tokens: int):
    return jnp.pad(x, [(0, num_tokens - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _with_columns(head_dv, columns: int):
    """A head cut or filled with zeros to a number of columns."""
    if head_dv.shape[1] == columns:
        return head_dv
    return jnp.pad(head_dv[:, :columns], ((0, 0), (0, max(0, columns - head_dv.shape[1]))))
