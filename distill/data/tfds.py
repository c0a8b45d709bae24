"""TensorFlow Datasets, read without TensorFlow through `tfds` data sources."""

import functools
from pathlib import Path

from distill.base.errors import UserError, first_line
from distill.data.base import Example
from distill.data.table import BadRow, Columns, Tables, make_example, register_tables


@register_tables(
    "tfds", without_path="no path is set: pass a TFDS name or data.path=LOCAL, its folder"
)
def _tables(path: str, columns: Columns, subset: str) -> Tables:
    """Of a prepared folder such as ~/data/NAME/1.0.0, or a name in the TFDS catalogue.

    Only the array_record format can be read without TensorFlow.
    """
    return {
        name: functools.partial(_read, source, columns, f"{path} split {name}", name)
        for name, source in _data_sources(path).items()
    }


def _data_sources(path: str) -> dict:
    try:
        import tensorflow_datasets
    except ImportError:
        raise UserError(
            "data.name=tfds needs a package that is not installed: "
            "pip install tensorflow-datasets array-record"
        ) from None
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            return tensorflow_datasets.builder_from_directory(folder).as_data_source()
        return tensorflow_datasets.data_source(path)
    except Exception as error:  # TFDS raises anything, down to the download client's own errors
        raise UserError(
            f"TFDS dataset {path!r} cannot be loaded ({first_line(error)}); pass data.path=LOCAL, "
            "the folder that holds dataset_info.json"
        ) from None


def _read(source, columns: Columns, where: str, split: str) -> list[Example | BadRow]:
    features = source.dataset_info.features
    columns.present(list(features), where)
    names = {n: label.names for n, label in features.items() if getattr(label, "names", None)}
    return [
        make_example(
            {**row, **{n: classes[row[n]] for n, classes in names.items() if row[n] >= 0}},
            columns,
            f"{where} row {i}",
            f"{split}/{i}",
        )
        for i, row in enumerate(source)
    ]
