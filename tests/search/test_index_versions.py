"""An index is built whole or not at all, found out when damaged, and replaced in one step."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from search_parts import DAMAGES, KilledError, draw_codes, draw_images, files_in, killed_at_write, write

from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.search import Index, build
from ray_retrieval.storage import digest

FILES = 3 * 4 + 2  # of three shards with images, the manifest and the pointer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Embeddings of one model and two states of a database, and an index of three shards of the first."""
    folder = tmp_path_factory.mktemp("versions")
    write(folder / "embeddings", draw_codes(100, 12), draw_images(100))
    write(folder / "later", draw_codes(110, 12, seed=5), draw_images(110))
    build(folder / "embeddings", folder / "index", shards=3)
    return folder


@pytest.mark.parametrize("before_rename", [True, False])
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, before_rename):
    expected = files_in(made / "index")
    assert len(expected) == FILES
    for number in range(1, FILES + 1):
        index = tmp_path / f"killed-{number}"
        with killed_at_write(monkeypatch, number, before_rename=before_rename), pytest.raises(KilledError):
            build(made / "embeddings", index, shards=3)
        if number < FILES or before_rename:
            with pytest.raises(ArtefactError, match="no index here"):
                Index.open(index)
        else:
            Index.open(index).verify()
        build(made / "embeddings", index, shards=3)
        assert files_in(index) == expected


@pytest.mark.parametrize("before_rename", [True, False])
def test_a_new_version_appears_whole_or_not_at_all(made, tmp_path, monkeypatch, before_rename):
    whole = shutil.copytree(made / "index", tmp_path / "whole")
    build(made / "later", whole, shards=3)
    for number in range(1, FILES + 1):
        index = shutil.copytree(made / "index", tmp_path / f"killed-{number}")
        with killed_at_write(monkeypatch, number, before_rename=before_rename), pytest.raises(KilledError):
            build(made / "later", index, shards=3)
        found = Index.open(index)
        found.verify()
        published = number == FILES and not before_rename
        assert (found.version, found.rows) == ((2, 110) if published else (1, 100))
        build(made / "later", index, shards=3)
        assert files_in(index) == files_in(whole)


def test_finished_shards_are_not_written_again(made, tmp_path, monkeypatch):
    index = tmp_path / "index"
    with killed_at_write(monkeypatch, 9, before_rename=True), pytest.raises(KilledError):
        build(made / "embeddings", index, shards=3)
    done = {path: path.stat().st_mtime_ns for path in index.rglob("shard.json")}
    assert len(done) == 2
    build(made / "embeddings", index, shards=3)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_building_the_same_again_changes_nothing(made, tmp_path):
    index = shutil.copytree(made / "index", tmp_path / "index")
    before = {path: path.stat().st_mtime_ns for path in index.rglob("*") if path.is_file()}
    assert build(made / "embeddings", index, shards=3).number == 1
    assert {path: path.stat().st_mtime_ns for path in index.rglob("*") if path.is_file()} == before


def test_a_reader_keeps_the_version_that_it_opened(made, tmp_path):
    index = shutil.copytree(made / "index", tmp_path / "index")
    queries = draw_codes(5, 12, seed=8)
    reader = Index.open(index)
    hits = reader.search(queries, 7)
    manifest = build(made / "later", index, shards=2)
    assert (manifest.number, manifest.parent, manifest.next_row) == (2, 1, 110)
    np.testing.assert_array_equal(reader.search(queries, 7).rows, hits.rows)
    assert reader.row_of("image-0105") is None
    assert Index.open(index).row_of("image-0105") == 105
    assert reader.verify()[0] == f"CURRENT names {manifest.name}, and its checksum agrees"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_named(made, tmp_path, damage):
    names = sorted(files_in(made / "index"))
    assert {name.rpartition("/")[2] for name in names} == {
        "CURRENT",
        first_manifest(made / "index").name,
        "codes.bin",
        "rows.arrow",
        "images.arrow",
        "shard.json",
    }
    for number, name in enumerate(names):
        index = shutil.copytree(made / "index", tmp_path / str(number))
        DAMAGES[damage](index / name)
        with pytest.raises(ArtefactError, match=name):
            Index.open(index).verify()
        if name.endswith((".bin", ".arrow")):
            with pytest.raises(ArtefactError, match=name):
                Index.open(index, check="content")
            if damage != "changed":
                with pytest.raises(ArtefactError, match=name):
                    Index.open(index)


def test_ids_that_come_twice_are_refused(tmp_path):
    images = draw_images(6).set_column(0, "id", pa.array(["a", "b", "a", "c", "b", "a"]))
    source = write(tmp_path / "embeddings", draw_codes(6, 12), images, part_rows=2)
    with pytest.raises(DataError, match="2 ids come more than once: 'a', 'b' "):
        build(source, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_building_again_mends_damaged_shards(made, tmp_path):
    index = shutil.copytree(made / "index", tmp_path / "index")
    for name in ("codes.bin", "rows.arrow", "shard.json"):
        DAMAGES["changed"](sorted(index.rglob(name))[1])
    build(made / "embeddings", index, shards=3)
    assert files_in(index) == files_in(made / "index")


@pytest.mark.parametrize("name", ["codes.bin", "rows.arrow", "images.arrow"])
def test_a_file_of_another_shard_is_found_out(made, tmp_path, name):
    """Even where its size and checksum were recorded as they are."""
    index = shutil.copytree(made / "index", tmp_path / "index")
    first, _, last = sorted(Index.open(index).manifest.shards, key=lambda shard: shard.first_row)
    wrong = (index / last.folder / name).read_bytes()
    (index / first.folder / name).write_bytes(wrong)
    entry = next(file for file in first.files if file.file == name)
    for path in (index / first.folder / "shard.json", first_manifest(index)):
        text = path.read_text().replace(entry.sha256, digest(wrong))
        path.write_text(text.replace(f'"bytes": {entry.bytes},', f'"bytes": {len(wrong)},'))
    point_at(index, first_manifest(index).name)

    def use():
        found = Index.open(index)
        found.verify()
        found.image_bytes(0)

    with pytest.raises(ArtefactError, match=name):
        use()


def first_manifest(index):
    return next(index.glob("manifest-000001-*.json"))


def point_at(index, name):
    (index / "CURRENT").write_text(f"{name} {digest((index / name).read_bytes())}\n")


def change_manifest(index, **changes):
    path = first_manifest(index)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    point_at(index, path.name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sets"}, "'kind'"),
        ({"kind": "vectors"}, "codes have 'bits', the others a 'dimension'"),
        ({"kind": "local", "bits": None, "dimension": 4}, "local features.* have a 'shortlist'"),
        ({"search": "shortlist"}, "local features.* have a 'shortlist'"),
        ({"search": "ivf"}, "'search'"),
        ({"search": "approximate"}, "a file for each shard"),
        ({"deletes": [{"file": "deletes/1.bin", "bytes": 8, "sha256": "0"}]}, "'deletes"),
        ({"novelty": 1}, "'novelty'"),
        ({"deletes": {"file": "deletes/1.bin", "bytes": 8, "sha256": "0"}}, "rows are deleted"),
        ({"version": 1}, "format version 1, this program reads version 3.*build it elsewhere"),
        ({"rows": -1}, "'rows'"),
        ({"rows": 99}, "rows are deleted"),
        ({"next_row": 101, "rows": 101}, "do not cover its rows"),
    ],
)
def test_what_this_release_cannot_search_is_refused(made, tmp_path, changes, message):
    index = shutil.copytree(made / "index", tmp_path / "index")
    change_manifest(index, **changes)
    with pytest.raises(ArtefactError, match=message):
        Index.open(index).verify()


@pytest.mark.parametrize("folder", ["../elsewhere", "/elsewhere", "shards/../../x", "shards\\x", "C:x", ""])
def test_a_folder_outside_the_index_is_refused(made, tmp_path, folder):
    index = shutil.copytree(made / "index", tmp_path / "index")
    shards = json.loads(first_manifest(index).read_text())["shards"]
    change_manifest(index, shards=[{**shards[0], "folder": folder}, *shards[1:]])
    with pytest.raises(ArtefactError, match="no path inside"):
        Index.open(index)


def test_wrong_answers_to_the_test_queries_are_found_out(made, tmp_path):
    index = shutil.copytree(made / "index", tmp_path / "index")
    tests = json.loads(first_manifest(index).read_text())["self_test"]
    assert len(tests) == 8
    tests[3]["rows"][4] += 1
    change_manifest(index, self_test=tests)
    with pytest.raises(ArtefactError, match=r"manifest-000001-\w+\.json: test query 3"):
        Index.open(index).verify()


@pytest.mark.parametrize(
    "pointer", ["", "manifest-000001.json\n", "../manifest-000001.json " + "0" * 64 + "\n"]
)
def test_a_pointer_that_points_nowhere(made, tmp_path, pointer):
    index = shutil.copytree(made / "index", tmp_path / "index")
    (index / "CURRENT").write_text(pointer)
    with pytest.raises(ArtefactError, match="CURRENT: damaged"):
        Index.open(index)
