import itertools
import math
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import Metric, kernels, shards
from ray_retrieval.metrics import ties as order_free
from ray_retrieval.metrics.hamming import TIES, evaluate, mean_average_precision

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Sample = tuple[Data, int]

# Oracles, from the definitions ------------------------------------------------------------------------------


def unpack(codes: np.ndarray, bits: int) -> list[list[int]]:
    values: list[list[int]] = np.unpackbits(codes, axis=1)[:, :bits].tolist()
    return values


def shares_a_label(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return any(a == 1 and b == 1 for a, b in zip(one, other, strict=True))
    return bool(one == other)


def ranking_inputs(data: Data, bits: int) -> list[list[tuple[int, bool]]]:
    """For each query, the (distance, relevance) of every row."""
    query_codes, query_labels, codes, labels = data
    return [
        [
            (sum(a != b for a, b in zip(query, code, strict=True)), shares_a_label(query_label, label))
            for code, label in zip(unpack(codes, bits), labels.tolist(), strict=True)
        ]
        for query, query_label in zip(unpack(query_codes, bits), query_labels.tolist(), strict=True)
    ]


def average_precision(relevance: list[bool], k: int | None) -> Fraction:
    """AP@K from a ranking, nearest first."""
    hits, total = 0, Fraction(0)
    for rank, relevant in enumerate(relevance[:k], start=1):
        if relevant:
            hits += 1
            total += Fraction(hits, rank)
    return total / hits if hits else Fraction(0)


def naive_average_precision(rows: list[tuple[int, bool]], k: int | None, ties: str) -> Fraction:
    if ties == "expected":
        orders = [sorted(order, key=lambda row: row[0]) for order in itertools.permutations(rows)]
    elif ties == "row":
        orders = [sorted(rows, key=lambda row: row[0])]
    elif ties == "optimistic":
        orders = [sorted(rows, key=lambda row: (row[0], not row[1]))]
    else:
        orders = [sorted(rows, key=lambda row: (row[0], row[1]))]
    scores = [average_precision([relevant for _, relevant in order], k) for order in orders]
    return sum(scores, Fraction(0)) / len(scores)


def exact_expected(rows: list[tuple[int, bool]], k: int) -> Fraction:
    """The mean over all orders in exact arithmetic, for more rows than can be put in every order."""
    before, hits, total = 0, 0, Fraction(0)
    for distance in sorted({distance for distance, _ in rows}):
        bucket = [relevant for at, relevant in rows if at == distance]
        n, r = len(bucket), sum(bucket)
        places = min(n, k - before)
        first = sum(Fraction(hits + 1, before + i) for i in range(1, places + 1))
        second = sum(Fraction(i - 1, before + i) for i in range(1, places + 1))
        expectation, mass = Fraction(0), 0
        for c in range(max(0, places - (n - r)), min(r, places) + 1):
            weight = math.comb(r, c) * math.comb(n - r, places - c)
            sum_c = total + Fraction(c, places) * first
            if c > 1:
                sum_c += Fraction(c * (c - 1), places * (places - 1)) * second
            mass += weight
            expectation += weight * (sum_c / (hits + c) if places < n and hits + c else sum_c)
        expectation /= mass
        if places < n:
            return expectation if hits or r else Fraction(0)
        total, before, hits = expectation, before + n, hits + r
        if before == k:
            break
    return total / hits if hits else Fraction(0)


def at_distances(distances: list[int], bits: int) -> np.ndarray:
    """Codes at these distances from the zero code."""
    ones = np.arange(bits)[None, :] < np.array(distances)[:, None]
    return np.packbits(ones, axis=1)


def one_query(pattern: str, bits: int = 16) -> Data:
    """One query and its database from a picture: `+` relevant, `-` not, `|` the next distance."""
    rows = [
        (d, mark == "+") for d, bucket in enumerate(pattern.replace(" ", "").split("|")) for mark in bucket
    ]
    codes = at_distances([d for d, _ in rows], bits)
    return np.zeros((1, codes.shape[1]), np.uint8), np.array([1]), codes, np.array([int(r) for _, r in rows])


def random_data(
    seed: int, *, queries: int = 12, rows: int = 300, bits: int = 12, classes: int = 5, multi: bool = False
) -> Data:
    random = np.random.default_rng(seed)
    labels: np.ndarray = random.integers(0, classes, queries + rows)
    prototypes = random.random((classes, bits)) < 0.5
    codes = np.packbits(prototypes[labels] ^ (random.random((queries + rows, bits)) < 0.25), axis=1)
    if multi:
        hot = random.random((queries + rows, classes)) < 1.5 / classes
        hot[np.arange(queries + rows), labels] = True
        labels = hot
    return codes[:queries], labels[:queries], codes[queries:], labels[queries:]


@st.composite
def small_data(draw: st.DrawFn, most_rows: int = 5) -> Sample:
    bits = draw(st.sampled_from([1, 3, 8, 12, 70]))
    queries, rows = draw(st.integers(1, 3)), draw(st.integers(1, most_rows))
    width = -(-bits // 8)
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    # Few distinct codes, so that ties are the rule; and whatever lies beyond the bits.
    pool = random.integers(0, 256, (3, width), dtype=np.uint8)
    codes = pool[random.integers(0, 3, queries + rows)]
    labels: np.ndarray
    if draw(st.booleans()):
        labels = random.integers(0, 2, queries + rows)
    else:
        labels = random.random((queries + rows, draw(st.sampled_from([1, 2, 65, 130])))) < 0.3
    return (codes[:queries], labels[:queries], codes[queries:], labels[queries:]), bits


# Average precision ------------------------------------------------------------------------------------------


def test_average_precision_computed_by_hand() -> None:
    # Precisions at the relevant ranks 1, 3, 4: 1, 2/3, 3/4.
    data = one_query("+ | - | + | + | -")
    assert float(mean_average_precision(*data)) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3, abs=1e-15)
    assert float(mean_average_precision(*data, k=3)) == pytest.approx((1 + 2 / 3) / 2, abs=1e-15)
    assert float(mean_average_precision(*data, k=2)) == 1.0


def test_policies_computed_by_hand() -> None:
    data = one_query("- + | + -")
    assert float(mean_average_precision(*data, ties="row")) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert float(mean_average_precision(*data, ties="optimistic")) == pytest.approx((1 + 2 / 3) / 2)
    assert float(mean_average_precision(*data, ties="pessimistic")) == pytest.approx((1 / 2 + 2 / 4) / 2)
    # Four equally probable orders: the first hit at rank 1 or 2, the second at rank 3 or 4.
    assert float(mean_average_precision(*data, ties="expected")) == pytest.approx(
        (3 / 4 + (2 / 3 + 1 / 2) / 2) / 2
    )


@settings(max_examples=150, deadline=None)
@given(small_data(), st.integers(1, 7) | st.none())
def test_every_policy_matches_the_definition_over_all_orders(sample: Sample, k: int | None) -> None:
    data, bits = sample
    rankings = ranking_inputs(data, bits)
    for ties in TIES:
        oracle = sum(naive_average_precision(rows, k, ties) for rows in rankings) / len(rankings)
        assert float(mean_average_precision(*data, k=k, ties=ties, bits=bits)) == pytest.approx(
            float(oracle), abs=1e-14
        )
    report = evaluate(*data, k=k, bits=bits, at=[1, 2, 9], radius=1)
    assert [metric.value for metric in report.map.values()] == [
        mean_average_precision(*data, k=k, ties=ties, bits=bits).value for ties in TIES
    ]


@pytest.mark.parametrize("bits", [12, 16, 24, 32, 48, 64, 100, 128])
@pytest.mark.parametrize("multi", [False, True])
def test_database_order_and_extremes_match_naive_loops_at_any_width(bits: int, multi: bool) -> None:
    data = random_data(bits, bits=bits, multi=multi, queries=4, rows=150, classes=7)
    rankings = ranking_inputs(data, bits)
    for k in (None, 1, 40, 150, 1000):
        for ties in ("row", "optimistic", "pessimistic"):
            oracle = [float(naive_average_precision(rows, k, ties)) for rows in rankings]
            assert float(mean_average_precision(*data, k, ties, bits)) == pytest.approx(
                math.fsum(oracle) / len(oracle), abs=1e-13
            )


@pytest.mark.parametrize("k", [1, 5, 50, 333, 699, 700])
def test_expected_ties_match_exact_arithmetic_where_k_cuts_a_bucket(k: int) -> None:
    data = random_data(3, queries=2, rows=700, bits=12)
    oracle = [float(exact_expected(rows, k)) for rows in ranking_inputs(data, 12)]
    assert float(mean_average_precision(*data, k=k, ties="expected", bits=12)) == pytest.approx(
        np.mean(oracle), abs=1e-13
    )


def test_rankings_longer_than_a_chunk_match_a_stable_sort() -> None:
    query_codes, query_labels, codes, labels = random_data(5, queries=3, rows=9001, bits=16)
    ap = evaluate(query_codes, query_labels, codes, labels, k=6000).ap
    for q in range(3):
        distances = np.bitwise_count(codes ^ query_codes[q]).sum(axis=1)
        relevant = (labels == query_labels[q])[np.argsort(distances, kind="stable")][:6000]
        ranks = np.flatnonzero(relevant) + 1
        assert ap[q] == pytest.approx((np.arange(1, len(ranks) + 1) / ranks).mean(), abs=1e-13)


def test_without_ties_all_policies_agree_with_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    bits, random = 100, np.random.default_rng(0)
    query_labels = random.integers(0, 3, 6)
    labels = random.integers(0, 4, bits + 1)
    codes = at_distances(random.permutation(bits + 1).tolist(), bits)
    query_codes = np.zeros((6, codes.shape[1]), np.uint8)
    distances = np.bitwise_count(codes).sum(axis=1).astype(np.float64)
    for k in (None, 1, 7, 60):
        oracle = retrieval.RetrievalMAP(empty_target_action="neg", top_k=k)
        oracle.update(
            torch.from_numpy(np.tile(1 + bits - distances, 6)),  # It takes 0 as a refusal.
            torch.from_numpy((labels[None] == query_labels[:, None]).ravel()),
            indexes=torch.arange(6).repeat_interleave(bits + 1),
        )
        expected = float(oracle.compute())
        for ties in TIES:
            value = float(mean_average_precision(query_codes, query_labels, codes, labels, k, ties, bits))
            assert value == pytest.approx(expected, abs=1e-6)  # torchmetrics works in float32.


@settings(max_examples=60, deadline=None)
@given(small_data(most_rows=60))
def test_over_all_rows_optimistic_and_pessimistic_bound_the_others(sample: Sample) -> None:
    data, bits = sample
    best, expected, row, worst = (
        float(mean_average_precision(*data, ties=ties, bits=bits))
        for ties in ("optimistic", "expected", "row", "pessimistic")
    )
    assert 0 <= worst <= expected + 1e-14 <= best + 2e-14
    assert best <= 1
    assert worst - 1e-14 <= row <= best + 1e-14


def test_with_k_below_the_rows_the_divisor_can_turn_the_bounds_around() -> None:
    data = one_query("+ | - | + -")
    assert float(mean_average_precision(*data, k=3, ties="optimistic")) == pytest.approx(5 / 6)
    assert float(mean_average_precision(*data, k=3, ties="pessimistic")) == 1.0


@settings(max_examples=40, deadline=None)
@given(small_data(most_rows=40), st.integers(1, 50), st.randoms(use_true_random=False))
def test_order_free_policies_do_not_see_the_order_of_the_database(
    sample: Sample, k: int, random: Any
) -> None:
    (query_codes, query_labels, codes, labels), bits = sample
    order = list(range(len(codes)))
    random.shuffle(order)
    for ties in ("expected", "optimistic", "pessimistic"):
        stored = mean_average_precision(query_codes, query_labels, codes, labels, k, ties, bits)
        shuffled = mean_average_precision(
            query_codes, query_labels, codes[order], labels[order], k, ties, bits
        )
        assert stored == shuffled


def test_a_database_stored_class_by_class_is_reported_as_moving_the_result() -> None:
    query_codes, query_labels, codes, labels = random_data(1, queries=50, rows=2000, bits=8)
    order = np.argsort(labels, kind="stable")
    sorted_by_class = evaluate(query_codes, query_labels, codes[order], labels[order])
    assert sorted_by_class.ties_matter
    assert sorted_by_class.tie_gap == float(sorted_by_class.map["row"]) - float(
        sorted_by_class.map["expected"]
    )
    assert not evaluate(*one_query("+|-|+")).ties_matter


@pytest.mark.parametrize("first", [0, 1, 5, 63, 64, 65, 1000, 10**6])
@pytest.mark.parametrize("number", [0, 1, 2, 63, 64, 1000, 40_000])
def test_harmonic_sums_are_exact_to_the_last_digits(first: int, number: int) -> None:
    oracle = math.fsum(1 / i for i in range(first + 1, first + number + 1))
    assert order_free._harmonic(first, first + number) == pytest.approx(oracle, rel=5e-16, abs=0)


# Degenerate inputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", TIES)
def test_queries_without_a_hit_count_zero(ties: Any) -> None:
    assert float(mean_average_precision(*one_query("- - | -"), ties=ties)) == 0.0
    assert float(mean_average_precision(*one_query("- | - | +"), k=2, ties=ties)) == 0.0
    query_codes, _, codes, labels = one_query("+ | -")
    two = mean_average_precision(
        np.repeat(query_codes, 2, axis=0), np.array([1, 7]), codes, labels, ties=ties
    )
    assert float(two) == 0.5


@pytest.mark.parametrize("ties", TIES)
def test_one_row_and_rows_all_alike(ties: Any) -> None:
    assert float(mean_average_precision(*one_query("+"), ties=ties)) == 1.0
    assert float(mean_average_precision(*one_query("-"), ties=ties)) == 0.0
    assert float(mean_average_precision(*one_query("+ + + + +"), k=3, ties=ties)) == pytest.approx(
        1, abs=1e-15
    )


@pytest.mark.parametrize("ties", TIES)
def test_k_beyond_the_database_means_all_rows(ties: Any) -> None:
    data = random_data(2)
    assert (
        mean_average_precision(*data, k=10**6, ties=ties).value
        == mean_average_precision(*data, ties=ties).value
    )


def test_queries_are_counted_that_have_no_relevant_row_or_no_hit() -> None:
    query_codes, _, codes, labels = one_query("- | - | +")
    report = evaluate(np.repeat(query_codes, 3, axis=0), np.array([1, 0, 5]), codes, labels, k=2)
    assert (report.queries_without_relevant, report.queries_without_hits) == (1, 2)
    assert report.ap.tolist() == [0.0, 1.0, 0.0]
    assert report.recall_at[1].value == pytest.approx((0 + 1 / 2 + 0) / 3)


# The other metrics ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(small_data(most_rows=30), st.integers(0, 80))
def test_precision_and_recall_match_the_definitions(sample: Sample, radius: int) -> None:
    data, bits = sample
    ns = [5, 1, 30, 5, 64]
    report = evaluate(*data, bits=bits, k=2, at=ns, radius=radius)
    rankings = ranking_inputs(data, bits)
    relevant = [sum(r for _, r in rows) for rows in rankings]
    stable = [[r for _, r in sorted(rows, key=lambda row: row[0])] for rows in rankings]
    assert list(report.precision_at) == list(report.recall_at) == [5, 1, 30, 64]
    for n in ns:
        hits = [sum(order[:n]) for order in stable]
        assert report.precision_at[n].value == pytest.approx(np.mean([h / n for h in hits]))
        recalls = [h / r if r else 0 for h, r in zip(hits, relevant, strict=True)]
        assert report.recall_at[n].value == pytest.approx(np.mean(recalls))
    curve = report.pr_curve
    assert curve.radius.tolist() == list(range(bits + 1))
    for at, precision, recall in zip(curve.radius, curve.precision, curve.recall, strict=True):
        balls = [[r for d, r in rows if d <= at] for rows in rankings]
        assert precision == pytest.approx(np.mean([sum(b) / len(b) if b else 0 for b in balls]))
        assert recall == pytest.approx(
            np.mean([sum(b) / r if r else 0 for b, r in zip(balls, relevant, strict=True)])
        )
    assert report.precision_within_radius.value == curve.precision[min(radius, bits)]


def test_ranks_beyond_the_database_are_left_out_unless_asked_for() -> None:
    data = random_data(4, rows=150)
    assert list(evaluate(*data).precision_at) == [1, 10, 100]
    assert list(evaluate(*data, at=[]).precision_at) == []
    asked = evaluate(*data, at=[300])
    relevant = (data[1][:, None] == data[3][None]).sum(axis=1)
    assert asked.precision_at[300].value == pytest.approx((relevant / 300).mean())
    assert asked.recall_at[300].value == 1.0


def test_every_number_has_its_own_name_and_a_policy() -> None:
    report = evaluate(*random_data(4), k=50, at=[10])
    names = [metric.name for metric in report.metrics]
    assert names == [
        "map@50",
        "map@50/expected",
        "map@50/optimistic",
        "map@50/pessimistic",
        "precision@10",
        "recall@10",
        "precision@radius2",
    ]
    for metric in report.metrics:
        assert 0 <= float(metric) <= 1
        assert "mean over 12 queries" in metric.policy
    whole = mean_average_precision(*random_data(4))
    assert whole.name == "map@all"
    for said in ("all 300 rows", "divided by the relevant rows found there", "counts 0", "database order"):
        assert said in whole.policy
    assert float(Metric("x", 0.25, "")) == 0.25


# Layout, threads, blocks ------------------------------------------------------------------------------------


def test_nothing_depends_on_threads_or_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_data(6, queries=70, multi=True, classes=90)

    def everything(threads: int, block: int) -> tuple[Any, ...]:
        monkeypatch.setattr(shards, "_BLOCK", block)
        report = evaluate(*data, k=100, at=[3, 50], threads=threads)
        arrays = (report.ap, report.pr_curve.precision, report.pr_curve.recall)
        return report.metrics, *(array.tobytes() for array in arrays)

    alone = everything(threads=1, block=64)
    for threads, block in ((1, 1), (1, 7), (2, 64), (3, 5), (8, 1)):
        assert everything(threads, block) == alone


def test_bits_beyond_the_code_are_ignored() -> None:
    query_codes, query_labels, codes, labels = random_data(7, bits=12)
    clean = evaluate(query_codes, query_labels, codes, labels, bits=12)
    noise = np.random.default_rng(0)
    noisy = [
        array | noise.integers(0, 16, array.shape, dtype=np.uint8) * [[0, 1]]
        for array in (query_codes, codes)
    ]
    wide = [np.pad(array.astype(np.uint8), ((0, 0), (0, 9)), constant_values=255) for array in noisy]
    report = evaluate(wide[0], query_labels, wide[1], labels, bits=12)
    assert report.metrics == clean.metrics
    assert len(report.pr_curve.radius) == 13
    # Zero padding changes nothing but the number of bits that are named.
    assert mean_average_precision(query_codes, query_labels, codes, labels).value == clean.map["row"].value


def test_any_array_is_read_in_place_by_one_compiled_kernel(tmp_path: Any) -> None:
    query_codes, query_labels, codes, labels = random_data(8, bits=64)
    oracle = mean_average_precision(query_codes, query_labels, codes, labels)
    compiled = len(kernels.score.signatures)  # type: ignore[attr-defined]
    (tmp_path / "codes").write_bytes(b"head!" + codes.tobytes())
    mapped = np.memmap(tmp_path / "codes", np.uint8, "r", offset=5, shape=codes.shape)
    forms = [
        (mapped, labels),
        (np.asfortranarray(codes), labels.astype(np.int32)),
        (np.repeat(codes, 2, axis=0)[::2], np.repeat(labels, 2)[::2]),
    ]
    for form, form_labels in forms:
        assert mean_average_precision(query_codes, query_labels, form, form_labels) == oracle
    assert len(kernels.score.signatures) == compiled  # type: ignore[attr-defined]


def test_large_tables_of_labels_are_not_copied() -> None:
    codes, labels = np.zeros((100_000, 8), np.uint8), np.zeros((100_000, 64), np.float32)
    evaluate(codes[:1], labels[:1], codes[:9], labels[:9])  # What is compiled is not counted.
    tracemalloc.start()
    try:
        evaluate(codes[:1], labels[:1], codes, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < labels.nbytes / 3


def test_labels_mean_the_same_as_numbers_and_as_columns() -> None:
    query_codes, query_labels, codes, labels = random_data(9, classes=130)
    numbers = evaluate(query_codes, query_labels, codes, labels)
    for dtype in (bool, np.int64, np.uint8, np.float32):
        columns = np.eye(130, dtype=dtype)
        report = evaluate(query_codes, columns[query_labels], codes, columns[labels])
        assert report.metrics == numbers.metrics
    shifted = evaluate(query_codes, query_labels - 2**40, codes, labels - 2**40)
    assert shifted.metrics == numbers.metrics


def test_inputs_are_left_as_they_were() -> None:
    data = random_data(10, bits=20)
    before = [array.copy() for array in data]
    evaluate(*data, bits=13)
    for array, copy in zip(data, before, strict=True):
        assert array.flags.writeable
        np.testing.assert_array_equal(array, copy)


def test_progress_counts_every_query_once_and_its_error_comes_back() -> None:
    data = random_data(11, queries=70)
    for threads in (1, 2):
        steps: list[int] = []
        evaluate(*data, threads=threads, progress=steps.append)
        assert sum(steps) == 70
        assert len(steps) > 1

        def stop(_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(*data, threads=threads, progress=stop)


def test_default_threads_follow_what_the_process_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert shards.default_threads(None) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "none")
    assert shards.default_threads(None) >= 1
    assert shards.default_threads(5) == 5


# Errors -----------------------------------------------------------------------------------------------------

CODES, LABELS = np.zeros((4, 2), np.uint8), np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ((CODES.astype(np.float32), LABELS, CODES, LABELS), {}, "packed uint8"),
        ((CODES[0], LABELS, CODES, LABELS), {}, "query codes: codes are packed"),
        ((CODES[:0], LABELS[:0], CODES, LABELS), {}, "query codes: there is nothing"),
        ((CODES, LABELS, CODES[:0], LABELS[:0]), {}, "database codes: there is nothing"),
        ((CODES[:, :0], LABELS, CODES[:, :0], LABELS), {}, "nothing to compare"),
        ((CODES, LABELS, CODES[:, :1], LABELS), {}, "2 bytes wide and database codes 1"),
        ((CODES, LABELS[:3], CODES, LABELS), {}, "query labels: 4 codes but 3 labels"),
        ((CODES, LABELS, CODES, LABELS[:1]), {}, "database labels: 4 codes but 1 label"),
        ((CODES, LABELS, CODES, np.zeros((4, 3), bool)), {}, "0/1"),
        ((CODES, np.zeros((4, 2), bool), CODES, np.zeros((4, 3), bool)), {}, "same classes"),
        ((CODES, LABELS[:, None] + 5, CODES, LABELS[:, None]), {}, "0 or 1"),
        ((CODES, np.zeros((4, 0)), CODES, np.zeros((4, 0))), {}, "classes"),
        ((CODES, LABELS, CODES, LABELS / 2), {}, "whole numbers"),
        ((CODES, LABELS, CODES, LABELS), {"k": 0}, "k is at least 1"),
        ((CODES, LABELS, CODES, LABELS), {"bits": 17}, "1 to 16 bits, got 17"),
        ((CODES, LABELS, CODES, LABELS), {"bits": 0}, "got 0"),
        ((CODES, LABELS, CODES, LABELS), {"threads": 0}, "thread"),
    ],
)
def test_bad_input_is_named_in_one_line(data: Any, options: dict[str, Any], said: str) -> None:
    for function in (mean_average_precision, evaluate):
        with pytest.raises(MetricError) as caught:
            function(*data, **options)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(MetricError, match=r"unknown tie policy 'random'.*row, expected"):
        mean_average_precision(CODES, LABELS, CODES, LABELS, ties="random")  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="radius"):
        evaluate(CODES, LABELS, CODES, LABELS, radius=-1)
    with pytest.raises(MetricError, match="at least 1, got 0"):
        evaluate(CODES, LABELS, CODES, LABELS, at=[10, 0])
