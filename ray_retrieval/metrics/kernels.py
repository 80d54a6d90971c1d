"""Compiled loops behind the Hamming metrics: one pass over the rows of a shard for each query.

A row's key is 2 · distance, plus 1 where it is relevant. From the keys of a shard come

    counts     how many rows have each key: all that is needed where the order of ties does not matter, and
    the ranks  of the relevant rows in database order: the rows nearer anywhere, plus those at the same
               distance in earlier shards or earlier in this one, plus 1.

A shard is described by the counts of all shards together and of those before it, so that any cut of the rows
into shards gives the same ranks; a database in one piece is one shard with nothing before it. All that is
summed over rows is an integer: neither threads nor blocks nor shards can change the last digit of a result.
The precision hits / rank is at most 1 and is added up in units of 2^-`precision_shift(k)`.

Nothing larger than one key for each row is held. Keys of codes up to 127 bits are bytes.
"""

import numpy as np
import numpy.typing as npt

from ray_retrieval.metrics.compiled import compiled, ones
from ray_retrieval.metrics.masks import add, at_most, equal, lowest

Words = npt.NDArray[np.uint64]
Keys = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.uint8]
Counters = npt.NDArray[np.uint32]
Numbers = npt.NDArray[np.uint16]

# Rows that go through all steps while their keys are in the nearest cache. At most 65,535, so that the rows
# of one distance and the relevant ones among them are counted in the two halves of a 32-bit word; and a
# multiple of 64.
CHUNK = 4096
_WIDEST_BYTE_KEY = 127  # bits
_ONE = np.uint64(1)


def keys_for(rows: int, bits: int) -> Keys:
    """Room for the keys of so many rows, filled up to whole masks."""
    places = -(-rows // 64) * 64
    return np.zeros(places, np.uint8) if bits <= _WIDEST_BYTE_KEY else np.zeros(places, np.uint16)


def precision_shift(k: int) -> int:
    """Precisions are added up in units of 2^-shift: the finest in which k of them, each at most 1, fit int64.

    Rounding one precision to this unit moves an average precision by at most 2^-(shift + 1) + 2^-54: at
    K = 5,000 by 5e-16, at K = 112,218 by 7e-15, at K = 10⁹ by 6e-11.
    """
    return 63 - k.bit_length()


@compiled
def _relevance(bits: Words, query_label: Words, labels: Words, rows: int, single: bool) -> None:
    """Write one bit for each row, set where it is relevant; see `score` for the labels."""
    if single:
        column, wanted = labels[0], query_label[0]
        whole = rows // 64
        for block in range(whole):
            bits[block] = equal(column, 64 * block, wanted)
        if 64 * whole < rows:
            last = np.uint64(0)
            for row in range(64 * whole, rows):
                last |= np.uint64(column[row] == wanted) << np.uint64(row - 64 * whole)
            bits[whole] = last
        return
    bits[:] = 0
    for word in range(len(query_label)):
        hot = query_label[word]
        while hot != 0:
            rows_of_class = labels[64 * word + np.int64(lowest(hot))]
            hot &= hot - _ONE
            for block in range(len(bits)):
                bits[block] |= rows_of_class[block]


@compiled
def _fill_keys(keys: Keys, start: int, rows: int, query: Words, words: Words, relevant: Words) -> None:
    """Write the keys of `rows` rows from `start` on, which is a multiple of 64."""
    # Slices of one dimension, known to be contiguous and indexed from 0, without which the loops are not
    # vectorised: a slice of two dimensions is strided, and a sum of indices is checked for being negative.
    distances = keys[:rows]
    for word in range(len(words)):
        column, wanted = words[word][start : start + rows], query[word]
        if word == 0:
            for j in range(len(distances)):
                distances[j] = ones(column[j] ^ wanted) << _ONE
        else:
            for j in range(len(distances)):
                distances[j] += ones(column[j] ^ wanted) << _ONE
    bits = relevant[start // 64 :]
    for block in range(len(keys) // 64):
        add(keys, 64 * block, bits[block])


@compiled
def _count(keys: Keys, tables: Counters) -> None:
    """Count the keys, in four tables in turn: adding to one place twice in a row is slow."""
    first, second, third, fourth = tables[0], tables[1], tables[2], tables[3]
    fours = len(keys) // 4
    for j in range(fours):
        first[np.uint64(keys[4 * j])] += np.uint32(1)
        second[np.uint64(keys[4 * j + 1])] += np.uint32(1)
        third[np.uint64(keys[4 * j + 2])] += np.uint32(1)
        fourth[np.uint64(keys[4 * j + 3])] += np.uint32(1)
    for j in range(4 * fours, len(keys)):
        first[np.uint64(keys[j])] += np.uint32(1)


@compiled
def _rank(
    keys: Keys,
    rows: int,
    total: Ints,
    earlier: Ints,
    k: int,
    scale: float,
    relevant_at: Flags,
    state: Counters,
    states: Counters,
    buckets: Numbers,
) -> tuple[int, int]:
    """(sum of precisions at this shard's relevant rows among the first k, their number), in row order.

    Args:
        keys: of the shard's rows.
        rows: number of them.
        total: int64 [bits + 1, 2], rows of all shards by distance and relevance.
        earlier: likewise, of the shards before this one; this one's are added, as far as they are ranked.
        k: 1…rows of all shards.
        scale: units in 1.
        relevant_at: uint8 [depth + 2]; set to 1 at the ranks 1…depth of relevant rows, else to 0. What is
            ranked beyond goes to the last place.
        state: uint32 [bits + 1], scratch: rows of the chunk at each distance so far, and above them, from bit
            16 on, the relevant ones.
        states: uint32 [CHUNK], scratch: the state at each relevant row.
        buckets: uint16 [CHUNK], scratch: their distances.
    """
    # A counting sort that computes the place of each row without moving any: within a distance, rows come
    # in their own order, so the next place of each distance is all there is to remember.
    distances = len(total)
    beyond = len(relevant_at) - 1
    depth = max(k, beyond - 1)
    place, found = np.zeros(distances, np.int64), np.zeros(distances, np.int64)
    before, hits, largest = 0, 0, 0
    for d in range(distances):
        place[d] = before + earlier[d, 0] + earlier[d, 1]
        found[d] = hits + earlier[d, 1]
        if before < depth:
            largest = 2 * d + 1
        before += total[d, 0] + total[d, 1]
        hits += total[d, 1]
    relevant_at[:] = 0
    summed, within = 0, 0
    for start in range(0, rows, CHUNK):
        stop = min(rows, start + CHUNK)
        chunk = keys[start:stop]
        state[:] = 0
        kept = np.uint64(0)
        for block in range(0, stop - start, 64):
            # The keys are filled up to whole masks, so this reads no further than they go.
            mask = at_most(keys, start + block, np.uint64(largest))
            if stop - start - block < 64:
                mask &= (_ONE << np.uint64(stop - start - block)) - _ONE
            few = chunk[block:]
            while mask != 0:
                key = np.uint64(few[lowest(mask)])
                mask &= mask - _ONE
                bucket, relevant = key >> _ONE, key & _ONE
                now = state[bucket] + np.uint32(1) + (np.uint32(relevant) << np.uint32(16))
                state[bucket] = now
                # Written for every row, kept where it is relevant: a branch would often be foreseen wrongly.
                states[kept], buckets[kept] = now, bucket
                kept += relevant
        ranked, of = states[:kept], buckets[:kept]
        for i in range(len(ranked)):
            distance = np.uint64(of[i])
            rank = place[distance] + np.int64(ranked[i] & np.uint32(0xFFFF))
            hit = found[distance] + np.int64(ranked[i] >> np.uint32(16))
            # The quotient is rounded once and scaled by a power of two: the same on every machine.
            summed += int(hit / rank * scale + 0.5) if rank <= k else 0
            within += 1 if rank <= k else 0
        if beyond > 1:
            for i in range(len(ranked)):
                rank = place[np.uint64(of[i])] + np.int64(ranked[i] & np.uint32(0xFFFF))
                relevant_at[np.uint64(min(rank, beyond))] = 1
        for d in range(distances):
            ranked_here = np.int64(state[d] & np.uint32(0xFFFF))
            found_here = np.int64(state[d] >> np.uint32(16))
            place[d] += ranked_here
            found[d] += found_here
            earlier[d, 0] += ranked_here - found_here
            earlier[d, 1] += found_here
    return summed, within


@compiled
def score(
    queries: Words,
    query_labels: Words,
    words: Words,
    labels: Words,
    single: bool,
    keys: Keys,
    counting: bool,
    counts: Ints,
    ordering: bool,
    total: Ints,
    earlier: Ints,
    k: int,
    scale: float,
    at: Ints,
    precisions: Ints,
    hits: Ints,
    hits_at: Ints,
) -> None:
    """Compare a block of queries with the rows of a shard.

    Args:
        queries: uint64 [queries, code words]; the words beyond the bits are zero.
        query_labels: uint64 [queries, label words]: class numbers, or one bit for each class.
        words: uint64 [code words, rows].
        labels: uint64 [1, rows], class numbers, relevant where equal; or uint64 [classes, ceil(rows / 64)],
            for each class one bit for each row, relevant where a class is shared.
        single: whether labels are class numbers.
        keys: scratch, from `keys_for`.
        counting: whether to fill `counts`.
        counts: int64 [queries, bits + 1, 2], added to: rows by distance, not relevant and relevant.
        ordering: whether to rank in row order, and fill what follows from it.
        total: int64 [queries, bits + 1, 2], the counts of all shards. It may be the memory of `counts`.
        earlier: int64 [queries, bits + 1, 2], the counts of the shards before this one; those of this one are
            added, as far as the ranks of a later one need them.
        k: how many rows of each ranking count.
        scale: 2^`precision_shift(k)`.
        at: int64 [n], ascending ranks.
        precisions: int64 [queries], added to: sum of precisions at the relevant rows among the first k.
        hits: int64 [queries], added to: their number.
        hits_at: int64 [queries, n], added to: relevant rows of this shard up to each rank.
    """
    rows = words.shape[1]
    distances = counts.shape[1]
    relevant = np.zeros(len(keys) // 64, np.uint64)
    tables = np.zeros((4, 2 * distances), np.uint32)
    relevant_at = np.zeros((at[-1] if len(at) > 0 else 0) + 2, np.uint8)
    state = np.zeros(distances, np.uint32)
    states, buckets = np.zeros(CHUNK, np.uint32), np.zeros(CHUNK, np.uint16)
    for q in range(len(queries)):
        _relevance(relevant, query_labels[q], labels, rows, single)
        tables[:] = 0
        for start in range(0, rows, CHUNK):
            few = min(CHUNK, rows - start)
            chunk = keys[start : start + CHUNK]
            _fill_keys(chunk, start, few, queries[q], words, relevant)
            if counting:
                _count(chunk[:few], tables)
        if counting:
            for d in range(distances):
                for r in range(2):
                    key = 2 * d + r
                    sums = np.int64(tables[0, key]) + np.int64(tables[1, key])
                    counts[q, d, r] += sums + np.int64(tables[2, key]) + np.int64(tables[3, key])
        if ordering:
            summed, within = _rank(
                keys, rows, total[q], earlier[q], k, scale, relevant_at, state, states, buckets
            )
            precisions[q] += summed
            hits[q] += within
            first, seen = 1, 0
            for i in range(len(at)):
                for flag in relevant_at[first : at[i] + 1]:
                    seen += flag
                hits_at[q, i] += seen
                first = at[i] + 1
