"""Indices of codes in cells, and recall that is to be reached, of codes and of vectors."""

import shutil

import numpy as np
import pytest
from bare_parts import Bare, build_bare
from search_parts import (
    KilledError,
    assert_same,
    draw_codes,
    draw_images,
    draw_vectors,
    files_in,
    images_of,
    killed_at_write,
    write,
)

from ray_retrieval.descriptors import Codes
from ray_retrieval.errors import ArtefactError, RecipeError
from ray_retrieval.finder import Finder
from ray_retrieval.search import (
    NO_ROW,
    Index,
    add,
    build,
    choosing,
    compact,
    prune,
    remove,
    structure_search,
    structures,
)
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.hits import merge

BITS = 20
CELLS = ApproximateConfig(search="BIVF16", nprobe=2, recall_queries=100)


def clustered_codes(count, seed=0):
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).random((30, BITS)) < 0.5
    drawn = centres[generator.integers(0, 30, count)] ^ (generator.random((count, BITS)) < 0.1)
    return Codes(np.packbits(drawn, axis=1), BITS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Embeddings of 900 codes, of 40 and 200 more, and an index of the first in cells."""
    folder, codes = tmp_path_factory.mktemp("codes"), clustered_codes(1140)
    for name, start, stop in (("first", 0, 900), ("few", 900, 940), ("many", 940, 1140)):
        some = codes.take(np.arange(start, stop))
        write(folder / name, some, images_of(stop - start, start), part_rows=300)
    build(folder / "first", folder / "index", shards=2, approximate=CELLS)
    return folder, codes


def test_any_shards_and_threads_find_the_same(made, tmp_path):
    folder, _ = made
    queries, found = clustered_codes(60, seed=1), []
    for shards in (1, 3):
        build(folder / "first", tmp_path / f"{shards}", shards=shards, approximate=CELLS, threads=2)
        index = Index.open(tmp_path / f"{shards}", threads=shards)
        found.append(index.search(queries, 12))
        groups = [Index.open(tmp_path / f"{shards}", shards=[n]).search(queries, 12) for n in range(shards)]
        assert_same(merge(groups, 12), found[-1])
        assert index.verify()
    assert_same(*found)
    info = index.info()
    assert (info["search"], info["factory"], info["nprobe"]) == ("approximate", "BIVF16", 2)
    assert 0.5 < info["recall@10"] < 1
    exact = index.search(queries, 12, exact=True)
    assert not np.array_equal(exact.distances, found[0].distances)
    assert_same(index.search(queries, 12, effort=Effort(nprobe=16)), exact)


def test_codes_are_added_removed_filtered_and_compacted(made, tmp_path, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(structure_search, "FEW", 0)
    monkeypatch.setattr(structure_search, "FEW_SHARE", 0)
    index = shutil.copytree(folder / "index", tmp_path / "index")
    assert [file is None for file in add(index, folder / "few").manifest.approximate.files] == [
        False,
        False,
        True,
    ]
    manifest = add(index, folder / "many").manifest
    assert None not in manifest.approximate.files
    gone = np.arange(0, 1140, 3)
    remove(index, [f"image-{row:04d}" for row in gone])
    opened, queries = Index.open(index, check="content"), clustered_codes(30, seed=2)
    assert opened.verify()
    found = opened.search(queries, 10)
    assert not np.isin(found.rows, gone).any()
    everything = Effort(nprobe=16)
    assert_same(opened.search(queries, 10, effort=everything), opened.search(queries, 10, exact=True))
    for where in ("label = 3", "label != 3", "id < image-0020"):
        passing = opened.living(where)
        hits = opened.search(queries, 50, where=where)
        assert np.isin(hits.rows, [*passing, NO_ROW]).all()
        assert ((hits.rows != NO_ROW).sum(axis=1) == min(50, len(passing))).all()
        exact = opened.search(queries, 50, where=where, exact=True)
        assert_same(opened.search(queries, 50, where=where, effort=everything), exact)
    change = compact(index)
    assert change.manifest.approximate.key == manifest.approximate.key
    after, left = Index.open(index, check="content"), np.setdiff1d(np.arange(1140), gone)
    again = after.search(queries, 10)
    np.testing.assert_array_equal(left[again.rows], found.rows)
    assert after.verify()


def test_a_removed_row_far_away_changes_no_answer(made, tmp_path, monkeypatch):
    """Also where a query finds fewer than k: one cell of 16 holds no 300 of 900 rows."""
    folder, _ = made
    monkeypatch.setattr(structure_search, "FEW", 0)
    index = shutil.copytree(folder / "index", tmp_path / "index")
    queries, effort = clustered_codes(3, seed=2), Effort(nprobe=1)
    before = Index.open(index).search(queries, 300, effort=effort)
    assert (before.rows == NO_ROW).any()
    (unseen,) = np.flatnonzero(~np.isin(np.arange(900), before.rows))[:1]
    remove(index, [f"image-{unseen:04d}"])
    assert_same(Index.open(index).search(queries, 300, effort=effort), before)


@pytest.mark.parametrize("factory", ["BIVF64", "BIVF2"])
def test_where_all_that_is_near_was_removed_it_looks_further(tmp_path, monkeypatch, factory):
    monkeypatch.setattr(structure_search, "FEW", 0)
    codes = draw_codes(2000, BITS)
    build_bare(Bare(codes), tmp_path, approximate=ApproximateConfig(search=factory, recall_queries=9))
    query, effort = codes.take(np.array([5])), Effort(nprobe=1)
    near = Index.open(tmp_path).search(query, 2000, effort=effort).rows[0]
    near = near[near != NO_ROW]
    remove(tmp_path, [str(row) for row in near[: len(near) - 3]])
    opened = Index.open(tmp_path)
    found = opened.search(query, 20, effort=effort)
    assert (found.rows != NO_ROW).all()
    assert not np.isin(found.rows, near[: len(near) - 3]).any()
    exact = opened.search(query, 20, exact=True)
    if factory == "BIVF2":
        assert_same(found, exact)
    assert (found.distances >= exact.distances).all()


@pytest.mark.parametrize("few", [0, 10**6])
def test_filters_have_as_many_hits_as_rows_pass(made, monkeypatch, few):
    folder, _ = made
    opened, queries = Index.open(folder / "index"), clustered_codes(20, seed=2)
    monkeypatch.setattr(structure_search, "FEW", few)
    monkeypatch.setattr(structure_search, "FEW_SHARE", 0)
    found = opened.search(queries, 200, where="label = 3")
    assert ((found.rows != NO_ROW).sum(axis=1) == len(opened.living("label = 3"))).all()
    assert_same(found, opened.search(queries, 200, where="label = 3", exact=True))


@pytest.mark.parametrize("before_rename", [True, False])
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, before_rename):
    folder, _ = made
    expected = files_in(folder / "index")
    for number in range(1, len(expected) + 1):
        index = tmp_path / f"killed-{number}"
        with killed_at_write(monkeypatch, number, before_rename=before_rename), pytest.raises(KilledError):
            build(folder / "first", index, shards=2, approximate=CELLS)
        build(folder / "first", index, shards=2, approximate=CELLS)
        assert files_in(index) == expected


def test_auto_for_codes_measures_how_many_cells(made, tmp_path, monkeypatch):
    folder, _ = made
    auto = ApproximateConfig(search="auto", recall_queries=100, train_rows=700)
    manifest = build(folder / "first", tmp_path / "exact", approximate=auto)
    assert (manifest.search, manifest.approximate) == ("exact", None)
    assert manifest.why == "900 rows are searched exactly, as all databases up to 100,000,000 are"
    monkeypatch.setattr(choosing, "EXACT_CODES", 100)
    monkeypatch.setattr(structures, "WORTH", 0)
    built = build(folder / "first", tmp_path / "cells", approximate=auto)
    assert built.approximate.factory == "BIVF16"
    assert built.approximate.target == choosing.RECALL_TARGET
    assert built.approximate.recall.value >= choosing.RECALL_TARGET
    less = auto.model_copy(update={"recall_target": 0.6})
    lighter = build(folder / "first", tmp_path / "cells", approximate=less)
    assert lighter.approximate.effort.nprobe < built.approximate.effort.nprobe
    assert lighter.approximate.files == built.approximate.files
    assert 0.6 <= lighter.approximate.recall.value < built.approximate.recall.value
    assert build(folder / "first", tmp_path / "cells", approximate=less) == lighter


def test_auto_compares_all_where_cells_spare_little(tmp_path, monkeypatch):
    """Codes without structure have their nearest ones in all cells; many alike in one."""
    monkeypatch.setattr(choosing, "EXACT_CODES", 100)
    auto = ApproximateConfig(search="auto", recall_queries=100, train_rows=700)
    spread = build_bare(Bare(draw_codes(2000, 64)), tmp_path / "spread", approximate=auto)
    assert (spread.search, spread.approximate) == ("exact", None)
    assert spread.why.startswith("2,000 rows are searched exactly: to find ")
    alike = build_bare(Bare(draw_codes(2000, 64, distinct=12)), tmp_path / "alike", approximate=auto)
    assert alike.search == "approximate"


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Embeddings of 1,200 vectors without clusters: hard to find."""
    folder = tmp_path_factory.mktemp("spread")
    vectors = draw_vectors(1200, 16)
    return write(folder / "embeddings", vectors, draw_images(1200), part_rows=400), vectors


def test_a_build_below_its_recall_fails_with_a_hint_and_publishes_nothing(spread, tmp_path):
    embeddings, _ = spread
    config = ApproximateConfig(search="IVF16,Flat", nprobe=1, recall_target=0.9, recall_queries=100)
    with pytest.raises(RecipeError, match=r"finds 0\.\d{4} of the 10 nearest, 0\.9 is asked for") as caught:
        build(embeddings, tmp_path, approximate=config)
    assert not (tmp_path / "CURRENT").exists()
    option, _, reached = caught.value.mend.partition(" finds ")
    name, value = option.split("=")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("approximate/*/*")}
    done = build(embeddings, tmp_path, approximate=config.model_copy(update={name: int(value)}))
    assert reached.startswith(
        f"{done.approximate.recall.value:.4f}; what is written stays for the next build"
    )
    assert done.approximate.recall.value >= 0.9
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("approximate/*/*")} == times
    info = Index.open(tmp_path).info()
    assert (info["recall_target"], info["nprobe"]) == (0.9, int(value))
    before = files_in(tmp_path)
    with pytest.raises(RecipeError, match="asked for"):
        build(embeddings, tmp_path, approximate=config)
    assert files_in(tmp_path) == before  # the version before stays


@pytest.mark.parametrize("name", ["ef_search", "k_factor"])
def test_cells_of_codes_have_no_use_for_what_is_not_of_cells(tmp_path, monkeypatch, name):
    config = ApproximateConfig.model_validate({"search": "BIVF4", "recall_queries": 5})
    wrong = config.model_copy(update={name: 3})
    with pytest.raises(RecipeError, match=rf"{name}: search 'BIVF4' has no use .* what counts is nprobe"):
        build_bare(Bare(clustered_codes(40)), tmp_path, approximate=wrong)
    build_bare(Bare(clustered_codes(40)), tmp_path, approximate=config)
    with pytest.raises(RecipeError, match=f"{name}: search 'BIVF4' has no use"):
        Finder(str(tmp_path), effort=Effort.model_validate({name: 3}))
    assert Finder(str(tmp_path), effort=Effort(nprobe=3)).find(clustered_codes(1), 2)
    monkeypatch.setattr("ray_retrieval.search.index.GpuSearch", lambda *_: None)
    with pytest.raises(RecipeError, match="a search on a GPU compares all rows"):
        Finder(str(tmp_path), effort=Effort(nprobe=3), gpu=True)


def test_what_a_failed_first_build_wrote_is_pruned(spread, tmp_path):
    embeddings, _ = spread
    config = ApproximateConfig(search="IVF16,Flat", nprobe=1, recall_target=0.9, recall_queries=100)
    with pytest.raises(RecipeError, match=f"or until `ray-retrieval index prune {tmp_path}`"):
        build(embeddings, tmp_path, approximate=config)
    (tmp_path / "shards" / "mine").mkdir()
    (tmp_path / "shards" / "mine" / "notes.txt").write_text("not of an index")
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    tried = prune(tmp_path, dry_run=True)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} >= left
    assert prune(tmp_path) == tried
    assert (tried.versions, tried.kept, tried.spared) == ([], [], 0)
    assert tried.files >= 5
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix] == ["notes.txt"]
    with pytest.raises(ArtefactError):
        prune(tmp_path)
    build(embeddings, tmp_path)
    (tmp_path / "CURRENT").unlink()  # an index that lost it is not litter
    with pytest.raises(ArtefactError):
        prune(tmp_path)


def test_auto_for_vectors_takes_the_least_effort_that_is_enough(spread, tmp_path, monkeypatch):
    embeddings, _ = spread
    monkeypatch.setattr(choosing, "EXACT_VECTORS", 100)
    monkeypatch.setattr(structures, "WORTH", 0)
    found = {}
    for target in (0.5, 0.99):
        auto = ApproximateConfig(search="auto", recall_target=target, recall_queries=100)
        found[target] = build(embeddings, tmp_path / str(target), shards=2, approximate=auto).approximate
        assert found[target].recall.value >= target
        assert Index.open(tmp_path / str(target)).info()["recall_target"] == target
    assert found[0.5].recall.value < found[0.99].recall.value
    efforts = [found[target].effort for target in (0.5, 0.99)]
    assert efforts[0].nprobe * efforts[0].k_factor < efforts[1].nprobe * efforts[1].k_factor
    config = ApproximateConfig(search="auto", nprobe=1, k_factor=1, recall_queries=100)
    with pytest.raises(RecipeError, match="even nprobe=1, ef_search=64, k_factor=1 finds"):
        build(embeddings, tmp_path / "poor", approximate=config)


def test_where_rows_are_written_anew_it_looks_as_hard_as_it_has_to(spread, tmp_path):
    embeddings, _ = spread
    config = ApproximateConfig(search="IVF16,Flat", nprobe=8, recall_target=0.8, recall_queries=100)
    built = build(embeddings, tmp_path, approximate=config).approximate
    index = Index.open(tmp_path)
    shards = list(index.shards.values())
    assert structures.measured(index.folder, built, shards, 1).effort == built.effort
    poor = built.model_copy(update={"effort": Effort(nprobe=1)})
    raised = structures.measured(index.folder, poor, shards, 1)
    assert raised.effort.nprobe > 1
    assert raised.recall.value >= 0.8
    untold = poor.model_copy(update={"target": None})
    assert structures.measured(index.folder, untold, shards, 1).effort.nprobe == 1


def test_rows_that_are_filled_in_are_measured(tmp_path):
    """Added rows are of another kind than those that it was trained on: near ones lie in many cells."""
    first, others = clustered_codes(600), draw_codes(2000, BITS)
    index = tmp_path / "index"
    config = ApproximateConfig(search="BIVF16", nprobe=1, recall_queries=100)
    reached = build_bare(Bare(first), index, approximate=config).approximate.recall.value
    config = config.model_copy(update={"recall_target": reached})
    built = build_bare(Bare(first), index, approximate=config).approximate
    assert (built.recall.rows, built.missed) == (600, None)
    change = add(index, Bare(others))
    grown = change.manifest.approximate
    assert grown.recall.rows == 2600
    assert grown.recall.value >= reached > 0.5
    assert grown.effort.nprobe > 1  # it looks harder, as it has to
    assert not compact(index).changed


def test_where_nothing_reaches_the_target_any_more_it_is_said(tmp_path, monkeypatch):
    config = ApproximateConfig(search="BIVF16", nprobe=16, recall_target=0.99, recall_queries=100)
    index = tmp_path / "index"
    build_bare(Bare(clustered_codes(600)), index, approximate=config)
    monkeypatch.setattr(structures, "recall", lambda exact, found: 0.5)
    change = add(index, Bare(clustered_codes(500, seed=3)))
    assert change.missed.startswith("it finds 0.5000 of the 10 nearest, 0.99 is asked for: ")
    assert Index.open(index).info()["recall_missed"] == change.missed
    monkeypatch.undo()
    assert compact(index, shards=1).missed is None
    measured = Index.open(index).manifest.approximate.recall
    assert (measured.rows, measured.value) == (1100, 1)
    assert not compact(index).changed


def test_a_database_of_one_row_can_be_searched_in_cells(tmp_path):
    config = ApproximateConfig(search="BIVF1", recall_target=0.9)
    built = build_bare(Bare(clustered_codes(1)), tmp_path, approximate=config).approximate
    assert built.recall.value == 1
    assert Index.open(tmp_path).search(clustered_codes(1), 2).rows.tolist() == [[0, NO_ROW]]
