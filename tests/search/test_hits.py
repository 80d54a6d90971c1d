"""Merging hits is searching the union."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.errors import QueryError
from ray_retrieval.search import NO_DISTANCE, NO_ROW, Hits, merge
from ray_retrieval.search.hits import check_k, no_hits, without


def hits(*queries):
    """Hits of queries given as lists of (distance, row)."""
    table = np.array(queries, np.int64)
    return Hits(table[:, :, 0].astype(np.int32), table[:, :, 1])


def listed(found):
    return [
        list(zip(*query, strict=True))
        for query in zip(found.distances.tolist(), found.rows.tolist(), strict=True)
    ]


def test_ties_are_broken_by_row_across_parts():
    left, right = hits([(1, 5), (3, 2)]), hits([(1, 4), (3, 9)])
    assert listed(merge([left, right], 3)) == [[(1, 4), (1, 5), (3, 2)]]


def test_missing_hits_come_last():
    left, right = hits([(2, 0), (NO_DISTANCE, NO_ROW)]), hits([(NO_DISTANCE, NO_ROW)])
    empty = (NO_DISTANCE, NO_ROW)
    assert listed(merge([left, right, no_hits(1, 2)], 4)) == [[(2, 0), empty, empty, empty]]


def test_rows_and_distances_at_their_limits():
    far = hits([(2**20 - 1, 2**43 - 2)])
    assert listed(merge([far], 1)) == [[(2**20 - 1, 2**43 - 2)]]


def test_take_picks_queries():
    found = hits([(0, 1)], [(2, 3)], [(4, 5)])
    assert listed(found.take([2, 0])) == [[(4, 5)], [(0, 1)]]
    assert len(found.take(slice(1, 3))) == 2


@settings(deadline=None)
@given(data=st.data(), rows=st.integers(1, 60), k=st.integers(1, 70), parts=st.integers(1, 5))
def test_merged_parts_equal_the_whole_in_any_order(data, rows, k, parts):
    distances = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    owners = data.draw(st.lists(st.integers(0, parts - 1), min_size=rows, max_size=rows))

    def search(wanted):
        found = sorted((distances[row], row) for row in wanted)[:k]
        return hits(found + [(NO_DISTANCE, NO_ROW)] * (k - len(found)))

    whole = search(range(rows))
    shares = [search([row for row in range(rows) if owners[row] == part]) for part in range(parts)]
    merged = merge(data.draw(st.permutations(shares)), k)
    np.testing.assert_array_equal(merged.rows, whole.rows)
    np.testing.assert_array_equal(merged.distances, whole.distances)


def test_a_query_loses_its_own_row_or_the_last_one():
    found = hits([(0, 3), (1, 5), (2, 4)], [(0, 1), (1, 3), (2, 9)], [(0, 6), (2, 7), (3, 8)])
    assert listed(without(found, np.array([3, 3, 5]))) == [
        [(1, 5), (2, 4)],
        [(0, 1), (2, 9)],
        [(0, 6), (2, 7)],
    ]


def test_fewer_hits_than_one_are_refused():
    check_k(1)
    for k in (0, -3):
        with pytest.raises(QueryError, match=rf"at least 1, got {k} \(ask for 1 hit or more\)"):
            check_k(k)
