"""The exact search over vectors against a stable sort, FAISS and itself."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from unittest import mock

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import unit
from threadpoolctl import threadpool_info

from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.search import vectors as module
from ray_retrieval.search.hits import NO_ROW, Hits, merge
from ray_retrieval.search.threads import one_blas_thread
from ray_retrieval.search.vectors import VectorSegment, distances_to, norm_error, search_vectors


def all_distances(queries, database):
    """Every distance by its definition: 32 partial sums, halved until one is left; then the rest."""
    squares = (queries[:, None].astype(np.float64) - database[None].astype(np.float64)) ** 2
    whole = squares.shape[2] // 32 * 32
    sums = np.zeros((*squares.shape[:2], 32))
    for start in range(0, whole, 32):
        sums = sums + squares[:, :, start : start + 32]
    while sums.shape[2] > 1:
        half = sums.shape[2] // 2
        sums = sums[:, :, :half] + sums[:, :, half:]
    total = sums[:, :, 0]
    for place in range(whole, squares.shape[2]):
        total = total + squares[:, :, place]
    return total.astype(np.float32)


def nearest(queries, database, k):
    """What a search must return, by a stable sort of all distances."""
    distances = all_distances(queries, database)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, k - order.shape[1]))
    found = np.take_along_axis(distances, order, axis=1)
    return Hits(
        np.pad(found, missing, constant_values=np.inf),
        np.pad(order, missing, constant_values=NO_ROW).astype(np.int64),
    )


def draw(generator, count, dimension, kind):
    """Vectors with different kinds of ties and near ties."""
    if kind == "spread":
        return unit(generator.standard_normal((count, dimension)))
    if kind == "signs":  # Few different distances: many ties.
        return unit(generator.choice([-1.0, 1.0], (count, dimension)))
    if kind == "twins":
        few = unit(generator.standard_normal((3, dimension)))
        return few[generator.integers(0, 3, count)]
    if kind == "last bits":  # Nearer to each other than what a float32 product can tell.
        one = unit(np.random.default_rng(7).standard_normal((1, dimension)))
        steps = generator.integers(-2, 3, (count, dimension)).astype(np.float32)
        return one + steps * np.spacing(np.abs(one))
    if kind == "shorter":
        return draw(generator, count, dimension, "spread") * generator.uniform(0.9, 1, (count, 1)).astype(
            "f4"
        )
    assert kind == "long"
    return (30 * generator.standard_normal((count, dimension))).astype(np.float32)


def segments_of(vectors, cuts=()):
    edges = [0, *sorted(cuts), len(vectors)]
    return [VectorSegment(vectors[a:b], a, norm_error(vectors[a:b])) for a, b in itertools.pairwise(edges)]


def search(vectors, queries, k, **options):
    return search_vectors(segments_of(vectors), queries, k, **options)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.distances, expected.distances)
    assert found.distances.dtype == np.float32


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    dimension=st.integers(1, 70) | st.sampled_from([96, 128, 131]),
    count=st.integers(0, 200),
    kind=st.sampled_from(["spread", "signs", "twins", "last bits", "shorter", "long"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_search_equals_a_stable_sort(data, dimension, count, kind, seed):
    generator = np.random.default_rng(seed)
    database = draw(generator, count, dimension, kind)
    queries = draw(generator, data.draw(st.integers(0, 40)), dimension, kind)
    k = data.draw(st.sampled_from([1, 2, 5, max(count, 1), count + 7]) | st.integers(1, 250))
    cuts = data.draw(st.lists(st.integers(0, count), max_size=4))
    expected = nearest(queries, database, k)
    # Shares, groups and panels are made small, so that few rows and queries are split as many are.
    with ExitStack() as patches:
        for name, values in {
            "_SMALLEST_WORK": [1],
            "_GROUP": [3, 512],
            "_PANEL_ROWS": [7, 64, 512],
            "_FEW": [0, 2, 24],
            "_PANEL_BYTES": [1, 4000],
            "_BUFFERED_HITS": [1, 1000, 1 << 23],
        }.items():
            patches.enter_context(mock.patch.object(module, name, data.draw(st.sampled_from(values))))
        for threads in (1, data.draw(st.integers(2, 5))):
            assert_same(search_vectors(segments_of(database, cuts), queries, k, threads=threads), expected)


@pytest.mark.parametrize("few", [0, 24])
def test_many_rows_cross_panels_and_shares(few):
    generator = np.random.default_rng(0)
    database, queries = draw(generator, 20_001, 128, "spread"), draw(generator, 300, 128, "spread")
    queries[:20] = database[::1000][:20]
    with mock.patch.object(module, "_FEW", few):
        single = search(database, queries, 100)
        assert_same(single.take(slice(10)), nearest(queries[:10], database, 100))
        for threads in (2, 3):
            assert_same(search(database, queries, 100, threads=threads), single)
            assert_same(search(database, queries[:1], 100, threads=threads), single.take(slice(1)))
    assert (single.distances[:20, 0] == 0).all()


def test_hits_are_those_of_faiss():
    generator = np.random.default_rng(1)
    database, queries = draw(generator, 5000, 64, "spread"), draw(generator, 50, 64, "spread")
    flat = faiss.IndexFlatL2(64)
    flat.add(database)
    distances, rows = flat.search(queries, 20)
    found = search(database, queries, 20)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.distances, distances, atol=1e-6)


def test_distances_are_those_of_unit_vectors():
    angles = np.deg2rad([0, 90, 180, 60])
    database = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = search(database, database[:1], 4)
    assert found.rows.tolist() == [[0, 3, 1, 2]]
    np.testing.assert_allclose(found.distances, [[0, 1, 2, 4]], rtol=1e-6)


def test_the_limit_allows_for_the_error_of_products():
    """A product that is off by as much as it may be still lets every nearest row through."""
    generator = np.random.default_rng(2)
    database, queries = draw(generator, 700, 256, "last bits"), draw(generator, 30, 256, "last bits")
    gamma = 256 * 2.0**-24
    real = np.matmul

    def worst(a, b, *, out):
        real(a, b, out=out)
        out += generator.uniform(-0.8 * gamma, 0.8 * gamma, out.shape).astype(np.float32)
        return out

    with mock.patch.object(module.np, "matmul", worst):
        assert_same(search(database, queries, 5), nearest(queries, database, 5))


def test_merged_shards_are_one_search():
    generator = np.random.default_rng(3)
    database, queries = draw(generator, 500, 16, "signs"), draw(generator, 30, 16, "signs")
    parts = [search_vectors([segment], queries, 40) for segment in segments_of(database, [100, 100, 430])]
    assert_same(merge(parts, 40), search(database, queries, 40))


def test_first_row_shifts_the_rows():
    database = draw(np.random.default_rng(4), 100, 20, "spread")
    shifted = search_vectors([VectorSegment(database, 10**12, 1e-6)], database[:3], 5)
    np.testing.assert_array_equal(shifted.rows, search(database, database[:3], 5).rows + 10**12)


def test_more_hits_than_rows_leave_places_empty():
    found = search(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)[:1], 4)
    assert found.rows.tolist() == [[0, 1, NO_ROW, NO_ROW]]
    assert found.distances.tolist() == [[0, 2, np.inf, np.inf]]


def test_no_rows_and_no_queries():
    none, one = np.zeros((0, 3), np.float32), np.eye(1, 3, dtype=np.float32)
    assert search(none, one, 2).rows.tolist() == [[NO_ROW, NO_ROW]]
    assert search(one, none, 2).rows.shape == (0, 2)
    assert search_vectors([], one, 2).distances.tolist() == [[np.inf, np.inf]]


def test_arrays_of_every_layout(tmp_path):
    generator = np.random.default_rng(5)
    database, queries = draw(generator, 500, 33, "spread"), draw(generator, 30, 33, "spread")
    expected = nearest(queries, database, 10)
    path = tmp_path / "vectors.bin"
    path.write_bytes(b"\0" * 64 + database.tobytes())
    mapped = np.memmap(path, np.float32, "r", offset=64, shape=database.shape)
    frozen = database.copy()
    frozen.flags.writeable = False
    for layout in (mapped, frozen):
        assert_same(search(layout, queries, 10), expected)
        assert_same(search(layout, queries[:3], 10), expected.take(slice(3)))
    for wanted in (np.asfortranarray(queries), np.repeat(queries, 2, 0)[::2]):
        assert_same(search(database, wanted, 10), expected)
    assert database.flags.writeable
    assert queries.flags.writeable


def test_distances_to_rows():
    generator = np.random.default_rng(6)
    database, queries = draw(generator, 300, 50, "spread"), draw(generator, 40, 50, "spread")
    rows = generator.integers(-1, 300, (40, 25))
    expected = np.take_along_axis(all_distances(queries, database), np.maximum(rows, 0), axis=1)
    expected[rows == NO_ROW] = np.inf
    for threads in (1, 3):
        with mock.patch.object(module, "_SMALLEST_WORK", 1):
            found = distances_to(database, queries, rows, threads=threads)
        np.testing.assert_array_equal(found, expected)
    hits = search(database, queries, 25)
    np.testing.assert_array_equal(distances_to(database, queries, hits.rows), hits.distances)
    assert distances_to(database, queries[:0], rows[:0]).shape == (0, 25)
    assert distances_to(database[:0], queries, np.full((40, 2), NO_ROW)).min() == np.inf


def test_norm_error():
    generator = np.random.default_rng(7)
    vectors = draw(generator, 40_000, 5, "spread")
    vectors[39_000] *= 1.01
    exact = np.abs((vectors.astype(np.float64) ** 2).sum(axis=1) - 1).max()
    assert norm_error(vectors) == pytest.approx(exact, rel=1e-9)
    assert norm_error(vectors[:0]) == 0
    for value in (np.nan, -np.inf):
        vectors[20_000, 2] = value
        with pytest.raises(ArtefactError, match="row 20,000"):
            norm_error(vectors)


def test_wrong_arrays_are_refused():
    good = np.eye(3, dtype=np.float32)
    for bad in (good.astype(np.float64), good[0]):
        with pytest.raises(ArtefactError, match=r"vectors to search are float32 \[n, d\]"):
            VectorSegment(bad, 0, 0.0)
        with pytest.raises(ArtefactError, match=r"queries are float32 \[n, d\]"):
            search(good, bad, 1)
        with pytest.raises(ArtefactError, match=r"vectors are float32 \[n, d\]"):
            norm_error(bad)
    with pytest.raises(ArtefactError, match="row after row"):
        VectorSegment(good[:, :2], 0, 0.0)
    with pytest.raises(ArtefactError, match="finite"):
        VectorSegment(good, 0, np.nan)
    with pytest.raises(ArtefactError, match="3 dimensions, the queries 2"):
        search(good, good[:, :2], 1)
    with pytest.raises(QueryError, match="got 0"):
        search(good, good, 0)
    for value in (np.nan, np.inf, 1e30):
        with pytest.raises(QueryError, match="query 1 is not a finite vector"):
            search(good, np.where(np.arange(3)[:, None] == 1, np.float32(value), good), 1)


def test_wrong_rows_are_refused():
    good = np.eye(3, dtype=np.float32)
    for rows in ([[3], [0], [0]], [[-2], [0], [0]], [[0]]):
        with pytest.raises(ArtefactError, match="rows are"):
            distances_to(good, good, np.array(rows))


def test_searches_run_side_by_side():
    generator = np.random.default_rng(8)
    database, queries = draw(generator, 5000, 32, "spread"), draw(generator, 40, 32, "spread")
    expected = search(database, queries, 10)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: search(database, queries, 10, threads=3), range(30)))
    for one in found:
        assert_same(one, expected)


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_blas_gets_its_threads_back_when_the_last_search_ends():
    before = blas_threads()
    first, second = one_blas_thread(), one_blas_thread()
    first.__enter__()
    second.__enter__()
    assert set(blas_threads()) == {1}
    first.__exit__(None, None, None)
    assert set(blas_threads()) == {1}
    second.__exit__(None, None, None)
    assert blas_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_searches_too():
    database = draw(np.random.default_rng(9), 5000, 32, "spread")
    expected = search(database, database[:40], 10, threads=2)
    child = os.fork()
    if child == 0:
        found = search(database, database[:40], 10, threads=2)
        os._exit(0 if np.array_equal(found.rows, expected.rows) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
