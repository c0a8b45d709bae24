"""Datasets of the Hugging Face hub, and folders written by `datasets.save_to_disk`."""

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from distill.base.errors import UserError, first_line
from distill.data.base import Example
from distill.data.table import BadRow, Columns, Tables, examples_from_arrow, register_tables

if TYPE_CHECKING:
    import datasets

# Names that `datasets.load_dataset` takes for formats.
_FILE_READERS = {"arrow", "csv", "json", "pandas", "parquet", "text", "webdataset", "xml"}


@register_tables(
    "hf", without_path="no path is set: pass a hub id or data.path=LOCAL, a saved folder"
)
def _chosen_tables(path: str, columns: Columns, subset: str) -> Tables:
    """Of a saved folder, or of a dataset of the hub: ID or ID@REVISION, and its configuration."""
    if Path(path).expanduser().is_dir():
        return _saved_tables(path, columns)
    return hub_tables(path, columns, subset=subset)


def hub_tables(
    hub_id: str,
    columns: Columns,
    *,
    subset: str = "",
    instead: str = "data.path=LOCAL, a local copy",
) -> Tables:
    """The splits of a hub dataset, downloaded or from the cache.

    `instead` is what the error tells the user to pass where there is no hub.

    Raises:
        UserError: the hub cannot be reached and its cache has no copy, or it has no such dataset.
    """
    import datasets

    if hub_id in _FILE_READERS:
        raise UserError(
            f"data.path={hub_id} names a reader of files and no dataset: for files set data.name "
            "to csv, json or parquet and data.path=LOCAL; for the hub, an id such as openai/gsm8k"
        )
    name, _, revision = hub_id.partition("@")
    reachable = _hub_answers(name)
    try:
        with contextlib.nullcontext() if reachable else _offline():
            splits = datasets.load_dataset(name, subset or None, revision=revision or None)
    # From no network to no subset; readers and the hub's client raise classes of their own.
    except Exception as error:
        reason = first_line(error) if reachable else "no network, no cached copy"
        raise UserError(
            f"hub dataset {hub_id!r} cannot be loaded ({reason}); check the id and the network, or "
            f"pass {instead}"
        ) from None
    return _tables(splits, columns, hub_id)


def _saved_tables(path: str, columns: Columns) -> Tables:
    import datasets

    try:
        saved = datasets.load_from_disk(str(Path(path).expanduser()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.path={path} was not written by datasets.save_to_disk ({first_line(error)}); "
            "for .jsonl or .parquet files use data.name=jsonl or parquet"
        ) from None
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    return _tables(splits, columns, path)


def _tables(splits: dict, columns: Columns, where: str) -> Tables:
    return {
        name: functools.partial(_read, table, columns, f"{where} split {name}", name)
        for name, table in splits.items()
    }


def _read(
    table: "datasets.Dataset", columns: Columns, where: str, split: str
) -> list[Example | BadRow]:
    names = columns.present(table.column_names, where)
    rows = table.select_columns(names).with_format("arrow")[:]
    rows = rows.replace_schema_metadata(table.select_columns(names).features.arrow_schema.metadata)
    return examples_from_arrow(rows, columns, where, split)


def _hub_answers(hub_id: str) -> bool:
    """Asks the hub once: `load_dataset` would try a dead network for up to minutes."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(hub_id, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        return True  # a refusal, which load_dataset explains
    except Exception:  # the transport's errors belong to whatever HTTP client the hub uses
        return False
    return True


@contextlib.contextmanager
def _offline():
    """Makes `datasets` look in its cache only."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
