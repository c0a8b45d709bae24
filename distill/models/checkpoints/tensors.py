"""The tensors in the files of a checkpoint, each read by slices; those in few bits dequantised."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from distill.base.errors import UserError, first_line
from distill.models.checkpoints.hub import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_CONVERT = (
    "only safetensors are read, since a pickle can run any code when it is opened; where you trust "
    "the model, load it with transformers and save it again with save_pretrained"
)
# What torch.compile and data parallelism put before keys, or into them.
_WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")

Index = tuple[slice, ...]


class Tensor(Protocol):
    """A tensor that stays on disk until it is sliced.

    `key`, `file` and `kind`, the dtype, are for messages; a virtual one has those of its main part.
    """

    @property
    def key(self) -> str: ...
    @property
    def file(self) -> Path: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...
    def read(self, index: Index) -> np.ndarray: ...
    def __hash__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file."""

    key: str
    file: Path
    shape: tuple[int, ...]
    kind: str

    def read(self, index: Index) -> np.ndarray:
        # Opened anew: until a file is closed, all of it that was read counts as our memory.
        if self.kind != "F8_E4M3":
            with safe_open(self.file, framework="numpy") as file:
                return file.get_slice(self.key)[index] if index else file.get_tensor(self.key)
        # NumPy's safetensors know no 8 bits.
        offset = _offsets(self.file, self.file.stat().st_mtime_ns)[self.key]
        values = np.memmap(self.file, np.uint8, "r", offset=offset, shape=self.shape)
        return values[index].copy().view(ml_dtypes.float8_e4m3fn)


@functools.lru_cache(maxsize=4)
def _offsets(path: Path, modified: int) -> dict[str, int]:
    """Where the tensors of a file begin: a mixture's header is long, and each expert asks."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        key: 8 + size + entry["data_offsets"][0]
        for key, entry in header.items()
        if key != "__metadata__"
    }


@dataclasses.dataclass(frozen=True)
class Virtual:
    """Base of tensors that are made of others, and called by the main one of them."""

    main: Tensor

    @property
    def key(self) -> str:
        return self.main.key

    @property
    def file(self) -> Path:
        return self.main.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.main.shape

    @property
    def kind(self) -> str:
        """Of what is read."""
        return "F32"


@dataclasses.dataclass(frozen=True)
class Scaled(Virtual):
    """8 bits with a scale for every block of the last two axes (DeepSeek-V3, arXiv:2412.19437)."""

    scales: Tensor
    block: tuple[int, int]

    def read(self, index: Index) -> np.ndarray:
        values = self.main.read(index).astype(np.float32)
        if math.prod(self.scales.shape) == 1:
            whole = tuple(slice(None) for _ in self.scales.shape)
            return values * self.scales.read(whole).astype(np.float32).reshape(())
        bounds = _bounds(index, self.shape)[-2:]
        sized = list(zip(bounds, self.block, strict=True))
        cut = (slice(low // size, -(-high // size)) for (low, high), size in sized)
        scales = self.scales.read((*index[:-2], *cut)).astype(np.float32)
        for axis, ((low, high), size) in zip((-2, -1), sized, strict=True):
            block_of = np.arange(low, high) // size - low // size
            scales = np.take(scales, block_of, axis=axis)
        return values * scales


# The sixteen values of 4 bits: a sign, two bits of exponent, one of mantissa.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])


@dataclasses.dataclass(frozen=True)
class MxFp4(Virtual):
    """4 bits with a power of two for every 32 (OCP Microscaling Formats): experts of gpt-oss.

    In the file (expert, output, input / 32, 16 bytes) and scales (expert, output, input / 32); read
    as the tensor of 16 bits would be, (expert, input, output).
    """

    scales: Tensor

    @property
    def key(self) -> str:
        return self.main.key.removesuffix("_blocks")

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, groups, size = self.main.shape
        return experts, 2 * groups * size, outputs

    def read(self, index: Index) -> np.ndarray:
        experts, inputs, outputs = index
        (_, (low, high), _) = _bounds(index, self.shape)
        size = 2 * self.main.shape[-1]
        first = low // size
        groups = slice(first, -(-high // size))
        blocks = self.main.read((experts, outputs, groups, slice(None)))
        exponents = self.scales.read((experts, outputs, groups)).astype(np.int32) - 127
        pairs = np.stack([_E2M1[blocks & 15], _E2M1[blocks >> 4]], axis=-1)
        values = np.ldexp(pairs.reshape(*exponents.shape, size), exponents[..., None])
        values = values.reshape(*exponents.shape[:-1], -1)
        return values[..., low - first * size : high - first * size].swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class OfExpert(Virtual):
    """One expert's rows in a tensor of all experts, (expert, row, column)."""

    expert: int
    rows: range

    @property
    def kind(self) -> str:
        return self.main.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), self.main.shape[2]

    def read(self, index: Index) -> np.ndarray:
        rows = self.rows[index[0]]
        own = slice(self.expert, self.expert + 1), slice(rows.start, rows.stop), index[1]
        return self.main.read(own)[0]


_ALL_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)(gate_up|down)_proj")


def split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor per expert and projection where those of all are stored together."""
    split: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not (found := _ALL_EXPERTS.fullmatch(key)) or len(tensor.shape) != 3:
            split[key] = tensor
            continue
        prefix, names = found[1], found[2].split("_")
        size = tensor.shape[1] // len(names)
        for expert, (i, name) in itertools.product(range(tensor.shape[0]), enumerate(names)):
            rows = range(i * size, (i + 1) * size)
            split[f"{prefix}{expert}.{name}_proj.weight"] = OfExpert(tensor, expert, rows)
    return split


def _bounds(index: Index, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [each.indices(size)[:2] for each, size in zip(index, shape, strict=True)]


def find_tensors(folder: Path, quantization: dict | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint by key, without what wrappers add to keys; reads headers only.

    `quantization` is that of config.json, one that `is_readable`.

    Raises:
      UserError: there are no safetensors, or they are damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for stored in read_header(path):
            key = _WRAPPERS.sub("", stored.key)
            if key in tensors:
                raise UserError(
                    f"{key} is in both {tensors[key].file} and {path}: remove the older file, "
                    "or download the model again"
                )
            tensors[key] = stored
    return _dequantised(tensors, quantization) if quantization else tensors


def read_header(path: Path) -> Iterator[Stored]:
    """The tensors of one file."""
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
            slices = file.get_slice(key)
            yield Stored(key, path, tuple(slices.get_shape()), slices.get_dtype())


def is_readable(quantization: dict) -> bool:
    """Whether a `quantization_config` says how `find_tensors` can dequantise."""
    return quantization.get("quant_method") in ("fp8", "mxfp4")


def _dequantised(tensors: dict[str, Tensor], quantization: dict) -> dict[str, Tensor]:
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    found = dict(tensors)
    for key in tensors:
        name, _, part = key.rpartition("_")
        if key.endswith("_scale_inv") and (name := key.removesuffix("_scale_inv")) in tensors:
            found[name] = _scaled(tensors[name], found.pop(key), (rows, columns))
        elif part == "blocks" and f"{name}_scales" in tensors:
            found[name] = MxFp4(found.pop(key), found.pop(f"{name}_scales"))
        elif key.endswith(("activation_scale", "input_scale")):  # of no weight
            del found[key]
    return found


def _scaled(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Scaled:
    sizes = zip(values.shape[-2:], block, strict=True)
    grid = (*values.shape[:-2], *(-(-size // of) for size, of in sizes))
    if math.prod(scales.shape) != 1 and scales.shape != grid:
        raise UserError(
            f"{scales.file}: {scales.key} has shape {scales.shape}, blocks of {block} of "
            f"{values.shape} call for {grid}"
        )
    return Scaled(values, scales, block)


def has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


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
