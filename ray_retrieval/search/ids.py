"""Ids of rows: what images are known by, so that no two rows that a search can find have the same."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.errors import DataError

_NAMED = 3  # ids in an error


def check_once(ids: pa.Array, where: object) -> None:
    """Raise DataError, naming the first few, if some ids come more than once."""
    if pc.count_distinct(ids, mode="all").as_py() == len(ids):
        return
    counted = pc.value_counts(ids)
    several = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")
    raise DataError(
        f"{len(several):,} ids come more than once: {first_of(several.to_pylist())}",
        where=where,
        mend="give each image an id of its own",
    )


def first_of(ids: Sequence[str], count: int | None = None) -> str:
    """The first few of some ids, and how many more there are.

    Args:
        ids: all of them, or at least the first few.
        count: of all.
    """
    named = ids[:_NAMED]
    left = (len(ids) if count is None else count) - len(named)
    return ", ".join(repr(name) for name in named) + (f" and {left:,} more" if left else "")
