"""Writing Hugging Face folders: the inverse of load.py, by the same key table."""

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
from jax.sharding import NamedSharding, Sharding
from safetensors.numpy import save_file

from distill.base import processes
from distill.base.errors import UserError
from distill.base.sharding import inner_sharding, replicated
from distill.data.tokenizer import save_tokenizer
from distill.models.checkpoints.hub import ADAPTER, CARD, CONFIG
from distill.models.checkpoints.keys import Weight, mapped_params
from distill.models.checkpoints.source import Source
from distill.models.checkpoints.tensors import INDEX, Stored, Tensor
from distill.models.facts import ModelConfig


def export_model(
    folder: str | Path,
    params: nnx.State,
    config: ModelConfig,
    hf_config_dict: dict[str, Any],
    tokenizer: Any,
    dtype: jax.typing.DTypeLike,
    generation_config: dict[str, Any] | None = None,
    source: Source | None = None,
    max_shard_bytes: float = 5e9,
    untied_rows: int | None = None,
    transform: Callable[[str, np.ndarray], np.ndarray] | None = None,
    card: str | None = None,
) -> None:
    """Writes a folder that transformers, vLLM and `load_params` can read.

    Written beside `folder` and renamed at the end: a killed export leaves nothing half-written
    under the final name. Every process of a job must call this; the first one writes.

    Args:
      folder: replaced if it holds an earlier export.
      tokenizer: a folder whose tokenizer's files are copied; or anything with `save_pretrained`.
      source: a container, whose keys are used, and whose other tensors are written as they are.
      max_shard_bytes: weights beyond this are spread over several files, as huggingface_hub does;
        the first process holds one file's weights at a time.
      untied_rows: writes the head of a tied model too, and of it and the embedding this many rows.
      transform: makes what is written from a tensor's key and value.
      card: goes to README.md.

    Raises:
      UserError: `folder` exists and is not a model.
    """
    folder = Path(folder)
    check_replaceable(folder)
    dtype = np.dtype(dtype)
    partial = begin_folder(folder)
    exported = list(_exported(params, config, untied_rows))
    if source is not None:
        exported = [each._replace(key=source.name(each.key)) for each in exported]
    others = {} if source is None else source.others
    transform = transform or (lambda _, value: value)
    _write_weights(partial, exported, others, dtype, max_shard_bytes, transform)
    if jax.process_index() == 0:
        write_json(partial / CONFIG, _with_dtype(hf_config_dict, dtype))
        if generation_config is not None:
            write_json(partial / "generation_config.json", generation_config)
        if isinstance(tokenizer, Path):
            copy_tokenizer(tokenizer, partial)
        else:
            save_tokenizer(tokenizer, partial)
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
        replace_folder(folder, partial)
    processes.sync(f"exported {folder}")


def begin_folder(folder: Path) -> Path:
    """An empty folder beside it, which `replace_folder` puts in its place."""
    partial = folder.with_name(folder.name + ".partial")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    return partial


def check_replaceable(folder: Path) -> None:
    """Raises UserError unless an export to the folder overwrites nothing but an earlier one."""
    if folder.is_dir():
        if not any((folder / name).is_file() for name in (CONFIG, ADAPTER)) and any(
            folder.iterdir()
        ):
            raise UserError(
                f"{folder} is not empty and holds no {CONFIG}: export to another folder"
            )
    elif folder.exists():
        raise UserError(f"{folder} is a file: export to a folder")


# What tokenizers and processors of all kinds are made of.
_TOKENIZER_FILES = (
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Unchanged: other versions of transformers than ours read them as they read the source."""
    for pattern in _TOKENIZER_FILES:
        for path in source.glob(pattern):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _write_weights(
    folder: Path,
    exported: list[Exported],
    others: dict[str, Tensor],
    dtype: np.dtype,
    max_shard_bytes: float,
    transform,
) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    writes = jax.process_index() == 0
    by_key = {each.key: each for each in exported}
    sizes = {key: math.prod(each.shape) * dtype.itemsize for key, each in by_key.items()}
    sizes |= {key: _num_bytes(each, dtype) for key, each in others.items()}
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(max_shard_bytes),
    )
    for name, keys in plan.filename_to_tensors.items():
        tensors = {}
        for key in keys:
            if key in others:
                if writes:
                    tensors[key] = _read_whole(others[key], dtype)
                continue
            value = by_key[key].gather(dtype)  # by all processes, in this order
            if value is not None:
                tensors[key] = transform(key, value)
        if writes:
            save_tensors(folder / name, tensors)
    if plan.is_sharded and writes:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file."""
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors leaves it to its owner alone, whatever the umask that made the folder.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _num_bytes(tensor: Tensor, dtype: np.dtype) -> int:
    """Of a carried tensor as it is written; its kind names its bits, BOOL has eight."""
    bits = re.search(r"\d+", tensor.kind)
    stored = int(bits.group()) // 8 if bits else 1
    return math.prod(tensor.shape) * (stored if isinstance(tensor, Stored) else dtype.itemsize)


def _read_whole(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    value = tensor.read(tuple(slice(None) for _ in tensor.shape))
    # What was dequantised is written like the weights.
    return value if isinstance(tensor, Stored) else value.astype(dtype)


class Part(NamedTuple):
    """What a parameter has in one tensor: array[place], in our layout."""

    weight: Weight
    array: jax.Array
    place: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.hf_shape(self.array.shape[len(self.place) :])


class Exported(NamedTuple):
    """One tensor of the checkpoint: its parts one behind the other, and `rows` of them."""

    key: str
    parts: list[Part]
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(part.shape[0] for part in self.parts)
        return (min(rows, self.rows or rows), *self.parts[0].shape[1:])

    def gather(self, dtype: np.dtype) -> np.ndarray | None:
        """Its value in the first process, None in others; all must call this."""
        gathered = [_gather(part, dtype) for part in self.parts]
        if jax.process_index() != 0:
            return None
        made = [_to_hf(x, part.weight) for x, part in zip(gathered, self.parts, strict=True)]
        return (made[0] if len(made) == 1 else np.concatenate(made))[: self.rows]


def _exported(params: nnx.State, config: ModelConfig, rows: int | None) -> Iterator[Exported]:
    mapped = mapped_params(config, params)
    for path, (weight, array) in mapped.items():
        cut = rows if path in ("embedding", "output_head") else None
        paths = weight.parts or (path,)
        for index, key in weight.tensors(array.shape) if path == paths[0] else ():
            yield Exported(key, [Part(*mapped[part], index) for part in paths], cut)
    if rows is not None and config.tied:
        yield Exported("lm_head.weight", [Part(*mapped["embedding"], ())], rows)


def _gather(part: Part, dtype: np.dtype) -> np.ndarray:
    """It in our layout, from the devices of all processes."""
    layout = part.array.sharding
    if not part.array.is_fully_addressable:
        # A process can read only what its own devices hold.
        assert isinstance(layout, NamedSharding)
        slicer = _slicer(dtype, replicated(layout.mesh))
    elif part.place:
        slicer = _slicer(dtype, inner_sharding(layout, len(part.place)))
    else:
        slicer = _slicer(dtype, layout)
    return np.asarray(slicer(part.array, *part.place))


@functools.cache
def _slicer(dtype: np.dtype, place: Sharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda array, *index: array[index].astype(dtype), out_shardings=place)


def _to_hf(array: np.ndarray, weight: Weight) -> np.ndarray:
    transposed = array.transpose([weight.ours.index(axis) for axis in "".join(weight.theirs)])
    # safetensors writes the buffer as it lies, whatever the strides.
    return np.ascontiguousarray(transposed.reshape(weight.hf_shape(array.shape)))


def _with_dtype(hf_config: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """transformers 5 writes 'dtype'; every version reads 'torch_dtype'."""
    names = {"dtype", "torch_dtype"} & hf_config.keys() or {"torch_dtype"}
    return {**hf_config, **dict.fromkeys(names, dtype.name)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_folder(folder: Path, new: Path) -> None:
    """Puts `new` in the place of `folder`; a folder with content cannot be renamed over."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
