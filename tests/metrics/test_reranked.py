"""Rankings that begin with given rows, against the definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics.retrieval import evaluate, evaluate_reranked

KS = (1, 2, 5)


def naive(queries, query_labels, rows, row_labels, removed, order):
    """The definitions, one query after another; `removed(q, r)`: row r does not count for q."""
    sums, valid = {}, 0
    for q in range(len(queries)):
        similarity = rows.astype(np.float64) @ queries[q].astype(np.float64)
        first = [r for r in order[q].tolist() if r >= 0]
        others = sorted(set(range(len(rows))) - set(first), key=lambda r: (-similarity[r], r))
        ranking = [r for r in first + others if not removed(q, r)]
        relevance = [bool(query_labels[q] == row_labels[r]) for r in ranking]
        relevant = sum(relevance)
        if relevant == 0:
            continue
        valid += 1
        scores = {f"recall@{k}": float(any(relevance[:k])) for k in KS}
        precisions = [sum(relevance[: i + 1]) / (i + 1) * relevance[i] for i in range(len(ranking))]
        scores["map"] = sum(precisions) / relevant
        scores["map@r"] = sum(precisions[:relevant]) / relevant
        scores["r_precision"] = sum(relevance[:relevant]) / relevant
        for name, score in scores.items():
            sums[name] = sums.get(name, 0.0) + score
    return {name: total / valid for name, total in sums.items()}


def values(metrics):
    return {name: float(metric) for name, metric in metrics.items()}


def signs(generator, count, dimension):
    """Vectors whose similarities are exact in float32, so that many are equal."""
    values = np.array([-1, 1], np.float32) / np.float32(dimension**0.5)
    return generator.choice(values, (count, dimension))


def drawn_order(generator, queries, rows, width):
    """Rows in any order, with -1 in places."""
    order = np.stack([generator.permutation(rows)[: min(width, rows)] for _ in range(queries)])
    return np.where(generator.random(order.shape) < 0.2, -1, order)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 20),
    size=st.integers(1, 30),
    width=st.integers(0, 40),
    form=st.sampled_from(["apart", "ids", "itself"]),
    block=st.sampled_from([1, 128, 300]),
    threads=st.integers(1, 3),
    kind=st.sampled_from([np.int64, np.int32]),
)
def test_any_order_agrees_with_the_definitions(seed, count, size, width, form, block, threads, kind):
    generator = np.random.default_rng(seed)
    dimension = generator.choice([1, 4, 16])
    queries, rows = signs(generator, count, dimension), signs(generator, size, dimension)
    labels, row_labels = generator.integers(0, 4, count), generator.integers(0, 4, size)
    ids, row_ids = generator.integers(0, 40, count), generator.integers(0, 40, size)
    given_ids = {"query_ids": ids, "database_ids": row_ids} if form == "ids" else {}
    if form == "itself":
        rows, row_labels = queries, labels
    order = drawn_order(generator, count, len(rows), width).astype(kind)

    def removed(q, r):
        return bool(ids[q] == row_ids[r]) if form == "ids" else form == "itself" and q == r

    expected = naive(queries, labels, rows, row_labels, removed, order)
    arguments = (queries, labels, rows, row_labels, order, KS)
    if not expected:
        with pytest.raises(MetricError, match="relevant row"):
            evaluate_reranked(*arguments, **given_ids)
        return
    found = evaluate_reranked(*arguments, **given_ids, block=block, threads=threads)
    assert values(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("width", [0, 1, 7, 300])
def test_the_order_of_similarity_changes_nothing(width):
    generator = np.random.default_rng(0)
    rows, labels = signs(generator, 300, 16), generator.integers(0, 20, 300)
    similarities = rows.astype(np.float64) @ rows.astype(np.float64).T
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :width]
    found = evaluate_reranked(rows, labels, None, None, order)
    assert values(found) == values(evaluate(rows, labels))
    names, copied = np.arange(300).astype(str), rows.copy()
    told = evaluate_reranked(rows, labels, copied, labels, order, query_ids=names, database_ids=names)
    assert values(told) == values(found)


def test_the_policies_say_what_is_reranked():
    rows, labels = np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1])
    order = np.array([[1, 0], [0, 1], [3, 2], [2, 3]])
    found = evaluate_reranked(rows, labels, None, None, order, ks=(1,))
    assert values(found) == {"recall@1": 1.0, "map": 1.0, "map@r": 1.0, "r_precision": 1.0}
    for metric in found.values():
        assert "rows by inner product after the first 2 rows, which are reranked" in metric.policy
        assert "the query itself does not count" in metric.policy
    assert not any("reranked" in metric.policy for metric in evaluate(rows, labels).values())


def test_orders_that_do_not_fit_are_refused():
    rows, labels = np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1])

    def measure(order):
        return evaluate_reranked(rows, labels, None, None, order)

    for order in (np.zeros((3, 1), np.int64), np.zeros(4, np.int64), np.zeros((4, 1))):
        with pytest.raises(MetricError, match=r"an order is whole numbers \[4, m\], got"):
            measure(order)
    for row in (-2, 4):
        with pytest.raises(MetricError, match="rows 0 to 3 or -1"):
            measure(np.full((4, 1), row))
    with pytest.raises(MetricError, match="the order of query 1 has a row twice"):
        measure(np.array([[0, 1, 2], [3, -1, 3], [-1, -1, 0], [0, 1, 2]]))


def test_the_order_may_be_read_only_and_stays_as_it_is():
    rows, labels = np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1])
    order = np.array([[1, -1], [0, 1], [3, 2], [-1, 3]])
    before = order.copy()
    order.flags.writeable = False
    evaluate_reranked(rows, labels, None, None, order)
    np.testing.assert_array_equal(order, before)
