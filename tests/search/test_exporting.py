"""An index as files of other formats: what comes back is what a search can find, in the order of its rows."""

import importlib.util
import json
import os
import sys

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from search_parts import (
    KilledError,
    draw_codes,
    draw_images,
    draw_local,
    draw_vectors,
    files_in,
    images_of,
    killed_at_write,
    truncate,
    write,
)

from ray_retrieval import storage
from ray_retrieval.errors import ArtefactError, DataError, RecipeError
from ray_retrieval.search import Index, add, build, export, exporting, imported, remove, vector_files
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.columns import descriptors_in

ROWS, NAMES = 90, list("abcdefg")
DRAWN = {"codes": draw_codes(2 * ROWS, 20, distinct=60), "vectors": draw_vectors(2 * ROWS, 6, distinct=120)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Indices of two shards, then a third added, and rows removed."""
    folder = tmp_path_factory.mktemp("made")
    for kind, descriptors in DRAWN.items():
        prices = pa.array(np.arange(2 * ROWS) / 4)
        for name, rows in (("first", range(ROWS)), ("more", range(ROWS, ROWS + 30))):
            images = images_of(len(rows), rows.start, price=prices[rows.start : rows.stop])
            write(folder / f"{kind}-{name}", descriptors.take(np.array(rows)), images, class_names=NAMES)
        search = "IVF4,SQ8" if kind == "vectors" else "exact"
        build(folder / f"{kind}-first", folder / kind, shards=2, approximate=ApproximateConfig(search=search))
        add(folder / kind, folder / f"{kind}-more")
        remove(folder / kind, where="price in (1, 5, 22.5, 25)")
    return folder


def found_by(index, queries, k=9):
    """Hits as (id, distance), which do not depend on the numbers of rows."""
    hits = index.search(queries, k, exact=True)
    ids = [index.records(rows[rows >= 0])["id"].to_pylist() for rows in hits.rows]
    return ids, hits.distances.tolist()


def test_removed_rows_are_those_that_are_left_out(made):
    for kind in DRAWN:
        index = Index.open(made / kind)
        assert (index.rows, index.deleted) == (ROWS + 30 - 4, 4)


@pytest.mark.parametrize("form", ["npy", "faiss", "hnsw", "parquet", "arrow"])
@pytest.mark.parametrize("kind", list(DRAWN))
def test_an_export_is_built_again_with_the_same_hits(made, tmp_path, monkeypatch, kind, form):
    monkeypatch.setattr(exporting, "_BLOCK_ROWS", 23)
    counts = []
    said = export(made / kind, tmp_path / "out", form, progress=counts.append)
    index = Index.open(made / kind)
    assert (said["rows"], said["model"], said["version_of_index"]) == (index.rows, "model-a", 3)
    assert said == {
        key: value
        for key, value in json.loads((tmp_path / "out" / "export.json").read_text()).items()
        if key not in ("format", "version")
    }
    assert counts[-1] == index.rows
    build(imported(tmp_path / "out"), tmp_path / "again", shards=3)
    again = Index.open(tmp_path / "again")
    assert again.verify()
    assert (again.model, again.class_names, again.form) == (index.model, index.class_names, index.form)
    queries = DRAWN[kind].take(np.arange(0, 2 * ROWS, 9))
    assert found_by(again, queries) == found_by(index, queries)
    old, new = index.records(index.living()), again.records(again.living())
    assert new.to_pydict() == {**old.to_pydict(), "row": list(range(index.rows))}


@pytest.mark.parametrize("form", ["npy", "parquet", "arrow"])
def test_a_column_of_the_name_of_other_descriptors_is_one_like_others(tmp_path, form):
    vectors, codes = draw_vectors(9, 6), pa.array([bytes([row]) * 2 for row in range(9)], pa.binary(2))
    for number, column in enumerate([pa.array([f"c{row}" for row in range(9)]), codes]):
        table = pa.table({"vector": list(vectors.data), "code": column})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        build(imported(tmp_path / f"{number}.parquet", column="vector"), tmp_path / f"index{number}")
        export(tmp_path / f"index{number}", tmp_path / f"out{number}", form)
        build(imported(tmp_path / f"out{number}"), tmp_path / f"again{number}")
        again = Index.open(tmp_path / f"again{number}")
        assert again.records(np.arange(9))["code"].to_pylist() == column.to_pylist()
        assert found_by(again, vectors) == found_by(Index.open(tmp_path / f"index{number}"), vectors)


@pytest.mark.parametrize("form", ["npy", "faiss", "parquet"])
def test_files_in_a_store_whose_uri_has_options_are_read(made, tmp_path, monkeypatch, form):
    """As those of Ceph and MinIO have, which say at which address the store is."""
    (tmp_path / "bucket").mkdir()
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "store_at", lambda uri: (store, storage.split_query(uri)[0].removeprefix("s3://"))
    )
    monkeypatch.setattr(storage, "_cache", lambda: storage.Folder(tmp_path / "cache"))
    out, options = "s3://bucket/out", "?endpoint_override=http%3A%2F%2Fhost%3A9000"
    export(made / "vectors", out + options, form)
    exported = {path.name for path in (tmp_path / "bucket" / "out").iterdir()}
    assert exported >= {"export.json", "rows.parquet"}
    rows = imported(out + options)
    assert len(rows) == ROWS + 26
    build(rows, tmp_path / "again")
    queries = DRAWN["vectors"].take(np.arange(5))
    assert found_by(Index.open(tmp_path / "again"), queries) == found_by(
        Index.open(made / "vectors"), queries
    )
    if form == "parquet":
        assert len(imported(f"{out}/rows.parquet{options}")) == ROWS + 26


@pytest.mark.parametrize("kind", list(DRAWN))
def test_faiss_finds_in_its_file_what_the_index_finds(made, tmp_path, kind):
    export(made / kind, tmp_path, "faiss")
    index, queries = Index.open(made / kind), DRAWN[kind].take(np.arange(8))
    read = faiss.read_index_binary if kind == "codes" else faiss.read_index
    flat = read(str(tmp_path / "index.faiss"))
    assert type(flat) is (faiss.IndexBinaryFlat if kind == "codes" else faiss.IndexFlatL2)
    distances = np.zeros((8, 5), np.int32 if kind == "codes" else np.float32)
    rows = np.zeros((8, 5), np.int64)
    pointers = map(faiss.swig_ptr, (distances, rows))
    flat.search_c(8, faiss.swig_ptr(queries.data), 5, *pointers)
    hits = index.search(queries, 5, exact=True)
    np.testing.assert_allclose(distances, hits.distances, atol=1e-5)
    assert (index.at(rows) == hits.rows).mean() > 0.9  # but for rows as far as each other
    known = pq.read_table(tmp_path / "rows.parquet")
    assert known["id"].to_pylist() == index.records(index.living())["id"].to_pylist()


def test_the_approximate_structure_as_one_index(made, tmp_path):
    said = export(made / "vectors", tmp_path, "faiss", approximate=True)
    structure = faiss.read_index(str(tmp_path / "index.faiss"))
    index = Index.open(made / "vectors")
    assert (type(structure), structure.ntotal) == (faiss.IndexIVFScalarQuantizer, index.rows)
    assert said["approximate"]["factory"] == "IVF4,SQ8"
    structure.make_direct_map()
    decoded = structure.reconstruct_n(0, index.rows)
    stored, built = index.descriptors().data, ROWS - 2  # two of the rows that it was built of are removed
    np.testing.assert_allclose(decoded[:built], stored[:built], atol=0.05)
    # Rows that were added later may lie beyond the range of the scalars, and are cut at its ends.
    np.testing.assert_allclose(decoded[built:], stored[built:], atol=0.3)
    with pytest.raises(DataError, match="as a structure of faiss is not read again"):
        imported(tmp_path)


def test_the_same_index_gives_the_same_files(made, tmp_path):
    for form in ("npy", "faiss", "hnsw", "parquet", "arrow"):
        export(made / "vectors", tmp_path / "one" / form, form)
        export(made / "vectors", tmp_path / "two" / form, form)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")


def test_sets_of_local_features(tmp_path):
    local = draw_local(40, 8, vectors=5)
    write(tmp_path / "embeddings", local, draw_images(40))
    build(tmp_path / "embeddings", tmp_path / "index", shards=3)
    remove(tmp_path / "index", ["image-0003", "image-0030"])
    index = Index.open(tmp_path / "index")
    left = index.descriptors()
    export(index.folder, tmp_path / "npy", "npy")
    named = {"data": "descriptors", **{name: name for name in ("offsets", "locations", "sizes", "vectors")}}
    for array, name in named.items():
        found = np.load(tmp_path / "npy" / f"{name}.npy")
        np.testing.assert_array_equal(found, getattr(left, array))
    export(index.folder, tmp_path / "parquet", "parquet")
    table = pq.read_table(tmp_path / "parquet" / "rows.parquet")
    back = descriptors_in(table, index.form)
    for array in ("offsets", "data", "locations", "scales", "scores", "sizes", "vectors"):
        np.testing.assert_array_equal(getattr(back, array), getattr(left, array))
    assert table["id"].to_pylist() == index.records(index.living())["id"].to_pylist()
    with pytest.raises(DataError, match=r"sets of local features .* is not read again"):
        imported(tmp_path / "npy")
    with pytest.raises(RecipeError, match="sets of local features are no faiss"):
        export(index.folder, tmp_path / "out", "faiss")


def test_a_version_is_exported_as_it_was(made, tmp_path):
    export(made / "codes", tmp_path / "out", "npy", version=1)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "codes.npy"), DRAWN["codes"].data[:ROWS])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("codes", {"form": "csv"}, "no format 'csv' .*known are npy, faiss, hnsw, parquet, arrow, lance"),
        ("codes", {"form": "faiss", "approximate": True}, "it has no approximate structure of FAISS"),
        ("vectors", {"form": "npy", "approximate": True}, "only FAISS's files hold an approximate structure"),
    ],
)
def test_what_cannot_be_is_refused(made, tmp_path, kind, arguments, message):
    with pytest.raises(RecipeError, match=message):
        export(made / kind, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_place_for_an_export(made, tmp_path):
    (tmp_path / "rows.npy").write_bytes(b"somebody's own")
    with pytest.raises(ArtefactError, match=r"rows.npy: the store refuses"):
        export(made / "codes", tmp_path / "rows.npy", "npy")
    assert (tmp_path / "rows.npy").read_bytes() == b"somebody's own"


def test_killed_anywhere_it_does_not_count(made, tmp_path, monkeypatch):
    export(made / "codes", tmp_path / "whole", "npy")
    for number in (2, 3, 4):
        export(made / "codes", tmp_path / "out", "npy")
        with pytest.raises(KilledError), killed_at_write(monkeypatch, number, before_rename=True):
            export(made / "codes", tmp_path / "out", "npy")
        assert not (tmp_path / "out" / "export.json").exists()
        export(made / "codes", tmp_path / "out", "npy")
        assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    with pytest.raises(KilledError), killed_at_write(monkeypatch, 1, before_rename=True):
        export(made / "codes", tmp_path / "out", "npy")
    assert imported(tmp_path / "out")
    truncate(tmp_path / "out" / "codes.npy")
    with pytest.raises(ArtefactError, match=r"codes.npy: damaged"):
        imported(tmp_path / "out")


@pytest.mark.skipif(importlib.util.find_spec("lance") is None, reason="needs pylance")
@pytest.mark.parametrize("kind", list(DRAWN))
def test_a_data_set_of_lance(made, tmp_path, kind):
    import lance

    for _ in range(2):
        export(made / kind, tmp_path / "out", "lance")
    index = Index.open(made / kind)
    table = lance.dataset(str(tmp_path / "out" / "rows.lance")).to_table()
    np.testing.assert_array_equal(descriptors_in(table, index.form).data, index.descriptors().data)
    assert table["price"].to_pylist() == index.records(index.living())["price"].to_pylist()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "rows.lance"]


def test_only_what_an_export_has_written_is_replaced(made, tmp_path):
    """Not the vectors that an index was made of, nor an index; but all of another export."""
    own = tmp_path / "work"
    own.mkdir()
    np.save(own / "vectors.npy", DRAWN["vectors"].data)
    (own / "notes.tmp-1").write_text("somebody's own")
    before = files_in(own)
    with pytest.raises(ArtefactError, match=r"vectors.npy: the file is there already, and no export"):
        export(made / "vectors", own, "npy")
    with pytest.raises(ArtefactError, match="an index lies here"):
        export(made / "vectors", made / "codes", "npy")
    assert files_in(own) == before
    for form in ("faiss", "hnsw", "parquet", "arrow"):
        export(made / "vectors", own, form)
        assert imported(own)
    left = {path.name for path in own.iterdir()}
    assert left == {"vectors.npy", "notes.tmp-1", "rows.arrow", "export.json"}


@pytest.mark.parametrize("name", ["../vectors.npy", "/etc/passwd", "", ".."])
def test_an_export_names_files_in_its_folder_only(made, tmp_path, name):
    export(made / "vectors", tmp_path / "out", "npy")
    (tmp_path / "vectors.npy").write_text("somebody's own")
    place = tmp_path / "out" / "export.json"
    said = json.loads(place.read_text())
    said["files"][0]["file"] = name
    place.write_text(json.dumps(said))
    for act in (imported, lambda out: export(made / "vectors", out, "npy")):
        with pytest.raises(ArtefactError, match=r"export.json: damaged: .* is no name of a file in it"):
            act(tmp_path / "out")
    assert (tmp_path / "vectors.npy").exists()


@pytest.mark.parametrize("form", ["npy", "faiss", "hnsw", "parquet", "arrow"])
@pytest.mark.parametrize("removed", [[], ["3", "17"], ["38", "39"]])
def test_an_index_that_numbers_its_rows_comes_back_as_such(tmp_path, form, removed):
    codes = DRAWN["codes"].data
    build(imported(codes[:40], bits=20), tmp_path / "index", shards=3)
    if removed:
        remove(tmp_path / "index", removed)
    export(tmp_path / "index", tmp_path / "out", form)
    build(imported(tmp_path / "out"), tmp_path / "again", shards=2)
    index, again = Index.open(tmp_path / "index"), Index.open(tmp_path / "again")
    assert again.verify()
    for opened in (index, again):
        assert opened.manifest.next_id == 40
        ids = opened.records(opened.living())["id"].to_pylist()
        assert ids == [str(row) for row in range(40) if str(row) not in removed]
    np.testing.assert_array_equal(index.descriptors(index.living()).data, again.descriptors().data)
    add(tmp_path / "again", imported(codes[40:42], bits=20))
    again = Index.open(tmp_path / "again")
    assert again.records(again.living()[-2:])["id"].to_pylist() == ["40", "41"]
    add(tmp_path / "index", imported(tmp_path / "out"))
    assert Index.open(tmp_path / "index").row_of(str(40 + again.rows - 3)) is not None


def test_what_is_known_is_read_once_beside_the_descriptors(made, tmp_path, monkeypatch):
    export(made / "codes", tmp_path / "out", "npy")
    rows = imported(tmp_path / "out")
    calls, read = [], type(rows._files[0]._known).batches
    monkeypatch.setattr(vector_files, "BLOCK_ROWS", 7)
    monkeypatch.setattr(
        type(rows._files[0]._known), "batches", lambda *args: calls.append(args) or read(*args)
    )
    tables = [table for table, _ in rows.tables(3, 80)]
    assert len(tables) > 5
    assert len(calls) == 1
    index = Index.open(made / "codes")
    expected = index.records(index.living()[3:80]).select(["id", "price"])
    assert pa.concat_tables(tables).select(["id", "price"]).to_pydict() == expected.to_pydict()


def test_what_is_built_in_memory_has_to_fit_there(made, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 30 if name == "SC_PHYS_PAGES" else 40)
    for options in ({"form": "hnsw"}, {"form": "faiss", "approximate": True}):
        with pytest.raises(RecipeError, match=r"built in memory: that takes 0.0 GB"):
            export(made / "vectors", tmp_path / "out", **options)
    export(made / "vectors", tmp_path / "out", "faiss")


def test_without_its_package_lance_is_refused(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(RecipeError, match=r"Lance's package is missing \(pip install pylance\)"):
        export(made / "codes", tmp_path / "out", "lance")
