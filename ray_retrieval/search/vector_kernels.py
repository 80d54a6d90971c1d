"""Compiled loops of the exact search over vectors: distances, products, and heaps of the nearest rows.

A heap holds the k nearest rows so far of one query, the farthest first. Each is one number that sorts by
(distance, place): the bits of the distance, which sort as the distances do because none is negative, above 32
bits of the row's place in what is searched. See `vectors` for what is compared.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils as untyped_cgutils
from numba.core import types
from numba.extending import intrinsic
from numba.np import arrayobj as untyped_arrayobj

from ray_retrieval.metrics.compiled import compiled, compiled_in_any_order
from ray_retrieval.search.hits import NO_ROW

cgutils: Any = untyped_cgutils
arrayobj: Any = untyped_arrayobj

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

NO_KEY = np.uint64(0x7F800000_FFFFFFFF)
"""Stands in a heap where there is no row: at distance infinity."""

MOST_ROWS = 1 << 32
"""Places that one search can tell apart."""

LANES, _WIDTH = 32, 8  # partial sums of a distance, in registers of the widest kind, whose additions overlap
_BLOCK_ROWS = 64  # of which all or none are looked at one by one


def _squared_differences_typing(_context: Any, query: Any, row: Any, chunks: Any) -> Any:
    return types.float64(query, row, chunks), _squared_differences_code


def _squared_differences_code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    floats, doubles = (ir.VectorType(kind, _WIDTH) for kind in (ir.FloatType(), ir.DoubleType()))
    arrays = [
        arrayobj.make_array(kind)(context, builder, value).data
        for kind, value in zip(signature.args[:2], arguments[:2], strict=True)
    ]
    zeros = ir.Constant(doubles, [0.0] * _WIDTH)
    sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(LANES // _WIDTH)]
    with cgutils.for_range(builder, arguments[2]) as loop:
        start = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
        for number, total in enumerate(sums):
            place = builder.add(start, ir.Constant(start.type, number * _WIDTH))
            pointers = [builder.bitcast(builder.gep(array, [place]), floats.as_pointer()) for array in arrays]
            values = [builder.fpext(builder.load(pointer, align=4), doubles) for pointer in pointers]
            difference = builder.fsub(*values)
            square = builder.fmul(difference, difference)
            builder.store(builder.fadd(builder.load(total), square), total)
    parts = [builder.load(total) for total in sums]
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [builder.fadd(*pair) for pair in zip(parts[:half], parts[half:], strict=True)]
    whole = parts[0]
    width = _WIDTH
    while width > 1:
        width //= 2
        places = ir.VectorType(ir.IntType(32), width)
        nothing = ir.Constant(whole.type, ir.Undefined)
        halves = [
            builder.shuffle_vector(whole, nothing, ir.Constant(places, list(range(low, low + width))))
            for low in (0, width)
        ]
        whole = builder.fadd(*halves)
    return builder.extract_element(whole, ir.Constant(ir.IntType(32), 0))


squared_differences: Any = intrinsic(_squared_differences_typing)
"""The sum of squared differences of the first 32 · chunks places of two rows, in float64.

There are 32 partial sums, over the places that are equal mod 32; then the upper half of them is added to the
lower until one is left. Written out in vectors, because the compiler may not reorder sums by itself, and one
sum after another takes ten times as long. The processor has no say in the order.
"""


@compiled_in_any_order
def largest_norm_error(vectors: Floats) -> tuple[float, int]:
    """The largest | |x|² - 1 | of the rows x, and the first row where it is no finite number, or -1.

    Args:
        vectors: float32 [n, d].
    """
    largest = 0.0
    for row in range(len(vectors)):
        square = 0.0
        for place in range(vectors.shape[1]):
            value = np.float64(vectors[row, place])
            square += value * value
        error = abs(square - 1.0)
        if not error < np.inf:
            return largest, row
        largest = max(largest, error)
    return largest, -1


@compiled
def add_up(vectors: Floats, groups: Rows, sums: Doubles, counts: Rows) -> None:
    """Add each row to the sum of its group, one after another.

    Args:
        vectors: float32 [n, d].
        groups: int64 [n].
        sums: float64 [groups, d], changed.
        counts: int64 [groups], of rows, changed.
    """
    for row in range(len(vectors)):
        group = groups[row]
        counts[group] += 1
        for place in range(vectors.shape[1]):
            sums[group, place] += vectors[row, place]


@compiled
def _distance(query: Floats, row: Floats) -> np.float32:
    """The sum of squared differences, in float64 and a fixed order, rounded to float32.

    Args:
        query: float32 [d].
        row: float32 [d].
    """
    chunks = len(query) // LANES
    total = squared_differences(query, row, chunks)
    # Loops run over slices from 0: the compiler checks other signed indices for wrap-around.
    some, others = query[chunks * LANES :], row[chunks * LANES :]
    for j in range(len(some)):
        difference = np.float64(some[j]) - np.float64(others[j])
        total += difference * difference
    return np.float32(total)


@compiled
def distances_of(vectors: Floats, queries: Floats, rows: Rows, out: Floats) -> None:
    """Write the distances of each query to its rows; infinity for `NO_ROW`.

    Args:
        vectors: float32 [n, d], read-only.
        queries: float32 [q, d], read-only.
        rows: int64 [q, m], read-only, places in `vectors` or `NO_ROW`.
        out: float32 [q, m], filled.
    """
    for number in range(rows.shape[0]):
        for place in range(rows.shape[1]):
            row = rows[number, place]
            out[number, place] = np.inf if row < 0 else _distance(queries[number], vectors[row])


@compiled
def _threshold(base: float, limit: float) -> np.float32:
    """The least product of a row that may lie at a distance up to the limit, rounded down."""
    # What rounds to the limit may be greater by half a unit in its last place.
    least = base - 0.5 * limit * (1.0 + 2.0**-23) - 2.0**-140
    return np.float32(least - 2.0**-23 * abs(least) - 2.0**-140)


@compiled
def _any_at_least(values: Floats, threshold: np.float32) -> bool:
    hits = np.uint32(0)
    for j in range(len(values)):
        hits += np.uint32(values[j] >= threshold)
    return bool(hits > 0)


@compiled
def _at_least(values: Floats, threshold: np.float32, places: Rows) -> int:
    """Write the places of the values that are at least the threshold, in order, and return their number."""
    count = 0
    for start in range(0, len(values), _BLOCK_ROWS):
        block = values[start : start + _BLOCK_ROWS]
        if _any_at_least(block, threshold):
            for j in range(len(block)):
                places[count] = start + j
                count += int(block[j] >= threshold)
    return count


@compiled
def _distance_of(key: np.uint64) -> float:
    return float(np.uint32(key >> np.uint64(32)).view(np.float32))


@compiled
def collect(
    products: Floats, panel: Floats, first: int, queries: Floats, bases: Doubles, heaps: Keys
) -> None:
    """Put the rows of a panel that belong to the nearest so far into their queries' heaps.

    Args:
        products: float32 [q, n], of queries and rows, as nearly as `bases` allows for.
        panel: float32 [n, d], read-only.
        first: place of the panel's first row, which is greater than those of the rows before.
        queries: float32 [q, d], read-only.
        bases: float64 [q]: a row whose product is less than this less half a distance is farther than that.
        heaps: uint64 [q, k + 1], updated; the last place is 0, so that there always are two to compare.
    """
    places, near = np.empty(products.shape[1], np.int64), np.empty(products.shape[1], np.float32)
    for number in range(products.shape[0]):
        query, heap = queries[number], heaps[number]
        count = _at_least(products[number], _threshold(bases[number], _distance_of(heap[0])), places)
        # One distance after another without decisions in between: the processor fetches rows ahead.
        for i in range(count):
            near[i] = _distance(query, panel[places[i]])
        bits = near.view(np.uint32)
        for i in range(count):
            key = (np.uint64(bits[i]) << np.uint64(32)) | np.uint64(first + places[i])
            if key < heap[0]:
                _sift(heap, key)


@compiled
def _sift(heap: Keys, key: np.uint64) -> None:
    """Put a key in place of the first one of a heap."""
    place, size = np.uint64(0), np.uint64(len(heap) - 1)
    while True:
        child = place + place + np.uint64(1)
        if child >= size:
            break
        child += np.uint64(heap[child + np.uint64(1)] > heap[child])
        if key >= heap[child]:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = key


@compiled_in_any_order
def _products(queries: Floats, panel: Floats, out: Floats) -> None:
    """Write the products of few queries with rows: four queries at a time share what is loaded of a row.

    Args:
        queries: float32 [q, d].
        panel: float32 [n, d].
        out: float32 [q, n], filled.
    """
    fours = len(queries) // 4 * 4
    for first in range(0, fours, 4):
        a, b, c, d = queries[first], queries[first + 1], queries[first + 2], queries[first + 3]
        for place in range(len(panel)):
            row = panel[place]
            of_a = of_b = of_c = of_d = np.float32(0)
            for j in range(len(row)):
                of_a += a[j] * row[j]
                of_b += b[j] * row[j]
                of_c += c[j] * row[j]
                of_d += d[j] * row[j]
            out[first, place], out[first + 1, place] = of_a, of_b
            out[first + 2, place], out[first + 3, place] = of_c, of_d
    for number in range(fours, len(queries)):
        query = queries[number]
        for place in range(len(panel)):
            row, product = panel[place], np.float32(0)
            for j in range(len(row)):
                product += query[j] * row[j]
            out[number, place] = product


@compiled
def collect_for_few(
    vectors: Floats, first: int, panel_rows: int, queries: Floats, bases: Doubles, heaps: Keys
) -> None:
    """Multiply few queries with all the vectors, panel by panel, and collect the nearest; see `collect`.

    Args:
        vectors: float32 [n, d].
        first: place of the first of them.
        panel_rows: vectors of a panel, at most.
        queries: float32 [q, d].
        bases: as for `collect`.
        heaps: as for `collect`.
    """
    room = np.empty(len(queries) * panel_rows, np.float32)
    for start in range(0, len(vectors), panel_rows):
        panel = vectors[start : start + panel_rows]
        products = room[: len(queries) * len(panel)].reshape(len(queries), len(panel))
        _products(queries, panel, products)
        collect(products, panel, first + start, queries, bases, heaps)


@compiled
def write_hits(heaps: Keys, first_places: Rows, first_rows: Rows, distances: Floats, rows: Rows) -> None:
    """Write the hits of each heap, sorted by (distance, row), and `NO_ROW` at infinity where there are fewer.

    Args:
        heaps: uint64 [q, k + 1], used up.
        first_places: int64 [segments], ascending: the place of the first row of each segment.
        first_rows: int64 [segments], ascending: its row number.
        distances: float32 [q, k], filled.
        rows: int64 [q, k], filled.
    """
    for number in range(rows.shape[0]):
        keys = heaps[number, : rows.shape[1]]
        keys.sort()
        for i in range(len(keys)):
            place = np.int64(keys[i] & np.uint64(0xFFFFFFFF))
            segment = np.searchsorted(first_places, place, side="right") - 1
            distances[number, i] = _distance_of(keys[i])
            rows[number, i] = first_rows[segment] + place - first_places[segment]
            if keys[i] == NO_KEY:
                rows[number, i] = NO_ROW
