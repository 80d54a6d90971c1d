"""Query expansion and database augmentation against their formulas, and steps one after another."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from search_parts import assert_same, draw_codes, draw_images, unit, write

from ray_retrieval.config import validate
from ray_retrieval.descriptors import Vectors
from ray_retrieval.errors import ArtefactError, QueryError, RecipeError
from ray_retrieval.evaluate import EvaluateConfig
from ray_retrieval.search import Index
from ray_retrieval.search import build as build_index
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.rerank import (
    AnyRerankConfig,
    DatabaseAugmentationConfig,
    DiffusionConfig,
    HeldVectors,
    KReciprocalConfig,
    QueryExpansionConfig,
    SuperGlobalConfig,
    build,
    build_all,
    expansion,
    rerank,
)

KINDS = [
    QueryExpansionConfig,
    DatabaseAugmentationConfig,
    KReciprocalConfig,
    DiffusionConfig,
    SuperGlobalConfig,
]


def clusters(seed, count, dimension):
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((max(1, count // 6), dimension))
    chosen = generator.integers(0, len(centres), count)
    return unit(centres[chosen] + 0.5 * generator.standard_normal((count, dimension)))


def expanded(vector, database, without, n, alpha):
    """One vector, by the formula, in float64."""
    x, rows = vector.astype(np.float64), database.astype(np.float64)
    distances = ((x - rows) ** 2).sum(axis=1)
    nearest = sorted((row for row in range(len(rows)) if row != without), key=lambda r: (distances[r], r))
    total = x.copy()
    for row in nearest[:n]:
        total += max(1 - distances[row] / 2, 0.0) ** alpha * rows[row]
    return total / np.linalg.norm(total)


cases = {
    "seed": st.integers(0, 2**32 - 1),
    "count": st.integers(1, 40),
    "n": st.integers(1, 12),
    "alpha": st.sampled_from([0.0, 1.0, 3.0]),
    "gathered": st.sampled_from([1, 100, 1 << 22]),
}


@settings(max_examples=60, deadline=None)
@given(**cases)
@example(seed=33888305, count=1, n=1, alpha=0.0, gathered=100)  # a query without neighbours, beside others
def test_expanded_queries_are_those_of_the_formula(seed, count, n, alpha, gathered):
    vectors = clusters(seed, count + 5, 7)
    database, guests = vectors[:count], vectors[count:]
    members = np.random.default_rng(seed).integers(0, count, 4)
    queries = np.concatenate([database[members], guests])
    rows = np.concatenate([members, np.full(len(guests), NO_ROW)]).astype(np.int64)
    asked = []

    class Spy(HeldVectors):
        def search(self, queries, k):
            asked.append(queries.data)
            return super().search(queries, k)

    held = HeldVectors(database)
    step = build(QueryExpansionConfig(n=n, alpha=alpha), Spy(database))
    hits = held.search(Vectors(queries), max(step.depth, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expansion, "_GATHERED", gathered)
        made, found = step(Vectors(queries), hits, rows)
    wanted = [expanded(query, database, row, n, alpha) for query, row in zip(queries, rows, strict=True)]
    np.testing.assert_allclose(asked[0], wanted, atol=3e-7)
    np.testing.assert_array_equal(made.data, asked[0])
    assert_same(found, held.search(Vectors(asked[0]), hits.rows.shape[1]))
    for number in range(len(queries)):
        one = slice(number, number + 1)
        assert_same(step(Vectors(queries[one]), hits.take(one), rows[one])[1], found.take(one))


@settings(max_examples=60, deadline=None)
@given(**cases)
def test_augmented_rows_are_those_of_the_formula(seed, count, n, alpha, gathered):
    database, queries = clusters(seed, count, 7), clusters(seed + 1, 5, 7)
    held, done = HeldVectors(database), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expansion, "_GATHERED", gathered)
        step = build(DatabaseAugmentationConfig(n=n, alpha=alpha), held, threads=2, progress=done.append)
    wanted = [expanded(database[row], database, row, n, alpha) for row in range(count)]
    augmented = step.database.vectors()
    np.testing.assert_allclose(augmented, wanted, atol=3e-7)
    assert sum(done) == count
    given = Vectors(queries)
    made, found = step(given, held.search(given, 9))
    assert made is given
    assert_same(found, HeldVectors(augmented).search(Vectors(queries), 9))
    np.testing.assert_array_equal(held.vectors(), database)


def test_a_query_that_equals_a_row_does_not_count_twice():
    database = clusters(0, 50, 8)
    database[30] = database[4]
    held, queries = HeldVectors(database), Vectors(database[[30, 7]])
    step = build(QueryExpansionConfig(n=3), held)
    hits = held.search(queries, 10)
    # Unless told otherwise, the first row that equals the query is the query.
    assert_same(step(queries, hits)[1], step(queries, hits, np.array([4, 7]))[1])
    assert step.depth == 4


def test_hits_that_are_far_or_missing_add_nothing():
    database = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    held = HeldVectors(database)
    queries = Vectors(np.array([[0.6, 0.8]], np.float32))
    hits = held.search(queries, 5)
    _, found = build(QueryExpansionConfig(n=4, alpha=1), held)(queries, hits)
    whole = np.array([[0.6 + 0.6, 0.8 + 0.8]])
    expected = held.search(Vectors(unit(whole)), 5)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.distances, expected.distances, atol=1e-6)
    empty = HeldVectors(np.zeros((0, 2), np.float32))
    for config in (QueryExpansionConfig(), DatabaseAugmentationConfig()):
        _, found = build(config, empty)(queries, empty.search(queries, 2))
        assert found.rows.tolist() == [[NO_ROW, NO_ROW]]


def test_steps_follow_one_another():
    database, queries = clusters(1, 120, 8), Vectors(clusters(2, 6, 8))
    held = HeldVectors(database)
    configs = [DatabaseAugmentationConfig(n=2), QueryExpansionConfig(n=3), KReciprocalConfig(k1=5, depth=20)]
    steps = build_all(configs, held, threads=2)
    augmented = steps[0].database
    assert [step.database for step in steps] == [augmented] * 3
    hits = held.search(queries, 40)
    first = augmented.search(queries, 40)
    unknown = np.full(len(queries), NO_ROW)
    made, second = build(configs[1], augmented)(queries, first, unknown)
    _, third = build(configs[2], augmented)(made, second, unknown)
    assert_same(rerank(steps, queries, hits), third)
    assert_same(rerank([], queries, hits), hits)


def test_every_step_is_told_by_its_name():
    adapter = TypeAdapter(AnyRerankConfig)
    held, queries = HeldVectors(clusters(3, 30, 4)), Vectors(clusters(4, 2, 4))
    hits = held.search(queries, 12)
    for kind in KINDS:
        config = adapter.validate_python({"name": kind.model_fields["name"].default})
        assert config == kind()
        step = build(config, held)
        assert step(queries, hits)[1].rows.shape == (2, 12)
        with pytest.raises(ArtefactError, match="4 dimensions, the queries 3"):
            step(Vectors(unit(np.ones((2, 3)))), hits)
        with pytest.raises(QueryError, match="got 30 to 30"):
            step(queries, Hits(np.zeros((2, 1), np.float32), np.full((2, 1), 30)))


def test_a_step_works_on_the_queries_of_the_one_before():
    """Of a query that is a row, and of one that is not."""
    database, guests = clusters(5, 120, 8), clusters(6, 4, 8)
    held, queries = HeldVectors(database), Vectors(np.concatenate([database[[3, 50]], guests]))
    rows = np.array([3, 50, *[NO_ROW] * 4])
    hits = held.search(queries, 30)
    # By the shared neighbours alone: the distance, in which the queries tell, has no weight.
    expand, share = QueryExpansionConfig(n=4), KReciprocalConfig(k1=6, k2=3, weight=0)
    found = rerank(build_all([expand, share], held), queries, hits, rows)
    made = [expanded(query, database, row, 4, 3.0) for query, row in zip(queries.data, rows, strict=True)]
    by_formula = Vectors(unit(np.array(made)))
    again = held.search(by_formula, 30)
    # What has been moved away from its row is no row.
    _, expected = build(share, held)(by_formula, again, np.full(6, NO_ROW))
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.distances, expected.distances, atol=2e-6)
    alone = rerank(build_all([share], held), queries, hits, rows)
    for number in range(6):
        assert not np.array_equal(found.distances[number], alone.distances[number])


def test_augmentation_and_then_expansion_are_those_of_the_formula():
    database, guests = clusters(7, 90, 8), clusters(8, 4, 8)
    held, queries = HeldVectors(database), Vectors(np.concatenate([database[[3, 50]], guests]))
    rows = np.array([3, 50, *[NO_ROW] * 4])
    configs = [DatabaseAugmentationConfig(n=3), QueryExpansionConfig(n=5, alpha=2.0)]
    hits = held.search(queries, 20)
    found = rerank(build_all(configs, held), queries, hits, rows)
    augmented = unit(np.stack([expanded(database[row], database, row, 3, 3.0) for row in range(90)]))
    made = [expanded(query, augmented, row, 5, 2.0) for query, row in zip(queries.data, rows, strict=True)]
    expected = HeldVectors(augmented).search(Vectors(unit(np.array(made))), 20)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.distances, expected.distances, atol=1e-6)
    # A query that nobody has told about is looked for among the rows as they were before.
    assert_same(rerank(build_all(configs, held), queries, hits), found)


@pytest.mark.parametrize("before", [kind.model_fields["name"].default for kind in KINDS])
def test_augmentation_comes_first(before):
    steps = [{"name": before}, {"name": "database_augmentation"}]
    with pytest.raises(RecipeError, match=r"^--rerank: 'rerank': database_augmentation is the first step"):
        validate(EvaluateConfig, {"rerank": steps}, where="--rerank")
    adapter = TypeAdapter(AnyRerankConfig)
    configs = [adapter.validate_python(step) for step in steps]
    with pytest.raises(RecipeError, match=r"^database_augmentation is the first step"):
        build_all(configs, HeldVectors(clusters(0, 5, 4)))


@pytest.mark.parametrize("steps", ["diffusion", ["diffusion"], [{"name": "diffusion"}]])
def test_a_name_is_no_step(steps):
    with pytest.raises(RecipeError, match=r"as its configuration, got .*diffusion.*rerank_steps"):
        build_all(steps, HeldVectors(clusters(0, 5, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_refused_before_anything_is_searched(tmp_path, kind):
    write(tmp_path / "embeddings", draw_codes(20, 32), draw_images(20))
    build_index(tmp_path / "embeddings", tmp_path / "index")
    index = Index.open(tmp_path / "index")
    for make in (lambda: build(kind(), index), lambda: build_all([kind()], index)):
        with pytest.raises(ArtefactError, match=r"codes.*vectors") as caught:
            make()
        assert "\n" not in str(caught.value)
