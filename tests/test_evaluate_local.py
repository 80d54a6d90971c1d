"""Local features against labels and against a ground truth: rankings of an index, and after verification."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from samples import coloured_benchmark, coloured_table
from search_parts import draw_local, draw_vectors, write

from ray_retrieval import evaluate_local, evaluation, search
from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import Local, Vectors, concatenate
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.evaluate import EvaluateConfig, evaluate
from ray_retrieval.evaluation import as_text, features_of
from ray_retrieval.metrics import rankings, revisited
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.rerank import verification

COUNT, QUERIES = 30, 6
HARD = 9
"""The row of the one view of a query that is hard to find; see `crowded`."""
VERIFIED = {"rerank": [{"name": "geometric_verification", "depth": 10, "min_inliers": 4}], "at": [1, 3]}


def moved(features, shift, seed):
    """The same features at other places, in descriptors that are a little different."""
    noise = np.random.default_rng(seed).normal(0, 0.02, features.data.shape)
    data = features.data.astype(np.float32) + noise
    data /= np.linalg.norm(data, axis=1, keepdims=True)
    return replace(features, data=data.astype(np.float16), locations=features.locations + np.float32(shift))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six queries, each a moved copy of the database's image of the same number, and an index."""
    folder = tmp_path_factory.mktemp("evaluate-local")
    rich = draw_local(COUNT, 16, most=60, seed=3)
    queries = moved(rich.take(np.arange(QUERIES)), 15, 4)
    table = coloured_table(COUNT, classes=COUNT, prefix="d")
    asked = coloured_table(QUERIES, classes=COUNT, prefix="q")
    embeddings = [
        Embeddings.open(write(folder / name, features, images.table))
        for name, features, images in (("q", queries, asked), ("d", rich, table))
    ]
    search.build(folder / "d", folder / "index", shards=2)
    benchmark = replace(coloured_benchmark(12), queries=asked, database=table)
    return *embeddings, search.Index.open(folder / "index"), benchmark


def values(report):
    return {metric["name"]: metric["value"] for metric in report["test"]}


def test_measured_are_the_rankings_of_the_index(made):
    queries, database, index, benchmark = made
    report = evaluate(queries, database, EvaluateConfig(**VERIFIED), benchmark, index=index)
    hits = index.search(queries.descriptors, COUNT)
    expected = rankings.evaluate(hits.rows, queries.labels, database.labels, (1, 3))
    found = values(report)
    assert {name: found[name] for name in expected} == {n: m.value for n, m in expected.items()}
    # Whatever is moved as a whole is found by verification.
    counts = queries.descriptors.counts
    assert found["recall@1/reranked"] >= (counts >= 12).mean()
    policy = next(m["policy"] for m in report["test"] if m["name"] == "map/reranked")
    assert "geometric_verification" in policy


def unlabelled(table):
    images = table.table
    return ImageTable(pa.table({"id": images["id"], "image": images["image"]}), name=table.name)


def test_of_queries_and_database_the_one_without_labels_is_named(made, tmp_path):
    queries, database, _, benchmark = made
    images = unlabelled(benchmark.database).table
    bare = Embeddings.open(write(tmp_path / "d", database.descriptors, images))
    search.build(tmp_path / "d", tmp_path / "index")
    index = search.Index.open(tmp_path / "index")
    with pytest.raises(DataError, match="a label of every image") as caught:
        evaluate(queries, bare, EvaluateConfig(at=[1]), benchmark, index=index)
    assert caught.value.where == str(tmp_path / "d")


def test_rankings_of_few_queries_are_whole(made, monkeypatch):
    *given, index, benchmark = made
    monkeypatch.setattr(evaluation, "_DEPTH", 1)

    def policy():
        return evaluate(*given, EvaluateConfig(at=[1]), benchmark, index=index)["test"][-1]["policy"]

    assert f"of up to {COUNT} rows of {COUNT}" in policy()
    monkeypatch.setattr(evaluation, "_PLACES", 4 * QUERIES)
    assert f"of up to 5 rows of {COUNT}" in policy()


def test_a_ground_truth_counts_rows_of_the_benchmark(made, tmp_path):
    queries, _, _, benchmark = made
    lost = {0, 7}
    rich = draw_local(COUNT, 16, most=60, seed=3)

    truth = tuple(
        {"easy": np.array([row]), "hard": np.array([row + 10]), "junk": np.array([row + 20])}
        for row in range(QUERIES)
    )
    benchmark = replace(
        benchmark,
        queries=unlabelled(benchmark.queries),
        database=unlabelled(benchmark.database),
        ground_truth=truth,
        protocol="revisited",
        ks=(1, 5),
    )
    database = Embeddings.open(write(tmp_path / "d", rich, benchmark.database.table, skip=lost))
    search.build(tmp_path / "d", tmp_path / "index")
    index = search.Index.open(tmp_path / "index")
    report = evaluate(queries, database, EvaluateConfig(), benchmark, index=index)
    hits = index.search(queries.descriptors, COUNT)
    present = np.array([row for row in range(COUNT) if row not in lost])
    ranks = np.where(hits.rows < 0, -1, present[hits.rows])
    expected = revisited.evaluate(ranks.T, truth, "revisited", (1, 5))
    found = values(report)
    for protocol, metrics in expected.items():
        for name, metric in metrics.items():
            assert found[f"{name}/{protocol}" if "/" not in name else name] == metric.value
    assert any("2 of 30 images" in note for note in report["notes"])


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """One query whose nearest hits are junk and easy images; a view of it, hard to find, lies behind them.

    All images have the query's features, the view where it shows them, the others somewhere else. The order
    of the vectors and that of the votes is the order of the rows.
    """
    folder = tmp_path_factory.mktemp("crowded")
    count, generator = 12, np.random.default_rng(7)
    many = draw_local(40, 16, most=60, seed=3)
    query = many.take(np.array([many.counts.argmax()]))
    query = replace(query, sizes=np.array([[640, 640]], np.int32))
    sets = []
    for row in range(count):
        noise = generator.normal(0, 0.02 + 0.01 * row, query.data.shape)
        data = query.data.astype(np.float32) + noise
        data /= np.linalg.norm(data, axis=1, keepdims=True)
        places = generator.uniform(0, 640, query.locations.shape)
        if row == HARD:
            places = query.locations + 5
        sets.append(replace(query, data=data.astype(np.float16), locations=places.astype(np.float32)))
    database = concatenate(sets)
    angles = np.linspace(0.1, 1, count)
    vectors = [
        Vectors(np.stack([np.cos(some), np.sin(some)], axis=1).astype(np.float32))
        for some in (np.zeros(1), angles)
    ]
    table, asked = (
        coloured_table(rows, classes=2, prefix=prefix) for rows, prefix in ((count, "d"), (1, "q"))
    )
    made = {
        name: Embeddings.open(write(folder / name, descriptors, images.table, model=model))
        for name, descriptors, images, model in (
            ("q", query, asked, "model-l"),
            ("d", database, table, "model-l"),
            ("vq", vectors[0], asked, "model-v"),
            ("vd", vectors[1], table, "model-v"),
        )
    }
    search.build(folder / "d", folder / "index")
    truth = ({"easy": np.arange(4), "hard": np.array([HARD]), "junk": np.array([4, 5])},)
    benchmark = replace(
        coloured_benchmark(12),
        queries=asked,
        database=table,
        ground_truth=truth,
        protocol="revisited",
        ks=(1,),
    )
    return made, search.Index.open(folder / "index"), benchmark


@pytest.mark.parametrize("kind", ["local features", "vectors"])
def test_ignored_images_are_dropped_before_those_that_are_verified(crowded, kind):
    """With depth 4, hard verifies rows 6 to 9, and medium and easy rows 0 to 3."""
    made, index, benchmark = crowded
    step = {"name": "geometric_verification", "depth": 4}
    if kind == "vectors":
        config = EvaluateConfig(rerank=[{**step, "local": str(index.folder)}])
        report = evaluate(made["vq"], made["vd"], config, benchmark, features=made["q"])
    else:
        report = evaluate(made["q"], made["d"], EvaluateConfig(rerank=[step]), benchmark, index=index)
        assert index.search(made["q"].descriptors, 12).rows[0].tolist() == list(range(12))
    found = values(report)
    # Of what is left for hard, rows 6, 7 and 8 are before it, until it is verified.
    assert found["map/hard"] == pytest.approx((0 + 1 / 4) / 2)
    assert found["map/hard/reranked"] == 1
    assert found["map/easy/reranked"] == found["map/easy"] == 1
    # Four rows of junk and easy ones are verified for medium: 9 stays the eighth of the ten that count.
    assert found["map/medium/reranked"] == found["map/medium"] < 1
    policies = {metric["name"]: metric["policy"] for metric in report["test"]}
    assert "do not count for a query are left out before the first are taken" in policies["map/hard/reranked"]
    assert "left out before" not in policies["map/hard"]


def test_each_image_is_compared_with_a_query_once(crowded, monkeypatch):
    made, index, benchmark = crowded
    compared = []
    plain = verification.verify

    def counted(query, candidates, config, **options):
        compared.append(len(candidates))
        return plain(query, candidates, config, **options)

    monkeypatch.setattr(verification, "verify", counted)
    config = EvaluateConfig(rerank=[{"name": "geometric_verification", "depth": 8}])
    evaluate(made["q"], made["d"], config, benchmark, index=index)
    assert compared == [10]  # all but junk; not 8 for each of three protocols


def test_a_query_does_not_take_its_own_place_among_the_verified(crowded, monkeypatch):
    """By labels, where the query is the first row of the database: the view is the tenth of the others."""
    made, index, benchmark = crowded
    labelled = replace(
        benchmark, ground_truth=None, protocol=None, queries_in_database=True, queries=benchmark.database
    )
    first = made["d"]
    for least in ("_DEPTH", "_PLACES"):
        monkeypatch.setattr(evaluation, least, 1)
    for depth, reached in ((8, False), (9, True)):
        step = {"name": "geometric_verification", "depth": depth, "min_inliers": 12}
        steps = EvaluateConfig(rerank=[step]).rerank
        protocols = evaluate_local._ignored(first, first, labelled)
        assert [rows.tolist() for rows in protocols["labels"]] == [[row] for row in range(12)]
        part = {"labels": [np.array([0])]}
        _, after = evaluate_local._rankings(made["q"], index, steps, part, (5,), None, 1, None)
        assert (after["labels"][0, 0] == HARD) == reached
        assert 0 not in after["labels"][0]


def test_features_of_another_model_than_the_index_are_refused(crowded, made):
    _, index, benchmark = crowded
    sets = crowded[0]
    config = EvaluateConfig(rerank=[{"name": "geometric_verification", "local": str(index.folder)}])
    with pytest.raises(ArtefactError, match=r"index is of model model-l; .* those given are of model-a"):
        evaluate(sets["vq"], sets["vd"], config, benchmark, features=made[0])
    with pytest.raises(ArtefactError, match=r"index is of model model-l; .* there are none"):
        evaluate(sets["vq"], sets["vd"], config, benchmark)


def test_local_features_are_verified_by_those_of_another_model(crowded, tmp_path):
    """An index of local features whose own agree on nothing: the other model's tell."""
    made, index, benchmark = crowded
    own = draw_local(12, 16, most=60, seed=11)
    asked = own.take(np.array([0]))
    queries = Embeddings.open(write(tmp_path / "q", asked, benchmark.queries.table, model="model-x"))
    database = Embeddings.open(write(tmp_path / "d", own, benchmark.database.table, model="model-x"))
    search.build(tmp_path / "d", tmp_path / "index")
    mine = search.Index.open(tmp_path / "index")
    step = {"name": "geometric_verification", "local": str(index.folder)}
    report = evaluate(
        queries, database, EvaluateConfig(rerank=[step]), benchmark, index=mine, features=made["q"]
    )
    reached = HARD in mine.search(asked, 12).rows
    assert (values(report)["map/hard/reranked"] == 1) == reached
    assert reached


def test_an_index_of_other_embeddings_is_refused(made, tmp_path):
    queries, _, index, benchmark = made
    other = Embeddings.open(write(tmp_path / "d", draw_local(COUNT, 16, seed=8), benchmark.database.table))
    with pytest.raises(ArtefactError, match="other embeddings"):
        evaluate(queries, other, EvaluateConfig(), benchmark, index=index)


def test_vectors_are_verified_by_an_index_of_local_features(made, tmp_path):
    local_queries, _, index, benchmark = made
    asked, found = draw_vectors(QUERIES, 8, seed=1), draw_vectors(COUNT, 8, seed=2)
    queries = Embeddings.open(write(tmp_path / "q", asked, benchmark.queries.table))
    database = Embeddings.open(write(tmp_path / "d", found, benchmark.database.table))
    step = {"name": "geometric_verification", "depth": COUNT, "min_inliers": 4, "local": str(index.folder)}
    config = EvaluateConfig(rerank=[step], at=[1])
    measured = values(evaluate(queries, database, config, benchmark, features=local_queries))
    counts = local_queries.descriptors.counts
    assert measured["recall@1/reranked"] >= (counts >= 12).mean() > measured["recall@1"]


def test_features_are_those_of_the_same_images(made, tmp_path):
    local_queries, _, _, benchmark = made
    vectors = draw_vectors(QUERIES, 8, seed=1)
    queries = Embeddings.open(write(tmp_path / "q", vectors, benchmark.queries.table, skip={2}))
    fewer = draw_local(QUERIES, 16, most=9, seed=5)
    features = Embeddings.open(write(tmp_path / "f", fewer, benchmark.queries.table, skip={0}))
    found = features_of(queries, features)
    nothing = fewer.take(np.zeros(0, np.int64))
    assert isinstance(nothing, Local)
    assert found.counts.tolist() == [0, *fewer.counts[[1, 3, 4, 5]].tolist()]
    np.testing.assert_array_equal(found.data, concatenate([fewer.take(np.array([1, 3, 4, 5]))]).data)
    assert local_queries.rows == QUERIES


def test_the_text_is_laid_out_as_the_authors_code_does():
    metrics = [
        {"name": "map/medium", "value": 0.82094},
        {"name": "map/easy", "value": 0.9185},
        {"name": "mp@1/medium", "value": 1.0},
        {"name": "mp@10/medium", "value": 0.8936},
        {"name": "mr@1/medium", "value": 0.1},
        {"name": "mr@10/medium", "value": 0.4062},
    ]
    assert as_text(metrics) == (
        "easy\n  mAP=91.85\n  mP@k[] []\n  mR@k[] []\n"
        "medium\n  mAP=82.09\n  mP@k[1 10] [100.00 89.36]\n  mR@k[1 10] [10.00 40.62]\n"
    )
