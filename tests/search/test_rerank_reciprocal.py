"""k-reciprocal re-ranking against the dense matrices of its publication."""

from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import unit

from ray_retrieval.config import validate
from ray_retrieval.descriptors import Vectors
from ray_retrieval.errors import ArtefactError, QueryError, RecipeError
from ray_retrieval.metrics.compiled import frozen
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.rerank import (
    HeldVectors,
    KReciprocalConfig,
    build,
    neighbours,
    reciprocal,
    reciprocal_kernels,
)
from ray_retrieval.search.vectors import distances_to


def all_distances(one, other):
    differences = one[:, None].astype(np.float64) - other[None].astype(np.float64)
    return (differences**2).sum(axis=2).astype(np.float32)


def dense_scores(items, k1, k2, weight):
    """float64 [n, n]: the score of every item for every item, by the formulas of the paper, set by set."""
    count = len(items)
    distances = all_distances(items, items).astype(np.float64)
    normalised = distances / np.maximum(distances.max(axis=1, keepdims=True), 1e-300)
    nearest = []
    for p in range(count):
        others = sorted((g for g in range(count) if g != p), key=lambda g: (distances[p, g], g))
        nearest.append([p, *others])

    def reciprocal_neighbours(p, k):
        return {g for g in nearest[p][: k + 1] if p in nearest[g][: k + 1]}

    v = np.zeros((count, count))
    for p in range(count):
        near = reciprocal_neighbours(p, k1)
        related = set(near)
        for q in near:
            candidates = reciprocal_neighbours(q, int(np.around(k1 / 2)))
            if len(candidates & near) > 2 / 3 * len(candidates):
                related |= candidates
        for g in related:
            v[p, g] = np.exp(-normalised[p, g])
    v /= v.sum(axis=1, keepdims=True)
    expanded = np.stack([v[nearest[p][:k2]].mean(axis=0) for p in range(count)])
    minima = np.minimum(expanded[:, None], expanded[None]).sum(axis=2)
    return (1 - weight) * (1 - minima / (2 - minima)) + weight * normalised


def draw(generator, count, dimension, kind):
    if kind == "spread":
        return unit(generator.standard_normal((count, dimension)))
    if kind == "clusters":
        centres = generator.standard_normal((max(1, count // 6), dimension))
        chosen = generator.integers(0, len(centres), count)
        return unit(centres[chosen] + 0.4 * generator.standard_normal((count, dimension)))
    if kind == "signs":  # Few different distances: many ties.
        return unit(generator.choice([-1.0, 1.0], (count, dimension)))
    assert kind == "twins"
    few = unit(generator.standard_normal((4, dimension)))
    return few[generator.integers(0, 4, count)]


def assert_sorted(hits):
    for distances, rows in zip(hits.distances, hits.rows, strict=True):
        keys = list(zip(distances.tolist(), rows.tolist(), strict=True))
        assert keys == sorted(keys)


def assert_scores(found, hits, expected):
    """The hits, each with the expected score: `expected` [q, n]."""
    assert found.distances.dtype == np.float32
    assert_sorted(found)
    np.testing.assert_array_equal(np.sort(found.rows), np.sort(hits.rows))
    there = found.rows != NO_ROW
    scores = np.take_along_axis(expected, np.maximum(found.rows, 0), axis=1)
    np.testing.assert_allclose(found.distances[there], scores[there], atol=2e-6)
    assert (found.distances[~there] == np.inf).all()


KINDS = ["spread", "clusters", "signs", "twins"]


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 45),
    dimension=st.sampled_from([2, 3, 5, 16]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    k1=st.integers(1, 25),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_rows_and_others_score_as_in_the_dense_form(data, count, dimension, kind, seed, k1, weight):
    generator = np.random.default_rng(seed)
    database = draw(generator, count, dimension, kind)
    k2 = data.draw(st.integers(1, min(8, k1 + 1)))
    config = KReciprocalConfig(k1=k1, k2=k2, weight=weight)
    members = generator.integers(0, count, data.draw(st.integers(0, 6)))
    guests = draw(generator, data.draw(st.integers(0, 4)), dimension, kind)
    queries = np.concatenate([database[members], guests])
    rows = np.concatenate([members, np.full(len(guests), NO_ROW)]).astype(np.int64)
    order = generator.permutation(len(rows))
    queries, rows = queries[order], rows[order]
    expected = np.zeros((len(queries), count))
    alone = dense_scores(database, k1, k2, weight)
    for number, row in enumerate(rows):
        joined = np.concatenate([database, queries[number : number + 1]])
        expected[number] = alone[row] if row >= 0 else dense_scores(joined, k1, k2, weight)[-1, :-1]
    held = HeldVectors(database)
    hits = held.search(Vectors(queries), data.draw(st.sampled_from([1, 3, count, count + 4])))
    with ExitStack() as patches:
        sizes = {"_ROWS": [7, 8192], "_MADE": [5, 1024], "_GROUP": [2, 256], "_PAIRS": [3, 999]}
        for name, values in sizes.items():
            patches.enter_context(mock.patch.object(reciprocal, name, data.draw(st.sampled_from(values))))
        for threads in (1, 3):
            step = build(config, held, threads=threads)
            _, found = step(Vectors(queries), hits, rows)
            assert_scores(found, hits, expected)
            _, again = step(Vectors(queries), hits, rows)
            np.testing.assert_array_equal(again.distances, found.distances)
            for number in range(len(queries)):
                one = slice(number, number + 1)
                _, single = step(Vectors(queries[one]), hits.take(one), rows[one])
                np.testing.assert_array_equal(single.rows, found.rows[one])
                np.testing.assert_array_equal(single.distances, found.distances[one])


@pytest.mark.parametrize("kind", ["spread", "clusters"])
@pytest.mark.parametrize(("k1", "k2"), [(6, 3), (12, 4), (20, 6)])
def test_a_query_changes_the_neighbourhoods_that_it_enters(kind, k1, k2):
    generator = np.random.default_rng(k1)
    database, queries = draw(generator, 150, 8, kind), draw(generator, 12, 8, kind)
    if kind == "clusters":
        queries = unit(database[:12] + 0.15 * generator.standard_normal((12, 8)))
    joined = [np.concatenate([database, queries[i : i + 1]]) for i in range(12)]
    expected = np.stack([dense_scores(items, k1, k2, 0.0)[-1, :-1] for items in joined])
    held = HeldVectors(database)
    hits = held.search(Vectors(queries), 150)
    _, found = build(KReciprocalConfig(k1=k1, k2=k2, weight=0), held)(Vectors(queries), hits)
    assert_scores(found, hits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_joint_items_score_as_in_the_dense_form(kind):
    generator = np.random.default_rng(5)
    database, queries = draw(generator, 50, 6, kind), draw(generator, 12, 6, kind)
    items = np.concatenate([database, queries])
    expected = dense_scores(items, 9, 4, 0.3)[len(database) :, : len(database)]
    held, rows = HeldVectors(database), np.full(len(queries), NO_ROW)
    hits = held.search(Vectors(queries), 30)
    step = build(KReciprocalConfig(k1=9, k2=4, joint=True), held, threads=2)
    assert_scores(step(Vectors(queries), hits, rows)[1], hits, expected)
    # Rows among the queries are not taken twice.
    rows[3:6] = [7, 49, 0]
    queries[3:6] = database[rows[3:6]]
    hits = held.search(Vectors(queries), 30)
    guests = rows == NO_ROW
    scores = dense_scores(np.concatenate([database, queries[guests]]), 9, 4, 0.3)
    expected = np.concatenate([scores[50:, :50], scores[rows[3:6], :50]])[[0, 1, 2, 9, 10, 11, *range(3, 9)]]
    assert_scores(step(Vectors(queries), hits, rows)[1], hits, expected)


def test_hits_behind_the_depth_stay_behind_by_distance():
    generator = np.random.default_rng(6)
    database = draw(generator, 80, 8, "clusters")
    held, queries = HeldVectors(database), Vectors(draw(generator, 5, 8, "clusters"))
    hits = held.search(queries, 40)
    _, whole = build(KReciprocalConfig(k1=6), held)(queries, hits)
    cut = build(KReciprocalConfig(k1=6, depth=10), held)
    _, found = cut(queries, hits)
    assert cut.depth == 10
    np.testing.assert_array_equal(found.rows[:, 10:], hits.rows[:, 10:])
    assert (found.distances[:, 10:] >= 1).all()
    assert (found.distances[:, :10] <= 1).all()
    _, first = build(KReciprocalConfig(k1=6), held)(queries, hits.take(slice(None)))
    np.testing.assert_array_equal(first.rows, whole.rows)
    only = Hits(hits.distances[:, :10].copy(), hits.rows[:, :10].copy())
    np.testing.assert_array_equal(cut(queries, only)[1].rows, found.rows[:, :10])
    np.testing.assert_array_equal(cut(queries, only)[1].distances, found.distances[:, :10])


def test_a_query_that_equals_a_row_is_that_row():
    database = draw(np.random.default_rng(7), 60, 8, "clusters")
    database[40] = database[11]
    held, queries = HeldVectors(database), Vectors(database[[3, 40, 11]])
    hits = held.search(queries, 60)
    step = build(KReciprocalConfig(k1=5, k2=2), held)
    found, told = step(queries, hits)[1], step(queries, hits, np.array([3, 11, 11]))[1]
    np.testing.assert_array_equal(found.rows, told.rows)
    np.testing.assert_array_equal(found.distances, told.distances)
    assert found.rows[:, 0].tolist() == [3, 11, 11]
    assert_scores(found, hits, dense_scores(database, 5, 2, 0.3)[[3, 11, 11]])


def test_an_equal_vector_may_be_another_image():
    database = draw(np.random.default_rng(8), 60, 8, "clusters")
    held, queries = HeldVectors(database), Vectors(database[:4])
    hits = held.search(queries, 60)
    _, found = build(KReciprocalConfig(k1=5), held)(queries, hits, np.full(4, NO_ROW))
    expected = [
        dense_scores(np.concatenate([database, database[i : i + 1]]), 5, 6, 0.3)[-1, :-1] for i in range(4)
    ]
    assert_scores(found, hits, np.array(expected))


def test_the_hits_distances_and_order_do_not_matter():
    generator = np.random.default_rng(9)
    database = draw(generator, 60, 8, "clusters")
    held, queries = HeldVectors(database), Vectors(draw(generator, 4, 8, "clusters"))
    hits = held.search(queries, 20)
    step = build(KReciprocalConfig(k1=5), held)
    shuffled = Hits(np.zeros((4, 20), np.float32), hits.rows[:, ::-1].copy())
    np.testing.assert_array_equal(step(queries, shuffled)[1].rows, step(queries, hits)[1].rows)


def test_it_brings_classes_together():
    generator = np.random.default_rng(0)
    centres, labels = generator.standard_normal((20, 16)), np.repeat(np.arange(20), 15)
    database = unit(centres[labels] + 1.1 * generator.standard_normal((300, 16)))
    held = HeldVectors(database)
    hits = held.search(Vectors(database), 300)
    _, found = build(KReciprocalConfig(k1=12), held)(Vectors(database), hits)
    before, after = ((labels[each.rows[:, 1:15]] == labels[:, None]).mean() for each in (hits, found))
    assert after > before + 0.05


def test_progress_counts_every_row_once():
    done = []
    held = HeldVectors(draw(np.random.default_rng(0), 100, 4, "spread"))
    with mock.patch.object(neighbours, "_ROWS", 30):
        build(KReciprocalConfig(), held, progress=done.append)
    assert done == [30, 30, 30, 10]


def test_no_rows_and_no_queries():
    step = build(KReciprocalConfig(), HeldVectors(np.zeros((0, 3), np.float32)))
    hits = Hits(np.full((1, 2), np.inf, np.float32), np.full((1, 2), NO_ROW))
    assert step(Vectors(np.eye(1, 3, dtype=np.float32)), hits)[1].rows.tolist() == [[NO_ROW, NO_ROW]]
    held = HeldVectors(np.eye(3, dtype=np.float32))
    none = Hits(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.int64))
    assert len(build(KReciprocalConfig(), held)(Vectors(np.zeros((0, 3), np.float32)), none)[1]) == 0


def test_read_only_vectors_and_rows_are_welcome(tmp_path):
    database = draw(np.random.default_rng(1), 50, 6, "clusters")
    database.tofile(tmp_path / "vectors")
    mapped = HeldVectors(np.memmap(tmp_path / "vectors", np.float32, "r", shape=database.shape))
    queries = Vectors(database[:5] * np.float32(1))
    hits = mapped.search(queries, 10)
    hits.rows.flags.writeable = hits.distances.flags.writeable = False
    _, found = build(KReciprocalConfig(k1=5), mapped)(queries, hits)
    _, expected = build(KReciprocalConfig(k1=5), HeldVectors(database))(queries, hits)
    np.testing.assert_array_equal(found.distances, expected.distances)


def test_what_does_not_fit_is_refused():
    held = HeldVectors(np.eye(3, dtype=np.float32))
    step, queries = build(KReciprocalConfig(), held), Vectors(np.eye(2, 3, dtype=np.float32))
    hits = held.search(queries, 2)
    with pytest.raises(ArtefactError, match="3 dimensions, the queries 2"):
        step(Vectors(np.eye(2, dtype=np.float32)), hits)
    with pytest.raises(ArtefactError, match="are of length 1, one of these is of length 3"):
        HeldVectors(3 * np.eye(3, dtype=np.float32))
    with pytest.raises(QueryError, match="query 1 is a vector of length 2, not 1"):
        step(Vectors(queries.data * np.float32([[1], [2]])), hits)
    with pytest.raises(QueryError, match="2 queries, but hits of 1"):
        step(queries, hits.take(slice(1)))
    with pytest.raises(QueryError, match="2 queries, but query_rows of 1"):
        step(queries, hits, np.array([0]))
    with pytest.raises(QueryError, match="query_rows are rows of 3 or -1, got 0 to 3"):
        step(queries, hits, np.array([0, 3]))
    with pytest.raises(RecipeError, match="'k2' is at most 'k1' \\+ 1"):
        validate(KReciprocalConfig, {"k1": 3, "k2": 5})


@pytest.mark.parametrize("joint", [False, True])
def test_a_query_that_has_been_moved_away_from_its_row_is_no_row(joint):
    database = draw(np.random.default_rng(10), 60, 8, "clusters")
    held, rows = HeldVectors(database), np.array([3, 11])
    # One a little beside its row, as when an image is encoded twice, one far from it.
    queries = Vectors(unit(database[rows] + np.array([[1e-4], [0.2]]) * np.eye(8)[:2]))
    hits = held.search(queries, 60)
    step = build(KReciprocalConfig(k1=5, k2=2, joint=joint), held)
    _, told = step(queries, hits, rows)
    _, expected = step(queries, hits, np.array([3, NO_ROW]))
    np.testing.assert_array_equal(told.distances, expected.distances)
    assert not np.array_equal(step(queries, hits, np.full(2, NO_ROW))[1].distances[0], told.distances[0])


@pytest.mark.parametrize("dimension", [1, 31, 32, 100, 128])
def test_distances_are_those_of_the_search_to_the_last_bit(dimension):
    vectors = frozen(draw(np.random.default_rng(dimension), 50, dimension, "spread"))
    expected = distances_to(vectors, vectors[:1], np.arange(50)[None])[0]
    assert [reciprocal_kernels._distance(vectors[0], row) for row in vectors] == expected.tolist()
