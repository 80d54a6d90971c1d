"""Ids of rows: what images are known by, so that no two rows that a search can find have the same."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.errors import DataError
from ray_retrieval.search.id_kernels import hash_texts

Hashes = npt.NDArray[np.uint64]

_NAMED = 3  # ids in an error
_LOOKED_AT = 100_000  # ids that may come twice; of more it is not counted how often


def check_once(blocks: Callable[[], Iterable[pa.Array]], rows: int, where: object) -> None:
    """Raise DataError, naming the first few, if some ids come more than once.

    Of each id 8 bytes are in memory; only of those that have these in common more.

    Args:
        blocks: gives the ids, large_string, some at a time; called once more if some come twice.
        rows: how many they are.
        where: they come from, for the error.
    """
    hashes, done = np.empty(rows, np.uint64), 0
    for ids in blocks():
        _hash(ids, hashes[done : done + len(ids)])
        done += len(ids)
    hashes.sort()
    alike = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if len(alike) == 0:
        return
    looked_at, found = alike[:_LOOKED_AT], [pa.array([], pa.large_string())]
    for ids in blocks():
        own = np.empty(len(ids), np.uint64)
        _hash(ids, own)
        found.append(ids.filter(pa.array(np.isin(own, looked_at))))
    counted = pc.value_counts(pa.chunked_array(found))
    several = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")
    if len(several) == 0 and len(alike) == len(looked_at):
        return
    count = len(several) + len(alike) - len(looked_at)
    raise DataError(
        f"{count:,} ids come more than once: {first_of(several.to_pylist(), count)}",
        where=where,
        mend="give each image an id of its own",
    )


def _hash(ids: pa.Array, out: Hashes) -> None:
    _, offsets, data = ids.buffers()
    starts = np.frombuffer(offsets, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    texts = np.frombuffer(data or b"", np.uint8)
    hash_texts(starts, texts, out)


def first_of(ids: Sequence[str], count: int | None = None) -> str:
    """The first few of some ids, and how many more there are.

    Args:
        ids: all of them, or at least the first few.
        count: of all.
    """
    named = ids[:_NAMED]
    left = (len(ids) if count is None else count) - len(named)
    return ", ".join(repr(name) for name in named) + (f" and {left:,} more" if left else "")
