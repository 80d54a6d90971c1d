"""An index of vectors: exact, the same for any shards, and refused where it is damaged."""

import itertools
import json

import numpy as np
import pytest
from search_parts import (
    DAMAGES,
    KilledError,
    draw_codes,
    draw_images,
    draw_vectors,
    files_in,
    killed_at_write,
    write,
)

from ray_retrieval.descriptors import DescriptorKind, Form, Vectors
from ray_retrieval.errors import ArtefactError, QueryError, RecipeError
from ray_retrieval.finder import Finder
from ray_retrieval.search import NO_ROW, Hits, Index, build, choosing, merge
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.rerank import (
    DatabaseAugmentationConfig,
    DiffusionConfig,
    KReciprocalConfig,
    QueryExpansionConfig,
    SuperGlobalConfig,
)
from ray_retrieval.search.structures import _recall_queries, _sample

ROWS, DIMENSION = 100, 7


@pytest.fixture(scope="module")
def vectors():
    return draw_vectors(ROWS, DIMENSION, distinct=60)  # with equal ones: ties


@pytest.fixture(scope="module")
def made(tmp_path_factory, vectors):
    folder = tmp_path_factory.mktemp("vectors")
    embeddings = write(folder / "embeddings", vectors, draw_images(ROWS))
    for shards in (1, 5):
        build(embeddings, folder / f"index-{shards}", shards=shards)
    return folder


def brute_force(database, queries, k):
    """Distances summed in float64 and rounded; ties by row."""
    differences = queries.data[:, None].astype(np.float64) - database.data[None]
    distances = (differences**2).sum(axis=2).astype(np.float32)
    rows = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, rows, axis=1), rows


@pytest.mark.parametrize("k", [1, 10, ROWS])
def test_shards_find_bit_for_bit_what_brute_force_finds(made, vectors, k):
    queries = Vectors(np.concatenate([draw_vectors(20, DIMENSION, seed=1).data, vectors.data[:5]]))
    distances, rows = brute_force(vectors, queries, k)
    for shards in (1, 5):
        found = Index.open(made / f"index-{shards}", threads=2).search(queries, k)
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_allclose(found.distances, distances, rtol=1e-6, atol=1e-12)
    assert found.distances.dtype == np.float32
    assert not found.distances[20:, 0].any()  # of a vector to itself: exactly 0


@pytest.mark.parametrize(("length", "said"), [(3, "3"), (0, "0"), (0.99, "0.99"), (np.nan, "finite")])
@pytest.mark.parametrize("where", [None, "label = 1"])
def test_vectors_that_are_not_of_length_1_are_no_queries(made, vectors, length, said, where):
    queries = Vectors(vectors.data[:3] * np.float32([[1], [length], [1]]))
    with pytest.raises(QueryError, match=rf"^query 1 .*\b{said}\b"):
        Index.open(made / "index-1").search(queries, 5, where=where)


def test_vectors_that_were_rounded_to_16_bits_are_queries(made):
    index, drawn = Index.open(made / "index-1"), draw_vectors(500, DIMENSION, seed=2).data
    drawn[0] = 1 / np.sqrt(DIMENSION)  # all numbers are rounded the same way
    bfloat16 = ((drawn.view(np.uint32) + np.uint32(1 << 15)) >> 16 << 16).view(np.float32)
    for rounded in (drawn.astype(np.float16).astype(np.float32), bfloat16):
        found = index.search(Vectors(rounded), 1).distances
        np.testing.assert_allclose(found, index.search(Vectors(drawn), 1).distances, atol=1e-2)


def test_vectors_that_are_not_of_length_1_are_no_rows(tmp_path, vectors):
    data = vectors.data.copy()
    data[57] *= 2
    embeddings = write(tmp_path / "embeddings", Vectors(data), draw_images(ROWS))
    with pytest.raises(ArtefactError, match=r"are of length 1, one of these is of length 2 .*divide"):
        build(embeddings, tmp_path / "index")


def test_more_hits_than_rows_are_filled_up(made):
    found = Index.open(made / "index-5").search(draw_vectors(3, DIMENSION), ROWS + 2)
    assert (found.rows[:, -2:] == NO_ROW).all()
    assert np.isinf(found.distances[:, -2:]).all()


def test_merged_groups_of_shards_equal_the_index(made):
    queries = draw_vectors(9, DIMENSION, seed=4)
    whole = Index.open(made / "index-5").search(queries, 13)
    groups = [
        Index.open(made / "index-5", shards=group).search(queries, 13) for group in ([3], [0, 4], [2, 1])
    ]
    for order in itertools.permutations(groups):
        merged = merge(order, 13)
        np.testing.assert_array_equal(merged.rows, whole.rows)
        np.testing.assert_array_equal(merged.distances, whole.distances)


def test_merging_with_nothing_found():
    nothing = Hits(np.full((1, 2), np.inf, np.float32), np.full((1, 2), NO_ROW))
    some = Hits(np.array([[0.5, np.inf]], np.float32), np.array([[7, NO_ROW]]))
    merged = merge([nothing, some], 3)
    assert merged.rows.tolist() == [[7, NO_ROW, NO_ROW]]
    assert merged.distances.tolist() == [[0.5, np.inf, np.inf]]


def test_what_it_says_of_itself_and_verifies(made, vectors):
    index = Index.open(made / "index-5")
    info = index.info()
    assert json.loads(json.dumps(info)) == info
    assert (info["kind"], info["dimension"], info["rows"]) == ("vectors", DIMENSION, ROWS)
    assert "bits" not in info
    assert index.form == Form(DescriptorKind.VECTORS, DIMENSION)
    assert len(index.verify()) == 2 + 5 + 1
    rows = np.array([99, 0, 41, 0])
    np.testing.assert_array_equal(index.descriptors(rows).data, vectors.data[rows])
    np.testing.assert_array_equal(index.descriptors().data, vectors.data)
    with pytest.raises(QueryError, match="no row 100"):
        index.descriptors([100])


def test_vectors_lie_behind_a_header_as_numpy_reads_them(made, vectors):
    data = next((made / "index-1" / "shards").rglob("vectors.bin")).read_bytes()
    assert data[:8] == b"RRVECTS2"
    np.testing.assert_array_equal(
        np.frombuffer(data, "<f4", offset=64).reshape(ROWS, DIMENSION), vectors.data
    )


def test_queries_of_another_form_are_refused(made):
    index = Index.open(made / "index-1")
    with pytest.raises(ArtefactError, match="vectors of 7 dimensions, the queries are vectors of 8"):
        index.search(draw_vectors(1, 8), 3)
    with pytest.raises(ArtefactError, match="the queries are 16-bit codes"):
        index.search(draw_codes(1, 16), 3)
    with pytest.raises(QueryError, match="0"):
        index.search(draw_vectors(1, DIMENSION), 0)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(tmp_path, vectors, damage):
    build(write(tmp_path / "embeddings", vectors, draw_images(ROWS)), tmp_path / "index", shards=2)
    DAMAGES[damage](next((tmp_path / "index" / "shards").rglob("vectors.bin")))
    with pytest.raises(ArtefactError, match=r"vectors\.bin"):
        Index.open(tmp_path / "index", check="content")


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """Embeddings of 1,200 vectors around 30 centres, as a trained model makes them."""
    generator = np.random.default_rng(0)
    drawn = draw_vectors(30, 16).data[generator.integers(0, 30, 1200)]
    drawn = drawn + generator.normal(0, 0.1, drawn.shape).astype(np.float32)
    vectors = Vectors(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    folder = tmp_path_factory.mktemp("clustered")
    return write(folder / "embeddings", vectors, draw_images(1200), part_rows=400), vectors


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,PQ8x4fs", "HNSW16", "SQ8"])
def test_an_approximate_search_has_exact_distances_and_a_measured_recall(clustered, tmp_path, factory):
    embeddings, vectors = clustered
    nprobe = 4 if factory.startswith("IVF") else 64
    config = ApproximateConfig(search=factory, nprobe=4 if nprobe == 4 else None, recall_queries=200)
    for shards in (1, 3):
        build(embeddings, tmp_path / f"{shards}", shards=shards, approximate=config, threads=2)
    index = Index.open(tmp_path / "3", threads=2)
    info = index.info()
    assert (info["search"], info["factory"], info["nprobe"]) == ("approximate", factory, nprobe)
    assert 0.8 < info["recall@10"] <= 1
    queries = Vectors(vectors.data[:50])
    found, exact = index.search(queries, 10), index.search(queries, 10, exact=True)
    np.testing.assert_array_equal(exact.rows, brute_force(vectors, queries, 10)[1])
    share = np.mean([np.isin(a, b).mean() for a, b in zip(exact.rows, found.rows, strict=True)])
    assert share > 0.8
    # What both find is at the same distance, and hits are in order.
    for query in range(50):
        known = dict(zip(exact.rows[query].tolist(), exact.distances[query].tolist(), strict=True))
        hits = list(zip(found.distances[query].tolist(), found.rows[query].tolist(), strict=True))
        assert hits == sorted(hits)
        assert all(known.get(row, distance) == distance for distance, row in hits)
    groups = [Index.open(tmp_path / "3", shards=group).search(queries, 10) for group in ([1], [0, 2])]
    np.testing.assert_array_equal(merge(groups, 10).rows, found.rows)
    harder = index.search(queries, 10, effort=Effort(nprobe=16, ef_search=400, k_factor=40))
    np.testing.assert_array_equal(harder.rows, exact.rows)
    assert len(index.verify()) == 2 + 3 + 4 + 1


@pytest.mark.parametrize("config", [QueryExpansionConfig(n=3), DatabaseAugmentationConfig(n=3)])
def test_steps_that_search_themselves_look_as_hard_as_is_asked(clustered, tmp_path, config):
    embeddings, vectors = clustered
    build(embeddings, tmp_path / "exact")
    little = ApproximateConfig(search="IVF16,Flat", nprobe=1, recall_queries=5)
    build(embeddings, tmp_path / "cells", approximate=little)
    exact = Finder(tmp_path / "exact", rerank=[config], threads=1)
    finder = Finder(tmp_path / "cells", rerank=[config], effort=Effort(nprobe=16), threads=1)
    queries = Vectors(vectors.data[:20])
    assert [answer.hits for answer in finder.find(queries, 60)] == [
        answer.hits for answer in exact.find(queries, 60)
    ]
    assert finder.index.info()["nprobe"] == 1  # what the index says of itself stays


STEPS = [
    QueryExpansionConfig(n=3),
    DatabaseAugmentationConfig(n=3),
    KReciprocalConfig(k1=8, k2=3, depth=40),
    DiffusionConfig(k=8, depth=40),
    SuperGlobalConfig(depth=40),
]


@pytest.mark.parametrize("config", STEPS, ids=[config.name for config in STEPS])
def test_few_hits_are_the_first_of_many_and_a_filter_is_refused(clustered, tmp_path, config):
    embeddings, _ = clustered
    build(embeddings, tmp_path)
    finder, queries = Finder(tmp_path, rerank=[config], threads=1), draw_vectors(20, 16, seed=5)
    few, many = finder.find(queries, 2), finder.find(queries, 60)
    assert [answer.hits for answer in few] == [answer.hits[:2] for answer in many]
    plain = Finder(tmp_path, threads=1).find(queries, 2)
    assert [[hit.row for hit in answer.hits] for answer in few] != [
        [hit.row for hit in answer.hits] for answer in plain
    ]
    with pytest.raises(QueryError, match="a filter does not go with"):
        finder.find(queries, 2, where="label = 3")


def test_building_for_another_search_keeps_the_shards(clustered, tmp_path):
    embeddings, _ = clustered
    first = build(embeddings, tmp_path, shards=2)
    config = ApproximateConfig(search="IVF8,Flat", recall_queries=50)
    second = build(embeddings, tmp_path, shards=2, approximate=config)
    assert (second.number, second.parent, second.shards) == (2, 1, first.shards)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert build(embeddings, tmp_path, shards=2, approximate=config) == second
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == times


def test_building_with_another_effort_keeps_the_files(clustered, tmp_path):
    embeddings, _ = clustered
    config = ApproximateConfig(search="IVF16,PQ8x4fs", nprobe=1, k_factor=1, recall_queries=100)
    first = build(embeddings, tmp_path, shards=2, approximate=config)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("approximate/*/*")}
    harder = config.model_copy(update={"nprobe": 16, "k_factor": 16})
    second = build(embeddings, tmp_path, shards=2, approximate=harder)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("approximate/*/*")} == times
    assert (second.number, second.approximate.files) == (2, first.approximate.files)
    assert second.approximate.effort.nprobe == 16
    assert second.approximate.recall.value > first.approximate.recall.value


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["0.faiss", "1.faiss", "1.json"])
def test_building_again_mends_a_damaged_file(clustered, tmp_path, name, damage):
    embeddings, vectors = clustered
    config = ApproximateConfig(search="IVF8,SQ8", recall_queries=50)
    first = build(embeddings, tmp_path, shards=2, approximate=config)
    before = files_in(tmp_path)
    DAMAGES[damage](next(tmp_path.glob(f"approximate/*/{name}")))
    if name.endswith(".faiss"):
        with pytest.raises(ArtefactError, match=name):
            Index.open(tmp_path, check="content")
    assert build(embeddings, tmp_path, shards=2, approximate=config) == first
    assert files_in(tmp_path) == before
    index = Index.open(tmp_path, check="content")
    index.verify()
    assert index.search(Vectors(vectors.data[:3]), 1).rows[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("before_rename", [True, False])
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(clustered, tmp_path, monkeypatch, before_rename):
    embeddings, _ = clustered
    config = ApproximateConfig(search="IVF8,SQ8", recall_queries=50)
    build(embeddings, tmp_path / "whole", shards=2, approximate=config)
    expected = files_in(tmp_path / "whole")
    for number in range(1, len(expected) + 1):
        index = tmp_path / f"killed-{number}"
        with killed_at_write(monkeypatch, number, before_rename=before_rename), pytest.raises(KilledError):
            build(embeddings, index, shards=2, approximate=config)
        build(embeddings, index, shards=2, approximate=config)
        assert files_in(index) == expected


def test_recall_is_asked_with_rows_that_were_not_trained_on():
    sample = _sample(1000, 600)
    queries = _recall_queries(1000, sample, 300)
    assert len(set(queries.tolist())) == 300
    assert (np.diff(queries) > 0).all()
    assert not np.isin(queries, sample).any()
    assert set(_recall_queries(1000, sample, 400).tolist()) == set(range(1000)) - set(sample.tolist())
    # Where all rows were trained on, some of them have to do.
    assert len(_recall_queries(1000, _sample(1000, 2000), 300)) == 300


def test_few_rows_are_searched_exactly_by_auto(clustered, tmp_path):
    embeddings, _ = clustered
    manifest = build(embeddings, tmp_path, approximate=ApproximateConfig(search="auto"))
    assert (manifest.search, manifest.approximate) == ("exact", None)
    assert manifest.why == "1,200 rows are searched exactly, as all databases up to 200,000 are"
    assert Index.open(tmp_path).info()["why"] == manifest.why


def test_what_cannot_be_searched_so_is_refused_before_anything_is_written(clustered, tmp_path, monkeypatch):
    embeddings, _ = clustered
    codes = write(tmp_path / "codes", draw_codes(50, 16), draw_images(50))
    for source, search, why in (
        (embeddings, "IVFx", "IVFx"),
        (embeddings, "BIVF16", "could not parse index string BIVF16"),
        (embeddings, "IVF4000,Flat", "4,000 cells, and there are 1,200 rows"),
        (embeddings, "IDMap,Flat", "leave out what maps their ids"),
        (codes, "IVF8,Flat", "'IVF8,Flat' is no search of codes"),
        (codes, "BIVF64", "64 cells, and there are 50 rows"),
    ):
        with pytest.raises(RecipeError, match=why):
            build(source, tmp_path / "index", approximate=ApproximateConfig(search=search))
    monkeypatch.setattr(choosing, "EXACT_VECTORS", 100)
    with pytest.raises(RecipeError, match="takes at least"):
        build(embeddings, tmp_path / "index", approximate=ApproximateConfig(search="auto", memory=1000))
    assert not (tmp_path / "index").exists()
    for name in ("a", "b"):
        assert not (tmp_path / name / "CURRENT").exists()
