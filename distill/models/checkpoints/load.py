"""Hugging Face folders: reading their weights into shards.

Import and export (export.py) follow the same key table (keys.py). Only safetensors are read,
so loading a checkpoint never runs code from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from distill.base.errors import UserError
from distill.base.sharding import inner_sharding
from distill.models.checkpoints.hub import CONFIG
from distill.models.checkpoints.keys import Weight, fused_rows, key_table, mapped_params
from distill.models.checkpoints.source import Source, open_source
from distill.models.checkpoints.tensors import Index, Tensor
from distill.models.facts import ModelConfig

# Read at once: what is read exists three times for a moment, in the file's mapped pages, as bytes
# and in our layout.
_PIECE_BYTES = 32e6

Bounds = tuple[tuple[int, int], ...]  # start and stop on each axis
Read = Callable[[Index], np.ndarray]  # a slice of one tensor, from disk
Mapped = dict[str, tuple[Weight, jax.ShapeDtypeStruct]]  # row of the key table and shape, by path


def load_params(
    path_or_id: str | Path,
    config: ModelConfig,
    abstract_params: nnx.State,
    shardings: nnx.State | None,
    dtype: jax.typing.DTypeLike,
    finish: Callable[[str, nnx.Variable], nnx.Variable] | None = None,
) -> nnx.State:
    """Reads a checkpoint, each weight straight to its shards.

    A host reads only the slices that its own devices hold, and keeps its part of one tensor of the
    checkpoint in its memory at a time. Every process of a job must call this.

    Args:
      abstract_params: the nnx.Param state of a `Transformer`, holding shapes.
      shardings: the same tree holding jax shardings; None puts all on the default device.
      dtype: of the returned parameters, whatever the files hold.
      finish: makes what is kept of a parameter, from its name in the key table and the loaded
        parameter; called before the next one is read.

    Raises:
      UserError: keys are missing or unknown, shapes differ, or a file is damaged; the message
        names the key and the file.
    """
    source, expected = open_source(path_or_id), mapped_params(config, abstract_params)
    _check_present(source, expected)
    _check_known(source, config, expected)
    return _read_params(source, expected, abstract_params, shardings, dtype, finish)


def load_head(
    path_or_id: str | Path,
    config: ModelConfig,
    abstract_params: nnx.State,
    shardings: nnx.State,
    dtype: jax.typing.DTypeLike,
) -> nnx.State:
    """`load_params` of the output head or the embedding alone; no other weight is read."""
    table = key_table(config)
    flat = {"/".join(map(str, path)): param for path, param in nnx.to_flat_state(abstract_params)}
    expected = {path: (table[path], param.get_value()) for path, param in flat.items()}
    source = open_source(path_or_id)
    _check_present(source, expected)
    return _read_params(source, expected, abstract_params, shardings, dtype, None)


def _read_params(
    source: Source,
    expected: Mapped,
    abstract_params: nnx.State,
    shardings: nnx.State | None,
    dtype: jax.typing.DTypeLike,
    finish: Callable[[str, nnx.Variable], nnx.Variable] | None,
) -> nnx.State:
    tensors = source.tensors
    _check_tensors(tensors, expected)

    def load(path, param: nnx.Variable, sharding: nnx.Variable | None = None) -> nnx.Variable:
        weight, array = expected[name := jax.tree_util.keystr(path, simple=True, separator="/")]
        place = (
            sharding.get_value() if sharding is not None else SingleDeviceSharding(jax.devices()[0])
        )
        target = weight, array.shape, place, np.dtype(dtype)
        first, _ = fused_rows(expected, name)
        reads = {key: _from_row(tensors[key], first) for _, key in weight.tensors(array.shape)}
        if weight.stacked:
            loaded = param.replace(_read_stack(reads, *target))
        else:
            loaded = param.replace(_read_tensor(reads[weight.key], *target))
        return loaded if finish is None else finish(name, loaded)

    trees = (abstract_params,) if shardings is None else (abstract_params, shardings)
    return jax.tree_util.tree_map_with_path(
        load, *trees, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def _keys(params: Mapped) -> set[str]:
    return {key for weight, array in params.values() for _, key in weight.tensors(array.shape)}


def _check_present(source: Source, params: Mapped) -> None:
    if missing := sorted(_keys(params) - source.tensors.keys()):
        raise UserError(
            f"{source.folder} lacks {_listed(missing)}, which {CONFIG} calls for: download the "
            f"model again, or correct {CONFIG}"
        )


def _check_known(source: Source, config: ModelConfig, params: Mapped) -> None:
    tensors = source.tensors
    # Both are recomputed from what is there: written by older versions of transformers.
    redundant = {key for key in tensors if key.endswith("rotary_emb.inv_freq")}
    if config.tied:
        redundant.add("lm_head.weight")
    unknown = sorted(tensors.keys() - _keys(params) - redundant)
    if unknown:
        raise UserError(
            f"{tensors[unknown[0]].file} has {_listed(unknown)}, "
            f"unknown for a {config.family} model with this {CONFIG}: a model with more parts "
            "(adapters, vision, experts) is not supported; merge or remove them"
        )


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more keys"


def _check_tensors(tensors: dict[str, Tensor], params: Mapped) -> None:
    for path, (weight, array) in params.items():
        inner = weight.hf_shape(array.shape[len(weight.stacked) :])[1:]
        expected = (fused_rows(params, path)[1], *inner)
        for _, key in weight.tensors(array.shape):
            file, found, kind = (tensor := tensors[key]).file, tensor.shape, tensor.kind
            if found != expected:
                raise UserError(f"{file}: {key} has shape {found}, {CONFIG} calls for {expected}")
            if kind not in ("BF16", "F16", "F32"):
                raise UserError(f"{file}: {key} holds {kind}, only BF16, F16 and F32 can be read")


def _from_row(tensor: Tensor, first: int) -> Read:
    """Reads a tensor as if it began at this row: one of the parameters that lie in it."""

    def read(index: Index) -> np.ndarray:
        rows = slice(index[0].start + first, index[0].stop + first)
        return tensor.read((rows, *index[1:]))

    return read


def _read_stack(
    reads: dict[str, Read],
    weight: Weight,
    shape: tuple[int, ...],
    place: Sharding,
    dtype: np.dtype,
) -> jax.Array:
    """The tensors of all layers as one parameter, filled one by one on the devices.

    A small one is put together on the host: it needs no program.
    """
    if math.prod(shape) * dtype.itemsize <= _PIECE_BYTES:
        return _place_blocks(
            lambda bounds: _join(reads, weight, shape, bounds, dtype), shape, place
        )
    stack = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=place)()
    write, leading = _writer(place), len(weight.stacked)
    inner = shape[leading:], inner_sharding(place, leading), dtype
    for index, key in weight.tensors(shape):
        block = _read_tensor(reads[key], weight, *inner)
        # One at a time: else the host runs ahead, and layers wait in its memory for the devices.
        stack = jax.block_until_ready(write(stack, block, *index))
    return stack


@functools.cache
def _writer(place: Sharding) -> Callable[..., jax.Array]:
    def write(stack, block, *index):
        start = *index, *[0] * block.ndim
        return jax.lax.dynamic_update_slice(stack, block[(None,) * len(index)], start)

    return jax.jit(write, donate_argnums=0, out_shardings=place)


def _read_tensor(
    read_slice: Read, weight: Weight, shape: tuple[int, ...], place: Sharding, dtype: np.dtype
) -> jax.Array:
    """One tensor in our layout, of which this host reads what its devices hold."""
    return _place_blocks(
        lambda bounds: _read_block(read_slice, weight, shape, bounds, dtype), shape, place
    )


def _place_blocks(
    read: Callable[[Bounds], np.ndarray], shape: tuple[int, ...], place: Sharding
) -> jax.Array:
    """An array of which this host reads what its devices hold."""
    # Devices that hold copies of one shard ask for it one after another.
    read_once = functools.cache(read)

    def of_index(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # JAX asks for slices of what has axes
        bounds = (each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
        return read_once(tuple(bounds))

    return jax.make_array_from_callback(shape, place, of_index)


def _join(
    reads: dict[str, Read],
    weight: Weight,
    shape: tuple[int, ...],
    bounds: Bounds,
    dtype: np.dtype,
) -> np.ndarray:
    """A block of a stack."""
    whole = np.empty([stop - start for start, stop in bounds], dtype)
    leading = len(weight.stacked)
    for index, key in weight.tensors(shape):
        place = [i - start for i, (start, _) in zip(index, bounds, strict=False)]
        if all(0 <= i < size for i, size in zip(place, whole.shape, strict=False)):
            inner = shape[leading:], bounds[leading:], dtype
            whole[tuple(place)] = _read_block(reads[key], weight, *inner)
    return whole


def _read_block(
    read_slice: Read, weight: Weight, shape: tuple[int, ...], bounds: Bounds, dtype: np.dtype
) -> np.ndarray:
    block = np.empty([stop - start for start, stop in bounds], dtype)
    for piece, cut in _pieces(weight, shape, bounds, dtype):
        block[cut] = _read_piece(read_slice, weight, shape, piece)
    return block


def _pieces(weight: Weight, shape: tuple[int, ...], bounds: Bounds, dtype: np.dtype):
    """Cuts a block into parts of few bytes: the bounds of each, and its place in the block.

    Cut is the axis that varies slowest in the file, so that every part lies there in one piece.
    """
    axis = weight.ours.index(weight.theirs[0][0])
    start, stop = bounds[axis]
    row_bytes = math.prod(high - low for low, high in bounds) * dtype.itemsize / (stop - start)
    rows = max(1, int(_PIECE_BYTES / row_bytes))
    for low in range(start, stop, rows):
        high = min(low + rows, stop)
        cut = (*[slice(None)] * axis, slice(low - start, high - start))
        yield (*bounds[:axis], (low, high), *bounds[axis + 1 :]), cut


def _read_piece(
    read_slice: Read, weight: Weight, shape: tuple[int, ...], bounds: Bounds
) -> np.ndarray:
    """A part of a tensor, in our layout.

    Of an axis merged from several of ours, the rows that the first of them asks for are read whole,
    and the others are cut here.
    """
    size = dict(zip(weight.ours, shape, strict=True))
    bound = dict(zip(weight.ours, bounds, strict=True))
    hf_index, expanded, cut = [], [], []
    for merged in weight.theirs:
        first, inner = merged[0], merged[1:]
        inner_size = math.prod(size[axis] for axis in inner)
        start, stop = bound[first]
        hf_index.append(slice(start * inner_size, stop * inner_size))
        expanded += [stop - start, *(size[axis] for axis in inner)]
        cut += [slice(None), *(slice(*bound[axis]) for axis in inner)]
    block = read_slice(tuple(hf_index)).reshape(expanded)[tuple(cut)]
    order = "".join(weight.theirs)
    return block.transpose([order.index(axis) for axis in weight.ours])
