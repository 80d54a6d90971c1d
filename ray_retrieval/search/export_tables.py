"""Rows as tables of other programs, written some at a time."""

import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_retrieval.errors import RecipeError
from ray_retrieval.storage import Folder, refusal, temporary_name

LANCE = "rows.lance"
"""A folder, which `export.json` does not list among its files."""
_GROUP_ROWS = 1 << 16
"""Of Parquet's row groups, each of which is a place to begin to read."""


def write_parquet(folder: Folder, name: str, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    """Write tables of one schema as one Parquet file."""
    floats = [field.name for field in schema if _is_float_list(field.type)]
    # Hardly a vector has a value twice: looking for such as do costs more than it saves.
    dictionary = [field.name for field in schema if field.name not in floats]
    with (
        folder.writing(name) as stream,
        pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=dictionary or False) as writer,
    ):
        for table in tables:
            writer.write_table(table, row_group_size=_GROUP_ROWS)


def write_arrow(folder: Folder, name: str, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    """Write tables of one schema as one file of Arrow's, a batch each."""
    with folder.writing(name) as stream, pa.ipc.new_file(stream, schema) as writer:
        for table in tables:
            writer.write_table(table)


def write_lance(folder: Folder, name: str, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    """Write tables of one schema as a data set of Lance.

    Raises:
        RecipeError: if the package is missing, or the folder is not on a local disk.
        ArtefactError: if it cannot be written.
    """
    try:
        lance: Any = import_module("lance")
    except ImportError:
        raise RecipeError(
            "Lance's package is missing", where="the format lance", mend="pip install pylance"
        ) from None
    if not folder.is_local:
        raise RecipeError("data sets of Lance are written to local disks", where=folder, mend="copy it then")
    temporary = temporary_name(f"{folder.path}/{name}")
    batches = (batch for table in tables for batch in table.to_batches())
    try:
        lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), temporary)
        folder.remove(name)
        os.replace(temporary, f"{folder.path}/{name}")
    except OSError as error:
        raise refusal(error, folder.uri_of(name)) from error


def _is_float_list(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_float_list(kind.value_type)
    return bool(pa.types.is_floating(kind))
