"""Diffusion against dense solutions of its equation, and against the conjugate gradients of scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from search_parts import unit

from ray_retrieval.descriptors import Vectors
from ray_retrieval.errors import RecipeError
from ray_retrieval.metrics.compiled import frozen
from ray_retrieval.recipe import rerank_steps
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.rerank import (
    DatabaseAugmentationConfig,
    DiffusionConfig,
    HeldVectors,
    QueryExpansionConfig,
    build,
    build_all,
    neighbours,
    rerank,
)
from ray_retrieval.search.rerank.diffusion import diffuse, graph_of


def draw(generator, count, dimension, kind):
    if kind == "spread":
        return unit(generator.standard_normal((count, dimension)))
    if kind == "clusters":
        centres = generator.standard_normal((max(1, count // 8), dimension))
        chosen = generator.integers(0, len(centres), count)
        return unit(centres[chosen] + 0.4 * generator.standard_normal((count, dimension)))
    assert kind == "twins"
    return unit(generator.standard_normal((4, dimension)))[generator.integers(0, 4, count)]


def squared(one, other):
    """Float32 values of float64 sums, as searches have them."""
    differences = one[:, None].astype(np.float64) - other[None].astype(np.float64)
    return (differences**2).sum(axis=2).astype(np.float32).astype(np.float64)


def powers(distances, gamma):
    return max(1 - distances / 2, 0.0) ** gamma


def dense_graph(database, k, gamma):
    """S, pair by pair."""
    count = len(database)
    distances = squared(database, database)
    near = [
        sorted((j for j in range(count) if j != i), key=lambda j, i=i: (distances[i, j], j))[:k]
        for i in range(count)
    ]
    weights = np.zeros((count, count))
    for i in range(count):
        for j in near[i]:
            if i in near[j]:
                weights[i, j] = powers(distances[i, j], gamma)
    degrees = weights.sum(axis=1)
    degrees[degrees == 0] = 1
    return weights / np.sqrt(degrees[:, None] * degrees[None])


def dense_scores(graph, nodes, query, own, rows, database, config):
    """{row: f} of one query, by solving the equation on some nodes."""
    distances = squared(query[None], database)[0]
    others = [row for row in rows if row != own][: config.k_query]
    start = np.zeros(len(nodes))
    for row in [*others, *(row for row in rows if row == own)]:
        start[nodes.index(row)] = powers(distances[row], config.gamma)
    matrix = np.eye(len(nodes)) - config.alpha * graph[np.ix_(nodes, nodes)]
    return dict(zip(nodes, np.linalg.solve(matrix, start), strict=True))


def in_rows(graph, count):
    weights = graph.weights.astype(np.float64)
    return sparse.csr_array((weights, graph.columns, graph.starts), (count, count))


KINDS = ["spread", "clusters", "twins"]
graphs = {
    "count": st.integers(1, 40),
    "kind": st.sampled_from(KINDS),
    "seed": st.integers(0, 2**32 - 1),
    "k": st.integers(1, 45),
    "gamma": st.sampled_from([0.5, 1.0, 3.0]),
}


@settings(max_examples=60, deadline=None)
@given(**graphs, block=st.sampled_from([3, 8192]))
def test_the_graph_is_that_of_mutual_neighbours(count, kind, seed, k, gamma, block):
    database, done = draw(np.random.default_rng(seed), count, 5, kind), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_ROWS", block)
        graph = graph_of(database, k, gamma, threads=2, progress=done.append)
    assert sum(done) == count
    found = in_rows(graph, count).toarray()
    np.testing.assert_allclose(found, dense_graph(database, k, gamma), rtol=1e-6)
    np.testing.assert_array_equal(found, found.T)
    assert (graph.weights > 0).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), **graphs)
def test_distances_are_those_of_the_solved_equation(data, count, kind, seed, k, gamma):
    generator = np.random.default_rng(seed)
    database = draw(generator, count, 5, kind)
    members = generator.integers(0, count, data.draw(st.integers(0, 4)))
    guests = draw(generator, data.draw(st.integers(0, 3)), 5, kind)
    queries = np.concatenate([database[members], guests])
    own = np.concatenate([members, np.full(len(guests), NO_ROW)]).astype(np.int64)
    config = DiffusionConfig(
        k=k,
        k_query=data.draw(st.integers(1, 12)),
        gamma=gamma,
        alpha=data.draw(st.sampled_from([0.0, 0.5, 0.9])),
        iterations=200,
        depth=data.draw(st.sampled_from([1, 5, count, count + 3])),
    )
    held = HeldVectors(database)
    hits = held.search(Vectors(queries), data.draw(st.sampled_from([1, count, count + 4])))
    graph, plain = dense_graph(database, k, gamma), squared(queries, database)
    whole = list(range(count)) if config.depth >= count else None
    for threads in (1, 3):
        step = build(config, held, threads=threads)
        made, found = step(Vectors(queries), hits, own)
        np.testing.assert_array_equal(made.data, queries)
        np.testing.assert_array_equal(np.sort(found.rows), np.sort(hits.rows))
        assert found.distances.dtype == np.float32
        for number, query in enumerate(queries):
            rows = [row for row in hits.rows[number].tolist() if row != NO_ROW]
            head = rows[: config.depth]
            scores = dense_scores(graph, whole or head, query, own[number], head, database, config)
            limit = 2e-5 * max(1e-3, *scores.values())
            got = dict(zip(found.rows[number].tolist(), found.distances[number].tolist(), strict=True))
            for row in rows:
                f = scores[row] if row in head else 0.0
                if got[row] < 0:
                    assert -got[row] == pytest.approx(f, abs=limit)
                else:
                    assert f <= limit
                    assert got[row] == pytest.approx(plain[number, row], abs=1e-6)
            keys = list(zip(found.distances[number].tolist(), found.rows[number].tolist(), strict=True))
            assert keys == sorted(keys)
            one = slice(number, number + 1)
            _, single = step(Vectors(queries[one]), hits.take(one), own[one])
            np.testing.assert_array_equal(single.rows, found.rows[one])
            np.testing.assert_array_equal(single.distances, found.distances[one])


@pytest.mark.parametrize("inside", [30, 300])
def test_iterations_are_those_of_scipy(inside):
    generator = np.random.default_rng(0)
    database = draw(generator, 300, 8, "clusters")
    graph = graph_of(database, 12, 3.0)
    nodes, start = generator.permutation(300)[:inside], np.zeros(inside)
    start[:5] = generator.random(5)
    part = in_rows(graph, 300)[nodes][:, nodes]
    for alpha, iterations in ((0.99, 20), (0.99, 3), (0.1, 50)):
        matrix = sparse.eye_array(inside) - alpha * part
        wanted, _ = sparse.linalg.cg(matrix, start, rtol=1e-6, atol=0, maxiter=iterations)
        room = np.full(300, -1, np.int32)
        found = diffuse(frozen(nodes), start, graph, alpha, iterations, room)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9 * wanted.max())
        assert (room == -1).all()
    nothing = diffuse(frozen(nodes), np.zeros(inside), graph, 0.99, 20, np.full(300, -1, np.int32))
    assert (nothing == 0).all()


def test_hits_behind_the_depth_stay_behind_by_distance():
    generator = np.random.default_rng(1)
    held = HeldVectors(draw(generator, 80, 6, "clusters"))
    queries = Vectors(draw(generator, 5, 6, "clusters"))
    hits = held.search(queries, 40)
    step = build(DiffusionConfig(k=40, depth=10), held)
    assert step.depth == 10
    _, found = step(queries, hits)
    np.testing.assert_array_equal(found.rows[:, 10:], hits.rows[:, 10:])
    np.testing.assert_array_equal(found.distances[:, 10:], hits.distances[:, 10:])
    assert (found.distances[:, :10] < 0).all()
    only = Hits(hits.distances[:, :10].copy(), hits.rows[:, :10].copy())
    np.testing.assert_array_equal(step(queries, only)[1].rows, found.rows[:, :10])
    np.testing.assert_array_equal(step(queries, only)[1].distances, found.distances[:, :10])


def test_a_query_that_equals_a_row_is_that_row_unless_told_otherwise():
    generator = np.random.default_rng(2)
    database = draw(generator, 60, 6, "clusters")
    database[30] = database[4]
    held, queries = HeldVectors(database), Vectors(database[[30, 7]])
    step, hits = build(DiffusionConfig(k=10, k_query=3), held), held.search(queries, 20)
    found, told = step(queries, hits)[1], step(queries, hits, np.array([4, 7]))[1]
    np.testing.assert_array_equal(found.rows, told.rows)
    np.testing.assert_array_equal(found.distances, told.distances)
    other = step(queries, hits, np.full(2, NO_ROW))[1]
    assert not np.array_equal(found.distances, other.distances)


def test_similarity_spreads_along_a_curve():
    """Two long arcs with a gap between them: the ends of the query's own are farther than the other arc."""
    angles = np.linspace(0, 1.2, 60)
    arcs = [np.stack([np.cos(angles), np.sin(angles), np.full(60, height)], axis=1) for height in (0.0, 0.35)]
    held = HeldVectors(unit(np.concatenate(arcs)))
    query = Vectors(held.vectors()[:1])
    hits = held.search(query, 120)
    assert (hits.rows[0, :60] >= 60).sum() > 10
    _, found = build(DiffusionConfig(k=6, iterations=200), held)(query, hits)
    np.testing.assert_array_equal(np.sort(found.rows[0, :60]), np.arange(60))
    # What cannot be reached follows in the order of the search.
    np.testing.assert_array_equal(found.rows[0, 60:], hits.rows[0][hits.rows[0] >= 60])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_databases(count):
    database = unit(np.eye(3))[:count]
    held, queries = HeldVectors(database), Vectors(unit(np.array([[3.0, 1, 0], [0, 0, -1]])))
    hits = held.search(queries, 4)
    _, found = build(DiffusionConfig(), held)(queries, hits)
    assert found.rows.tolist() == [[*range(count), *[NO_ROW] * (4 - count)]] * 2
    assert np.isinf(found.distances[:, count:]).all()
    none = Vectors(np.zeros((0, 3), np.float32))
    assert build(DiffusionConfig(), held)(none, held.search(none, 4))[1].rows.shape == (0, 4)


def test_it_follows_other_steps():
    generator = np.random.default_rng(3)
    held, queries = (
        HeldVectors(draw(generator, 90, 6, "clusters")),
        Vectors(draw(generator, 4, 6, "clusters")),
    )
    configs = [DatabaseAugmentationConfig(n=3), QueryExpansionConfig(n=3), DiffusionConfig(k=8, depth=30)]
    hits, unknown = held.search(queries, 40), np.full(4, NO_ROW)
    found = rerank(build_all(configs, held), queries, hits)
    augmented = build(configs[0], held).database
    made, second = build(configs[1], augmented)(queries, augmented.search(queries, 40), unknown)
    _, expected = build(configs[2], augmented)(made, second, unknown)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.distances, expected.distances)


def test_wrong_settings_are_named_with_what_is_known():
    assert rerank_steps(["diffusion"]) == (DiffusionConfig(),)
    with pytest.raises(RecipeError, match=r"unknown name 'difusion' \(did you mean 'diffusion'\?\)$"):
        rerank_steps(["difusion"])
    with pytest.raises(RecipeError, match=r"unknown name 'xyz' \(known here: .*diffusion, superglobal"):
        rerank_steps(["xyz"])
    with pytest.raises(
        RecipeError, match=r"^`rerank`: unknown key 'rerank.1.dept' \(did you mean 'depth'\?\)$"
    ):
        rerank_steps(["query_expansion", "{name: diffusion, dept: 5}"])
    with pytest.raises(RecipeError, match=r"'rerank.0.alpha': input should be less than 1, got 1"):
        rerank_steps(["{name: diffusion, alpha: 1}"])
