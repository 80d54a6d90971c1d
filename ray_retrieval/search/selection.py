"""Searching among some of the rows: without deleted ones, and under a filter.

A search among some rows returns what the search of a database of these rows alone returns, ties included. Two
ways lead there. Where the rows are few, they are gathered and compared exactly. Else the search over all rows
is asked for more hits, and those that may not be are dropped; queries that are still short after a second
attempt, because the wrong rows lie around them, go the first way. Asking for more costs a few per cent; a
search that looks at each row's mark takes several times as long. An approximate search looks at few rows, and
so at their marks (`bits`): see `structure_search.StructureSearch.search`.
"""

import functools
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes, Vectors
from ray_retrieval.search.hits import NO_ROW, Hits, merge, no_hits
from ray_retrieval.search.scan import Segment
from ray_retrieval.search.segments import AnySegment, search_segments
from ray_retrieval.search.vectors import VectorSegment

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Bits = npt.NDArray[np.uint8]
"""A mask with a bit for each row, the lowest of a byte first, and zeros to the end of the last byte."""
Asked = TypeVar("Asked", bound=Hashable)
Find = Callable[[Codes | Vectors, int], Hits]
"""The search over all rows: the `k` nearest for each query."""

FEW, FEW_SHARE = 20_000, 1 / 64
"""Rows, or such a share of all, are compared one by one rather than looked for in a structure, where a search
would have to find so many times as many candidates."""
_SHARE = 8  # of the rows, 1 in so many is few where each is compared anyway
_MORE = 8  # times as many hits at the second attempt
_SPARE = 8
_BYTES_AT_ONCE = 1 << 26  # of gathered rows, or of hits
_HIT_BYTES = 4 + 8  # a distance and a row
_FILTERED_BYTES = 1 << 28  # of filters and what they select
_MOST_FILTERS = 64
_KEPT_BYTES = 1 << 26  # of what a selection keeps for the next search


@dataclass(frozen=True)
class Spans:
    """Where the rows of opened shards lie.

    Attributes:
        first_rows: int64 [shards], ascending.
        sizes: int64 [shards].
    """

    first_rows: Rows
    sizes: Rows

    @property
    def rows(self) -> int:
        """In all."""
        return int(self.sizes.sum())

    def place(self, rows: Rows) -> tuple[Rows, Rows, Mask]:
        """Of rows, int64 [m], the shard and the place there, int64 [m]; bool [m]: whether it is opened."""
        numbers = np.searchsorted(self.first_rows, rows, side="right") - 1
        places = rows - self.first_rows[numbers]
        return numbers, places, (numbers >= 0) & (places >= 0) & (places < self.sizes[numbers])


@dataclass(frozen=True)
class Selection:
    """The rows of opened shards that may be hits.

    Attributes:
        spans: of the shards.
        dead: int64 [n], ascending: rows that may not.
        allowed: for each shard, which of its rows may, `dead` looked at already; None: all others.
    """

    spans: Spans
    dead: Rows
    allowed: tuple[Bits, ...] | None = None

    @staticmethod
    def of(spans: Spans, dead: Rows, masks: Iterable[Mask] | None = None) -> "Selection":
        """Without deleted rows, wherever they are, and without those that a filter's masks exclude.

        Args:
            spans: of the shards.
            dead: int64, ascending: deleted rows.
            masks: of a filter, over the rows of all shards, some at a time: only these are held as bytes.
        """
        numbers, places, here = spans.place(dead)
        if masks is None:
            return Selection(spans, dead[here])
        made = _packed(masks, spans.sizes.tolist())
        for number, bits in enumerate(made):
            _clear(bits, places[here & (numbers == number)])
        return Selection(spans, dead[here], made)

    def __len__(self) -> int:
        """How many rows may be hits."""
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        if self.allowed is None:
            return self.spans.rows - len(self.dead)
        return sum(int(np.bitwise_count(bits).sum(dtype=np.int64)) for bits in self.allowed)

    @property
    def bytes(self) -> int:
        """Of memory, with the places that it will keep once they are asked for."""
        places = len(self) * np.dtype(np.int64).itemsize
        bits = sum(some.nbytes for some in self.allowed or ())
        return bits + self.dead.nbytes + (places if places <= _KEPT_BYTES else 0)

    def mask(self, number: int) -> Mask:
        """Bool [rows of a shard]: which of them may."""
        size = int(self.spans.sizes[number])
        return np.unpackbits(self.bits[number], count=size, bitorder="little").view(np.bool_)

    def places(self, number: int) -> Rows:
        """int64, ascending: places in a shard of those that may; not to be changed."""
        if number not in self._found:
            found = np.flatnonzero(self.mask(number))
            if len(self) * found.itemsize > _KEPT_BYTES:
                return found
            self._found[number] = found
        return self._found[number]

    @functools.cached_property
    def _found(self) -> dict[int, Rows]:
        return {}

    @functools.cached_property
    def bits(self) -> tuple[Bits, ...]:
        """Which rows of each shard may: a bit a row, made once, and kept."""
        if self.allowed is not None:
            return self.allowed
        made = []
        for first, size in zip(self.spans.first_rows.tolist(), self.spans.sizes.tolist(), strict=True):
            bits = np.full(-(-size // 8), 0xFF, np.uint8)
            bits[size // 8 :] = (1 << size % 8) - 1
            start, stop = np.searchsorted(self.dead, [first, first + size])
            _clear(bits, self.dead[start:stop] - first)
            made.append(bits)
        return tuple(made)

    def chosen(self) -> Rows:
        """int64, ascending: those that may."""
        parts = [self.places(number) + first for number, first in enumerate(self.spans.first_rows)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def at(self, places: Rows) -> Rows:
        """int64 [m]: the rows at some places, int64 [m], among those that may."""
        if self.allowed is not None:
            return self.chosen()[places]
        before = np.cumsum([0, *self.spans.sizes[:-1]])
        everywhere = places + np.searchsorted(self._gaps, places, side="right")
        numbers = np.searchsorted(before, everywhere, side="right") - 1
        return np.asarray(self.spans.first_rows[numbers] + everywhere - before[numbers])

    @functools.cached_property
    def _gaps(self) -> Rows:
        """int64 [dead], ascending: how many rows that may come before each one that may not."""
        before = np.cumsum([0, *self.spans.sizes[:-1]])
        numbers, inside, _ = self.spans.place(self.dead)
        return np.asarray(before[numbers] + inside - np.arange(len(self.dead)))

    def allows(self, rows: Rows) -> Mask:
        """Which of some hits, int64 of any shape, may be: bool of that shape; `NO_ROW` may not."""
        if self.allowed is None:
            real: Mask = rows != NO_ROW
            return real & ~is_among(rows, self.dead)
        flat = rows.reshape(-1)
        numbers, places, here = self.spans.place(flat)
        for number in np.unique(numbers[here]):
            own = np.flatnonzero(here & (numbers == number))
            inside = places[own]
            here[own] = (self.allowed[number][inside >> 3] >> (inside & 7)) & 1
        return here.reshape(rows.shape)


def _packed(masks: Iterable[Mask], sizes: Sequence[int]) -> tuple[Bits, ...]:
    """The masks of consecutive rows, however many each has, as a bit each, for every shard."""
    coming, left, made = iter(masks), np.zeros(0, np.bool_), []
    for size in sizes:
        found, start = np.zeros(-(-size // 8), np.uint8), 0
        while start < size:
            if len(left) == 0:
                left = next(coming)
                continue
            mask, left = left[: size - start], left[size - start :]
            lead = start % 8  # rows of the byte that the block before has begun
            own = np.packbits(np.concatenate([np.zeros(lead, np.bool_), mask]), bitorder="little")
            found[start // 8 : start // 8 + len(own)] |= own
            start += len(mask)
        made.append(found)
    return tuple(made)


def _clear(bits: Bits, places: Rows) -> None:
    """Set the bits of some rows to zero."""
    np.bitwise_and.at(bits, places >> 3, ~(np.uint8(1) << (places & 7).astype(np.uint8)))


class RecentSelections:
    """The selections of the filters that were used last, as the same ones often come again.

    They are kept up to some number, and some bytes in all, those of the filters included: of a billion rows,
    two.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[Selection, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def of(self, asked: Asked, select: Callable[[Asked], Selection]) -> Selection:
        """The selection of a filter, made anew if it is not there."""
        with self._lock:
            known = self._kept.pop(asked, None)
            if known is not None:
                self._kept[asked] = known
                return known[0]
        found = select(asked)
        taken = found.bytes + _bytes_of(asked)
        with self._lock:
            before = self._kept.pop(asked, None)  # of another thread that was asked the same
            self._kept[asked] = found, taken
            self._bytes += taken - (before[1] if before else 0)
            while self._bytes > _FILTERED_BYTES or len(self._kept) > _MOST_FILTERS:
                self._bytes -= self._kept.popitem(last=False)[1][1]
        return found


def _bytes_of(asked: object) -> int:
    """Of memory that a filter takes, about: it and all that it consists of."""
    parts = vars(asked).values() if is_dataclass(asked) else asked if isinstance(asked, tuple) else ()
    return sys.getsizeof(asked) + sum(map(_bytes_of, parts))


def is_among(rows: Rows, sorted_rows: Rows) -> Mask:
    """Which rows, int64 of any shape, are among others, int64 [n], that ascend: bool of that shape."""
    if len(sorted_rows) == 0:
        return np.zeros(rows.shape, np.bool_)
    places = np.minimum(np.searchsorted(sorted_rows, rows), len(sorted_rows) - 1)
    return np.asarray(sorted_rows[places] == rows)


def search_selected(
    find: Find,
    segments: Sequence[AnySegment],
    selection: Selection,
    queries: Codes | Vectors,
    k: int,
    *,
    threads: int,
) -> Hits:
    """The `k` nearest of the selected rows for each query, sorted by (distance, row).

    Args:
        find: the exact search over all rows of the segments.
        segments: those of the selection's shards, in their order.
        selection: which rows may be hits.
        queries: codes or vectors.
        k: hits per query.
        threads: to share the work among.
    """
    count, total = len(selection), selection.spans.rows
    most = min(k, count)
    if count <= total // _SHARE:
        return search_gathered(segments, range(len(segments)), selection, queries, k, threads=threads)
    found = no_hits(len(queries), k, np.int32 if isinstance(queries, Codes) else np.float32)
    short = np.arange(len(queries))
    wanted = math.ceil(most * total / count) + _SPARE
    for asked in (wanted, _MORE * wanted):
        left = [short[:0]]
        step = max(1, _BYTES_AT_ONCE // (_HIT_BYTES * min(asked, total)))
        for start in range(0, len(short), step):
            some = short[start : start + step]
            hits = dropped(find(queries.take(some), min(asked, total)), selection, k)
            found.distances[some], found.rows[some] = hits.distances, hits.rows
            left.append(some[np.count_nonzero(hits.rows != NO_ROW, axis=1) < most])
        short = np.concatenate(left)
    if len(short):
        left_over, everywhere = queries.take(short), range(len(segments))
        hits = search_gathered(segments, everywhere, selection, left_over, k, threads=threads)
        found.distances[short], found.rows[short] = hits.distances, hits.rows
    return found


def dropped(hits: Hits, selection: Selection, k: int) -> Hits:
    """The first `k` of the hits that may be; `NO_ROW` where there are fewer."""
    allowed = selection.allows(hits.rows)
    order = np.argsort(~allowed, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(allowed, order, axis=1)
    dtype = np.int32 if hits.distances.dtype == np.int32 else np.float32
    found = no_hits(len(hits), k, dtype)
    width = order.shape[1]
    np.copyto(found.distances[:, :width], np.take_along_axis(hits.distances, order, axis=1), where=kept)
    np.copyto(found.rows[:, :width], np.take_along_axis(hits.rows, order, axis=1), where=kept)
    return found


def search_gathered(
    segments: Sequence[AnySegment],
    numbers: Sequence[int],
    selection: Selection | None,
    queries: Codes | Vectors,
    k: int,
    *,
    threads: int,
) -> Hits:
    """The `k` nearest rows of some segments for each query, exactly: they are copied out and compared.

    Args:
        segments: those of the selection's shards.
        numbers: of those to search.
        selection: which rows may be hits; default all, without a copy.
        queries: codes or vectors.
        k: hits per query.
        threads: to share the work among.
    """
    if selection is None:
        return search_segments([segments[number] for number in numbers], queries, k, threads=threads)
    blocks = (
        (places, segments[number].first_row, _gathered(segments[number], places))
        for number in numbers
        for places in _blocks(selection.places(number), segments[number])
    )
    return search_blocks(blocks, queries, k, threads=threads)


def search_blocks(
    blocks: Iterable[tuple[Rows, int, AnySegment]], queries: Codes | Vectors, k: int, *, threads: int
) -> Hits:
    """The `k` nearest rows of blocks that were copied from somewhere, one block at a time.

    Args:
        blocks: the places that a block's rows have there, the row number of place 0, and the rows.
        queries: codes or vectors.
        k: hits per query.
        threads: to share the work among.
    """
    found = no_hits(len(queries), k, np.int32 if isinstance(queries, Codes) else np.float32)
    for places, first_row, block in blocks:
        hits = search_segments([block], queries, min(k, len(places)), threads=threads)
        rows = np.where(hits.rows == NO_ROW, NO_ROW, places[hits.rows] + first_row)
        found = merge([found, Hits(hits.distances, rows)], k)
    return found


def _blocks(places: Rows, segment: AnySegment) -> Iterator[Rows]:
    assert isinstance(segment, Segment | VectorSegment)
    data = segment.words if isinstance(segment, Segment) else segment.vectors
    step = max(1, _BYTES_AT_ONCE // max(1, data.shape[1] * data.itemsize))
    for start in range(0, len(places), step):
        yield places[start : start + step]


def _gathered(segment: AnySegment, places: Rows) -> AnySegment:
    """Some rows of a segment, numbered from 0."""
    if isinstance(segment, Segment):
        words = segment.words[places]
        words.flags.writeable = False
        return Segment(words, 0)
    assert isinstance(segment, VectorSegment)
    return VectorSegment(np.ascontiguousarray(segment.vectors[places]), 0, segment.norm_error)
