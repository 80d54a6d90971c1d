"""Approximate searches and shortlists of an index that changes."""

import shutil

import numpy as np
import pytest
from search_parts import assert_same, draw_images, draw_local, draw_vectors, files_in, images_of, write
from soak_parts import survives_kills

from ray_retrieval.descriptors import Vectors, concatenate
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search import NO_ROW, Index, add, build, compact, remove, rerank, structures
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.votes import LocalSearchConfig


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """Embeddings of 600 vectors, of 40, and of 100 more, and an approximate index of the first."""
    folder = tmp_path_factory.mktemp("clustered")
    generator = np.random.default_rng(0)
    drawn = draw_vectors(30, 8).data[generator.integers(0, 30, 740)]
    drawn = drawn + generator.normal(0, 0.1, drawn.shape).astype(np.float32)
    vectors = Vectors(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    for name, start, stop in (("first", 0, 600), ("few", 600, 640), ("many", 640, 740)):
        write(
            folder / name, vectors.take(np.arange(start, stop)), images_of(stop - start, start), part_rows=300
        )
    config = ApproximateConfig(search="IVF8,PQ4x4fs", nprobe=2, recall_queries=50)
    build(folder / "first", folder / "index", shards=2, approximate=config)
    return folder, vectors


def test_few_added_rows_are_searched_exactly_and_many_are_filled_in(clustered, tmp_path):
    made, vectors = clustered
    index = shutil.copytree(made / "index", tmp_path / "index")
    manifest = add(index, made / "few").manifest
    assert [file is None for file in manifest.approximate.files] == [False, False, True]
    found = Index.open(index).search(vectors.take(np.arange(600, 640)), 1)
    assert found.rows[:, 0].tolist() == list(range(600, 640))
    assert Index.open(index).verify()
    manifest = add(index, made / "many").manifest
    assert None not in manifest.approximate.files
    assert len(list(index.glob("approximate/*/*.faiss"))) == 4 + 1  # and what they are filled from
    gone = [f"image-{row:04d}" for row in range(0, 300)]
    remove(index, gone)
    opened = Index.open(index)
    hits = opened.search(vectors.take(np.arange(0, 740, 20)), 10)
    assert (hits.rows >= 300).all()
    exact = opened.search(vectors.take(np.arange(0, 740, 20)), 10, exact=True)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact.rows, hits.rows, strict=True)]) > 0.8
    change = compact(index)
    assert len(change.manifest.shards) == 2
    assert change.manifest.approximate.key == manifest.approximate.key
    assert change.manifest.approximate.recall.value > 0.8
    assert Index.open(index, check="content").verify()
    hits = Index.open(index).search(vectors.take(np.arange(300, 740, 20)), 1)
    assert hits.rows[:, 0].tolist() == list(range(0, 440, 20))


def test_killed_while_files_beside_the_shards_are_written(clustered, tmp_path):
    made, vectors = clustered
    start = shutil.copytree(made / "index", tmp_path / "start")
    add(start, made / "few")
    whole = shutil.copytree(start, tmp_path / "whole")
    assert None not in add(whole, made / "many").manifest.approximate.files
    asked = vectors.take(np.arange(0, 740, 50))
    survives_kills(start, lambda index: add(index, made / "many"), files_in(whole), asked, keep=9)


def test_one_row_may_be_left_of_an_approximate_index(clustered, tmp_path):
    made, vectors = clustered
    index = shutil.copytree(made / "index", tmp_path / "index")
    remove(index, where="id != image-0007")
    assert compact(index).manifest.rows == 1
    assert Index.open(index).search(vectors.take(np.array([7])), 3).rows.tolist() == [[0, NO_ROW, NO_ROW]]


def test_a_build_does_not_take_over_the_recall_of_other_rows(clustered, tmp_path):
    made, _ = clustered
    index = shutil.copytree(made / "index", tmp_path / "index")
    config = ApproximateConfig(search="IVF8,PQ4x4fs", nprobe=2, recall_queries=50)
    first = Index.open(index).manifest.approximate
    remove(index, [f"image-{row:04d}" for row in range(500)])
    compacted = compact(index).manifest.approximate
    assert (compacted.key, compacted.recall.queries) == (first.key, first.recall.queries)
    assert compacted.recall.value != first.recall.value
    assert build(made / "first", index, shards=2, approximate=config).approximate == first


def test_compacting_fills_in_what_was_left_out(clustered, tmp_path):
    made, _ = clustered
    index = shutil.copytree(made / "index", tmp_path / "index")
    add(index, made / "few")
    tried = compact(index, keep=1, dry_run=True)
    change = compact(index, keep=1)
    assert (tried.changed, tried.pruned) == (True, change.pruned)
    assert None not in change.manifest.approximate.files


def test_where_a_filter_leaves_few_an_approximate_search_finds_them_all(clustered, tmp_path, monkeypatch):
    made, vectors = clustered
    opened, queries = Index.open(made / "index"), vectors.take(np.arange(20))
    for few in (0, 10**6):
        monkeypatch.setattr("ray_retrieval.search.structure_search.FEW", few)
        found = opened.search(queries, 90, where="label = 3")
        assert (found.rows % 7 == 3).all(where=found.rows != NO_ROW)
        assert ((found.rows != NO_ROW).sum(axis=1) == 86).all()
        if few:
            assert_same(found, opened.search(queries, 90, where="label = 3", exact=True))


CONFIGS = {
    "exact": LocalSearchConfig(neighbours=20),
    "votes": LocalSearchConfig(shortlist="votes", factory="IVF4,Flat", nprobe=4, neighbours=20),
    "asmk": LocalSearchConfig(shortlist="asmk", words=8),
    "global": LocalSearchConfig(shortlist="global"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("few", [0, 20_000])
def test_shortlists_are_those_of_what_is_left(tmp_path, monkeypatch, kind, few):
    monkeypatch.setattr("ray_retrieval.search.neighbours._FEW", few)
    monkeypatch.setattr("ray_retrieval.search.neighbours._BYTES_AT_ONCE", 1 << 13)
    sets, asked = draw_local(70, 8, vectors=5), draw_local(6, 8, vectors=5, seed=7)
    for name, start, stop in (("first", 0, 50), ("more", 50, 70)):
        write(tmp_path / name, sets.take(np.arange(start, stop)), images_of(stop - start, start))
    index = tmp_path / "index"
    build(tmp_path / "first", index, shards=2, local=CONFIGS[kind])
    local = add(index, tmp_path / "more").manifest.local
    assert len(local.files) == (3 if kind in ("votes", "asmk") else 0)
    gone = np.array([0, 3, 10, 11, 12, 44, 55, 69])
    remove(index, [f"image-{row:04d}" for row in gone])
    left = np.setdiff1d(np.arange(70), gone)
    opened = Index.open(index, check="content", threads=2)
    assert opened.verify()
    found = opened.search(asked, 62)
    filtered = opened.search(asked, 62, where="label in (1, 2, 5)")
    assert (filtered.rows != NO_ROW).any()
    assert np.isin(filtered.rows[filtered.rows != NO_ROW] % 7, (1, 2, 5)).all()
    compact(index)
    after = Index.open(index)
    assert after.verify()
    expected = after.search(asked, 62)
    np.testing.assert_array_equal(found.rows, np.where(expected.rows == NO_ROW, NO_ROW, left[expected.rows]))
    np.testing.assert_allclose(found.distances, expected.distances, atol=1e-6)
    # The same filter as a database of its own, with the same structure.
    remove(index, where="label not in (1, 2, 5)")
    compact(index)
    alone = Index.open(index).search(asked, 62)
    some = left[np.isin(left % 7, (1, 2, 5))]
    np.testing.assert_array_equal(
        filtered.rows, np.where(alone.rows == NO_ROW, NO_ROW, some[alone.rows][:, :62])
    )
    np.testing.assert_allclose(filtered.distances, alone.distances, atol=1e-6)


@pytest.mark.parametrize("kind", ["votes", "asmk"])
def test_killed_while_a_shortlist_grows(tmp_path, kind):
    sets, asked = draw_local(40, 8), draw_local(3, 8, seed=7)
    for name, start, stop in (("first", 0, 30), ("more", 30, 40)):
        write(tmp_path / name, sets.take(np.arange(start, stop)), images_of(stop - start, start))
    start = tmp_path / "start"
    build(tmp_path / "first", start, local=CONFIGS[kind])
    whole = shutil.copytree(start, tmp_path / "whole")
    assert len(add(whole, tmp_path / "more").manifest.local.files) == 2
    survives_kills(start, lambda index: add(index, tmp_path / "more"), files_in(whole), asked, keep=9)


def test_re_ranking_after_removals(tmp_path):
    """Verification reads what it is asked for; what looks at all rows wants none missing."""
    sets, vectors = draw_local(20, 8), draw_vectors(20, 4)
    for name, descriptors in (("local", sets), ("vectors", vectors)):
        build(write(tmp_path / f"{name}-embeddings", descriptors, draw_images(20)), tmp_path / name)
        remove(tmp_path / name, [f"image-{row:04d}" for row in (0, 1, 5)])
    index = Index.open(tmp_path / "local")
    step = rerank.build(rerank.GeometricVerificationConfig(), index)
    hits = index.search(sets.take(np.array([18, 19])), 17)
    found = rerank.rerank([step], sets.take(np.array([18, 19])), hits)
    assert set(found.rows.ravel().tolist()) == set(hits.rows.ravel().tolist())
    assert found.rows[:, 0].tolist() == [18, 19]
    index = Index.open(tmp_path / "vectors")
    for config in (rerank.QueryExpansionConfig(), rerank.KReciprocalConfig()):
        with pytest.raises(ArtefactError, match="rows without gaps, and 3 of the index were removed"):
            rerank.build(config, index)


def test_small_limits_decide_what_is_filled_in(clustered, tmp_path, monkeypatch):
    made, _ = clustered
    index = shutil.copytree(made / "index", tmp_path / "index")
    monkeypatch.setattr(structures, "LEFT_OUT_ROWS", 39)
    assert None not in add(index, made / "few").manifest.approximate.files
    assert concatenate([Index.open(index).descriptors([639])]).data.shape == (1, 8)
