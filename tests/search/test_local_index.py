"""An index of local features: the same sets and shortlists however it is cut, and refused where damaged."""

import io
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import (
    DAMAGES,
    KilledError,
    assert_same,
    draw_codes,
    draw_images,
    draw_local,
    files_in,
    killed_at_write,
    write,
)

from ray_retrieval.descriptors import DescriptorKind, Form, Local, concatenate
from ray_retrieval.errors import ArtefactError, DataError, QueryError, RecipeError
from ray_retrieval.finder import Finder
from ray_retrieval.search import NO_ROW, Index, build, embeddings, merge
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.columns import descriptor_columns, descriptors_in
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.neighbours import FeatureSegment, merge_neighbours, nearest_features
from ray_retrieval.search.votes import LocalSearchConfig, cast, search_votes
from ray_retrieval.storage import digest

ROWS, DIMENSION, GLOBAL = 60, 8, 5
ARRAYS = ("offsets", "data", "locations", "scales", "scores", "sizes", "vectors")
CONFIGS = {
    "exact": LocalSearchConfig(neighbours=20),
    "votes": LocalSearchConfig(shortlist="votes", factory="IVF4,SQ8", nprobe=2, neighbours=20),
    "asmk": LocalSearchConfig(shortlist="asmk", words=8),
    "global": LocalSearchConfig(shortlist="global"),
}
FORM = Form(DescriptorKind.LOCAL, DIMENSION, GLOBAL)


@pytest.fixture(scope="module")
def local():
    return draw_local(ROWS, DIMENSION, vectors=GLOBAL)


@pytest.fixture(scope="module")
def queries():
    return draw_local(9, DIMENSION, vectors=GLOBAL, seed=7)


@pytest.fixture(scope="module")
def made(tmp_path_factory, local):
    """The same embeddings as one shard and as five, for every shortlist."""
    folder = tmp_path_factory.mktemp("local")
    source = write(folder / "embeddings", local, draw_images(ROWS), part_rows=17)
    for (kind, config), shards in itertools.product(CONFIGS.items(), (1, 5)):
        build(source, folder / f"{kind}-{shards}", shards=shards, local=config)
    return folder


def assert_equal(found, expected):
    assert Form.of(found) == Form.of(expected)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_a_shortlist_takes_only_what_it_has_a_use_for(made):
    for kind, config in CONFIGS.items():
        for name in Effort.model_fields:
            index, effort = str(made / f"{kind}-5"), Effort.model_validate({name: 3})
            if (kind, name) == ("votes", "nprobe"):
                assert Finder(index, effort=effort, rerank=[]).index.settings == {"nprobe"}
                continue
            search = config.factory or kind
            with pytest.raises(RecipeError, match=f"{name}: search '{search}' has no use for it"):
                Finder(index, effort=effort, rerank=[])


# Columns and embeddings


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 6), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9), st.lists(st.integers(0, 5))
)
def test_columns_hold_every_set_however_they_are_cut(count, dimension, vectors, most, rows):
    sets = draw_local(count, dimension, vectors=vectors, seed=most, most=max(1, most))
    columns = descriptor_columns(sets)
    table = pa.table([column for _, column in columns], schema=pa.schema([field for field, _ in columns]))
    file = io.BytesIO()
    pq.write_table(table, file)
    form = Form.of(sets)
    assert_equal(descriptors_in(pq.read_table(file), form), sets)
    rows = np.array([row for row in rows if row < count], np.int64)
    assert_equal(descriptors_in(table.take(pa.array(rows)), form), sets.take(rows))
    middle = np.arange(1, max(1, count - 1))
    assert_equal(descriptors_in(table.slice(1, len(middle)), form), sets.take(middle))
    twice = pa.concat_tables([table, table.slice(1, len(middle))])
    assert_equal(descriptors_in(twice, form), concatenate([sets, sets.take(middle)]))


def test_other_programs_read_the_columns(tmp_path, local):
    write(tmp_path, local, draw_images(ROWS), part_rows=ROWS)
    read = pq.read_table(tmp_path / "part-00000.parquet").to_pydict()
    counts = local.counts.tolist()
    assert 0 in counts
    for name in ("descriptors", "locations", "scales", "scores"):
        assert [len(one) for one in read[name]] == counts
    row = counts.index(max(counts))
    some = slice(*local.offsets[row : row + 2])
    np.testing.assert_array_equal(np.float16(read["descriptors"][row]), local.data[some])
    np.testing.assert_array_equal(np.float32(read["locations"][row]), local.locations[some])
    assert read["size"][row] == local.sizes[row].tolist()


@pytest.mark.parametrize("vectors", [0, GLOBAL])
def test_embeddings_give_the_sets_back(tmp_path, monkeypatch, vectors):
    sets = draw_local(30, DIMENSION, vectors=vectors)
    write(tmp_path, sets, draw_images(30), part_rows=7, skip={0, 8, 29})
    kept = np.setdiff1d(np.arange(30), [0, 8, 29])
    found = Embeddings.open(tmp_path)
    assert (found.form, found.rows) == (Form.of(sets), 27)
    assert_equal(found.descriptors, sets.take(kept))
    monkeypatch.setattr(embeddings, "_IN_MEMORY", found.descriptors.data.nbytes - 1)
    mapped = Embeddings.open(tmp_path).descriptors
    assert isinstance(mapped.data.base, np.memmap)
    assert_equal(mapped, sets.take(kept))


def test_only_the_columns_of_local_features_are_taken_names(tmp_path):
    images = draw_images(3, size=pa.array(["s", "m", "l"]))
    write(tmp_path / "codes", draw_codes(3, 8), images)
    with pytest.raises(DataError, match=r"column 'size'.*rename"):
        write(tmp_path / "local", draw_local(3, DIMENSION), images)


# The sets in an index


def test_sets_come_back_in_the_order_asked(made, local):
    rows = np.array([59, 0, 31, 0, 12, 13])
    for shards in (1, 5):
        index = Index.open(made / f"exact-{shards}")
        assert_equal(index.descriptors(), local)
        assert_equal(index.descriptors(rows), local.take(rows))
        assert_equal(index.descriptors([]), FORM.zeros(0))
    group = Index.open(made / "exact-5", shards=[1, 4])
    assert_equal(group.descriptors([50, 12]), local.take(np.array([50, 12])))
    with pytest.raises(QueryError, match="no row 40"):
        group.descriptors([40])
    with pytest.raises(ArtefactError, match="vectors are asked for"):
        group.vectors()


def test_files_are_arrays_as_numpy_reads_them(made, local):
    shard = next((made / "exact-1" / "shards").iterdir())
    header, offsets = (shard / "offsets.bin").read_bytes()[:64], (shard / "offsets.bin").read_bytes()[64:]
    assert header[:8] == b"RRLOCAL1"
    assert np.frombuffer(header, "<u4", 2, 8).tolist() == [DIMENSION, GLOBAL]
    assert np.frombuffer(header, "<u8", 3, 16).tolist() == [ROWS, 0, len(local.data)]
    np.testing.assert_array_equal(np.frombuffer(offsets, "<i8"), local.offsets)
    for name, kind in {"locations": "<f4", "scales": "<f4", "scores": "<f4", "sizes": "<i4"}.items():
        stored = np.fromfile(shard / f"{name}.bin", kind)
        np.testing.assert_array_equal(stored, getattr(local, name).reshape(-1))
    np.testing.assert_array_equal(np.fromfile(shard / "descriptors.bin", "<f2"), local.data.reshape(-1))
    np.testing.assert_array_equal(np.fromfile(shard / "vectors.bin", "<f4"), local.vectors.reshape(-1))


def test_without_global_vectors_there_is_no_file_of_them(tmp_path):
    sets = draw_local(6, DIMENSION)
    build(write(tmp_path / "embeddings", sets, draw_images(6)), tmp_path / "index", shards=2)
    assert not list((tmp_path / "index").rglob("vectors.bin"))
    assert_equal(Index.open(tmp_path / "index").descriptors(), sets)


def test_images_without_any_feature_are_rows_that_nothing_finds(tmp_path):
    nothing = Form(DescriptorKind.LOCAL, DIMENSION).zeros(5)
    write(tmp_path / "embeddings", nothing, draw_images(5))
    build(tmp_path / "embeddings", tmp_path / "index", shards=2)
    index = Index.open(tmp_path / "index")
    index.verify()
    assert index.info()["features"] == 0
    found = index.search(draw_local(3, DIMENSION), 2)
    assert (found.rows == NO_ROW).all()
    assert np.isinf(found.distances).all()
    with pytest.raises(RecipeError, match="no image has a local feature"):
        build(tmp_path / "embeddings", tmp_path / "other", local=CONFIGS["asmk"])


# Shortlists


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("k", [1, 7, ROWS + 2])
def test_shards_and_threads_do_not_change_a_shortlist(made, queries, kind, k):
    whole = Index.open(made / f"{kind}-1").search(queries, k)
    assert whole.distances.dtype == np.float32
    assert whole.rows.shape == (len(queries), k)
    real = whole.rows != NO_ROW
    assert real.any()
    assert ((whole.distances[real] <= 0) & (whole.distances[real] > -1)).all()
    assert (whole.distances[:, :-1] <= whole.distances[:, 1:]).all()
    assert_same(Index.open(made / f"{kind}-5", threads=2).search(queries, k), whole)


def test_exact_votes_are_those_of_the_arrays(made, local, queries):
    everything = FeatureSegment(local.offsets, local.data, 0, 0)
    expected = search_votes([everything], queries, 10, CONFIGS["exact"], images=ROWS)
    for kind in ("exact", "votes"):
        assert_same(Index.open(made / f"{kind}-5").search(queries, 10, exact=True), expected)


def test_looking_harder_finds_what_the_exact_votes_find(made, queries):
    index = Index.open(made / "votes-5")
    exact = index.search(queries, 5, exact=True).rows
    shares = [
        np.mean([np.isin(exact[row], found) for row, found in enumerate(rows)])
        for rows in (index.search(queries, 5, effort=Effort(nprobe=nprobe)).rows for nprobe in (1, 4))
    ]
    assert shares[0] <= shares[1]
    assert shares[1] > 0.9
    little = index.search(queries, 5)
    for nprobe in (1, 4):
        effort = Effort(nprobe=nprobe)
        found = index.with_effort(effort).search(queries, 5)
        assert_same(found, index.search(queries, 5, effort=effort))
    assert_same(index.search(queries, 5), little)  # the other one is as it was


def test_global_vectors_rank_by_the_cosine(made, local, queries):
    found = Index.open(made / "global-5").search(queries, 8)
    cosines = queries.vectors.astype(np.float64) @ local.vectors.astype(np.float64).T
    np.testing.assert_array_equal(found.rows, np.argsort(-cosines, axis=1)[:, :8])
    expected = (1 + np.take_along_axis(cosines, found.rows, axis=1)) / 2
    np.testing.assert_allclose(-found.distances, expected, atol=1e-6)
    itself = Index.open(made / "global-1").search(local.take(np.array([3])), 1)
    assert itself.rows.tolist() == [[3]]
    assert 0.999999 < -itself.distances[0, 0] < 1


@pytest.mark.parametrize("kind", ["asmk", "global"])
def test_merged_groups_of_shards_equal_the_index(made, queries, kind):
    whole = Index.open(made / f"{kind}-5").search(queries, 9)
    groups = [Index.open(made / f"{kind}-5", shards=group) for group in ([3], [0, 4], [2, 1])]
    assert_same(merge([group.search(queries, 9) for group in groups], 9), whole)


def test_groups_of_shards_have_their_neighbours_merged_before_votes_are_cast(made, queries):
    whole, config = Index.open(made / "votes-5").search(queries, 9), CONFIGS["votes"]
    data = queries.data.astype(np.float32)
    parts = []
    for group in ([3], [0, 4], [2, 1]):
        indexed = Index.open(made / "votes-5", shards=group).shortlist.indexed
        parts.append(nearest_features(indexed, data, config.neighbours, config.effort))
    merged = merge_neighbours(parts, config.neighbours)
    assert_same(cast(merged, queries.offsets, 9, images=ROWS), whole)


def test_queries_of_another_form_and_no_hits_at_all_are_refused(made):
    index = Index.open(made / "exact-1")
    with pytest.raises(ArtefactError, match=r"with vectors of 5, the queries are .* of 9 dimensions"):
        index.search(draw_local(2, 9, vectors=GLOBAL), 3)
    for kind in CONFIGS:
        with pytest.raises(QueryError, match="got 0"):
            Index.open(made / f"{kind}-1").search(FORM.zeros(1), 0)


# Building


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_it_says_of_itself_and_verifies(made, local, kind):
    index = Index.open(made / f"{kind}-5", check="content")
    info = index.info()
    assert json.loads(json.dumps(info)) == info
    assert (info["kind"], info["search"], info["shortlist"]) == ("local", "shortlist", kind)
    assert (info["dimension"], info["vectors"], info["rows"]) == (DIMENSION, GLOBAL, ROWS)
    assert (info["features"], info["features_per_image"]) == (len(local.data), len(local.data) / ROWS)
    on_disk = [*made.glob(f"{kind}-5/shards/*/*"), *made.glob(f"{kind}-5/local/*/*")]
    size = sum(path.stat().st_size for path in on_disk if path.suffix != ".json")
    assert (info["bytes"], info["bytes_per_image"]) == (size, size / ROWS)
    assert ("recall@59" in info) == (kind != "exact")
    files = len(index.manifest.files)
    assert files == {"votes": 5 + 1, "asmk": 5}.get(kind, 0)  # one a shard, and what they are filled from
    assert len(index.verify()) == 2 + 5 + files + 1
    assert index.form == FORM
    group = Index.open(made / f"{kind}-5", shards=[2])
    assert "test queries are left out" in group.verify()[-1]


def test_the_recall_is_that_of_the_exact_votes(made, local):
    recall = Index.open(made / "votes-5").manifest.local.recall
    assert (recall.k, recall.queries) == (59, 16)
    rows = np.sort(np.random.default_rng(1).choice(ROWS, 16, replace=False))
    index, asked = Index.open(made / "votes-1"), local.take(rows)
    wanted, found = (index.search(asked, 60, exact=exact).rows for exact in (True, False))
    there = total = 0
    for own, exact, some in zip(rows, wanted, found, strict=True):
        others = set(exact.tolist()) - {own, NO_ROW}
        there += len(others & set(some.tolist()))
        total += len(others)
    assert recall.value == there / total


def test_databases_too_large_to_compare_are_not_measured(made, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_retrieval.search.shortlist._MOST_COMPARED", 1000)
    build(made / "embeddings", tmp_path / "index", local=CONFIGS["asmk"])
    assert Index.open(tmp_path / "index").manifest.local.recall is None


def test_auto_takes_exact_votes_for_few_features(made, tmp_path):
    assert build(made / "embeddings", tmp_path / "index").local.kind == "exact"


@pytest.mark.parametrize("kind", ["votes", "asmk"])
def test_what_is_sound_is_kept_and_what_is_not_is_written_anew(made, tmp_path, kind):
    index = shutil.copytree(made / f"{kind}-5", tmp_path / "index")
    before = files_in(index)
    paths = sorted(path for path in index.glob("local/*/*") if path.suffix != ".json")
    assert len(paths) == {"votes": 5 + 1, "asmk": 5}[kind]
    DAMAGES["changed"](paths[2])
    paths[4].unlink()
    for path in paths:
        if path.exists():
            os.utime(path, ns=(0, 0))
    build(made / "embeddings", index, shards=5, local=CONFIGS[kind])
    assert files_in(index) == before
    kept = [True, True, False, True, False, True]
    assert [path.stat().st_mtime_ns == 0 for path in paths] == kept[: len(paths)]


def test_how_hard_it_looks_changes_the_version_and_no_file(made, tmp_path):
    index = shutil.copytree(made / "votes-5", tmp_path / "index")
    harder = CONFIGS["votes"].model_copy(update={"nprobe": 4})
    manifest = build(made / "embeddings", index, shards=5, local=harder)
    assert (manifest.number, manifest.parent) == (2, 1)
    assert manifest.files == Index.open(made / "votes-5").manifest.files
    assert manifest.local.recall.value >= Index.open(made / "votes-5").manifest.local.recall.value


@pytest.mark.parametrize("before_rename", [True, False])
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, before_rename):
    expected, number = files_in(made / "votes-5"), 0
    index = tmp_path / "index"
    while True:
        number += 1
        try:
            with killed_at_write(monkeypatch, number, before_rename=before_rename):
                build(made / "embeddings", index, shards=5, local=CONFIGS["votes"])
            break
        except KilledError:
            continue
    assert number > 10
    assert files_in(index) == expected


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(made, tmp_path, damage):
    names = ["offsets", "descriptors", "locations", "scales", "scores", "sizes", "vectors"]
    for pattern in [*(f"shards/*/{name}.bin" for name in names), "local/*/1.faiss"]:
        index = shutil.copytree(made / "votes-5", tmp_path / "index")
        victim = sorted(index.glob(pattern))[0]
        DAMAGES[damage](victim)
        with pytest.raises(ArtefactError, match=f"{victim.name}: "):
            Index.open(index).verify()
        with pytest.raises(ArtefactError, match=f"{victim.name}: "):
            Index.open(index, check="content")
        shutil.rmtree(index)


def test_wrong_answers_to_the_test_queries_are_found_out(made, tmp_path):
    index = shutil.copytree(made / "exact-5", tmp_path / "index")
    path = next(index.glob("manifest-000001-*.json"))
    body = json.loads(path.read_text())
    tests = [number for number, test in enumerate(body["self_test"]) if len(test["rows"]) > 4]
    for change, other in (("rows", 1_000), ("distances", -0.9)):
        changed = json.loads(json.dumps(body))
        changed["self_test"][tests[0]][change][1] = other
        path.write_text(json.dumps(changed))
        (index / "CURRENT").write_text(f"{path.name} {digest(path.read_bytes())}\n")
        with pytest.raises(ArtefactError, match=f"test query {tests[0]} does not find"):
            Index.open(index).verify()


def test_searches_that_local_features_do_not_have_are_refused(made, tmp_path):
    with pytest.raises(
        RecipeError, match=r"'auto' is a search of codes or vectors.* hold sets of local features"
    ):
        build(made / "embeddings", tmp_path / "index", approximate=ApproximateConfig(search="auto"))
    sets = draw_local(6, DIMENSION)
    write(tmp_path / "embeddings", sets, draw_images(6))
    with pytest.raises(RecipeError, match="no global vectors"):
        build(tmp_path / "embeddings", tmp_path / "index", local=CONFIGS["global"])
    assert isinstance(sets, Local)
    assert not Path(tmp_path / "index" / "CURRENT").exists()
