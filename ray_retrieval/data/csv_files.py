"""Tables of images in CSV files: as people write them, and as spreadsheets save them."""

import csv
import functools
import io
import re
from typing import NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ray_retrieval.data import location
from ray_retrieval.data.columns import LABEL_COLUMNS, canonical_labels, first_of, is_text, refuse_repeated
from ray_retrieval.errors import DataError

_PATH_COLUMNS = ("path", "image", "filename", "file_name", "file")
_TEXT_COLUMNS = frozenset({"id", *_PATH_COLUMNS, *LABEL_COLUMNS})
_HEAD = 2**20
"""Characters at the start of a file among which the names of all columns are."""
_DECIMAL = r"^[+-]?\d+(,\d+)?$"
_TO_UTF8 = "save it in UTF-8, which spreadsheets call 'CSV UTF-8'"


def parse_csv(file: str) -> tuple[pa.Table, str]:
    """A CSV's columns, and which of them is of the paths, whether the images are there or not.

    Ids, paths and labels are text as it stands, null where it is empty. Columns without a name and a value,
    and rows without a value, are left out; so are spaces around the columns' names.

    Raises:
        DataError: if the file is no CSV, not UTF-8, has no column of paths, no row, an empty path, or two
            columns of one name.
    """
    table = _tidied(_columns(file))
    refuse_repeated(table.column_names, where=file)
    column = first_of(table.column_names, _PATH_COLUMNS)
    assert column is not None, "looked for before"
    if len(table) == 0:
        raise DataError("the file has no row", where=file)
    if table[column].null_count:
        row = int(np.flatnonzero(table[column].is_null())[0])
        raise DataError(f"row {row + 1} has no path", where=file)
    return table, column


def labels_of_csv(column: pa.ChunkedArray, *, where: str) -> tuple[pa.Array, list[str] | None]:
    """A CSV's labels as int64 or list<int64>, with its class names.

    Several of one image are separated by `|` or `;`. Words for what is unknown, such as NA, are null where
    all others are numbers.

    Args:
        column: string [n].
        where: what to name in an error.

    Raises:
        DataError: as `canonical_labels`.
    """
    known = _known(column, pyarrow.csv.ConvertOptions().null_values)
    return canonical_labels(known, None, where=where, separators="|;")


def refuse_shortened(column: pa.ChunkedArray, name: str, *, where: str) -> None:
    """Fail where a spreadsheet has written long numbers in short: different ones may then be the same.

    Args:
        column: string [n].
        name: what to call it in an error.
        where: what to name in an error.

    Raises:
        DataError: naming the first.
    """
    short = column.filter(pc.match_substring_regex(column, r"^\d([.,]\d+)?E\+\d+$"))
    if len(short):
        raise DataError(
            f"{len(short)} numbers of the column '{name}' are shortened, the first is {short[0]}",
            where=where,
            mend="let the spreadsheet keep the column as text, and save it again",
        )


def _columns(file: str) -> pa.Table:
    """The columns of a CSV, without the spaces around their names; those that are known here are text.

    Raises:
        DataError: if it is none, not UTF-8, or has no column of paths.
    """
    try:
        with location.open_file(file) as source:
            header = _header(io.TextIOWrapper(source, "utf-8-sig", newline=""), file)
        known = {name: pa.string() for name in header.names if name.strip() in _TEXT_COLUMNS}
        with location.open_file(file) as source:
            table = pyarrow.csv.read_csv(
                source,
                read_options=pyarrow.csv.ReadOptions(skip_rows=header.lines_before),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=header.separator,
                    # Else text of several lines in quotes may be cut where a block of the file ends.
                    newlines_in_values=True,
                ),
                convert_options=pyarrow.csv.ConvertOptions(column_types=known),
            )
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
        if "UTF8" in str(error) or isinstance(error, UnicodeDecodeError):
            raise DataError("not a text file in UTF-8", where=file, mend=_TO_UTF8) from None
        raise DataError(f"not a valid CSV file: {error}", where=file) from None
    # What is no text in UTF-8 is read as bytes, where it is not asked for.
    foreign = [field.name for field in table.schema if pa.types.is_binary(field.type)]
    if foreign:
        raise DataError(f"the column '{foreign[0]}' is not UTF-8", where=file, mend=_TO_UTF8)
    table = table.rename_columns([name.strip() for name in table.column_names])
    return table if header.separator == "," else _with_decimal_commas(table)


def _with_decimal_commas(table: pa.Table) -> pa.Table:
    """The columns of a CSV; those of nothing but numbers, some as `59,90`, in float64.

    Where columns are not between commas, spreadsheets of many languages write numbers so.
    """
    for place, field in enumerate(table.schema):
        if field.name in _TEXT_COLUMNS or not is_text(field.type):
            continue
        known = pc.if_else(pc.equal(table[place], ""), pa.scalar(None, field.type), table[place])
        if known.null_count < len(known) and pc.all(pc.match_substring_regex(known, _DECIMAL)).as_py():
            numbers = pc.replace_substring(known, ",", ".").cast(pa.float64())
            table = table.set_column(place, field.name, numbers)
    return table


class _Header(NamedTuple):
    """The names of a CSV's columns as they stand, the sign between them, and how many lines come before."""

    names: list[str]
    separator: str
    lines_before: int


def _header(text: TextIO, file: str) -> _Header:
    """How a CSV begins: columns are between commas, semicolons or tabs; spreadsheets may say which.

    Raises:
        DataError: if no column is of paths.
    """
    head = text.read(_HEAD)
    told = re.match(r"sep=(.)\r?\n", head)
    head = head[told.end() :] if told else head
    found = []
    for separator in told[1] if told else ",;\t":
        names = next((row for row in csv.reader(io.StringIO(head, ""), delimiter=separator) if row), [])
        if not names or first_of([name.strip(" ") for name in names], _PATH_COLUMNS) is not None:
            return _Header(names, separator, int(told is not None))
        found.append(names)
    widest = max(found, key=len)
    raise DataError(
        f"no column of paths among {', '.join(widest)}",
        where=file,
        mend="name it 'path', 'image' or 'filename', and put commas, semicolons or tabs between the columns",
    )


def _tidied(table: pa.Table) -> pa.Table:
    """A CSV with null for empty text, without columns of neither a name nor a value, and rows of no value."""
    kept = [
        place for place, name in enumerate(table.column_names) if name or table[place].null_count < len(table)
    ]
    table = table.select(kept)
    for place, field in enumerate(table.schema):
        if is_text(field.type):
            column = table[place]
            known = pc.if_else(pc.equal(column, ""), pa.scalar(None, field.type), column)
            table = table.set_column(place, field.name, known)
    filled = functools.reduce(pc.or_, (column.is_valid() for column in table.columns))
    return table if pc.all(filled).as_py() else table.filter(filled)


def _known(label: pa.ChunkedArray, unknown: list[str]) -> pa.ChunkedArray:
    """A CSV's labels with null for the words of `unknown`, where all others are numbers."""
    missing = pc.is_in(label, value_set=pa.array(unknown))
    numbers = pc.match_substring_regex(label.filter(pc.invert(missing)), r"^[\s\d|;-]+$")
    return pc.if_else(missing, pa.scalar(None, label.type), label) if pc.all(numbers).as_py() else label
