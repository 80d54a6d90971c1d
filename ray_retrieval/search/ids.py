"""Ids of rows: what images are known by, so that no two rows that a search can find have the same.

However many ids there are, few of them are in memory at a time: of those that are to be told apart 8 bytes
each, of those that they are compared with nothing, but where these 8 bytes are the same.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.errors import DataError
from ray_retrieval.search.id_kernels import hash_texts, mark, marked
from ray_retrieval.search.selection import is_among

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Blocks = Callable[[], Iterable[pa.Array]]
"""Gives ids, large_string, some at a time; the same ones each time."""

_NAMED = 3  # ids in an error
_READ_AGAIN = 4096  # known rows whose records are in memory at a time
_LOOKED_AT = 100_000  # ids that may come twice; of more it is not counted how often


def hashes_of(blocks: Blocks, rows: int) -> Hashes:
    """uint64 [rows], ascending: a number for each id, the same for equal ones.

    Args:
        blocks: gives the ids.
        rows: how many they are.
    """
    hashes, done = np.empty(rows, np.uint64), 0
    for ids in blocks():
        _hash(ids, hashes[done : done + len(ids)])
        done += len(ids)
    hashes.sort()
    return hashes


def check_once(blocks: Blocks, hashes: Hashes, where: object) -> None:
    """Raise DataError, naming the first few, if some ids come more than once.

    Args:
        blocks: gives the ids; only called if some may come twice.
        hashes: of all of them, as `hashes_of` gives them.
        where: they come from, for the error.
    """
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


def found_again(
    blocks: Blocks,
    hashes: Hashes,
    known: Iterable[tuple[int, pa.Array]],
    texts: Callable[[Rows], pa.Array],
    removed: Rows,
) -> tuple[Rows, Rows]:
    """Which ids are also those of known rows.

    The known ids are read once, the others once more if any may be among them; of each row that is found 16
    bytes are in memory.

    Args:
        blocks: gives the ids.
        hashes: of all of them, as `hashes_of` gives them.
        known: ids of known rows, large_string, some at a time, each with the number of its first row.
        texts: gives the ids of some of these rows again, int64 [m], in their order.
        removed: int64, ascending: rows that are known no more.

    Returns:
        The places of the ids, ascending, and the row that has each, both int64 [n].
    """
    rows, row_hashes = _alike(hashes, known)
    here = ~is_among(rows, removed)
    rows, row_hashes = rows[here], row_hashes[here]
    places, found, before = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for ids in blocks() if len(rows) else ():
        own = np.empty(len(ids), np.uint64)
        _hash(ids, own)
        first, last = np.searchsorted(row_hashes, own), np.searchsorted(row_hashes, own, "right")
        counts = last - first
        place = np.repeat(np.arange(len(ids)), counts)
        ends = np.cumsum(counts)
        row = rows[np.arange(len(place)) - np.repeat(ends - counts, counts) + np.repeat(first, counts)]
        for start in range(0, len(row), _READ_AGAIN):
            some = slice(start, start + _READ_AGAIN)
            same = np.asarray(pc.equal(ids.take(pa.array(place[some])), texts(row[some])))
            places.append(place[some][same] + before)
            found.append(row[some][same])
        before += len(ids)
    return np.concatenate(places), np.concatenate(found)


def _alike(hashes: Hashes, known: Iterable[tuple[int, pa.Array]]) -> tuple[Rows, Hashes]:
    """The known rows whose ids have one of some numbers, and that number, in ascending order of it."""
    power = max(10, (8 * len(hashes)).bit_length())
    shift, bits = np.uint64(64 - power), np.zeros(1 << power - 3, np.uint8)
    mark(hashes, shift, bits)
    rows, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for first_row, ids in known if len(hashes) else ():
        own, may = np.empty(len(ids), np.uint64), np.empty(len(ids), np.bool_)
        _hash(ids, own)
        marked(own, shift, bits, may)
        some = np.flatnonzero(may)
        places = np.minimum(np.searchsorted(hashes, own[some]), len(hashes) - 1)
        some = some[hashes[places] == own[some]]
        rows.append(some + first_row)
        numbers.append(own[some])
    found = np.concatenate(numbers)
    order = np.argsort(found, kind="stable")
    return np.concatenate(rows)[order], found[order]


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
