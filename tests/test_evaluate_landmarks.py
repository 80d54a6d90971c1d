"""Vectors against a ground truth of lists, by hand; and what the examples of a report make of it."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from samples import coloured_benchmark, coloured_table, png
from search_parts import draw_codes, draw_vectors, write

from ray_retrieval import examples, search
from ray_retrieval.data.table import ImageTable
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.evaluate import EvaluateConfig, evaluate
from ray_retrieval.pictures import cropped, opened
from ray_retrieval.search.embeddings import Embeddings

COUNT, QUERIES, KS = 40, 6, (1, 5)
POSITIVE = {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",), "classic": ("ok",)}


def unlabelled(table, **columns):
    images = table.table
    return ImageTable(pa.table({"id": images["id"], "image": images["image"], **columns}), name=table.name)


def drawn_truth(names, seed=0):
    """Lists of rows for each query; the first has no easy one."""
    generator = np.random.default_rng(seed)
    truth = []
    for query in range(QUERIES):
        rows = generator.permutation(COUNT)
        sizes = [0 if query == 0 and name == "easy" else int(generator.integers(2, 5)) for name in names]
        ends = np.cumsum([0, *sizes])
        truth.append({name: rows[ends[n] : ends[n + 1]].astype(np.int64) for n, name in enumerate(names)})
    return tuple(truth)


@pytest.fixture
def made(tmp_path):
    """A function that makes the benchmark and its embeddings."""

    def make(protocol="revisited", *, lost=frozenset(), lost_queries=frozenset()):
        names = ("easy", "hard", "junk") if protocol == "revisited" else ("ok", "junk")
        queries = unlabelled(coloured_table(QUERIES, seed=1, prefix="q"))
        database = unlabelled(coloured_table(COUNT, seed=2, prefix="d"))
        benchmark = replace(
            coloured_benchmark(12),
            queries=queries,
            database=database,
            ground_truth=drawn_truth(names),
            protocol=protocol,
            ks=KS,
        )
        benchmark.check()
        asked, found = draw_vectors(QUERIES, 8, seed=3), draw_vectors(COUNT, 8, seed=4)
        folders = (
            Embeddings.open(write(tmp_path / "q", asked, queries.table, skip=lost_queries)),
            Embeddings.open(write(tmp_path / "d", found, database.table, skip=lost)),
        )
        return folders, benchmark, asked.data, found.data

    return make


def by_hand(rankings, truth, names, positive, ks=KS):
    """map, mp@k, mr@k by one query and one row after another; a row that is in no ranking is never found."""
    scores = []
    for ranking, lists in zip(rankings, truth, strict=True):
        right = {row for name in positive for row in lists[name].tolist()}
        ignored = {row for name in names for row in lists[name].tolist()} - right
        if not right:
            continue
        places = [n for n, row in enumerate(r for r in ranking if r not in ignored) if row in right]
        area = sum(
            ((n / place if place else 1) + (n + 1) / (place + 1)) / 2 for n, place in enumerate(places)
        )
        score = {"map": area / len(right)}
        for k in ks:
            divisor = min(k, places[-1] + 1) if len(places) == len(right) else k
            score[f"mp@{k}"] = sum(place < divisor for place in places) / divisor
            score[f"mr@{k}"] = sum(place < k for place in places) / len(right)
        scores.append(score)
    return {name: np.mean([score[name] for score in scores]) for name in scores[0]}


def values(found):
    return {metric["name"]: metric["value"] for metric in found["test"]}


def rankings_of(asked, found, lost=()):
    similarity = asked.astype(np.float64) @ found.T.astype(np.float64)
    return [
        [row for row in np.argsort(-line, kind="stable").tolist() if row not in lost] for line in similarity
    ]


def assert_by_hand(found, rankings, benchmark, truth=None, suffix=""):
    truth = truth or benchmark.ground_truth
    names = tuple(truth[0])
    for protocol in ("easy", "medium", "hard") if benchmark.protocol == "revisited" else ("classic",):
        for name, value in by_hand(rankings, truth, names, POSITIVE[protocol]).items():
            assert values(found)[f"{name}/{protocol}{suffix}"] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("protocol", ["revisited", "classic"])
def test_the_protocols_numbers_are_those_of_the_definitions(made, protocol):
    folders, benchmark, asked, found = made(protocol)
    measured = evaluate(*folders, EvaluateConfig(), benchmark)
    assert_by_hand(measured, rankings_of(asked, found), benchmark)
    assert measured["notes"] == []
    first = measured["test"][0]
    assert first["name"] == ("map/medium" if protocol == "revisited" else "map/classic")
    assert "removed from the ranking: junk" in first["policy"]
    assert len(measured["test"]) == (3 if protocol == "revisited" else 1) * (1 + 2 * len(KS))


def test_the_easy_protocol_counts_the_queries_that_have_an_easy_one(made):
    folders, benchmark, *_ = made()
    policies = {
        metric["name"]: metric["policy"] for metric in evaluate(*folders, EvaluateConfig(), benchmark)["test"]
    }
    assert "mean over the 5 of 6 queries" in policies["map/easy"]
    assert "mean over the 6 of 6 queries" in policies["map/medium"]


def test_images_without_a_vector_are_never_found_and_are_noted(made):
    folders, benchmark, asked, found = made(lost={3, 17, 20, 21, 39}, lost_queries={2})
    measured = evaluate(*folders, EvaluateConfig(), benchmark)
    kept = [query for query in range(QUERIES) if query != 2]
    truth = tuple(benchmark.ground_truth[query] for query in kept)
    rankings = rankings_of(asked[kept], found, {3, 17, 20, 21, 39})
    assert_by_hand(measured, rankings, benchmark, truth)
    assert "1 of 6 queries cannot be decoded" in measured["notes"][0]
    assert "5 of 40 images of the database cannot be decoded" in measured["notes"][1]
    listed = {row for one in truth for name in ("easy", "hard") for row in one[name].tolist()}
    assert f"for a query, {len(listed & {3, 17, 20, 21, 39})}, count as never found" in measured["notes"][1]


@pytest.mark.parametrize("lost", [frozenset(), frozenset({0, 5, 30})])
def test_re_ranked_results_stand_beside_the_plain_ones(made, lost):
    """Query expansion, against its formula."""
    folders, benchmark, asked, found = made(lost=lost)
    expansion = {"name": "query_expansion", "n": 3, "alpha": 2.0}
    done = []
    measured = evaluate(*folders, EvaluateConfig(rerank=(expansion,)), benchmark, progress=done.append)
    assert sum(done) == 4 * QUERIES
    assert_by_hand(measured, rankings_of(asked, found, lost), benchmark)
    expanded = []
    for query, ranking in zip(asked.astype(np.float64), rankings_of(asked, found, lost), strict=True):
        near = found[ranking[:3]].astype(np.float64)
        expanded.append(query + (np.clip(near @ query, 0, None) ** 2) @ near)
    assert_by_hand(measured, rankings_of(np.array(expanded), found, lost), benchmark, suffix="/reranked")
    assert "re-ranked by query_expansion" in measured["test"][-1]["policy"]


def test_codes_and_embeddings_of_other_images_are_refused(made, tmp_path):
    folders, benchmark, *_ = made()
    codes = [
        Embeddings.open(write(tmp_path / f"codes-{name}", draw_codes(len(table), 16), table.table))
        for name, table in (("q", benchmark.queries), ("d", benchmark.database))
    ]
    with pytest.raises(DataError, match="is measured with vectors, these are codes"):
        evaluate(*codes, EvaluateConfig(), benchmark)
    with pytest.raises(ArtefactError, match="the images are not those of d"):
        evaluate(folders[0], folders[0], EvaluateConfig(), benchmark)


def test_a_ground_truth_that_does_not_fit_is_refused(made):
    *_, benchmark, _, _ = made()
    with pytest.raises(DataError, match="6 queries, and a ground truth of 5"):
        replace(benchmark, ground_truth=benchmark.ground_truth[1:]).check()
    beyond = ({**benchmark.ground_truth[0], "junk": np.array([COUNT])}, *benchmark.ground_truth[1:])
    with pytest.raises(DataError, match="list 'junk' of query 0 names a row outside 0…39"):
        replace(benchmark, ground_truth=beyond).check()


def test_examples_are_framed_by_the_ground_truth(made, tmp_path):
    (queries, database), benchmark, asked, found = made()
    search.build(database.folder, tmp_path / "index")
    index = search.Index.open(tmp_path / "index")
    shown = examples.of_benchmark(benchmark, queries, index, count=3, hits=COUNT)
    assert [example.query.id for example in shown] == [benchmark.queries.ids[row] for row in (0, 2, 5)]
    for example, query, ranking in zip(shown, (0, 2, 5), rankings_of(asked[[0, 2, 5]], found), strict=True):
        lists = {row: name for name, rows in benchmark.ground_truth[query].items() for row in rows.tolist()}
        assert [hit.id for hit in example.hits] == [benchmark.database.ids[row] for row in ranking]
        right = {"easy": True, "hard": True, "junk": None, None: False}
        assert [hit.right for hit in example.hits] == [right[lists.get(row)] for row in ranking]
        assert [hit.labels for hit in example.hits] == [[lists[r]] if r in lists else [] for r in ranking]


def test_a_query_is_shown_as_its_box(made, tmp_path):
    (queries, database), benchmark, *_ = made()
    boxes = pa.array([[4.0, 2.0, 12.0, 16.0]] * QUERIES, pa.list_(pa.float64()))
    boxed = replace(benchmark, queries=unlabelled(benchmark.queries, box=boxes))
    search.build(database.folder, tmp_path / "index")
    index = search.Index.open(tmp_path / "index")
    shown = examples.of_benchmark(boxed, queries, index, count=1, hits=1)
    assert opened(shown[0].query.image, 128).size == (8, 14)


def test_a_query_whose_file_has_gone_since_is_shown_without_its_picture(made, tmp_path):
    (queries, database), benchmark, *_ = made()
    images = [{"bytes": None, "path": f"{tmp_path}/gone/{name}.png"} for name in benchmark.queries.ids]
    gone = ImageTable(pa.table({"id": benchmark.queries.ids, "image": images}), name="gone")
    search.build(database.folder, tmp_path / "index")
    index = search.Index.open(tmp_path / "index")
    (shown,) = examples.of_benchmark(replace(benchmark, queries=gone), queries, index, count=1, hits=1)
    assert (shown.query.id, shown.query.image) == (benchmark.queries.ids[0], None)
    assert shown.hits[0].image is not None


def test_a_box_keeps_to_the_image():
    pixels = np.zeros((10, 20, 3), np.uint8)
    assert opened(cropped(png(pixels), [-5, 2, 8.4, 99]), 64).size == (8, 8)
    assert cropped(png(pixels), [30, 0, 40, 5]) == png(pixels)
    assert cropped(b"no image", [0, 0, 1, 1]) == b"no image"
