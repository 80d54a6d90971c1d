"""Searching among some rows finds what a database of these rows alone would."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import draw_codes, draw_vectors

from ray_retrieval.descriptors import Codes, Vectors
from ray_retrieval.search import selection as module
from ray_retrieval.search.filters import Filter
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.scan import Segment, to_words
from ray_retrieval.search.segments import search_segments
from ray_retrieval.search.selection import RecentSelections, Selection, Spans, search_selected
from ray_retrieval.search.vectors import VectorSegment

BITS, DIMENSION = 9, 3


def segments_of(kind, sizes, seed):
    """Rows with many ties in segments, with gaps between their numbers, and the rows' numbers."""
    count = sum(sizes)
    if kind == "codes":
        data = draw_codes(count, BITS, seed=seed, distinct=max(1, count // 3)).data
    else:
        data = draw_vectors(count, DIMENSION, seed=seed, distinct=max(1, count // 3)).data
    segments, first, numbers = [], 5, []
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        rows = data[start : start + size]
        segment = (
            Segment(to_words(rows, BITS), first) if kind == "codes" else VectorSegment(rows, first, 1e-6)
        )
        segments.append(segment)
        numbers += range(first, first + size)
        first += size + 2
    return segments, data, np.array(numbers)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["codes", "vectors"]),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    share=st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]),
    k=st.integers(1, 70),
    share_of_few=st.sampled_from([1, 8, 10**9]),
    filtered=st.booleans(),
    at_once=st.sampled_from([1 << 26, 1 << 9]),
    seed=st.integers(0, 10**6),
)
def test_as_the_search_of_what_is_selected(kind, sizes, share, k, share_of_few, filtered, at_once, seed):
    segments, data, numbers = segments_of(kind, sizes, seed)
    generator = np.random.default_rng(seed)
    kept = generator.random(len(data)) < share
    spans = Spans(np.array([segment.first_row for segment in segments]), np.array(sizes))
    elsewhere = np.array([0, 10**6])  # deleted rows of other shards
    if filtered:
        masks = np.array_split(kept, 1 + seed % 7)
        dead = numbers[kept][::3]
        kept = kept & ~np.isin(numbers, dead)
        selection = Selection.of(spans, np.union1d(dead, elsewhere), masks)
    else:
        selection = Selection.of(spans, np.union1d(numbers[~kept], elsewhere))
    assert len(selection) == kept.sum()
    np.testing.assert_array_equal(selection.chosen(), numbers[kept])
    unpacked = [np.unpackbits(bits, bitorder="little") for bits in selection.bits]
    marks = [bits[:size] for bits, size in zip(unpacked, sizes, strict=True)]
    np.testing.assert_array_equal(np.concatenate(marks), kept)
    assert sum(int(bits.sum()) for bits in unpacked) == kept.sum()
    places = generator.permutation(int(kept.sum()))
    np.testing.assert_array_equal(selection.at(places), numbers[kept][places])
    np.testing.assert_array_equal(selection.allows(numbers), kept)
    assert not selection.allows(np.array([NO_ROW])).any()
    queries = (
        draw_codes(4, BITS, seed=seed + 1) if kind == "codes" else draw_vectors(4, DIMENSION, seed=seed + 1)
    )

    def find(some, count):
        return search_segments(segments, some, count, threads=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_retrieval.search.selection._BYTES_AT_ONCE", at_once)
        patch.setattr("ray_retrieval.search.selection._SHARE", share_of_few)
        found = search_selected(find, segments, selection, queries, k, threads=2)
    alone = data[kept]
    whole = Segment(to_words(alone, BITS)) if kind == "codes" else VectorSegment(alone, 0, 1e-6)
    expected = search_segments([whole], queries, k, threads=1)
    np.testing.assert_array_equal(found.distances, expected.distances)
    if kept.any():
        rows = np.where(expected.rows == NO_ROW, NO_ROW, numbers[kept][expected.rows])
        np.testing.assert_array_equal(found.rows, rows)
    assert found.distances.dtype == expected.distances.dtype


@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_all_that_is_near_may_be_deleted(kind, monkeypatch):
    """Then asking for more does not help, and the others are compared one by one."""
    generator = np.random.default_rng(0)
    if kind == "codes":
        far = generator.integers(0, 256, (500, 4), np.uint8)
        data, query = (
            np.concatenate([np.zeros((2000, 4), np.uint8), far]),
            Codes(np.zeros((1, 4), np.uint8), 32),
        )
        segment = Segment(to_words(data, 32))
    else:
        data = np.concatenate([np.tile(np.eye(1, 8, dtype=np.float32), (2000, 1)), draw_vectors(500, 8).data])
        query, segment = Vectors(data[:1]), VectorSegment(data, 0, 1e-6)
    spans = Spans(np.array([0]), np.array([len(data)]))
    asked = []

    def find(some, count):
        asked.append(count)
        return search_segments([segment], some, count, threads=1)

    selection = Selection.of(spans, np.arange(1999))
    monkeypatch.setattr("ray_retrieval.search.selection._SHARE", 10**9)
    found = search_selected(find, [segment], selection, query, 5, threads=1)
    assert len(asked) == 2
    assert max(asked) < 500
    expected = [
        row for row in search_segments([segment], query, 2500, threads=1).rows[0].tolist() if row >= 1999
    ]
    assert found.rows[0].tolist() == expected[:5]


def selected(rows, dead=0):
    """Every one of some rows but the first `dead`, as of a filter."""
    spans = Spans(np.array([0]), np.array([rows]))
    return Selection.of(spans, np.arange(dead), [np.ones(rows, bool)])


@pytest.mark.parametrize("bound", ["_FILTERED_BYTES", "_MOST_FILTERS"])
def test_selections_of_the_last_filters_are_kept_within_bounds(monkeypatch, bound):
    most = {"_FILTERED_BYTES": 2 * (selected(9).bytes + module._bytes_of("a")), "_MOST_FILTERS": 2}
    monkeypatch.setattr(module, bound, most[bound])
    made = []

    def select(name):
        made.append(name)
        return selected(9)

    recent = RecentSelections()
    for name in ("a", "b", "a", "c", "a", "b"):
        assert len(recent.of(name, select)) == 9
    assert made == ["a", "b", "c", "b"]
    for _ in range(3):  # as if several had been asked at a time, and each had made it
        recent.of("d", lambda _: recent.of("d", select))
    made.clear()
    assert all(len(recent.of(name, select)) == 9 for name in ("b", "d"))
    assert made == []


def test_what_a_filter_and_its_selection_take_is_counted(monkeypatch):
    assert selected(80).bytes == 10 + 80 * 8
    assert selected(80, dead=5).bytes == 10 + 75 * 8 + 5 * 8
    selection = selected(80)
    selection.places(0)
    assert selection.bytes == 10 + selection.places(0).nbytes
    monkeypatch.setattr(module, "_KEPT_BYTES", 79 * 8)
    assert selected(80).bytes == 10  # so many places are not kept
    short = module._bytes_of(Filter.parse("label = 1"))
    tracemalloc.start()
    asked = Filter.parse(f"label in ({', '.join(map(str, range(10_000, 11_000)))})")
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert short < 1000 < 0.8 * taken < module._bytes_of(asked) < 1.2 * taken


def test_a_filter_takes_a_bit_a_row():
    """Masks come some at a time, and none of them stays."""
    rows, block = 800_000, 10_001
    spans, dead = Spans(np.array([0, rows]), np.array([rows, rows])), np.arange(0, 2 * rows, 3)
    everything = np.arange(rows) % 5 > 0

    def masks():
        return (everything[start : start + block] for _ in range(2) for start in range(0, rows, block))

    Selection.of(spans, dead[:9], masks())
    tracemalloc.start()
    chosen = Selection.of(spans, dead[:9], masks())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 * rows / 8 + 100_000
    assert len(chosen) == 2 * np.count_nonzero(everything) - np.count_nonzero(everything[dead[:9]])
    chosen = Selection.of(spans, dead, masks())
    kept = np.tile(everything, 2)
    kept[dead] = False
    assert np.array_equal(chosen.chosen(), np.flatnonzero(kept))
    asked = np.random.default_rng(0).integers(0, 2 * rows, 500)
    assert np.array_equal(chosen.allows(asked), kept[asked])


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_what_is_kept_of_a_selection_is_what_is_made(monkeypatch, kept):
    monkeypatch.setattr(module, "_KEPT_BYTES", kept)
    chosen = Selection(Spans(np.array([0, 7]), np.array([5, 3])), np.array([1, 4, 8]))
    for _ in range(2):
        assert [chosen.places(number).tolist() for number in (0, 1)] == [[0, 2, 3], [0, 2]]
        assert chosen.mask(1).tolist() == [True, False, True]
        assert chosen.chosen().tolist() == [0, 2, 3, 7, 9]
        assert chosen.at(np.arange(5)).tolist() == [0, 2, 3, 7, 9]
