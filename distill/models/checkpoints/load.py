"""Hugging Face folders: reading their weights into shards.

Import and export (export.py) follow the same key table (keys.py). Only safetensors are read,
so loading a checkpoint never runs code from it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from distill.base.errors import UserError
from distill.base.sharding import inner_sharding
from distill.models.checkpoints.hub import CONFIG, first_line, read_json, resolve_model
from distill.models.checkpoints.keys import Weight, fused_rows, mapped_params
from distill.models.facts import ModelConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_CONVERT = (
    "only safetensors are read, since a pickle can run any code when it is opened; where you trust "
    "the model, load it with transformers and save it again with save_pretrained"
)
# Read at once: what is read exists three times for a moment, in the file's mapped pages, as bytes
# and in our layout.
_PIECE_BYTES = 32e6

Bounds = tuple[tuple[int, int], ...]  # start and stop on each axis


def load_model_config(path_or_id: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration of a model, parsed and as the dictionary in its config.json.

    Raises:
      UserError: no such model, or one that the decoder does not support.
    """
    path = resolve_model(path_or_id) / CONFIG
    hf_config = read_json(path)
    return ModelConfig.from_hf(hf_config, str(path)), hf_config


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
      path_or_id: see `resolve_model`.
      config: of this checkpoint.
      abstract_params: the nnx.Param state of a `Transformer`, holding shapes.
      shardings: the same tree holding jax shardings; None puts all on the default device.
      dtype: of the returned parameters, whatever the files hold.
      finish: makes what is kept of a parameter, from its name in the key table and the loaded
        parameter; called before the next one is read.

    Raises:
      UserError: keys are missing or unknown, shapes differ, or a file is damaged; the message
        names the key and the file.
    """
    folder = resolve_model(path_or_id)
    tensors = _find_tensors(folder)
    expected = mapped_params(config, abstract_params)
    _check_keys(folder, tensors, config, expected)
    _check_tensors(tensors, expected)

    def load(path, param: nnx.Variable, sharding: nnx.Variable | None = None) -> nnx.Variable:
        weight, array = expected[name := jax.tree_util.keystr(path, simple=True, separator="/")]
        place = (
            sharding.get_value() if sharding is not None else SingleDeviceSharding(jax.devices()[0])
        )
        target = weight, array.shape, place, np.dtype(dtype)
        first, _ = fused_rows(expected, name)
        own = tensors
        if first:
            own = {key: tensor._replace(first_row=first) for key, tensor in tensors.items()}
        if weight.stacked:
            loaded = param.replace(_read_stack(own, *target))
        else:
            loaded = param.replace(_read_tensor(own[weight.key], *target))
        return loaded if finish is None else finish(name, loaded)

    trees = (abstract_params,) if shardings is None else (abstract_params, shardings)
    return jax.tree_util.tree_map_with_path(
        load, *trees, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


class _Tensor(NamedTuple):
    """A tensor that stays on disk until it is sliced; `first_row` is where a part of it begins."""

    key: str
    file: Path
    shape: tuple[int, ...]
    kind: str
    first_row: int = 0

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, first = index[0], self.first_row
        index = (slice(rows.start + first, rows.stop + first), *index[1:])
        # Opened anew: until a file is closed, all of it that was read counts as our memory.
        with safe_open(self.file, framework="numpy") as file:
            return file.get_slice(self.key)[index]


def _find_tensors(folder: Path) -> dict[str, _Tensor]:
    """All tensors of a checkpoint by key; reads only the headers."""
    tensors: dict[str, _Tensor] = {}
    for path in _weight_files(folder):
        try:
            file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            is_pickle = isinstance(error, SafetensorError) and _is_pickle(path)
            raise UserError(
                f"{path} is not a readable safetensors file ({first_line(error)}): "
                f"{_CONVERT if is_pickle else 'copy or download it again'}"
            ) from None
        with file:
            for key in file.keys():
                if key in tensors:
                    raise UserError(
                        f"{key} is in both {tensors[key].file} and {path}: remove the older file, "
                        "or download the model again"
                    )
                slices = file.get_slice(key)
                tensors[key] = _Tensor(key, path, tuple(slices.get_shape()), slices.get_dtype())
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        found = f" but {pickles[0]}" if pickles else ""
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}{found}: {_CONVERT}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(
            f"{folder / INDEX} has no weight_map of keys to file names: download the model again"
        )
    for name in sorted(set(names.values())):
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise UserError(f"{folder / INDEX} names {name!r}, no file beside it: {_CONVERT}")
    return [folder / name for name in sorted(set(names.values()))]


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as torch.save writes it: a zip archive, or before 1.6 a pickle."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05"))


def _check_keys(
    folder: Path,
    tensors: dict[str, _Tensor],
    config: ModelConfig,
    params: dict[str, tuple[Weight, jax.ShapeDtypeStruct]],
) -> None:
    expected = {key for weight, array in params.values() for _, key in weight.tensors(array.shape)}
    missing = sorted(expected - tensors.keys())
    if missing:
        raise UserError(
            f"{folder} lacks {_listed(missing)}, which {CONFIG} calls for: download the model "
            f"again, or correct {CONFIG}"
        )
    # Both are recomputed from what is there: written by older versions of transformers.
    redundant = {key for key in tensors if key.endswith("rotary_emb.inv_freq")}
    if config.tied:
        redundant.add("lm_head.weight")
    unknown = sorted(tensors.keys() - expected - redundant)
    if unknown:
        raise UserError(
            f"{tensors[unknown[0]].file} has {_listed(unknown)}, "
            f"unknown for a {config.family} model with this {CONFIG}: a model with more parts "
            "(adapters, vision, experts) is not supported; merge or remove them"
        )


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more keys"


def _check_tensors(
    tensors: dict[str, _Tensor], params: dict[str, tuple[Weight, jax.ShapeDtypeStruct]]
) -> None:
    for path, (weight, array) in params.items():
        inner = weight.hf_shape(array.shape[len(weight.stacked) :])[1:]
        expected = (fused_rows(params, path)[1], *inner)
        for _, key in weight.tensors(array.shape):
            _, file, found, kind, _ = tensors[key]
            if found != expected:
                raise UserError(f"{file}: {key} has shape {found}, {CONFIG} calls for {expected}")
            if kind not in ("BF16", "F16", "F32"):
                raise UserError(f"{file}: {key} holds {kind}, only BF16, F16 and F32 can be read")


def _read_stack(
    tensors: dict[str, _Tensor],
    weight: Weight,
    shape: tuple[int, ...],
    place: Sharding,
    dtype: np.dtype,
) -> jax.Array:
    """The tensors of all layers as one parameter, filled one by one on the devices."""
    stack = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=place)()
    write, leading = _writer(place), len(weight.stacked)
    inner = shape[leading:], inner_sharding(place, leading), dtype
    for index, key in weight.tensors(shape):
        block = _read_tensor(tensors[key], weight, *inner)
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
    tensor: _Tensor, weight: Weight, shape: tuple[int, ...], place: Sharding, dtype: np.dtype
) -> jax.Array:
    """One tensor in our layout, of which this host reads what its devices hold."""
    blocks: dict[Bounds, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
        # Devices that hold copies of one shard ask for it one after another.
        if bounds not in blocks:
            blocks[bounds] = block = np.empty([stop - start for start, stop in bounds], dtype)
            for piece, cut in _pieces(weight, shape, bounds, dtype):
                block[cut] = _read_piece(tensor, weight, shape, piece)
        return blocks[bounds]

    return jax.make_array_from_callback(shape, place, read)


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
    tensor: _Tensor, weight: Weight, shape: tuple[int, ...], bounds: Bounds
) -> np.ndarray:
    """A part of a tensor, in our layout.

    Of an axis merged from several of ours, the rows that the first of them asks for are read whole,
    and the others are cut here.
    """
    size = dict(zip(weight.ours, shape, strict=True))
    bound = dict(zip(weight.ours, bounds, strict=True))
    hf_index, expanded, cut = [], [], []
    for first, *inner in weight.theirs:
        inner_size = math.prod(size[axis] for axis in inner)
        start, stop = bound[first]
        hf_index.append(slice(start * inner_size, stop * inner_size))
        expanded += [stop - start, *(size[axis] for axis in inner)]
        cut += [slice(None), *(slice(*bound[axis]) for axis in inner)]
    block = tensor.read(tuple(hf_index)).reshape(expanded)[tuple(cut)]
    order = "".join(weight.theirs)
    return block.transpose([order.index(axis) for axis in weight.ours])
