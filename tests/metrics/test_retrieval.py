import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import ranks, retrieval
from ray_retrieval.metrics.retrieval import evaluate

KS = (1, 2, 5)


def shares_a_label(one: Any, other: Any) -> bool:
    return bool((one & other).any()) if np.ndim(one) else bool(one == other)


def naive(
    queries: np.ndarray,
    query_labels: np.ndarray,
    rows: np.ndarray,
    row_labels: np.ndarray,
    removed: Any,
) -> dict[str, float]:
    """The definitions, one query and one row after another; `removed(q, r)`: row r does not count for q."""
    sums: dict[str, float] = {}
    valid = 0
    for q in range(len(queries)):
        ranking = [r for r in range(len(rows)) if not removed(q, r)]
        similarity = [float(queries[q].astype(np.float64) @ row.astype(np.float64)) for row in rows]
        ranking.sort(key=lambda r: (-similarity[r], r))
        relevance = [shares_a_label(query_labels[q], row_labels[r]) for r in ranking]
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


def values(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(metric) for name, metric in metrics.items()}


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clusters(count: int, dimension: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    centres = random.standard_normal((classes, dimension))
    return unit(centres[labels] + 1.5 * random.standard_normal((count, dimension))), labels


# By hand ----------------------------------------------------------------------------------------------------


def at_angles(*degrees: float) -> np.ndarray:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_a_case_by_hand() -> None:
    # Ranking: - + - +, so R = 2; precisions 1/2 at rank 2 and 2/4 at rank 4.
    found = evaluate(at_angles(0), np.array([7]), at_angles(40, 20, 30, 10), np.array([7, 7, 1, 2]), ks=KS)
    assert values(found) == {
        "recall@1": 0.0,
        "recall@2": 1.0,
        "recall@5": 1.0,
        "map": pytest.approx(0.5),
        "map@r": pytest.approx(0.25),
        "r_precision": pytest.approx(0.5),
    }


def test_equal_rows_count_in_their_own_order() -> None:
    query, rows = at_angles(0), at_angles(10, 10, 10)
    for labels, first in (([1, 0, 0], 1), ([0, 1, 0], 2), ([0, 0, 1], 3)):
        found = evaluate(query, np.array([1]), rows, np.array(labels))
        assert float(found["map"]) == pytest.approx(1 / first)


def test_a_query_is_removed_by_id_even_where_its_double_comes_first() -> None:
    # Row 0 is a double of another class; dropping the first row would keep the query itself.
    queries, rows = at_angles(0), at_angles(0, 0, 50)
    for ids in (["b"], np.array(["b"]), np.array(["b"], object)):
        found = evaluate(queries, np.array([1]), rows, np.array([2, 1, 1]), (1, 2), ids, ["a", "b", "c"])
        assert values(found) == pytest.approx(
            {"recall@1": 0.0, "recall@2": 1.0, "map": 0.5, "map@r": 0.0, "r_precision": 0.0}
        )
    assert float(evaluate(queries, np.array([1]), rows, np.array([2, 1, 1]))["map"]) == pytest.approx(7 / 12)


def test_every_row_with_the_id_is_removed_also_one_of_another_class() -> None:
    found = evaluate(at_angles(0), np.array([1]), at_angles(0, 1, 2), np.array([1, 2, 1]), (), [5], [5, 5, 6])
    assert float(found["map"]) == 1.0


def test_queries_without_a_relevant_row_are_left_out_and_counted() -> None:
    vectors, labels = at_angles(0, 10, 90), np.array([1, 1, 2])
    found = evaluate(vectors, labels)
    assert float(found["map"]) == 1.0
    assert all("mean over the 2 of 3 queries" in metric.policy for metric in found.values())


def test_the_policies_tell_the_definitions_apart() -> None:
    found = evaluate(*clusters(50, 8, 5), ks=(1, 10))
    assert list(found) == ["recall@1", "recall@10", "map", "map@r", "r_precision"]
    assert all(name == metric.name and metric.policy for name, metric in found.items())
    assert len({metric.policy for metric in found.values()}) == len(found)
    assert all("equal ones in row order" in metric.policy for metric in found.values())
    assert all("the query itself does not count" in metric.policy for metric in found.values())


def test_one_query_and_one_row() -> None:
    found = evaluate(at_angles(0), np.array([3]), at_angles(180), np.array([3]))
    assert set(values(found).values()) == {1.0}


# Against the definitions ------------------------------------------------------------------------------------


@st.composite
def samples(draw: st.DrawFn) -> tuple[Any, ...]:
    """Queries and rows whose similarities are exact in float32, so that many are equal."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dimension = draw(st.sampled_from([1, 4, 16]))
    count, rows = draw(st.integers(1, 20)), draw(st.integers(1, 30))
    draw_vectors = lambda n: random.choice(  # noqa: E731
        np.array([-1, 1], np.float32) / np.float32(dimension**0.5), (n, dimension)
    )
    classes = draw(st.integers(1, 6))
    labels = [random.integers(-2, classes - 2, n) for n in (count, rows)]
    if draw(st.booleans()):
        labels = [random.random((n, classes)) < 0.3 for n in (count, rows)]
    form = draw(st.sampled_from(["ids", "names", "itself", "itself with ids", "apart"]))
    identities = [random.integers(0, 40, n) for n in (count, rows)]
    return draw_vectors(count), labels[0], draw_vectors(rows), labels[1], form, identities


@given(samples(), st.integers(1, 300), st.integers(1, 3), st.sampled_from([0, 2, 10**6]))
@settings(max_examples=120, deadline=None)
def test_any_sample_agrees_with_the_definitions(
    sample: tuple[Any, ...], block: int, threads: int, few: int
) -> None:
    queries, query_labels, rows, row_labels, form, (query_ids, row_ids) = sample
    ids: dict[str, Any] = {}
    if form.startswith("itself"):
        rows, row_labels, row_ids = queries, query_labels, query_ids
    if form in ("ids", "itself with ids"):
        ids = {"query_ids": query_ids, "database_ids": row_ids}
    elif form == "names":
        ids = {"query_ids": [f"{n}.jpg" for n in query_ids], "database_ids": [f"{n}.jpg" for n in row_ids]}

    def removed(query: int, row: int) -> bool:
        return bool(query_ids[query] == row_ids[row]) if ids else form == "itself" and query == row

    expected = naive(queries, query_labels, rows, row_labels, removed)
    given_labels = [part.astype(np.int64) for part in (query_labels, row_labels)]
    arguments = (queries, given_labels[0], rows, given_labels[1], KS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "FEW", few)
        if not expected:
            with pytest.raises(MetricError, match="relevant row"):
                evaluate(*arguments, **ids, threads=threads, block=block)
            return
        found = evaluate(*arguments, **ids, threads=threads, block=block)
    assert values(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("few", [0, 10**6])
def test_both_ways_to_the_ranks_agree_with_a_stable_sort(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than a chunk and a tile; similarities of both signs, zeros of both signs, many equal.
    random = np.random.default_rng(3)
    similarities = (random.integers(-20, 20, (3, 9001)) / np.float32(16)).astype(np.float32)
    similarities[:, ::7] = -0.0
    relevant = np.sort(random.permutation(9001)[:300])
    order = [np.argsort(-row, kind="stable") for row in similarities]
    out: list[Any] = [
        np.zeros(3, np.int64),
        np.zeros(3, np.int64),
        np.zeros(3),
        np.zeros(3),
        np.zeros(3, np.int64),
    ]
    none = np.zeros((3, 2), np.int64)
    spans = np.tile(np.array([[0, 300]]), (3, 1))
    ranks.rank_queries(similarities, 3, 9001, relevant, spans, relevant[:0], none, few, *out)
    for q in range(3):
        places = np.flatnonzero(np.isin(order[q], relevant)) + 1
        precisions = np.arange(1, 301) / places
        assert out[0][q] == 300
        assert out[1][q] == places[0]
        assert out[2][q] == pytest.approx(precisions.sum(), rel=1e-12)
        assert out[3][q] == pytest.approx(precisions[places <= 300].sum(), rel=1e-12)
        assert out[4][q] == (places <= 300).sum()


def test_threads_and_blocks_do_not_change_a_bit() -> None:
    queries, labels = clusters(700, 37, 60)
    first = evaluate(queries, labels, threads=1)
    for threads, block in ((2, 128), (3, 129), (1, 10_000)):
        assert evaluate(queries, labels, threads=threads, block=block) == first


def test_equal_vectors_have_equal_similarities_wherever_they_stand() -> None:
    # Copies of one vector of another class, before and after the relevant row at every place of two tiles:
    # the rank is the number of copies before it.
    vector = unit(np.random.default_rng(0).standard_normal((1, 127)))
    rows = np.repeat(vector, 2100, axis=0)
    for place in (0, 1, 17, 1023, 1024, 2047, 2048, 2099):
        labels = np.zeros(2100, np.int64)
        labels[place] = 1
        other = unit(vector + 0.1)
        assert float(evaluate(other, np.array([1]), rows, labels)["map"]) == 1 / (place + 1)


def test_the_same_array_is_the_same_as_none_and_a_copy_with_ids() -> None:
    queries, labels = clusters(300, 16, 40)
    alone = evaluate(queries, labels)
    assert evaluate(queries, labels, queries, labels) == alone
    ids = np.arange(300)
    copied = evaluate(queries, labels, queries.copy(), labels.copy(), (1, 5, 10), ids, ids)
    assert values(copied) == values(alone)
    assert float(evaluate(queries, labels, queries.copy(), labels)["recall@1"]) == 1.0


def test_queries_in_parts_add_up_to_the_whole() -> None:
    queries, labels = clusters(300, 16, 40)
    rows, row_labels = clusters(500, 16, 40, seed=1)
    whole = evaluate(queries, labels, rows, row_labels)
    parts = [evaluate(queries[a:b], labels[a:b], rows, row_labels) for a, b in ((0, 90), (90, 300))]
    for name, metric in whole.items():
        together = (90 * float(parts[0][name]) + 210 * float(parts[1][name])) / 300
        assert float(metric) == pytest.approx(together, abs=1e-12)


def test_progress_counts_every_query_once() -> None:
    queries, labels = clusters(300, 8, 10)
    done: list[int] = []
    evaluate(queries, labels, threads=2, progress=done.append)
    assert sorted(done) == [44, 128, 128]


def test_inputs_stay_as_they_are_and_may_be_read_only() -> None:
    queries, labels = clusters(200, 8, 10)
    given_queries = queries.copy()
    given_queries.flags.writeable = False
    strided = np.repeat(queries, 2, axis=1)[:, ::2]
    assert values(evaluate(given_queries, labels)) == values(evaluate(strided, labels))
    np.testing.assert_array_equal(given_queries, queries)


# Other implementations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("classes", [3, 60])
def test_agrees_with_pytorch_metric_learning(itself: bool, classes: int) -> None:
    torch = pytest.importorskip("torch")
    accuracy = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    queries, labels = clusters(400, 24, classes)
    rows, row_labels = (queries, labels) if itself else clusters(500, 24, classes, seed=1)
    names = {
        "precision_at_1": "recall@1",
        "r_precision": "r_precision",
        "mean_average_precision_at_r": "map@r",
        "mean_average_precision": "map",
    }
    calculator = accuracy.AccuracyCalculator(
        include=tuple(names),
        k=None,
        device=torch.device("cpu"),
        knn_func=inference.CustomKNN(distances.CosineSimilarity()),
    )
    peer = calculator.get_accuracy(
        torch.from_numpy(queries),
        torch.from_numpy(labels),
        *(() if itself else (torch.from_numpy(rows), torch.from_numpy(row_labels))),
    )
    found = evaluate(queries, labels) if itself else evaluate(queries, labels, rows, row_labels)
    for theirs, ours in names.items():
        assert float(found[ours]) == pytest.approx(peer[theirs], abs=1e-6), theirs


def test_agrees_with_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.retrieval")
    queries, labels = clusters(60, 16, 8)
    rows, row_labels = clusters(200, 16, 8, seed=1)
    # It takes what is not above 0 for not relevant, so all similarities are raised.
    similarities = torch.from_numpy(queries).double() @ torch.from_numpy(rows).double().T + 2
    relevant = torch.from_numpy(labels[:, None] == row_labels)
    found = evaluate(queries, labels, rows, row_labels, ks=(3,))
    for name, function in (
        ("map", functional.retrieval_average_precision),
        ("r_precision", functional.retrieval_r_precision),
        ("recall@3", lambda s, r: functional.retrieval_hit_rate(s, r, top_k=3)),
    ):
        peer = np.mean([float(function(s, r)) for s, r in zip(similarities, relevant, strict=True)])
        assert float(found[name]) == pytest.approx(peer, abs=1e-6), name


# Limits -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_grows_by_the_blocks_of_the_threads_only() -> None:
    def kilobytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    queries, labels = clusters(12_000, 8, 2000)
    evaluate(queries[:500], labels[:500])
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak so far.
    except OSError:
        pytest.skip("the peak of this process cannot be reset")
    before = kilobytes("VmRSS")
    evaluate(queries, labels, threads=2)
    # The whole matrix has 549 MiB; two blocks of 128 queries have 12.
    assert kilobytes("VmHWM") - before < 64 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": np.ones((3, 2), np.float32)}, "queries: vectors have length 1, got 1.414 in row 0"),
        ({"queries": np.full((3, 2), np.nan, np.float32)}, "length 1, got nan"),
        ({"database": at_angles(0, 1) * np.array([[1], [np.inf]], np.float32)}, "database: .*row 1"),
        ({"database": np.zeros((2, 2), np.float32)}, "database: .*got 0 "),
        ({"queries": at_angles(0, 1, 2).astype(np.float64)}, "float32"),
        ({"queries": np.zeros((0, 2), np.float32), "query_labels": np.zeros(0, int)}, "nothing to compare"),
        ({"database": np.ones((2, 1), np.float32)}, "2 dimensions and the database 1"),
        ({"query_labels": np.array([1])}, "query_labels: 3 vectors but 1 label"),
        ({"query_labels": np.array([0.5, 1, 2])}, "whole numbers"),
        ({"query_labels": np.full((3, 2), 2), "database_labels": np.eye(2)}, "0 or 1"),
        ({"query_labels": np.eye(3)}, r"\[n\], or both"),
        ({"database_labels": None}, "labels of its own"),
        ({"ks": (0,)}, "at least 1"),
        ({"block": 0}, "block"),
        ({"threads": 0}, "thread"),
        ({"query_ids": [1, 2, 3]}, "database_ids: ids are needed on both sides"),
        ({"query_ids": [1, 2, 3], "database_ids": ["a", "b"]}, "text"),
        ({"query_ids": [1, 2], "database_ids": [1, 2]}, "query_ids: 3 vectors but 2 ids"),
        ({"query_ids": [1.5, 2, 3], "database_ids": [1, 2]}, "text or whole numbers"),
        ({"database_labels": np.array([8, 9])}, "none of 3 queries has a relevant row"),
        ({"database": None, "database_labels": np.array([1, 2, 3])}, "labels differ"),
        (
            {"database": None, "database_labels": None, "query_ids": [1, 2, 3], "database_ids": [1, 2, 4]},
            "differ",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "queries": at_angles(0, 1, 2),
        "query_labels": np.array([1, 1, 2]),
        "database": at_angles(3, 4),
        "database_labels": np.array([1, 2]),
    }
    assert evaluate(**arguments)
    with pytest.raises(MetricError, match=message):
        evaluate(**{**arguments, **change})


def test_blas_threads_are_as_before() -> None:
    from threadpoolctl import threadpool_info

    evaluate(*clusters(50, 8, 5))  # The first call may load a library.
    before = threadpool_info()
    evaluate(*clusters(50, 8, 5))
    assert threadpool_info() == before
    assert retrieval.__all__ == ["evaluate", "evaluate_reranked"]
