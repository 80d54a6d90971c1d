"""The metrics of the revisited benchmarks against their definitions, and counting against sorting."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.data.pickles import read_pickle
from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import positions
from ray_retrieval.metrics.revisited import (
    GroundTruth,
    evaluate,
    evaluate_reranked,
    evaluate_vectors,
    trapezoidal_average_precision,
)

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "revisited"
PROTOCOLS = {
    "easy": (["easy"], ["hard", "junk"]),
    "medium": (["easy", "hard"], ["junk"]),
    "hard": (["hard"], ["easy", "junk"]),
}
KS = (1, 3, 5)


def naive(rankings, truth, protocols=PROTOCOLS, ks=KS):
    """The definitions, one query and one row after another."""
    report = {}
    for protocol, (positive, ignored) in protocols.items():
        scores = []
        for ranking, lists in zip(rankings, truth, strict=True):
            right = {int(row) for name in positive for row in lists[name]}
            out = {int(row) for name in ignored for row in lists[name]}
            if not right:
                continue
            hits = [int(row) in right for row in ranking if int(row) not in out]
            found, area = 0, 0.0
            for position, hit in enumerate(hits):
                if hit:
                    before = found / position if position else 1.0
                    found += 1
                    area += (before + found / (position + 1)) / 2
            score = {"map": area / len(right)}
            last = max((i + 1 for i, hit in enumerate(hits) if hit), default=0)
            for k in ks:
                divisor = min(k, last) if found == len(right) else k
                score[f"mp@{k}"] = sum(hits[:divisor]) / divisor
                score[f"mr@{k}"] = sum(hits[:k]) / len(right)
            scores.append(score)
        report[protocol] = {name: np.mean([score[name] for score in scores]) for name in scores[0]}
    return report


def values(report):
    return {name: {key: metric.value for key, metric in part.items()} for name, part in report.items()}


def agree(found, expected):
    assert found.keys() == expected.keys()
    for protocol in expected:
        assert found[protocol] == pytest.approx(expected[protocol], abs=1e-12)


def drawn_truth(generator, queries, rows):
    """Lists of random rows; the first query has an easy and a hard one, as `rows` of at least 2 allow."""
    truth = []
    for query in range(queries):
        order, sizes = generator.permutation(rows), generator.integers(0, rows // 2 + 1, 2)
        if query == 0:
            sizes = np.maximum(sizes, 1)
        easy, hard, rest = np.split(order, np.cumsum(sizes))
        junk = rest[: generator.integers(0, len(rest) + 1)]
        truth.append({"easy": easy.tolist(), "hard": hard, "junk": junk.tolist(), "bbx": [0, 0.5, 1, 1]})
    return truth


def signs(generator, count, dimension):
    """Vectors whose similarities are exact in float32, so that many are equal."""
    return generator.choice(np.array([-1, 1], np.float32) / np.float32(dimension**0.5), (count, dimension))


def rankings_of(queries, rows):
    """int64 [rows, queries]: all rows by similarity, equal ones in their order."""
    similarities = rows.astype(np.float64) @ queries.astype(np.float64).T
    return np.argsort(-similarities, axis=0, kind="stable")


def cut(generator, rows, parts):
    """The rows in shards, some of them empty."""
    return np.split(rows, np.sort(generator.integers(0, len(rows) + 1, parts - 1)))


# Definitions ------------------------------------------------------------------------------------------------


def test_the_golden_average_precision():
    assert trapezoidal_average_precision(np.array([0, 2, 5]), 3) == pytest.approx(0.677778, abs=1e-6)
    assert trapezoidal_average_precision(np.array([0, 2]), 4) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 4)
    assert trapezoidal_average_precision(np.zeros(0, np.int64), 2) == 0
    for found, positives in (([], 0), ([0, 1], 1)):
        with pytest.raises(MetricError, match="positives found of"):
            trapezoidal_average_precision(np.array(found, np.int64), positives)


def test_a_ranking_by_hand():
    truth = [{"easy": [1, 4], "hard": [3], "junk": [0, 2]}]
    found = values(evaluate(np.array([[0], [1], [2], [3], [5], [4]]), truth, ks=(1, 2, 10)))
    # Left of the ranking: easy 1 5 4, medium 1 3 5 4, hard 3 5.
    assert found["easy"]["map"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert found["easy"] | {"map": 0} == {
        "map": 0, "mp@1": 1, "mr@1": 0.5, "mp@2": 0.5, "mr@2": 0.5, "mp@10": pytest.approx(2 / 3), "mr@10": 1
    }  # fmt: skip
    assert found["medium"]["map"] == pytest.approx((1 + 1 + (2 / 3 + 3 / 4) / 2) / 3)
    assert found["medium"]["mp@10"] == pytest.approx(3 / 4)
    assert found["hard"] == {"map": 1, "mp@1": 1, "mr@1": 1, "mp@2": 1, "mr@2": 1, "mp@10": 1, "mr@10": 1}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 8),
    rows=st.integers(2, 30),
    length=st.integers(0, 40),
)
def test_rankings_agree_with_the_definitions(seed, queries, rows, length):
    generator = np.random.default_rng(seed)
    truth = drawn_truth(generator, queries, rows)
    ranks = np.stack([generator.permutation(rows)[:length] for _ in range(queries)], axis=1)
    ranks = np.where(generator.random(ranks.shape) < 0.1, -1, ranks).astype(generator.choice(["i4", "i8"]))
    kept = [column[column >= 0] for column in ranks.T]
    agree(values(evaluate(ranks, truth, ks=KS, rows=rows)), naive(kept, truth))


def test_the_classic_protocol():
    generator = np.random.default_rng(0)
    truth = [
        {"ok": lists["easy"], "junk": lists["junk"], "bbx": None} for lists in drawn_truth(generator, 9, 40)
    ]
    ranks = np.stack([generator.permutation(40) for _ in truth], axis=1)
    expected = naive(ranks.T, truth, {"classic": (["ok"], ["junk"])})
    agree(values(evaluate(ranks, truth, "classic", KS)), expected)


def test_a_truncated_ranking_has_the_precision_of_the_whole():
    truth = [{"easy": [0, 1, 9], "hard": [2], "junk": [3]}]
    whole = values(evaluate(np.arange(10)[:, None], truth, ks=(1, 3, 5)))["easy"]
    part = values(evaluate(np.arange(7)[:, None], truth, ks=(1, 3, 5)))["easy"]
    assert {name: part[name] for name in part if name != "map"} == {
        name: whole[name] for name in whole if name != "map"
    }
    assert part["map"] < whole["map"]
    empty = values(evaluate(np.zeros((0, 1), np.int64), truth))
    assert {value for part in empty.values() for value in part.values()} == {0}


def test_names_and_policies():
    truth = [{"easy": [0], "hard": [1], "junk": []}, {"easy": [], "hard": [1], "junk": [0]}]
    found = evaluate(np.array([[0, 0], [1, 1]]), truth, ks=(5,))
    assert [metric.name for metric in found["easy"].values()] == ["map/easy", "mp@5/easy", "mr@5/easy"]
    assert "mean over the 1 of 2 queries" in found["easy"]["map"].policy
    assert "positive: easy; removed from the ranking: hard and junk" in found["easy"]["map"].policy
    assert "positive: easy and hard; removed from the ranking: junk" in found["medium"]["map"].policy
    assert "trapezoids" in found["hard"]["map"].policy
    assert "first min(5, position of the last positive)" in found["hard"]["mp@5"].policy
    assert "first 5, divided by all R positives" in found["hard"]["mr@5"].policy
    vectors = np.eye(2, dtype=np.float32)
    assert "inner product" in evaluate_vectors(vectors, vectors, truth)["hard"]["map"].policy
    order = np.array([[1], [1]])
    reranked = evaluate_reranked(vectors, vectors, truth, order)["hard"]["map"].policy
    assert "after the first 1 row, reranked" in reranked


# Counting ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.sampled_from([1, 2, 17, 130]),
    rows=st.sampled_from([2, 9, 60, 1023, 1500, 2100]),
    dimension=st.sampled_from([1, 4, 16]),
    shards=st.integers(1, 5),
    threads=st.integers(1, 3),
)
def test_counting_is_exactly_as_sorting(seed, queries, rows, dimension, shards, threads):
    generator = np.random.default_rng(seed)
    wanted, database = signs(generator, queries, dimension), signs(generator, rows, dimension)
    truth = drawn_truth(generator, queries, min(rows, 200))
    expected = evaluate(rankings_of(wanted, database), truth, ks=KS, rows=rows)
    parts = cut(generator, database, shards)
    assert values(evaluate_vectors(wanted, parts, truth, ks=KS, threads=threads)) == values(expected)


def test_counting_does_not_depend_on_shards_where_sums_are_rounded(tmp_path):
    generator = np.random.default_rng(0)
    database = generator.standard_normal((5000, 48), np.float32)
    database /= np.linalg.norm(database, axis=1, keepdims=True)
    database[4000:4500] = database[:500]  # Equal rows, in other places of other products.
    queries, truth = database[2000:2070].copy(), drawn_truth(generator, 70, 900)
    expected = values(evaluate_vectors(queries, database, truth))
    similarities = database.astype(np.float64) @ queries.astype(np.float64).T
    by_sorting = values(evaluate(np.argsort(-similarities, axis=0, kind="stable"), truth))
    for protocol, part in expected.items():  # Rows that are equal but for rounding may change places.
        assert part == pytest.approx(by_sorting[protocol], abs=1e-4)
    database.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", np.float32, "r", shape=database.shape)
    for parts in (2, 3, 7):
        assert values(evaluate_vectors(queries, cut(generator, mapped, parts), truth, threads=2)) == expected


def test_equal_rows_stand_in_row_order_over_shards_of_which_one_is_empty():
    generator = np.random.default_rng(1)
    queries, database = signs(generator, 5, 16), signs(generator, 2500, 16)
    truth = drawn_truth(generator, 5, 300)
    shards = np.split(database, [90, 1100, 1100])
    expected = values(evaluate(rankings_of(queries, database), truth, ks=KS))
    assert values(evaluate_vectors(queries, shards, truth, ks=KS)) == expected
    with pytest.raises(MetricError, match="the database has no row"):
        positions.ranked_positions(queries, shards[:1], GroundTruth.of(truth).wanted)


def test_a_product_that_rounds_otherwise_counts_no_wanted_row():
    queries, database = np.ones((1, 1), np.float32), np.ones((3, 1), np.float32)
    wanted = positions.Wanted.of([[1]])
    known = positions.joined([positions.look_up(queries, database, 0, wanted)], wanted)
    for rounded in (np.nextafter(np.float32(1), np.float32(0)), np.float32(1)):
        elsewhere = known._replace(similarities=np.array([rounded], np.float32))
        better = positions._Scan(queries, [(database, 0)], wanted).better_than(elsewhere, 1, None)
        assert better.tolist() == [1]  # the equal one before it


@pytest.mark.parametrize("dimension", [40, 512])
def test_rows_that_repeat_a_wanted_one_stand_in_row_order(dimension):
    """A library may give equal vectors other similarities in other columns of a product."""
    generator = np.random.default_rng(0)
    database = generator.standard_normal((1500, dimension), np.float32)
    database /= np.linalg.norm(database, axis=1, keepdims=True)
    wanted = np.arange(0, 1400, 20)
    copies = wanted[:, None] + np.array([1, 3, 9])
    database[copies] = database[wanted, None]
    database[1450:1460] = database[0]  # in another product than the wanted one
    queries = database[wanted] + 0.3 * generator.standard_normal((70, dimension), np.float32) / dimension**0.5
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    first = [{"ok": [row], "junk": []} for row in wanted]
    last = [{"ok": [row], "junk": [row - 8]} for row in wanted + 9]
    several = [{"ok": [row + 9, row], "junk": [row + 3]} for row in wanted]
    shards = np.split(database, [7, 1024, 1100])
    head = np.stack([wanted + 500, wanted + 3], axis=1) % 1500
    for rows in (database, shards):
        assert evaluate_vectors(queries, rows, first, "classic")["classic"]["map"].value == 1
        found = evaluate_vectors(queries, rows, last, "classic", ks=(2, 3))["classic"]
        assert (found["mr@2"].value, found["mr@3"].value) == (0, 1)
        found = evaluate_vectors(queries, rows, several, "classic", ks=(1, 2, 3))["classic"]
        assert [found[f"mr@{k}"].value for k in (1, 2, 3)] == [0.5, 0.5, 1]
        found = evaluate_reranked(queries, rows, first, head, "classic", ks=(2, 3))["classic"]
        assert (found["mr@2"].value, found["mr@3"].value) == (0, 1)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 20),
    rows=st.sampled_from([2, 30, 1500]),
    width=st.integers(0, 40),
    shards=st.integers(1, 4),
)
def test_reranked_heads_agree_with_the_ranking_made_by_hand(seed, queries, rows, width, shards):
    generator = np.random.default_rng(seed)
    wanted, database = signs(generator, queries, 4), signs(generator, rows, 4)
    truth = drawn_truth(generator, queries, min(rows, 100))
    order = np.stack([generator.permutation(rows)[:width] for _ in range(queries)])
    order = np.where(generator.random(order.shape) < 0.2, -1, order)
    ranks = []
    for first, ranking in zip(order, rankings_of(wanted, database).T, strict=True):
        head = first[first >= 0]
        ranks.append(np.concatenate([head, ranking[~np.isin(ranking, head)]]))
    expected = evaluate(np.stack(ranks, axis=1), truth, ks=KS)
    found = evaluate_reranked(wanted, cut(generator, database, shards), truth, order, ks=KS)
    assert values(found) == values(expected)


def test_progress_counts_the_rows():
    generator = np.random.default_rng(2)
    done = []
    shards = cut(generator, signs(generator, 5000, 4), 3)
    evaluate_vectors(
        signs(generator, 2, 4), shards, drawn_truth(generator, 2, 50), threads=2, progress=done.append
    )
    assert sum(done) == 5000
    assert len(done) >= 5


# Errors -----------------------------------------------------------------------------------------------------


def test_ground_truth_that_makes_no_sense_is_refused():
    ranks = np.arange(4)[:, None]

    def refused(message, *lists, **options):
        with pytest.raises(MetricError, match=message) as error:
            evaluate(np.repeat(ranks, len(lists), axis=1), lists, **options)
        assert "\n" not in str(error.value)

    fine = {"easy": [0], "hard": [1], "junk": [2]}
    refused("row 1 is listed twice for query 1", fine, fine | {"junk": [2, 1]})
    refused("row 0 is listed twice for query 0", fine | {"easy": [0, 0]})
    refused("no list 'easy'.*use protocol='classic'", {"ok": [1], "junk": []})
    refused("no list 'ok'.*use protocol='revisited'", fine, protocol="classic")
    refused("no list 'junk'", {"easy": [], "hard": []})
    refused("list 'hard' of query 0 holds row numbers", fine | {"hard": [-1]})
    refused("list 'hard' of query 0 holds row numbers", fine | {"hard": [1.5]})
    refused("row 4 is listed, but the database has 4 rows", fine | {"hard": [4]}, rows=4)
    refused("none of 1 query has a positive under the protocol hard", fine | {"hard": []})
    refused("unknown protocol 'old'", fine, protocol="old")
    refused("there is no query")
    refused("k of at least 1, got 0", fine, ks=(0,))


def test_rankings_and_vectors_that_do_not_fit_are_refused():
    truth = [{"easy": [0], "hard": [1], "junk": [2]}]
    for ranks in (np.zeros((2, 2), np.int64), np.zeros(3, np.int64), np.zeros((3, 1))):
        with pytest.raises(MetricError, match=r"ranks are whole numbers \[n, 1\]"):
            evaluate(ranks, truth)
    with pytest.raises(MetricError, match="query 0 is given row 1 twice"):
        evaluate(np.array([[1], [0], [1]]), truth)
    with pytest.raises(MetricError, match="query 0 is given row -2"):
        evaluate(np.array([[-2]]), truth)
    with pytest.raises(MetricError, match=r"query 0 is given row 3.*0 to 2"):
        evaluate(np.array([[3]]), truth, rows=3)
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(MetricError, match="row 2 is listed, but the database has 2 rows"):
        evaluate_vectors(vectors[:1], vectors[:2], truth)
    with pytest.raises(MetricError, match="2 queries, but rows are given for 1"):
        evaluate_vectors(vectors[:2], vectors, truth)
    with pytest.raises(MetricError, match="3 dimensions and the database 2"):
        evaluate_vectors(vectors[:1], [vectors, vectors[:, :2]], truth)
    for wrong in (0.5, np.nan, np.inf):
        spoiled = np.array(vectors)
        spoiled[1, 1] = wrong
        with pytest.raises(MetricError, match=r"shard 1: vectors have length 1, got .* in row 1"):
            evaluate_vectors(vectors[:1], [vectors, spoiled], truth)
    with pytest.raises(MetricError, match=r"an order is whole numbers \[1, m\]"):
        evaluate_reranked(vectors[:1], vectors, truth, np.zeros((2, 1), np.int64))
    with pytest.raises(MetricError, match="order: query 0 is given row 3"):
        evaluate_reranked(vectors[:1], vectors, truth, np.array([[3]]))
    with pytest.raises(MetricError, match="order: query 0 is given row 0 twice"):
        evaluate_reranked(vectors[:1], vectors, truth, np.array([[0, 0]]))


# Published ground truth -------------------------------------------------------------------------------------

COUNTS = {
    "gnd_roxford5k.pkl": (4993, {"easy": 3029, "hard": 2497, "junk": 1356}, 68),
    "gnd_rparis6k.pkl": (6322, {"easy": 6874, "hard": 10350, "junk": 7153}, 70),
}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published ground truth")
@pytest.mark.parametrize("name", COUNTS)
def test_published_ground_truth(name):
    rows, listed, with_easy = COUNTS[name]
    file = read_pickle((PUBLISHED / name).read_bytes(), name)
    truth = file["gnd"]
    assert len(file["imlist"]) == rows
    assert len(file["qimlist"]) == len(truth) == 70
    assert {key: sum(len(lists[key]) for lists in truth) for key in listed} == listed
    assert sum(bool(lists["easy"]) for lists in truth) == with_easy

    # Positives above the others by a margin that leaves the hard ones mixed with them.
    generator = np.random.default_rng(0)
    similarities = generator.standard_normal((rows, 70))
    for query, lists in enumerate(truth):
        for key, higher in (("easy", 2.0), ("hard", 1.0), ("junk", 1.5)):
            similarities[lists[key], query] += higher
    ranks = np.argsort(-similarities, axis=0)
    found = evaluate(ranks, truth, ks=KS, rows=rows)
    agree(values(found), naive(ranks.T, truth))
    assert f"mean over the {with_easy} of 70 queries" in found["easy"]["map"].policy
    # Ignored rows as negatives would be another number, and a lower one.
    as_negative = naive(ranks.T, truth, {key: (right, []) for key, (right, _) in PROTOCOLS.items()})
    for protocol, part in values(found).items():
        assert as_negative[protocol]["map"] < part["map"] - 0.005


def test_vectors_that_are_present_have_one_row_each():
    vectors = np.eye(4, dtype=np.float32)
    truth = [{"ok": [1, 2], "junk": []}]
    found = evaluate_vectors(vectors[2:3], vectors[[0, 2, 3]], truth, "classic", present=np.array([0, 2, 3]))
    assert found["classic"]["map"].value == 0.5
    for wrong in ([0, 2], [0, 3, 2], [0, 2, 2]):
        with pytest.raises(MetricError, match="one row for each of 3 vectors is needed, ascending"):
            evaluate_vectors(vectors[2:3], vectors[[0, 2, 3]], truth, "classic", present=np.array(wrong))
