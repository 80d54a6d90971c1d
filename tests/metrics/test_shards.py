import tracemalloc
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import kernels, shards
from ray_retrieval.metrics.hamming import HammingReport, evaluate, evaluate_shards, mean_average_precision
from ray_retrieval.metrics.inputs import prepare
from ray_retrieval.metrics.parts import sum_of

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Shard = tuple[np.ndarray, np.ndarray]
EXACT = 2.0**-51  # Three roundings of values up to 1, with room.


def everything(report: HammingReport) -> tuple[Any, ...]:
    """All that a report says, to be compared with ==."""
    curve = report.pr_curve
    arrays = (report.ap, curve.radius, curve.precision, curve.recall)
    counts = (report.bits, report.queries, report.rows)
    empty = (report.queries_without_relevant, report.queries_without_hits)
    return report.metrics, *(array.tobytes() for array in arrays), counts, empty


def random_data(seed: int, queries: int, rows: int, bits: int, multi: bool, distinct: int = 6) -> Data:
    """Codes among which ties are the rule."""
    random = np.random.default_rng(seed)
    pool = random.integers(0, 256, (distinct, -(-bits // 8)), dtype=np.uint8)
    codes = pool[random.integers(0, distinct, queries + rows)]
    labels: np.ndarray = random.integers(0, 3, queries + rows)
    if multi:
        labels = random.random((queries + rows, 70)) < 0.01
    return codes[:queries], labels[:queries], codes[queries:], labels[queries:]


def cut(codes: np.ndarray, labels: np.ndarray, cuts: list[int]) -> list[Shard]:
    borders = [0, *sorted(cuts), len(codes)]
    return [(codes[a:b], labels[a:b]) for a, b in pairwise(borders)]


def exact_average_precisions(data: Data, bits: int, k: int) -> list[Fraction]:
    query_codes, query_labels, codes, labels = data
    scores = []
    for code, label in zip(query_codes, query_labels, strict=True):
        distances = np.unpackbits(codes ^ code, axis=1)[:, :bits].sum(axis=1)
        relevant = (labels & label).any(axis=1) if labels.ndim == 2 else labels == label
        total, hits = Fraction(0), 0
        for rank, row in enumerate(np.argsort(distances, kind="stable")[:k].tolist(), start=1):
            if relevant[row]:
                hits += 1
                total += Fraction(hits, rank)
        scores.append(total / hits if hits else Fraction(0))
    return scores


@st.composite
def sharded(draw: st.DrawFn) -> tuple[Data, int, list[int]]:
    bits = draw(st.sampled_from([1, 12, 64, 70, 127, 128, 200]))
    rows = draw(st.integers(1, 300))
    data = random_data(draw(st.integers(0, 2**32)), draw(st.integers(1, 4)), rows, bits, draw(st.booleans()))
    return data, bits, draw(st.lists(st.integers(0, rows), max_size=5))


@settings(max_examples=120, deadline=None)
@given(sharded(), st.integers(1, 320) | st.none(), st.lists(st.integers(1, 400), max_size=4))
def test_any_cut_into_shards_reports_the_same_to_the_last_bit(
    sample: tuple[Data, int, list[int]], k: int | None, at: list[int]
) -> None:
    data, bits, cuts = sample
    whole = evaluate(*data, bits=bits, k=k, at=at, radius=3, threads=1)
    parts = cut(data[2], data[3], cuts)
    options: dict[str, Any] = {"bits": bits, "k": k, "at": at, "radius": 3}
    assert everything(evaluate_shards(*data[:2], parts, threads=1, **options)) == everything(whole)


@settings(max_examples=60, deadline=None)
@given(sharded(), st.integers(1, 320))
def test_precisions_in_fixed_point_stay_within_the_stated_bound(
    sample: tuple[Data, int, list[int]], k: int
) -> None:
    data, bits, _ = sample
    within = min(k, len(data[2]))
    bound = 2.0 ** -(kernels.precision_shift(within) + 1) + EXACT
    found = evaluate(*data, bits=bits, k=k).ap.tolist()
    for ap, exact in zip(found, exact_average_precisions(data, bits, k), strict=True):
        assert abs(Fraction(ap) - exact) <= bound


@pytest.mark.parametrize("cuts", [[], [20_001], [0, 4095, 4096, 4097, 12_288, 30_000]])
def test_shards_of_several_chunks_match_exact_arithmetic(cuts: list[int]) -> None:
    data = random_data(3, queries=2, rows=30_000, bits=16, multi=True, distinct=500)
    report = evaluate_shards(*data[:2], cut(data[2], data[3], cuts), k=9000, at=[1, 64, 5000, 40_000])
    bound = 2.0 ** -(kernels.precision_shift(9000) + 1) + EXACT
    for ap, exact in zip(report.ap.tolist(), exact_average_precisions(data, 16, 9000), strict=True):
        assert abs(Fraction(ap) - exact) <= bound
    assert everything(evaluate(*data, k=9000, at=[1, 64, 5000, 40_000])) == everything(report)


@pytest.mark.parametrize("k", [1, 2, 3, 5000, 8191, 8192, 112_218, 10**9, 2**62])
def test_as_many_precisions_of_one_as_there_may_be_fit_an_int64(k: int) -> None:
    largest = k * 2 ** kernels.precision_shift(k)
    assert largest <= 2**63 - 1
    assert 4 * largest > 2**63 - 1  # The unit is as fine as can be, but for one bit.


def test_all_rows_relevant_at_one_distance_score_exactly_one_in_any_cut() -> None:
    codes, labels = np.zeros((10_000, 2), np.uint8), np.ones(10_000, np.int64)
    report = evaluate_shards(codes[:1], labels[:1], cut(codes, labels, [1, 7777]))
    assert report.ap.tolist() == [1.0]
    assert report.map["row"].value == 1.0


def test_hand_computed_ranks_over_two_shards() -> None:
    # Distances and relevance, in row order: first shard 1+ 0-, second 0+ 1-. The ranking is
    # 0- (row 1), 0+ (row 2), 1+ (row 0), 1- (row 3): precisions 1/2 and 2/3.
    query, label = np.zeros((1, 1), np.uint8), np.array([1])
    first = np.array([[128], [0]], np.uint8), np.array([1, 0])
    second = np.array([[0], [128]], np.uint8), np.array([1, 0])
    inputs = [prepare(query, label, *shard, None) for shard in (first, second)]
    counts = [shards.count_inputs(part, 1) for part in inputs]
    assert counts[0].counts[0, :2].tolist() == [[1, 0], [0, 1]]
    assert counts[1].counts[0, :2].tolist() == [[0, 1], [1, 0]]
    total, none = sum_of(counts), np.zeros_like(counts[0].counts)
    before = (none, counts[0].counts)
    orders = [
        shards.order_inputs(part, total, earlier, 4, [2, 3], 1)
        for part, earlier in zip(inputs, before, strict=True)
    ]
    unit = 2 ** kernels.precision_shift(4)
    assert orders[0].precisions.tolist() == [round(2 / 3 * unit)]
    assert orders[1].precisions.tolist() == [unit // 2]
    assert [order.hits_at.tolist() for order in orders] == [[[0, 1]], [[1, 1]]]
    report = evaluate_shards(query, label, [first, second], k=4, at=[2, 3])
    assert report.ap[0] == pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-15)
    assert report.precision_at[2].value == 1 / 2


def test_shards_are_loaded_one_at_a_time_and_progress_counts_both_passes() -> None:
    data = random_data(6, queries=30, rows=100, bits=12, multi=True)
    asked: list[int] = []

    class Loaded(list[Shard]):
        def __iter__(self) -> Any:
            for i in range(len(self)):
                asked.append(i)
                yield self[i]

    steps: list[int] = []
    shards = Loaded(cut(data[2], data[3], [30, 60]))
    report = evaluate_shards(*data[:2], shards, bits=12, threads=2, progress=steps.append)
    assert everything(report) == everything(evaluate(*data, bits=12))
    assert asked == [0, 1, 2, 0, 1, 2]
    assert sum(steps) == 2 * 3 * 30


def test_nothing_depends_on_the_threads_of_each_shard() -> None:
    data = random_data(7, queries=150, rows=500, bits=16, multi=True)
    shards = cut(data[2], data[3], [200])
    alone = everything(evaluate_shards(*data[:2], shards, k=100, threads=1))
    for threads in (2, 5):
        assert everything(evaluate_shards(*data[:2], shards, k=100, threads=threads)) == alone


@pytest.mark.parametrize("bits", [64, 130])
@pytest.mark.parametrize("multi", [False, True])
def test_nothing_depends_on_how_much_is_laid_out_at_once(
    bits: int, multi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_data(8, queries=150, rows=10_000, bits=bits, multi=multi, distinct=400)
    options: dict[str, Any] = {"bits": bits, "k": 3000, "at": [5, 9000]}
    whole = everything(evaluate(*data, **options))
    for name in ("_LAID_OUT_BYTES", "_EARLIER_BYTES"):  # a chunk of rows, a block of queries
        monkeypatch.setattr(shards, name, 1)
    for cuts in ([], [5000, 9001]):
        for threads in (1, 2):
            steps: list[int] = []
            parts = cut(data[2], data[3], cuts)
            report = evaluate_shards(*data[:2], parts, **options, threads=threads, progress=steps.append)
            assert everything(report) == whole
            assert sum(steps) == 2 * len(parts) * 150
            assert len(steps) > 4 * len(parts)


def test_long_codes_are_not_copied_as_a_whole() -> None:
    codes, labels = np.zeros((150_000, 32), np.uint8), np.zeros(150_000, np.int64)
    evaluate_shards(codes[:1], labels[:1], [(codes[:9], labels[:9])])  # What is compiled is not counted.
    tracemalloc.start()
    try:
        evaluate_shards(codes[:5], labels[:5], [(codes, labels)], threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < codes.nbytes * 2 / 3


def test_counts_are_held_twice_however_many_shards_there_are() -> None:
    codes, labels = np.zeros((500, 32), np.uint8), np.zeros(500, np.int64)
    parts = cut(codes, labels, [100, 200, 300, 400])
    evaluate_shards(codes[:1], labels[:1], parts)  # What is compiled is not counted.
    tracemalloc.start()
    try:
        evaluate_shards(codes, labels, parts, threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.7 * 16 * len(codes) * 257


@pytest.mark.parametrize("bits", [64, 127, 128])
def test_codes_at_the_largest_distance_are_counted_there(bits: int) -> None:
    # At 127 bits the key of a relevant row at the largest distance is the largest byte.
    width = -(-bits // 8)
    codes = np.full((65, width), 255, np.uint8)
    inputs = prepare(codes[:1] * 0, np.array([1]), codes, np.ones(65, np.int64), bits)
    counts = shards.count_inputs(inputs, 1)
    assert counts.counts[0, bits].tolist() == [0, 65]
    assert counts.counts.sum() == 65
    score = mean_average_precision(codes[:1] * 0, np.array([1]), codes, np.ones(65, np.int64), bits=bits)
    assert score.value == 1.0


# Errors -----------------------------------------------------------------------------------------------------

QUERIES: Shard = np.zeros((2, 1), np.uint8), np.zeros(2, np.int64)
ROWS: Shard = np.zeros((5, 1), np.uint8), np.zeros(5, np.int64)


def test_shards_without_any_row_are_refused() -> None:
    nothing = ROWS[0][:0], ROWS[1][:0]
    with pytest.raises(MetricError, match="nothing to compare"):
        evaluate_shards(*QUERIES, [nothing, nothing])
    with pytest.raises(MetricError, match="no shard"):
        evaluate_shards(*QUERIES, [])
    with pytest.raises(MetricError, match="k is at least 1"):
        evaluate_shards(*QUERIES, [ROWS], k=0)
