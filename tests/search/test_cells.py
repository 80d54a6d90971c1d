"""Cells of codes: exact where all are looked at, else the exact search of the rows in the cells looked at."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import assert_same, draw_codes

from ray_retrieval.descriptors import Codes
from ray_retrieval.errors import ArtefactError, QueryError, RecipeError
from ray_retrieval.search.approximate import recall, search_approximate
from ray_retrieval.search.cells import CellSegment, cells_in, fill, train
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.hits import NO_ROW, Hits, without
from ray_retrieval.search.scan import Segment, scan_segments, to_words


def clustered(count, bits, *, seed=0, turned=0.15):
    """Codes around 20 centres, each bit turned with a probability."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).random((20, bits)) < 0.5
    drawn = centres[generator.integers(0, 20, count)] ^ (generator.random((count, bits)) < turned)
    return Codes(np.packbits(drawn, axis=1), bits)


def opened(folder, factory, codes, *, shards=1, first_row=0):
    trained = train(factory, codes.take(np.arange(min(len(codes.data), 500))), seed=0)
    cuts = [len(codes.data) * number // shards for number in range(shards + 1)]
    found = []
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        path = folder / f"{number}.cells"
        segment = Segment(to_words(codes.data[start:stop], codes.bits), first_row + start)
        with path.open("wb") as stream:
            fill(trained, segment, stream.write)
        found.append(CellSegment(path, segment, codes.bits))
    return found


def packed(mask):
    return np.packbits(mask, bitorder="little")


def naive(codes, queries, k, *, centres, nprobe, allowed):
    """The exact search of the allowed rows whose cell is among a query's nearest, all in numpy."""

    def distances(one, other):
        return np.bitwise_count(one[:, None] ^ other[None]).sum(axis=2).astype(np.int64)

    cells = np.argmin(distances(codes.data, centres), axis=1)  # the first among equals
    visited = np.argsort(distances(queries.data, centres), axis=1, kind="stable")[:, :nprobe]
    found = np.full((len(queries.data), k), NO_ROW)
    between = distances(queries.data, codes.data)
    for query, own in enumerate(visited):
        rows = np.flatnonzero(allowed & np.isin(cells, own))
        rows = rows[np.argsort(between[query, rows], kind="stable")][:k]
        found[query, : len(rows)] = rows
    return found


def centres_of(segment):
    data = segment._held.centres.view(np.uint8)
    return np.ascontiguousarray(data[:, : (segment._held.bits + 7) // 8])


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([5, 12, 64, 100, 300]),
    count=st.integers(20, 300),
    cells=st.integers(1, 12),
    nprobe=st.integers(1, 14),
    k=st.integers(1, 40),
    shards=st.integers(1, 3),
    share=st.sampled_from([None, 0.0, 0.3, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_the_rows_of_near_cells_are_searched_exactly(
    tmp_path_factory, bits, count, cells, nprobe, k, shards, share, seed
):
    codes = draw_codes(count, bits, seed=seed, distinct=max(12, count // 2))  # with equal ones: ties
    queries = draw_codes(5, bits, seed=seed + 1)
    segments = opened(tmp_path_factory.mktemp("cells"), f"BIVF{cells}", codes, shards=shards)
    kept = np.ones(count, bool) if share is None else np.random.default_rng(seed).random(count) < share
    cuts = np.cumsum([len(some) for some in segments])[:-1]
    allowed = None if share is None else [packed(mask) for mask in np.split(kept, cuts)]
    found = search_approximate(segments, queries.data, k, Effort(nprobe=nprobe), allowed=allowed, threads=2)
    expected = naive(codes, queries, k, centres=centres_of(segments[0]), nprobe=nprobe, allowed=kept)
    np.testing.assert_array_equal(found.rows, expected)
    real = found.rows != NO_ROW
    exact = np.bitwise_count(queries.data[:, None] ^ codes.data[found.rows]).sum(axis=2)
    np.testing.assert_array_equal(found.distances[real], exact[real])


def test_what_stands_past_the_end_of_a_query_does_not_count(tmp_path):
    codes, queries = draw_codes(200, 60), draw_codes(5, 60, seed=1)
    (segment,) = opened(tmp_path, "BIVF4", codes)
    longer = queries.data | np.array([0] * 7 + [0b1111], np.uint8)
    for nprobe in (1, 4):
        effort = Effort(nprobe=nprobe)
        assert_same(segment.search(longer, 10, effort), segment.search(queries.data, 10, effort))


def test_many_ties_do_not_fill_the_buffer(tmp_path):
    """Rows at one distance by the thousand, in cells that are not in their order."""
    generator = np.random.default_rng(0)
    codes = Codes(generator.integers(0, 4, (30_000, 1), np.uint8) << 6, 2)
    (segment,) = opened(tmp_path, "BIVF3", codes)
    queries = Codes(np.array([[0], [64], [192]], np.uint8), 2)
    for k in (1, 50, 9000):
        exact = scan_segments([segment.segment], queries.data, 2, k)
        assert_same(segment.search(queries.data, k, Effort(nprobe=3)), exact)


def test_more_cells_find_more_and_all_find_everything(tmp_path):
    codes, queries = clustered(6000, 64, turned=0.3), clustered(100, 64, seed=1, turned=0.3)
    segments = opened(tmp_path, "BIVF32", codes, shards=2, first_row=7)
    exact = scan_segments([segment.segment for segment in segments], queries.data, 64, 10)
    found = [
        recall(exact, search_approximate(segments, queries.data, 10, Effort(nprobe=nprobe)))
        for nprobe in (1, 4, 32)
    ]
    assert 0.2 < found[0] < found[1] < found[2] == 1
    assert_same(search_approximate(segments, queries.data, 10, Effort(nprobe=99)), exact)
    own = without(exact, np.zeros(100, np.int64))
    assert recall(own, without(exact, np.zeros(100, np.int64))) == 1


def test_a_build_repeats_byte_for_byte(tmp_path):
    codes = clustered(800, 48)
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        opened(tmp_path / name, "BIVF8", codes)
        files.append((tmp_path / name / "0.cells").read_bytes())
    assert files[0] == files[1]
    assert train("BIVF8", codes, seed=0) != train("BIVF8", codes, seed=1)


def test_fewer_rows_than_hits(tmp_path):
    codes = clustered(50, 24)
    trained = train("BIVF4", codes, seed=0)
    for count in (0, 3):
        path, segment = tmp_path / f"{count}.cells", Segment(to_words(codes.data[:count], 24), 50)
        with path.open("wb") as stream:
            fill(trained, segment, stream.write)
        held = CellSegment(path, segment, 24)
        found = held.search(codes.data[:2], 5, Effort())
        assert found.rows.shape == (2, 5)
        assert (found.rows[:, :count] >= 50).all()
        assert (found.rows[:, count:] == NO_ROW).all()
        assert len(held) == count
    assert search_approximate([], codes.data[:2], 5, Effort()).distances.dtype == np.int32
    assert held.search(codes.data[:0], 5, Effort()).rows.shape == (0, 5)
    with pytest.raises(QueryError, match="got 0"):
        held.search(codes.data[:1], 0, Effort())
    with pytest.raises(ArtefactError, match="24 bits"):
        held.search(codes.data[:1, :2], 1, Effort())


@pytest.mark.parametrize("factory", ["BIVF", "BIVF0", "IVF8,Flat", "BHNSW16", "BIVF8_HNSW8", "BIVF8,Flat"])
def test_other_searches_of_codes_are_refused(factory):
    with pytest.raises(RecipeError, match=f"'{factory}' is no search of codes"):
        cells_in(factory)


def test_more_cells_than_rows_to_train_on_are_refused():
    with pytest.raises(RecipeError, match="60 cells, and there are 50 rows"):
        train("BIVF60", clustered(50, 24), seed=0)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    codes = clustered(300, 24)
    (segment,) = opened(tmp_path, "BIVF4", codes)
    path = tmp_path / "0.cells"
    with pytest.raises(ArtefactError, match="300 codes of 24 bits"):
        CellSegment(path, Segment(segment.segment.words[:10], 0), 24)
    with pytest.raises(ArtefactError, match="300 codes of 24 bits"):
        CellSegment(path, segment.segment, 23)
    data = path.read_bytes()
    for name, wrong in {
        "empty": b"",
        "cut": data[:-8],
        "other": b"RRCODES2" + data[8:],
        "short": data[:9],
    }.items():
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(ArtefactError, match="damaged") as caught:
            CellSegment(tmp_path / name, segment.segment, 24)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ArtefactError, match="damaged"):
        CellSegment(tmp_path / "missing", segment.segment, 24)


def test_hits_of_nothing_that_may_be(tmp_path):
    codes = clustered(300, 24)
    (segment,) = opened(tmp_path, "BIVF4", codes)
    found = segment.search(codes.data[:3], 2, Effort(), packed(np.zeros(300, bool)))
    assert isinstance(found, Hits)
    assert (found.rows == NO_ROW).all()
