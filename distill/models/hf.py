"""Hugging Face folders: reading their weights into shards, and writing them back.

Import and export follow the same key table (hf_keys.py). Only safetensors are read, so loading a
checkpoint never runs code from it.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distill.errors import UserError
from distill.models.config import ARCHITECTURES, ModelConfig
from distill.models.hf_keys import Weight, key_table
from distill.models.hub import CONFIG, first_line, read_json, resolve_model
from distill.sharding import replicated

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_CONVERT = (
    "only safetensors are read, since a pickle can run any code when it is opened; where you trust "
    "the model, load it with transformers and save it again with save_pretrained"
)

Bounds = tuple[tuple[int, int], ...]  # start and stop on each axis


def load_model_config(path_or_id: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration of a model, parsed and as the dictionary in its config.json.

    Raises:
      UserError: no such model, or one that the decoder does not support.
    """
    path = resolve_model(path_or_id) / CONFIG
    hf_config = read_json(path)
    return ModelConfig.from_hf(hf_config, str(path)), hf_config


# ---- import ----


def load_params(
    path_or_id: str | Path,
    config: ModelConfig,
    abstract_params: nnx.State,
    shardings: nnx.State | None,
    dtype: jax.typing.DTypeLike,
) -> nnx.State:
    """Reads a checkpoint, each weight straight to its shards.

    A host reads only the slices that its own devices hold, and keeps one stacked weight of them in
    its memory at a time.

    Args:
      path_or_id: see `resolve_model`.
      config: of this checkpoint.
      abstract_params: the nnx.Param state of a `Transformer`, holding shapes.
      shardings: the same tree holding jax shardings; None puts all on the default device.
      dtype: of the returned parameters, whatever the files hold.

    Raises:
      UserError: keys are missing or unknown, shapes differ, or a file is damaged; the message
        names the key and the file.
    """
    folder = resolve_model(path_or_id)
    tensors = _open_tensors(folder)
    table = key_table(config)
    _check_keys(folder, tensors, config, table)
    _check_tensors(tensors, abstract_params, table)

    def load(path, param: nnx.Variable, sharding: nnx.Variable | None = None) -> nnx.Variable:
        weight = table[jax.tree_util.keystr(path, simple=True, separator="/")]
        shape = param.get_value().shape
        place = (
            sharding.get_value() if sharding is not None else SingleDeviceSharding(jax.devices()[0])
        )
        read = _reader(tensors, weight, shape, np.dtype(dtype))
        return param.replace(jax.make_array_from_callback(shape, place, read))

    trees = (abstract_params,) if shardings is None else (abstract_params, shardings)
    return jax.tree_util.tree_map_with_path(
        load, *trees, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


class _Tensor(NamedTuple):
    """A tensor that stays on disk until it is sliced."""

    slices: Any
    file: Path


def _open_tensors(folder: Path) -> dict[str, _Tensor]:
    """All tensors of a checkpoint by key; opening reads only the headers."""
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
        for key in file.keys():
            if key in tensors:
                raise UserError(f"{key} is in both {tensors[key].file} and {path}")
            tensors[key] = _Tensor(file.get_slice(key), path)
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
        raise UserError(f"{folder / INDEX} has no weight_map of keys to file names")
    for name in sorted(set(names.values())):
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise UserError(f"{folder / INDEX} names {name!r}, no file beside it: {_CONVERT}")
    return [folder / name for name in sorted(set(names.values()))]


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as torch.save writes it: a zip archive, or before 1.6 a pickle."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05"))


def _check_keys(
    folder: Path, tensors: dict[str, _Tensor], config: ModelConfig, table: dict[str, Weight]
) -> None:
    expected = {key for weight in table.values() for key in weight.keys(config.num_layers)}
    missing = sorted(expected - tensors.keys())
    if missing:
        raise UserError(f"{folder} lacks {_listed(missing)}, which {CONFIG} calls for")
    # Both are recomputed from what is there: written by older versions of transformers.
    redundant = {key for key in tensors if key.endswith("rotary_emb.inv_freq")}
    if config.tied:
        redundant.add("lm_head.weight")
    unknown = sorted(tensors.keys() - expected - redundant)
    if unknown:
        raise UserError(
            f"{tensors[unknown[0]].file} has {_listed(unknown)}, "
            f"unknown for a {config.family} model with this {CONFIG}"
        )


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more keys"


def _check_tensors(
    tensors: dict[str, _Tensor], abstract_params: nnx.State, table: dict[str, Weight]
) -> None:
    for path, param in nnx.to_flat_state(abstract_params):
        weight, shape = table["/".join(path)], param.get_value().shape
        expected = weight.hf_shape(shape[1:] if weight.stacked else shape)
        for key in weight.keys(shape[0]):
            slices, file = tensors[key]
            found, kind = tuple(slices.get_shape()), slices.get_dtype()
            if found != expected:
                raise UserError(f"{file}: {key} has shape {found}, {CONFIG} calls for {expected}")
            if kind not in ("BF16", "F16", "F32"):
                raise UserError(f"{file}: {key} holds {kind}, only BF16, F16 and F32 can be read")


def _reader(
    tensors: dict[str, _Tensor], weight: Weight, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Function that reads any slice of one of our parameters."""
    keys = weight.keys(shape[0])
    layer_shape = shape[1:] if weight.stacked else shape
    blocks: dict[Bounds, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
        # Devices that hold copies of one shard ask for it one after another.
        if bounds not in blocks:
            blocks[bounds] = block = np.empty([stop - start for start, stop in bounds], dtype)
            layers = keys[slice(*bounds[0])] if weight.stacked else keys
            targets = block if weight.stacked else block[None]
            for key, target in zip(layers, targets, strict=True):
                target[...] = _read_layer(
                    tensors[key].slices, weight, layer_shape, bounds[-len(layer_shape) :]
                )
        return blocks[bounds]

    return read


def _read_layer(slices: Any, weight: Weight, shape: tuple[int, ...], bounds: Bounds) -> np.ndarray:
    """One layer's part of our parameter.

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
    block = slices[tuple(hf_index)].reshape(expanded)[tuple(cut)]
    order = "".join(weight.theirs)
    return block.transpose([order.index(axis) for axis in weight.ours])


# ---- export ----


def export_model(
    folder: str | Path,
    params: nnx.State,
    config: ModelConfig,
    hf_config_dict: dict[str, Any],
    tokenizer: Any,
    dtype: jax.typing.DTypeLike,
    generation_config: dict[str, Any] | None = None,
    max_shard_bytes: float = 5e9,
    untied_rows: int | None = None,
    transform: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> None:
    """Writes a folder that transformers, vLLM and `load_params` can read.

    Written beside `folder` and renamed at the end: a killed export leaves nothing half-written
    under the final name. Every process of a job must call this; the first one writes.

    Args:
      folder: replaced if it holds an earlier export.
      params: the nnx.Param state of a `Transformer`.
      config: of these parameters.
      hf_config_dict: goes to config.json, with its dtype updated.
      tokenizer: anything with `save_pretrained`.
      dtype: of the written weights.
      generation_config: goes to generation_config.json.
      max_shard_bytes: weights beyond this are spread over several files; also bounds the memory
        used, next to the largest single weight.
      untied_rows: writes the head of a tied model too, and of it and the embedding this many rows.
      transform: makes what is written from a tensor's key and value.

    Raises:
      UserError: `folder` exists and is not a model.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {CONFIG}: export to another folder")
    dtype = np.dtype(dtype)
    partial = folder.with_name(folder.name + ".partial")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    exported = list(_exported(params, config, untied_rows))
    _write_weights(partial, exported, dtype, max_shard_bytes, transform or (lambda _, value: value))
    if jax.process_index() == 0:
        _write_json(partial / CONFIG, _with_dtype(hf_config_dict, dtype))
        if generation_config is not None:
            _write_json(partial / "generation_config.json", generation_config)
        tokenizer.save_pretrained(partial)
        _replace(folder, partial)
    multihost_utils.sync_global_devices(f"exported {folder}")


def _write_weights(
    folder: Path, exported: list[_Exported], dtype: np.dtype, max_shard_bytes: float, transform
) -> None:
    sizes = [math.prod(each.shape) * dtype.itemsize for each in exported]
    shards = _plan_shards(sizes, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if shards[1:] else WEIGHTS
        parts = [exported[i] for i in shard]
        tensors = {part.key: transform(part.key, _fetch(part, dtype)) for part in parts}
        weight_map.update(dict.fromkeys(tensors, name))
        if jax.process_index() == 0:
            save_file(tensors, folder / name, metadata={"format": "pt"})
            # safetensors leaves it to its owner alone, whatever the umask that made the folder.
            (folder / name).chmod(folder.stat().st_mode & 0o666)
    if shards[1:] and jax.process_index() == 0:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)


class _Exported(NamedTuple):
    """One tensor of the checkpoint: array[index] in our layout, then `rows` of it in theirs."""

    key: str
    weight: Weight
    array: jax.Array
    index: tuple[int, ...]
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.weight.hf_shape(self.array.shape[len(self.index) :])
        return (min(shape[0], self.rows or shape[0]), *shape[1:])


def _exported(params: nnx.State, config: ModelConfig, rows: int | None) -> Iterator[_Exported]:
    arrays = {"/".join(path): param.get_value() for path, param in nnx.to_flat_state(params)}
    for path, weight in key_table(config).items():
        for layer, key in enumerate(weight.keys(config.num_layers)):
            cut = rows if path in ("embedding", "output_head") else None
            yield _Exported(key, weight, arrays[path], (layer,) if weight.stacked else (), cut)
    if rows is not None and config.tied:
        table = key_table(config)["embedding"]
        yield _Exported("lm_head.weight", table, arrays["embedding"], (), rows)


def _plan_shards(sizes: list[int], limit: float) -> list[list[int]]:
    """Consecutive groups of at most `limit` bytes; what is larger alone gets its own group."""
    shards: list[list[int]] = []
    filled = limit
    for i, size in enumerate(sizes):
        if filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(i)
        filled += size
    return shards


def _fetch(exported: _Exported, dtype: np.dtype) -> np.ndarray:
    """The tensor in their layout; replicated first, so that a process can read what others hold."""
    old = exported.array.sharding
    sharding = replicated(old.mesh) if isinstance(old, NamedSharding) else None
    array = np.asarray(_slicer(dtype, sharding)(exported.array, *exported.index))
    return _to_hf(array, exported.weight)[: exported.rows]


@functools.cache
def _slicer(dtype: np.dtype, sharding: Sharding | None) -> Callable[..., jax.Array]:
    return jax.jit(lambda array, *index: array[index].astype(dtype), out_shardings=sharding)


def _to_hf(array: np.ndarray, weight: Weight) -> np.ndarray:
    transposed = array.transpose([weight.ours.index(axis) for axis in "".join(weight.theirs)])
    # safetensors writes the buffer as it lies, whatever the strides.
    return np.ascontiguousarray(transposed.reshape(weight.hf_shape(array.shape)))


def _with_dtype(hf_config: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """transformers 5 writes 'dtype'; every version reads 'torch_dtype'."""
    names = {"dtype", "torch_dtype"} & hf_config.keys() or {"torch_dtype"}
    return {**hf_config, **dict.fromkeys(names, dtype.name)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(folder: Path, new: Path) -> None:
    """Puts `new` in the place of `folder`; a folder with content cannot be renamed over."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def hf_config_dict(
    config: ModelConfig, *, eos_token_id: int | list[int] | None, pad_token_id: int | None
) -> dict[str, Any]:
    """A config.json for a model that was not imported; the inverse of ModelConfig.from_hf."""
    scaling = config.rope_scaling
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        },
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": "float32",
    }
