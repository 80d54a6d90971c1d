"""The loops of `cells`: which cell a code belongs to, and what is nearest in some cells."""

import numpy as np
import numpy.typing as npt

from ray_retrieval.metrics.compiled import compiled, ones

Words = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Distances = npt.NDArray[np.int32]

BLOCK_ROWS = 64
"""Rows whose distances are found at once; so many more than there are have to lie in memory."""

_SPARE = 1 << 12  # hits that a buffer takes beyond twice those asked for


@compiled
def assign(words: Words, centres: Words, out: npt.NDArray[np.uint32]) -> None:
    """The nearest centre of each code, that of the lower number among equally near ones.

    Args:
        words: uint64 [n, w].
        centres: uint64 [w, cells], one column each, so that the loop over them is vectorised.
        out: uint32 [n], filled.
    """
    cells = centres.shape[1]
    keys = np.empty(cells, np.uint64)
    for row in range(words.shape[0]):
        code = words[row, 0]
        column = centres[0]
        for cell in range(cells):
            keys[cell] = (ones(code ^ column[cell]) << np.uint64(32)) | np.uint64(cell)
        for word in range(1, words.shape[1]):
            code = words[row, word]
            column = centres[word]
            for cell in range(cells):
                keys[cell] += ones(code ^ column[cell]) << np.uint64(32)
        best = keys[0]
        for cell in range(cells):
            best = min(best, keys[cell])
        out[row] = best & np.uint64(0xFFFFFFFF)


@compiled
def search_cells(
    words: Words,
    rows: npt.NDArray[np.uint32],
    offsets: Rows,
    probes: Rows,
    queries: Words,
    width: tuple[int, ...],
    bits: int,
    allowed: npt.NDArray[np.uint8],
    out_distances: Distances,
    out_rows: Rows,
) -> None:
    """The nearest rows of some cells for each query: in no order, but those that (distance, row) puts first.

    Args:
        words: uint64 [(n + 64) * w]: the codes, cell after cell.
        rows: uint32 [n], the row of each of them.
        offsets: int64 [cells + 1], where the cells begin.
        probes: int64 [q, p], the cells to look at.
        queries: uint64 [q, w].
        width: a tuple with w places: a number that the compiler knows.
        bits: of a code.
        allowed: uint8 [ceil(rows / 8)], a bit for each row, the lowest of a byte first: whether it may be a
            hit; of length 0, all may.
        out_distances: int32 [q, k], filled from the left.
        out_rows: int64 [q, k], likewise.
    """
    k = out_rows.shape[1]
    found_distances, found_rows = (
        np.empty(2 * k + _SPARE + BLOCK_ROWS, np.int32),
        np.empty(2 * k + _SPARE + BLOCK_ROWS, np.int64),
    )
    distances, histogram = np.empty(BLOCK_ROWS, np.uint64), np.empty(bits + 1, np.int64)
    for number in range(queries.shape[0]):
        query = queries[number]
        # `limit` is the smallest distance up to which there are k hits: no row beyond it is one. `within`
        # counts the hits up to it, ever found.
        limit, within, count = bits, 0, 0
        histogram[:] = 0
        for cell in probes[number]:
            start, stop = offsets[cell], offsets[cell + 1]
            own = rows[start:stop]
            for first in range(0, stop - start, BLOCK_ROWS):
                place = start + first
                block = words[place * len(width) : (place + BLOCK_ROWS) * len(width)]
                hits, bound = 0, np.uint64(limit)
                for at in range(BLOCK_ROWS):
                    distance = np.uint64(0)
                    for word in range(len(width)):
                        distance += ones(query[word] ^ block[at * len(width) + word])
                    distances[at] = distance
                    hits += int(distance <= bound)
                if hits == 0:
                    continue
                if count + BLOCK_ROWS > found_rows.shape[0]:
                    spare = k - (within - histogram[limit])
                    count = _nearest(found_distances, found_rows, count, limit, spare)
                for at in range(min(BLOCK_ROWS, stop - place)):
                    near, row = np.int64(distances[at]), np.int64(own[first + at])
                    if near <= limit and (allowed.shape[0] == 0 or (allowed[row >> 3] >> (row & 7)) & 1):
                        found_distances[count] = near
                        found_rows[count] = row
                        histogram[near] += 1
                        count += 1
                        within += 1
                while within - histogram[limit] >= k:
                    within -= histogram[limit]
                    limit -= 1
        spare = k - (within - histogram[limit])
        count = _nearest(found_distances, found_rows, count, limit, spare)
        out_distances[number, :count] = found_distances[:count]
        out_rows[number, :count] = found_rows[:count]


@compiled
def _nearest(distances: Distances, rows: Rows, count: int, limit: int, spare: int) -> int:
    """Drop from a buffer what cannot be among the nearest; the number of hits that stay.

    Args:
        distances: int32 [capacity], changed in place.
        rows: int64 [capacity], changed in place.
        count: hits in the buffer.
        limit: hits below this distance stay,
        spare: and the so many at it whose rows are lowest.
    """
    last = rows[:count][distances[:count] == limit]
    highest = np.iinfo(np.int64).max
    if len(last) > spare:
        highest = np.partition(last, spare - 1)[spare - 1]
    stay = 0
    for place in range(count):
        if distances[place] < limit or (distances[place] == limit and rows[place] <= highest):
            distances[stay] = distances[place]
            rows[stay] = rows[place]
            stay += 1
    return stay
