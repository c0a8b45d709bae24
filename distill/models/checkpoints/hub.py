"""Finding the local folder of a model: on disk, in the package, or on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distill.base.errors import UserError, first_line

CONFIG, CARD = "config.json", "README.md"
ADAPTER = "adapter_config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ASSETS = Path(__file__).parents[2] / "assets"
EMBEDDED = "embedded:"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?")


def resolve_model(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """Local folder of a model.

    `path_or_id` is a folder with config.json, or that of a LoRA adapter; 'embedded:NAME' for a
    model that comes with the package; or a Hugging Face hub id, which is downloaded (JSON,
    tokenizer, and with `weights` safetensors), of the revision in ID@REVISION. An adapter's base
    too.

    Raises:
      UserError: nothing is there, or the hub cannot be reached or has no such model.
    """
    folder = _folder(path_or_id, CONFIG, ADAPTER) or _download(str(path_or_id), weights)
    base_folder(folder, weights=weights)
    return folder


def base_folder(folder: Path, *, weights: bool = False) -> Path:
    """The folder itself; of an adapter, that of its base model.

    Raises:
      UserError: the adapter names no base, or one that cannot be found.
    """
    if (named := _base(folder)) is None:
        return folder
    try:
        return resolve_model(named, weights=weights)
    except UserError as error:
        raise UserError(f"{folder / ADAPTER}: base_model_name_or_path: {error}") from None


def _base(folder: Path) -> str | None:
    """The name of an adapter's base model; None for a model."""
    if (folder / CONFIG).is_file() or not (folder / ADAPTER).is_file():
        return None
    named = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"{folder / ADAPTER}: base_model_name_or_path={named!r} names no model")
    return named


def tokenizer_folder(path_or_id: str | Path) -> Path:
    """Where a model's tokenizer is: of an adapter without one, its base's.

    A folder with a tokenizer alone will do.
    """
    folder = _folder(path_or_id, CONFIG, ADAPTER, *_TOKENIZER)
    folder = folder or _download(str(path_or_id), weights=False)
    if any((folder / name).is_file() for name in _TOKENIZER):
        return folder
    return base_folder(folder)


def find_config(path_or_id: str | Path) -> Path | None:
    """config.json as `resolve_model` finds it; None for a hub id that was never downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if folder := _folder(path_or_id, CONFIG, ADAPTER):
        named = _base(folder)
        return find_config(named) if named else folder / CONFIG
    hub_id, revision = split_revision(str(path_or_id))
    cached = try_to_load_from_cache(hub_id, CONFIG, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def is_hub_id(path_or_id: str) -> bool:
    """Whether the name is none of a folder here or of a model in the package."""
    return bool(_HUB_ID.fullmatch(path_or_id)) and not Path(path_or_id).exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """A hub id, and the branch, tag or commit that it names behind an @."""
    hub_id, _, revision = name.partition("@")
    return hub_id, revision or None


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


def _download(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    hub_id, revision = split_revision(name)
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # network, repository, permission: one class each in the hub client
        raise UserError(
            f"there is no local folder {name!r} and the Hugging Face hub did not provide it "
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
