"""The column `positives` of a table of images: for each row, the rows of the same table that match it.

    canonical(column, where="photos")     # list<int64>, checked; null becomes an empty list
    taken(positives, rows)                # as the rows of `table.take(rows)` are numbered
    shifted(positives, 100)               # behind a table of 100 rows

Row numbers hold for one table alone, so whatever leaves rows out, orders them anew or joins tables numbers
them anew.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_retrieval.errors import DataError

IntArray = npt.NDArray[np.int64]


def canonical(column: pa.ChunkedArray, *, where: str) -> pa.ListArray:
    """list<int64> [n], without a null.

    Args:
        column: lists of whole numbers, one a row of the table; null for none.
        where: the table's name, for errors.

    Raises:
        DataError: if it holds something else, or a number that is no row.
    """
    lists = column.combine_chunks()
    kind = lists.type
    if not pa.types.is_null(kind):
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not listed or not (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)):
            raise DataError(
                f"'positives' holds lists of rows of the same table, found {kind}",
                where=where,
                mend="give row numbers, or the column another name",
            )
    # What int64 does not hold becomes negative, and so no row.
    rows = lists.cast(pa.list_(pa.int64()), safe=False).fill_null([])
    values = np.asarray(rows.flatten().fill_null(-1))
    outside = np.flatnonzero((values < 0) | (values >= len(rows)))
    if len(outside):
        row = int(np.searchsorted(np.cumsum(_lengths(rows)), outside[0], side="right"))
        found = lists[row].as_py()
        raise DataError(
            f"row {row} has the positives {found[:5]}, rows are 0…{len(rows) - 1}",
            where=where,
            mend="check that the positives were made for this table",
        )
    return _made(_lengths(rows), values)


def taken(positives: pa.ListArray, rows: IntArray) -> pa.ListArray:
    """The positives of some rows, as places in `rows`; those that are not among them are left out.

    Args:
        positives: canonical, of the whole table.
        rows: int64 [m], without repeats.
    """
    place = np.full(len(positives), -1, np.int64)
    place[rows] = np.arange(len(rows))
    some = positives.take(pa.array(rows, pa.int64()))
    lengths = _lengths(some)
    values = place[np.asarray(some.flatten())]
    owners = np.repeat(np.arange(len(rows)), lengths)
    kept = values >= 0
    return _made(np.bincount(owners[kept], minlength=len(rows)), values[kept])


def shifted(positives: pa.ListArray, rows: int) -> pa.ListArray:
    """list<int64> [n]: the positives of a table that comes to stand behind that many rows.

    Args:
        positives: canonical, of the whole table.
        rows: of what stands before.
    """
    return _made(_lengths(positives), np.asarray(positives.flatten()) + rows)


def digest(positives: pa.ListArray, state: Any) -> None:
    """Feed canonical positives, list<int64> [n], to a hash, whose `update` is called."""
    state.update(b"positives")
    state.update(_lengths(positives).astype("<i8").tobytes())
    state.update(np.asarray(positives.flatten()).astype("<i8").tobytes())


def _lengths(lists: pa.ListArray) -> IntArray:
    return np.asarray(lists.value_lengths()).astype(np.int64)


def _made(lengths: IntArray, values: IntArray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int64()))
