"""Compiled loops of k-reciprocal re-ranking; see `reciprocal` for what they compute.

Items are numbered 0…n - 1. A query that is none of them joins them as their guest, item n, for as long as it
is looked at: the lists of neighbours that it changes are laid over those of the items (`Room.slots`), and the
rows of V that depend on one of these, or on its being farther away than any item, are made anew.
"""

import numpy as np

from ray_retrieval.metrics.compiled import compiled
from ray_retrieval.search.rerank.reciprocal_data import (
    Doubles,
    Floats,
    Guests,
    Holders,
    Neighbours,
    Numbers,
    Room,
    Rows,
    Sparse,
)
from ray_retrieval.search.vector_kernels import LANES, squared_differences


@compiled
def _distance(one: Floats, other: Floats) -> np.float32:
    """As in `vector_kernels`, to the last bit; compiled functions do not call those of other files."""
    whole = len(one) // LANES
    total = squared_differences(one, other, whole)
    some, others = one[whole * LANES :], other[whole * LANES :]
    for j in range(len(some)):
        difference = np.float64(some[j]) - np.float64(others[j])
        total += difference * difference
    return np.float32(total)


@compiled
def _list(item: int, lists: Numbers, slots: Numbers, changed: Numbers) -> Numbers:
    slot = slots[item]
    found: Numbers = changed[slot] if slot >= 0 else lists[item]
    return found


@compiled
def _reciprocal(item: int, reach: int, lists: Numbers, slots: Numbers, changed: Numbers, out: Numbers) -> int:
    """Write those of the first `reach` of an item's list that have it among their first; their number."""
    count = 0
    for other in _list(item, lists, slots, changed)[:reach]:
        if other < 0:
            break
        for back in _list(other, lists, slots, changed)[:reach]:
            if back == item:
                out[count] = other
                count += 1
                break
    return count


@compiled
def _related(
    item: int, half: int, lists: Numbers, changed: Numbers, room: Room, some: Numbers, out: Numbers
) -> int:
    """Write R*, the expanded set of an item's reciprocal neighbours; their number.

    Args:
        item: whose.
        half: of the candidates' lists as much is looked at, themselves included.
        lists: int32 [n, k].
        changed: int32 [slots, k], lists that replace some of them.
        room: whose slots say which.
        some: int32 [half], room to work in.
        out: int32 [k * (1 + half)], filled from its beginning.
    """
    mark = 2 * room.counters[0]
    room.counters[0] += 1
    near = count = _reciprocal(item, lists.shape[1], lists, room.slots, changed, out)
    for member in out[:near]:
        room.marks[member] = mark
    for place in range(near):
        size = _reciprocal(out[place], half, lists, room.slots, changed, some)
        shared = 0
        for member in some[:size]:
            shared += room.marks[member] == mark
        if 3 * shared > 2 * size:
            for member in some[:size]:
                if room.marks[member] < mark:
                    room.marks[member] = mark + 1
                    out[count] = member
                    count += 1
    return count


@compiled
def _weigh(vector: Floats, farthest: float, vectors: Floats, guest: Floats, of: Numbers, out: Floats) -> None:
    """Write exp(-distance / farthest) of some items, divided by their sum.

    Args:
        vector: float32 [d], of the item whose they are.
        farthest: the distance of the item farthest from it; 0: all are equal.
        vectors: float32 [n, d].
        guest: float32 [d], the vector of item n.
        of: int32 [m], the items.
        out: float32 [m], filled.
    """
    scale = -1 / farthest if farthest > 0 else 0.0
    weights = np.empty(len(of))
    total = 0.0
    for place in range(len(of)):
        other = guest if of[place] == len(vectors) else vectors[of[place]]
        weights[place] = np.exp(scale * _distance(vector, other))
        total += weights[place]
    for place in range(len(of)):
        out[place] = weights[place] / total


@compiled
def make_rows(
    first: int,
    stop: int,
    half: int,
    near: Neighbours,
    room: Room,
    sizes: Rows,
    columns: Numbers,
    weights: Floats,
) -> int:
    """Make the rows of V of some items; the number of entries written.

    Args:
        first: the first item.
        stop: the one after the last.
        half: half of k1, rounded, and 1.
        near: of all items.
        room: to work in.
        sizes: int64 [stop - first], filled: entries of each row.
        columns: int32 [(stop - first) * k * (1 + half)], filled from its beginning.
        weights: float32, as many, likewise.
    """
    count, some = 0, np.empty(half, np.int32)
    for item in range(first, stop):
        size = _related(item, half, near.lists, near.lists[:0], room, some, columns[count:])
        vector, of = near.vectors[item], columns[count : count + size]
        _weigh(vector, near.farthest[item], near.vectors, vector, of, weights[count : count + size])
        count += size
        sizes[item - first] = size
    return count


@compiled
def _join(number: int, half: int, near: Neighbours, guests: Guests, room: Room) -> Numbers:
    """The lists that a guest changes, its own first. They are laid over those of the items.

    Which rows of V change with a list? That of its owner; that of the item that drops out at its end; and,
    where the guest is in its first half, those that look at the half neighbourhood of its owner or of the
    item that drops out of this half. `room.own` and `room.halves` tell.
    """
    first, stop = guests.spans[number], guests.spans[number + 1]
    items, size, query = len(near.vectors), near.lists.shape[1], room.counters[1]
    changed = np.empty((1 + stop - first, size), np.int32)
    changed[0] = guests.lists[number]
    room.slots[items] = 0
    for index in range(first, stop):
        host, slot = guests.hosts[index], 1 + index - first
        room.slots[host] = slot
        room.own[host] = query
        before = near.lists[host]
        # Behind those at the same distance: a guest's number is the highest.
        place = size - 1
        while near.distances[host, place - 1] > guests.distances[index]:
            place -= 1
        changed[slot, :place] = before[:place]
        changed[slot, place] = items
        changed[slot, place + 1 :] = before[place : size - 1]
        if before[size - 1] >= 0:
            room.own[before[size - 1]] = query
        if place < half:
            room.halves[host] = query
            if before[half - 1] >= 0:
                room.halves[before[half - 1]] = query
    return changed


@compiled
def _leave(number: int, near: Neighbours, guests: Guests, room: Room) -> None:
    room.slots[len(near.vectors)] = -1
    for host in guests.hosts[guests.spans[number] : guests.spans[number + 1]]:
        room.slots[host] = -1


@compiled
def _depends(item: int, near: Neighbours, vector: Floats, room: Room) -> bool:
    """Whether the row of V of an item is another one while there is a guest, or may be."""
    query = room.counters[1]
    if item == len(near.vectors) or room.own[item] == query:
        return True
    for other in near.lists[item]:
        if other < 0:
            break
        if room.halves[other] == query:
            return True
    return bool(_distance(near.vectors[item], vector) > near.farthest[item])


@compiled
def _made_anew(
    number: int,
    rows: Rows,
    first: int,
    half: int,
    near: Neighbours,
    changed: Numbers,
    guests: Guests,
    room: Room,
) -> Sparse:
    """The rows of V that a guest changes, among those that are looked at.

    Args:
        number: of the guest.
        rows: int64 [m], the items whose lists' first are looked at; -1: none.
        first: how many of each list.
        half: half of k1, rounded, and 1.
        near: of all items.
        changed: what `_join` has returned.
        guests: all of them.
        room: `seen` and `anew` are set for all items that are looked at.
    """
    vector, query = guests.vectors[number], room.counters[1]
    needed = np.empty(first * (1 + len(rows)), np.int32)
    count = 0
    for place in range(-1, len(rows)):
        item = guests.items[number] if place < 0 else rows[place]
        if item < 0:
            continue
        for other in _list(item, near.lists, room.slots, changed)[:first]:
            if other >= 0 and room.seen[other] != query:
                room.seen[other] = query
                room.anew[other] = -1
                if _depends(other, near, vector, room):
                    room.anew[other] = count
                    needed[count] = other
                    count += 1
    most = near.lists.shape[1] * (1 + half)
    starts, some = np.zeros(count + 1, np.int64), np.empty(half, np.int32)
    columns, weights = np.empty(count * most, np.int32), np.empty(count * most, np.float32)
    for place in range(count):
        item, start = needed[place], starts[place]
        size = _related(item, half, near.lists, changed, room, some, columns[start:])
        own, farthest = vector, float(guests.farthest[number])
        if item < len(near.vectors):
            own = near.vectors[item]
            farthest = max(float(near.farthest[item]), float(_distance(own, vector)))
        of = columns[start : start + size]
        _weigh(own, farthest, near.vectors, vector, of, weights[start : start + size])
        starts[place + 1] = start + size
    return Sparse(starts, columns, weights)


@compiled
def _row(item: int, room: Room, sparse: Sparse, anew: Sparse) -> tuple[Numbers, Floats]:
    """Columns and weights of the item's row of V: as stored, or as made anew for the guest."""
    place, rows = item, sparse
    if room.seen[item] == room.counters[1] and room.anew[item] >= 0:
        place, rows = room.anew[item], anew
    start, stop = rows.starts[place], rows.starts[place + 1]
    return rows.columns[start:stop], rows.weights[start:stop]


@compiled
def _enter_query(
    nearest: Numbers,
    room: Room,
    sparse: Sparse,
    holders: Holders,
    anew: Sparse,
    support: Numbers,
    values: Doubles,
) -> int:
    """Write the mean of the rows of V of the query's nearest; the number of columns.

    Args:
        nearest: int32 [k2], items; -1: none.
        room: `columns` is set for the columns that are written, `met` for the items that have one of them.
        sparse: V.
        holders: of its columns.
        anew: rows that replace some of it.
        support: int32, filled from its beginning: the columns.
        values: float64, likewise: their values.
    """
    width = rows = 0
    for item in nearest:
        if item < 0:
            break
        rows += 1
        columns, weights = _row(item, room, sparse, anew)
        for j in range(len(columns)):
            place = room.columns[columns[j]]
            if place < 0:
                place = room.columns[columns[j]] = width
                support[width], values[width] = columns[j], 0.0
                width += 1
                if columns[j] < len(holders.starts) - 1:
                    start, stop = holders.starts[columns[j]], holders.starts[columns[j] + 1]
                    for holder in holders.items[start:stop]:
                        room.met[holder] = room.counters[1]
            values[place] += weights[j]
    values[:width] /= rows
    return width


@compiled
def _overlap(
    nearest: Numbers,
    room: Room,
    sparse: Sparse,
    anew: Sparse,
    values: Doubles,
    sums: Doubles,
    touched: Numbers,
) -> float:
    """The sum of the minima of the query's row and the mean of the rows of V of a hit's nearest.

    Args:
        nearest: int32 [k2], items; -1: none.
        room: `columns` says which columns the query has, `met` which stored rows have one of them.
        sparse: V.
        anew: rows that replace some of it.
        values: float64, the query's values of them.
        sums: float64, as many zeros; they are again afterwards.
        touched: int32, as many, room to work in.
    """
    met = rows = 0
    query = room.counters[1]
    for item in nearest:
        if item < 0:
            break
        rows += 1
        # Most rows have no column of the query. Which of those made anew have one is not known.
        if room.met[item] != query and not (room.seen[item] == query and room.anew[item] >= 0):
            continue
        columns, weights = _row(item, room, sparse, anew)
        for j in range(len(columns)):
            place = room.columns[columns[j]]
            if place >= 0:
                if sums[place] == 0.0:
                    touched[met] = place
                    met += 1
                sums[place] += weights[j]
    overlap = 0.0
    for place in touched[:met]:
        overlap += min(values[place], sums[place] / rows)
        sums[place] = 0.0
    return overlap


@compiled
def score(
    guests: Guests,
    rows: Rows,
    distances: Floats,
    first: int,
    half: int,
    weight: float,
    depth: int,
    near: Neighbours,
    sparse: Sparse,
    holders: Holders,
    room: Room,
) -> None:
    """Replace the distances of hits by their scores.

    Args:
        guests: the queries, items or guests.
        rows: int64 [q, m], items; -1: none.
        distances: float32 [q, m], from the queries; replaced, but for what stands beside -1.
        first: k2.
        half: half of k1, rounded, and 1.
        weight: of the distance, 0…1.
        depth: how many hits have a score in 0…1. It is 1 + distance / farthest of those behind them.
        near: of all items.
        sparse: V.
        holders: of its columns.
        room: to work in; afterwards it is fit for the next call.
    """
    most = first * near.lists.shape[1] * (1 + half)
    support, touched = np.empty(most, np.int32), np.empty(most, np.int32)
    values, sums = np.empty(most), np.zeros(most)
    for number in range(len(rows)):
        of_query, item = rows[number, :depth], guests.items[number]
        is_guest = item == len(near.vectors)
        room.counters[1] += 1
        if is_guest:
            farthest, changed = guests.farthest[number], _join(number, half, near, guests, room)
            anew = _made_anew(number, of_query, first, half, near, changed, guests, room)
        else:
            farthest, changed, anew = near.farthest[item], near.lists[:0], sparse
        nearest = _list(item, near.lists, room.slots, changed)[:first]
        width = _enter_query(nearest, room, sparse, holders, anew, support, values)
        for place in range(rows.shape[1]):
            row = rows[number, place]
            if row < 0:
                continue
            share = distances[number, place] / farthest if farthest > 0 else 0.0
            if place >= depth:
                distances[number, place] = 1 + share
                continue
            nearest = _list(row, near.lists, room.slots, changed)[:first]
            overlap = _overlap(nearest, room, sparse, anew, values, sums, touched)
            distances[number, place] = (1 - weight) * (1 - overlap / (2 - overlap)) + weight * share
        for column in support[:width]:
            room.columns[column] = -1
        if is_guest:
            _leave(number, near, guests, room)
