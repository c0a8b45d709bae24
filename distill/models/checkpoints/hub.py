"""Finding the local folder of a model: on disk, in the package, or on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distill.base.errors import UserError

CONFIG, CARD = "config.json", "README.md"
ADAPTER = "adapter_config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ASSETS = Path(__file__).parents[2] / "assets"
EMBEDDED = "embedded:"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def resolve_model(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """Local folder of a model.

    Args:
      path_or_id: a folder with config.json, or that of a LoRA adapter, 'embedded:NAME' for a model
        that comes with the package, or a Hugging Face hub id, which is downloaded (safetensors,
        JSON and tokenizer).
      weights: whether safetensors are.

    Raises:
      UserError: nothing is there, or the hub cannot be reached or has no such model.
    """
    return _folder(path_or_id, CONFIG, ADAPTER) or _download(str(path_or_id), weights)


def base_folder(folder: Path, *, weights: bool = True) -> Path:
    """The folder itself; of an adapter, that of its base model.

    Raises:
      UserError: the adapter names no base, or one that cannot be found.
    """
    if (folder / CONFIG).is_file() or not (folder / ADAPTER).is_file():
        return folder
    named = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"{folder / ADAPTER}: base_model_name_or_path={named!r} names no model")
    try:
        return resolve_model(named, weights=weights)
    except UserError as error:
        raise UserError(f"{folder / ADAPTER}: base_model_name_or_path: {error}") from None


def tokenizer_folder(path_or_id: str | Path) -> Path:
    """Where a model's tokenizer is: of an adapter without one, its base's.

    A folder with a tokenizer alone will do.
    """
    folder = _folder(path_or_id, CONFIG, ADAPTER, *_TOKENIZER)
    folder = folder or _download(str(path_or_id), weights=False)
    if any((folder / name).is_file() for name in _TOKENIZER):
        return folder
    return base_folder(folder, weights=False)


def find_config(path_or_id: str | Path) -> Path | None:
    """config.json as `resolve_model` finds it; None for a hub id that was never downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if folder := _folder(path_or_id, CONFIG, ADAPTER):
        return base_folder(folder) / CONFIG
    cached = try_to_load_from_cache(str(path_or_id), CONFIG)
    return Path(cached) if isinstance(cached, str) else None


def is_hub_id(path_or_id: str) -> bool:
    """Whether the name is none of a folder here or of a model in the package."""
    return bool(_HUB_ID.fullmatch(path_or_id)) and not Path(path_or_id).exists()


def _folder(path_or_id: str | Path, *contents: str) -> Path | None:
    """The folder on this machine, with one of these files in it; None for a hub id."""
    name = str(path_or_id)
    if name.startswith(EMBEDDED):
        return _embedded_folder(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in contents):
            raise UserError(f"{folder} has no {CONFIG}: pass a folder saved by save_pretrained")
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file: pass the folder that holds {CONFIG}")
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            f"there is no folder {name!r}: pass a folder with {CONFIG} and *.safetensors, "
            "or a hub id such as Qwen/Qwen2.5-1.5B-Instruct"
        )
    return None


def _embedded_folder(name: str) -> Path:
    known = sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}"))
    wanted = name.removeprefix(EMBEDDED)
    if wanted not in known:
        listed = ", ".join(EMBEDDED + each for each in known) or "none"
        raise UserError(f"there is no model {name!r} in the package; available: {listed}")
    return ASSETS / wanted


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # network, repository, permission: one class each in the hub client
        raise UserError(
            f"there is no local folder {hub_id!r} and the Hugging Face hub did not provide it "
            f"({first_line(error)}): pass a local folder with {CONFIG} and *.safetensors instead"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
