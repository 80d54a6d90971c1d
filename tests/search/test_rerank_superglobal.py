"""SuperGlobal re-ranking against its formulas, hit by hit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import assert_same, unit

from ray_retrieval.descriptors import Vectors
from ray_retrieval.errors import RecipeError
from ray_retrieval.recipe import rerank_steps
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.rerank import (
    HeldVectors,
    KReciprocalConfig,
    QueryExpansionConfig,
    SuperGlobalConfig,
    build,
    build_all,
    rerank,
)
from ray_retrieval.search.rerank.superglobal import nearest_within


def clusters(generator, count, dimension):
    centres = generator.standard_normal((max(1, count // 8), dimension))
    chosen = generator.integers(0, len(centres), count)
    return unit(centres[chosen] + 0.5 * generator.standard_normal((count, dimension)))


def naive_scores(query, hits, k, beta):
    """float64 [m], by the formulas; hits are the vectors in their order."""
    query, hits = query.astype(np.float64), hits.astype(np.float64)
    refined = []
    for i, hit in enumerate(hits):
        others = sorted((j for j in range(len(hits)) if j != i), key=lambda j: (-(hit @ hits[j]), j))
        total, weight = hit.copy(), 1.0
        for j in others[:k]:
            share = beta * max(hit @ hits[j], 0.0)
            total += share * hits[j]
            weight += share
        refined.append(total / weight)
    first = [query @ vector for vector in refined]
    best = sorted(range(len(hits)), key=lambda i: (-first[i], i))[: k + 1]
    expanded = [max(refined[i][axis] for i in best) for axis in range(len(query))]
    return np.array([(first[i] + np.dot(expanded, refined[i])) / 2 for i in range(len(hits))])


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 40),
    dimension=st.sampled_from([3, 8, 33]),
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 12),
    beta=st.sampled_from([0.0, 0.15, 1.0]),
    twins=st.booleans(),
)
def test_scores_are_those_of_the_formulas(data, count, dimension, seed, k, beta, twins):
    generator = np.random.default_rng(seed)
    database = clusters(generator, count, dimension)
    if twins:
        database[1::2] = database[: 2 * (count // 2) : 2]
    queries = np.concatenate([clusters(generator, 3, dimension), database[:1]])
    depth = data.draw(st.sampled_from([1, 2, count // 2 + 1, count + 5]))
    config, held = SuperGlobalConfig(k=k, beta=beta, depth=depth), HeldVectors(database)
    hits = held.search(Vectors(queries), data.draw(st.sampled_from([1, count, count + 4])))
    greatest = (1 + np.sqrt(k + 1)) / 2
    for threads in (1, 3):
        step = build(config, held, threads=threads)
        made, found = step(Vectors(queries), hits)
        np.testing.assert_array_equal(made.data, queries)
        for number, query in enumerate(queries):
            rows = hits.rows[number][hits.rows[number] != NO_ROW]
            scores = naive_scores(query, database[rows[:depth]], k, beta)
            wanted = [
                *((greatest - scores) / 2 / greatest),
                *(1 + hits.distances[number, depth : len(rows)] / 4),
            ]
            by_row = dict(zip(rows.tolist(), wanted, strict=True))
            got = found.rows[number, : len(rows)].tolist()
            assert sorted(got) == sorted(by_row)
            np.testing.assert_allclose(
                found.distances[number, : len(rows)], [by_row[row] for row in got], atol=2e-6
            )
            assert (found.rows[number, len(rows) :] == NO_ROW).all()
            assert np.isinf(found.distances[number, len(rows) :]).all()
            keys = list(zip(found.distances[number].tolist(), found.rows[number].tolist(), strict=True))
            assert [key for key in keys if key[1] >= 0] == sorted(key for key in keys if key[1] >= 0)
            one = slice(number, number + 1)
            assert_same(step(Vectors(queries[one]), hits.take(one))[1], found.take(one))


def test_by_hand():
    """A hit far from the query comes forward because the others are near to it."""
    database = np.array([[0.8, 0.6, 0], [0.8, 0, 0.6]], np.float32)
    held, queries = HeldVectors(database), Vectors(np.array([[1, 0, 0]], np.float32))
    _, found = build(SuperGlobalConfig(k=1, beta=1), held)(queries, held.search(queries, 2))
    # s = 0.64; x' = (x_1 + 0.64 x_2) / 1.64 and the other way round; s1 = 0.8 for both.
    near, far = 0.6 / 1.64, 0.6 * 0.64 / 1.64
    second = 0.8 * 0.8 + near * near + near * far
    greatest = (1 + np.sqrt(2)) / 2
    wanted = (greatest - (0.8 + second) / 2) / (2 * greatest)
    np.testing.assert_allclose(found.distances[0], [wanted] * 2, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_nearest_within_takes_the_first_of_equal_ones(count, k, seed):
    values = np.random.default_rng(seed).integers(0, 4, (count, count)).astype(np.float32)
    k = min(k, count - 1)
    found = nearest_within(values, k)
    assert found.shape == (count, k)
    for i in range(count):
        others = sorted((j for j in range(count) if j != i), key=lambda j, i=i: (-values[i, j], j))
        assert found[i].tolist() == others[:k]


def test_hits_behind_the_depth_stay_behind_by_distance():
    generator = np.random.default_rng(1)
    held = HeldVectors(clusters(generator, 80, 6))
    queries = Vectors(clusters(generator, 5, 6))
    hits, step = held.search(queries, 40), build(SuperGlobalConfig(depth=15), held)
    assert step.depth == 15
    _, found = step(queries, hits)
    np.testing.assert_array_equal(found.rows[:, 15:], hits.rows[:, 15:])
    assert (found.distances[:, :15] <= 1).all()
    assert (found.distances[:, 15:] >= 1).all()
    only = Hits(hits.distances[:, :15].copy(), hits.rows[:, :15].copy())
    assert_same(step(queries, only)[1], Hits(found.distances[:, :15].copy(), found.rows[:, :15].copy()))


def test_it_stands_between_other_steps():
    generator = np.random.default_rng(2)
    held, queries = HeldVectors(clusters(generator, 90, 6)), Vectors(clusters(generator, 4, 6))
    configs = [
        QueryExpansionConfig(n=3),
        SuperGlobalConfig(depth=30),
        KReciprocalConfig(k1=6, k2=3, depth=20),
    ]
    hits, unknown = held.search(queries, 40), np.full(4, NO_ROW)
    found = rerank(build_all(configs, held), queries, hits)
    made, expected = queries, hits
    for config in configs:
        made, expected = build(config, held)(made, expected, unknown)
    assert_same(found, expected)


def test_nothing_found_and_nothing_asked():
    empty, queries = HeldVectors(np.zeros((0, 3), np.float32)), Vectors(unit(np.ones((2, 3))))
    _, found = build(SuperGlobalConfig(), empty)(queries, empty.search(queries, 4))
    assert (found.rows == NO_ROW).all()
    assert np.isinf(found.distances).all()
    none = Vectors(np.zeros((0, 3), np.float32))
    assert build(SuperGlobalConfig(), empty)(none, empty.search(none, 4))[1].rows.shape == (0, 4)


def test_wrong_settings_are_named_with_what_is_known():
    assert rerank_steps(["{name: superglobal, depth: 50}"]) == (SuperGlobalConfig(depth=50),)
    with pytest.raises(RecipeError, match=r"unknown key 'rerank.0.bet' \(did you mean 'beta'\?\)"):
        rerank_steps(["{name: superglobal, bet: 0.2}"])
