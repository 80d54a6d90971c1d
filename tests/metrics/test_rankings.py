import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import rankings, retrieval


def unit(rng, count, dimension=6):
    vectors = rng.standard_normal((count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_whole_rankings_measure_as_vectors_do(seed, in_database):
    rng = np.random.default_rng(seed)
    database, labels = unit(rng, 40), rng.integers(0, 6, 40)
    queries, own = (database[:7], labels[:7]) if in_database else (unit(rng, 7), np.arange(7) % 6)
    ids = {"query_ids": np.arange(7), "database_ids": np.arange(40)} if in_database else {}
    order = np.argsort(-(queries @ database.T), axis=1, kind="stable")
    try:
        expected = retrieval.evaluate(queries, own, database, labels, (1, 5), **ids)
    except MetricError:
        return
    found = rankings.evaluate(order, own, labels, (1, 5), **ids)
    assert {n: m.value for n, m in found.items()} == pytest.approx(
        {n: m.value for n, m in expected.items()}, abs=1e-12
    )


def test_what_a_truncated_ranking_lacks_is_never_found():
    # Of three relevant rows two are ranked, first and third; -1 is passed over.
    order = np.array([[4, -1, 0, 5, -1]])
    found = rankings.evaluate(order, np.array([1]), np.array([0, 0, 1, 1, 1, 1]), (1,), None, None)
    assert found["recall@1"].value == 1
    assert found["map"].value == pytest.approx((1 + 2 / 3) / 4)
    assert found["map@r"].value == pytest.approx((1 + 2 / 3) / 4)
    assert found["r_precision"].value == pytest.approx(2 / 4)
    assert "beyond their ends are never found" in found["map"].policy


def test_an_empty_ranking_counts_as_nothing_found():
    found = rankings.evaluate(np.full((1, 3), -1), np.array([0]), np.array([0, 1]), (1,))
    assert {metric.value for metric in found.values()} == {0}


@pytest.mark.parametrize(
    ("order", "what"),
    [
        (np.array([[0, 0]]), "a row twice"),
        (np.array([[0, 9]]), "rows 0 to 1"),
        (np.array([0, 1]), r"\[queries, m\]"),
        (np.array([[0.0]]), "whole numbers"),
    ],
)
def test_wrong_rankings_are_refused(order, what):
    with pytest.raises(MetricError, match=what):
        rankings.evaluate(order, np.array([0]), np.array([0, 1]))
