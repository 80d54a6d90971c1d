"""Rows are added to an index, removed and written anew, in versions that appear whole or not at all."""

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from search_parts import assert_same, draw_codes, draw_images, draw_vectors, files_in, images_of, write
from soak_parts import survives_kills

from ray_retrieval.descriptors import Codes, Vectors
from ray_retrieval.errors import ArtefactError, ConflictError, DataError, QueryError
from ray_retrieval.lock import writing_alone
from ray_retrieval.search import (
    NO_ROW,
    Index,
    add,
    build,
    compact,
    imported,
    prune,
    remove,
    rollback,
    versions,
)
from ray_retrieval.search.manifest import read_current
from ray_retrieval.storage import Folder

ROWS, MORE, BITS = 60, 14, 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index of 60 rows in three shards, embeddings of 14 more, and of 74 at once."""
    folder = tmp_path_factory.mktemp("changes")
    codes = draw_codes(ROWS + MORE, BITS, distinct=30)
    write(folder / "first", codes.take(np.arange(ROWS)), draw_images(ROWS))
    write(folder / "more", codes.take(np.arange(ROWS, ROWS + MORE)), images_of(MORE, ROWS))
    write(folder / "all", codes, draw_images(ROWS + MORE))
    build(folder / "first", folder / "index", shards=3)
    return folder


@pytest.fixture
def index(made, tmp_path):
    return shutil.copytree(made / "index", tmp_path / "index")


@pytest.fixture(scope="module")
def queries():
    return draw_codes(9, BITS, seed=3)


def contents(index, name):
    """Bytes of the files of a name, in the order of the shards."""
    opened = Index.open(index)
    return [(index / shard.folder / name).read_bytes() for shard in opened.manifest.shards]


# Adding


@pytest.mark.parametrize("shards", [1, 4])
def test_added_rows_are_as_if_they_had_been_there(made, index, queries, shards):
    seen = []
    change = add(index, made / "more", shards=shards, progress=seen.append)
    assert (change.changed, change.added, change.removed, seen[-1]) == (True, MORE, 0, MORE)
    manifest = change.manifest
    assert (manifest.number, manifest.parent, manifest.operation) == (2, 1, "add 14 rows")
    assert (manifest.rows, manifest.next_row, len(manifest.shards)) == (74, 74, 3 + shards)
    build(made / "all", index.parent / "whole")
    opened, whole = Index.open(index, check="content"), Index.open(index.parent / "whole")
    assert opened.verify()
    assert_same(opened.search(queries, 20), whole.search(queries, 20))
    assert opened.records(np.arange(74)) == whole.records(np.arange(74))
    assert [opened.image_bytes(row) for row in (0, 60, 73)] == [whole.image_bytes(row) for row in (0, 60, 73)]
    assert opened.row_of("image-0070") == 70


def test_an_id_that_is_there_is_refused_or_replaced(made, index, queries, tmp_path):
    codes = draw_codes(6, BITS, seed=7)
    again = write(tmp_path / "again", codes, images_of(6, 57))
    before = files_in(index)
    with pytest.raises(DataError, match=r"3 of the ids .* already: 'image-0057', 'image-0058', 'image-0059'"):
        add(index, again)
    assert files_in(index) == before
    change = add(index, again, replace=True)
    assert (change.added, change.removed) == (6, 3)
    assert change.manifest.operation == "add 6 rows, 3 of them replaced"
    opened = Index.open(index)
    assert (opened.rows, opened.deleted, opened.row_of("image-0058")) == (63, 3, 61)
    assert opened.living().tolist() == [*range(57), *range(60, 66)]
    assert not np.isin(opened.search(queries, 66).rows, [57, 58, 59]).any()
    np.testing.assert_array_equal(opened.descriptors([61]).data, codes.data[1:2])
    for read in (opened.records, opened.descriptors):
        with pytest.raises(QueryError, match="row 58 was removed"):
            read([58])
    names = pa.array(["a", "b", "c", "a", "b"])
    twice = draw_images(5).set_column(0, "id", names)
    with pytest.raises(DataError, match="2 ids come more than once: 'a', 'b'"):
        add(index, write(tmp_path / "twice", draw_codes(5, BITS), twice))


def test_images_that_are_there_byte_for_byte_are_left_out(made, index, tmp_path):
    change = add(index, made / "all", skip_duplicates=True)
    assert (change.added, change.skipped) == (MORE, ROWS)
    again = add(index, made / "all", skip_duplicates=True)
    assert (again.changed, again.skipped, again.manifest.number) == (False, ROWS + MORE, 2)
    # Under other ids, by their files, of which one is gone, and one of the same length as another.
    folder = tmp_path / "files"
    folder.mkdir()
    texts = {"new": b"bytes of x", "same": b"bytes of 5", "again": b"bytes of x", "gone": None}
    for name, text in texts.items():
        if text is not None:
            (folder / name).write_bytes(text)
    images = draw_images(4).set_column(0, "id", pa.array(list(texts)))
    paths = [{"bytes": None, "path": str(folder / name)} for name in texts]
    images = images.set_column(1, "image", pa.array(paths, images["image"].type))
    change = add(index, write(tmp_path / "by-path", draw_codes(4, BITS), images), skip_duplicates=True)
    assert (change.added, change.skipped) == (2, 2)
    last = change.manifest.next_row - np.array([2, 1])
    assert Index.open(index).records(last)["id"].to_pylist() == ["new", "gone"]


def test_images_that_change_their_ids_are_replaced_and_none_is_lost(tmp_path):
    """Of what has an id of the index, only that row's own image is left out."""
    index = build_of(tmp_path, {"a": b"one.", "b": b"two.", "c": b"same", "d": b"four"})
    coming = {"a": b"two.", "b": b"new!", "c": b"same", "e": b"one.", "f": b"four", "g": b"new!"}
    change = add(index, embeddings_of(tmp_path / "more", coming), replace=True, skip_duplicates=True)
    assert (change.added, change.removed, change.skipped) == (3, 2, 3)
    opened = Index.open(index)
    names = opened.records(opened.living())["id"].to_pylist()
    held = {name: opened.image_bytes(row) for name, row in zip(names, opened.living().tolist(), strict=True)}
    assert held == {"a": b"two.", "b": b"new!", "c": b"same", "d": b"four", "e": b"one."}


def build_of(folder, images):
    build(embeddings_of(folder / "first", images), folder / "index")
    return folder / "index"


def embeddings_of(folder, images):
    table = draw_images(len(images)).set_column(0, "id", pa.array(list(images)))
    held = [{"bytes": data, "path": None} for data in images.values()]
    table = table.set_column(1, "image", pa.array(held, table["image"].type))
    return write(folder, draw_codes(len(images), BITS, seed=len(images)), table)


def test_without_images_codes_tell_nothing_and_are_not_looked_at(tmp_path, monkeypatch):
    for name in ("first", "more"):
        ids = pa.array([f"{name}-{row}" for row in range(6)])
        images = draw_images(6, inline=False).set_column(0, "id", ids)
        write(tmp_path / name, draw_codes(6, BITS), images)
    build(tmp_path / "first", tmp_path / "index")
    monkeypatch.setattr("ray_retrieval.search.duplicates.digest", None)
    change = add(tmp_path / "index", tmp_path / "more", skip_duplicates=True)
    assert (change.added, change.skipped) == (6, 0)


def test_without_images_vectors_tell_duplicates(tmp_path):
    vectors = draw_vectors(9, 4)
    for name, rows in (("first", slice(0, 6)), ("more", slice(4, 9))):
        table = draw_images(9, inline=False)
        table = table.slice(rows.start, rows.stop - rows.start)
        names = pa.array([f"{name}-{row}" for row in range(len(table))])
        write(tmp_path / name, Vectors(vectors.data[rows]), table.set_column(0, "id", names))
    build(tmp_path / "first", tmp_path / "index")
    change = add(tmp_path / "index", tmp_path / "more", skip_duplicates=True)
    assert (change.added, change.skipped) == (3, 2)


def test_classes_are_told_by_their_names(tmp_path):
    names = {"first": ["cat", "dog"], "more": ["ant", "dog", "cat"], "less": ["dog"]}
    for number, (name, classes) in enumerate(names.items()):
        label = pa.array([[0], [0, len(classes) - 1], None], pa.list_(pa.int64()))
        ids = pa.array([f"{name}-{row}" for row in range(3)])
        images = draw_images(3).set_column(0, "id", ids).set_column(2, "label", label)
        write(tmp_path / name, draw_codes(3, 8, seed=number), images, class_names=classes)
    build(tmp_path / "first", tmp_path / "index")
    add(tmp_path / "index", tmp_path / "more")
    add(tmp_path / "index", tmp_path / "less")
    index = Index.open(tmp_path / "index")
    assert index.class_names == ["cat", "dog", "ant"]
    labels = index.records(np.arange(9))["label"].to_pylist()
    assert labels == [[0], [0, 1], None, [2], [2, 0], None, [1], [1, 1], None]
    assert index.living("label = ant").tolist() == [3, 4]
    unnamed = write(tmp_path / "unnamed", draw_codes(3, 8), images_of(3, 50))
    with pytest.raises(DataError, match="of the index have names, those of the new rows are numbers"):
        add(tmp_path / "index", unnamed)
    unlabelled = draw_images(13, label="none").slice(10)
    assert add(tmp_path / "index", write(tmp_path / "unlabelled", draw_codes(3, 8), unlabelled)).changed


@pytest.mark.parametrize("several", [False, True])
def test_numbers_and_names_that_are_numbers_are_the_same_classes(tmp_path, several):
    """As of a run, where sparse numbers are names, and of `encode` and files, where they are numbers."""

    def written(name, labels, classes=None):
        label = pa.array([[one] if several and one is not None else one for one in labels])
        images = images_of(len(labels), 0).set_column(0, "id", pa.array([f"{name}-{one}" for one in labels]))
        images = images.set_column(2, "label", label)
        return write(tmp_path / name, draw_codes(len(labels), 8), images, class_names=classes)

    def classes(index):
        opened = Index.open(index)
        labels = opened.records(np.arange(opened.rows))["label"].combine_chunks()
        numbers = (labels.flatten().drop_null() if several else labels.drop_null()).to_pylist()
        return numbers if opened.class_names is None else [opened.class_names[number] for number in numbers]

    sparse = written("sparse", [100_002, 100_001, 7, None])
    named = written("named", [0, 2, 1], ["7", "100001", "3"])
    of_names, of_numbers = tmp_path / "of-names", tmp_path / "of-numbers"
    build(named, of_names)
    add(of_names, sparse)
    assert classes(of_names) == ["7", "3", "100001", "100002", "100001", "7"]
    assert Index.open(of_names).class_names == ["7", "100001", "3", "100002"]
    build(sparse, of_numbers)
    add(of_numbers, named)
    assert classes(of_numbers) == [100_002, 100_001, 7, 7, 3, 100_001]
    with pytest.raises(DataError, match="of the new rows have names, those of the index are numbers"):
        add(of_numbers, written("other", [0, 1], ["007", "8"]))
    columns = {"ids": ["file-1", "file-2"], "labels": [[100_001], [5]] if several else [100_001, 5]}
    add(of_names, imported(draw_codes(2, 8).data, bits=8, model="model-a", **columns))
    assert classes(of_names)[-2:] == ["100001", "5"]


def test_a_class_of_a_name_that_comes_twice_is_the_first_of_it_as_in_filters(tmp_path):
    codes = draw_codes(3, 8)
    for name, classes in {"first": ["crane", "dog", "crane"], "more": ["ant", "ant", "crane"]}.items():
        images = draw_images(3).set_column(0, "id", pa.array([f"{name}-{row}" for row in range(3)]))
        images = images.set_column(2, "label", pa.array([0, 1, 2]))
        write(tmp_path / name, codes, images, class_names=classes)
    build(tmp_path / "first", tmp_path / "index")
    add(tmp_path / "index", tmp_path / "more")
    opened = Index.open(tmp_path / "index")
    assert opened.living("label = crane").tolist() == [0, 5]
    assert opened.living("label = ant").tolist() == [3, 4]


@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.list_(pa.string())], ids=str)
def test_rows_of_which_none_has_a_label_go_with_any(tmp_path, kind):
    """Also where a table, written a piece at a time, says of what type they would be."""
    some = {pa.string(): "dog", pa.int64(): 3, pa.list_(pa.string()): ["dog"]}[kind]
    none = [] if pa.types.is_list(kind) else None
    files = {"none": [none, None], "some": [some, none]}
    for name, labels in files.items():
        known = {"id": [f"{name}-0", f"{name}-1"], "label": pa.array(labels, kind)}
        table = pa.table({**known, "code": pa.array([b"a", b"b"], pa.binary(1))})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    for first, then in (("none", "some"), ("some", "none")):
        build(imported(tmp_path / f"{first}.parquet"), tmp_path / first)
        add(tmp_path / first, imported(tmp_path / f"{then}.parquet"))
        opened = Index.open(tmp_path / first)
        place = 2 if first == "none" else 0
        assert opened.living("label = 3" if kind == pa.int64() else "label = dog").tolist() == [place]


def test_columns_may_come_later_but_not_change_their_kind(made, index, tmp_path):
    images = images_of(3, 80, price=pa.array([1, 2, None]), note=pa.array(["a", None, "c"]))
    add(index, write(tmp_path / "priced", draw_codes(3, BITS), images))
    opened = Index.open(index)
    assert opened.info()["columns"] == ["row", "id", "label", "path", "price", "note"]
    assert opened.records([61, 0])["price"].to_pylist() == [2, None]
    assert opened.records([0])["note"].to_pylist() == [None]
    assert opened.living("price < 2 or note = c").tolist() == [60, 62]
    hits = opened.search(draw_codes(2, BITS), 5, where="price is not null").rows
    assert set(hits.ravel().tolist()) == {60, 61, NO_ROW}
    compact(index)
    assert Index.open(index).records([61, 0])["price"].to_pylist() == [2, None]
    before = files_in(index)
    kinds = [pa.list_(pa.int64()), pa.float64(), pa.uint64(), pa.string(), pa.timestamp("s")]
    for number, kind in enumerate(kinds):
        wrong = images_of(3, 90, price=pa.array([None, None, None], kind))
        source = write(tmp_path / f"wrong-{number}", draw_codes(3, BITS), wrong)
        with pytest.raises(DataError, match="column 'price' holds int64 in the index and "):
            add(index, source)
    assert files_in(index) == before


def test_columns_of_one_kind_meet_in_the_wider_type(made, index, tmp_path):
    """Every value is what it was."""
    values = {
        "first": {"size": pa.array([2**60, 3], pa.int64()), "share": pa.array([0.1, 1e300], pa.float64())},
        "second": {"size": pa.array([-7, None], pa.int8()), "share": pa.array([0.5, 0.1], pa.float32())},
        "third": {"size": pa.nulls(2), "share": pa.nulls(2)},
    }
    for number, (name, columns) in enumerate(values.items()):
        add(index, write(tmp_path / name, draw_codes(2, BITS), images_of(2, 100 + 2 * number, **columns)))
    for first in (60, 59):
        opened = Index.open(index)
        records = opened.records(np.arange(first, first + 6))
        assert records["size"].to_pylist() == [2**60, 3, -7, None, None, None]
        assert records["share"].to_pylist() == [0.1, 1e300, 0.5, float(np.float32(0.1)), None, None]
        assert opened.living("size > 3 or share > 1").tolist() == [first, first + 1]
        remove(index, [opened.records([0])["id"][0].as_py()])
        compact(index)


def test_numbers_of_more_digits_do_not_change_what_a_filter_finds(index, tmp_path):
    """0.1 of float32 equals what a filter says, but not as float64, which all shards would be compared as."""
    few, many = pa.array([0.1] * 3, pa.float32()), pa.array([0.1] * 3, pa.float64())
    columns = {"price": few, "prices": pa.array([[0.1]] * 3, pa.list_(pa.float32()))}
    add(index, write(tmp_path / "few", draw_codes(3, BITS), images_of(3, 80, **columns)))
    finer = {"price": many, "prices": pa.array([[0.1]] * 3, pa.list_(pa.float64()))}
    before = files_in(index)
    for name, column in finer.items():
        rows = write(tmp_path / name, draw_codes(3, BITS), images_of(3, 90, **{name: column}))
        with pytest.raises(DataError, match=f"'{name}' holds .* of more digits, .*cast it to that of"):
            add(index, rows)
    assert files_in(index) == before
    rows = write(tmp_path / "cast", draw_codes(3, BITS), images_of(3, 90, price=many.cast(pa.float32())))
    add(index, rows)
    compact(index, shards=1)
    for sign, expected in (("=", 6), ("<=", 6), ("<", 0), (">", 0)):
        assert len(Index.open(index).living(f"price {sign} 0.1")) == expected, sign
    assert len(Index.open(index).living("prices = 0.1")) == 3


def test_what_does_not_fit_is_refused(made, index, tmp_path):
    other = write(tmp_path / "other", draw_codes(3, BITS), images_of(3, 90), model="model-b")
    with pytest.raises(ArtefactError, match="made by model model-a, the rows by model model-b"):
        add(index, other)
    wide = write(tmp_path / "wide", draw_codes(3, 16), images_of(3, 90))
    with pytest.raises(ArtefactError, match="an index of 12-bit codes, the rows are 16-bit codes"):
        add(index, wide)
    with pytest.raises(ArtefactError, match="no index here"):
        add(tmp_path / "nowhere", made / "more")
    assert not (tmp_path / "nowhere").exists()


def test_an_index_knows_what_encoded_its_rows(index, tmp_path):
    assert "engines" not in Index.open(index).info()
    for start, engine in ((60, "onnx-int8"), (63, "onnx"), (66, "torch")):
        more = write(tmp_path / engine, draw_codes(3, BITS), images_of(3, start), engine=engine)
        add(index, more)
    opened = Index.open(index)
    assert opened.info()["engines"] == ["onnx", "onnx-int8"]
    said = opened.manifest.otherwise_encoded("torch")
    assert said.startswith("rows were encoded by onnx-int8, the queries by torch")
    assert opened.manifest.otherwise_encoded("onnx-int8") is None
    rollback(index, 1)
    assert Index.open(index).manifest.otherwise_encoded("torch") is None
    build(tmp_path / "onnx", tmp_path / "anew")
    assert Index.open(tmp_path / "anew").info()["engines"] == ["onnx"]


# Removing and compacting


def test_what_is_only_tried_needs_no_lock(index):
    removed = remove(index, ["image-0007"])
    with writing_alone(Folder(index), "add"):
        held = (index / ".lock").read_bytes()
        assert remove(index, ["image-0008"], dry_run=True).removed == 1
        assert compact(index, dry_run=True).changed
        assert prune(index, 1, dry_run=True).versions == [1]
        assert (index / ".lock").read_bytes() == held
        for change in (lambda: remove(index, ["image-0008"]), lambda: compact(index), lambda: prune(index)):
            with pytest.raises(ConflictError, match="another writer is at work"):
                change()
    assert read_current(Folder(index)) == removed.manifest


def test_removed_rows_are_as_if_they_had_never_been(made, index, queries):
    gone = [f"image-{row:04d}" for row in (0, 7, 8, 9, 59)]
    assert remove(index, gone[:2], dry_run=True).removed == 2
    assert versions(index)[0]["version"] == 1
    change = remove(index, gone)
    assert (change.manifest.rows, change.manifest.next_row) == (55, 60)
    assert change.manifest.operation == "remove 5 rows"
    stored = np.fromfile(index / change.manifest.deletes.file, "<i8")
    assert stored.tolist() == [0, 7, 8, 9, 59]
    left = np.setdiff1d(np.arange(ROWS), stored)
    first = Index.open(made / "first/../index").descriptors(left)
    kept = Codes(first.data, BITS)
    alone = index.parent / "alone"
    build(write(index.parent / "left", kept, draw_images(ROWS).take(left)), alone, shards=2)
    opened, expected = Index.open(index, threads=2), Index.open(alone)
    for k in (1, 10, 55, 70):
        hits = expected.search(queries, k)
        rows = np.where(hits.rows == NO_ROW, NO_ROW, left[hits.rows])
        found = opened.search(queries, k)
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_array_equal(found.distances, hits.distances)
    np.testing.assert_array_equal(opened.descriptors().data, kept.data)
    groups = [Index.open(index, shards=group).search(queries, 60) for group in ([0, 2], [1])]
    assert sorted({*groups[0].rows.ravel(), *groups[1].rows.ravel()} - {NO_ROW}) == left.tolist()
    # Compacted, it is the other one, file for file.
    assert compact(index, dry_run=True).changed
    assert compact(index, dry_run=True, keep=1).pruned.kept == [3]
    change = compact(index, shards=2)
    assert (change.manifest.rows, change.manifest.next_row, change.manifest.deletes) == (55, 55, None)
    assert_same(Index.open(index).search(queries, 60), expected.search(queries, 60))
    for name in ("codes.bin", "rows.arrow"):
        assert contents(index, name) == contents(alone, name)
    assert [Index.open(index).image_bytes(row) for row in range(55)] == [
        expected.image_bytes(row) for row in range(55)
    ]
    assert Index.open(index).manifest.self_test == expected.manifest.self_test
    again = compact(index, shards=2)
    assert (again.changed, again.manifest.number) == (False, 3)


def test_rows_are_removed_by_a_filter(index):
    assert remove(index, where="label in (2, 3) and id < image-0030").removed == 8
    assert Index.open(index).living("label = 2").tolist() == [30, 37, 44, 51, 58]
    assert not remove(index, where="label = 99").changed


def test_what_cannot_be_removed_is_refused(index):
    before = files_in(index)
    with pytest.raises(QueryError, match="no row of 2 of the ids: 'a', 'b'"):
        remove(index, ["image-0001", "b", "a"])
    with pytest.raises(QueryError, match="none of its 60 rows would be left"):
        remove(index, where="label >= 0")
    for wrong in ({}, {"ids": ["image-0001"], "where": "label = 0"}):
        with pytest.raises(QueryError, match="one of the two"):
            remove(index, **wrong)
    assert files_in(index) == before
    remove(index, ["image-0001"])
    with pytest.raises(QueryError, match="no row of 1 of the ids: 'image-0001'"):
        remove(index, ["image-0001"])


def test_damaged_tombstones_are_found_out_and_not_used_again(index):
    change = remove(index, ["image-0001", "image-0002"])
    file = index / change.manifest.deletes.file
    for rows in ([1, 1], [2, 1], [1, ROWS], [-1, 2]):
        np.array(rows, "<i8").tofile(file)
        with pytest.raises(ArtefactError, match="damaged: it should name 2 rows below 60 in order"):
            Index.open(index)
    rollback(index)
    again = remove(index, ["image-0001", "image-0002"])
    assert again.manifest.deletes == change.manifest.deletes
    assert Index.open(index, check="content").removed().tolist() == [1, 2]


# Versions


def test_versions_are_a_line_that_can_be_gone_back(made, index, queries):
    hits = [Index.open(index).search(queries, 9)]
    add(index, made / "more")
    remove(index, ["image-0003"])
    hits.append(Index.open(index).search(queries, 9))
    assert rollback(index).manifest.operation == "rollback to 2"
    assert rollback(index, 1).manifest.number == 5
    assert_same(Index.open(index).search(queries, 9), hits[0])
    assert_same(Index.open(index, version=3).search(queries, 9), hits[1])
    assert Index.open(index).verify()[1] == "4 earlier versions, and the checksums of their manifests agree"
    listed = versions(index)
    assert [found["version"] for found in listed] == [5, 4, 3, 2, 1]
    assert [found["operation"] for found in listed] == [
        "rollback to 1",
        "rollback to 2",
        "remove 1 row",
        "add 14 rows",
        "build",
    ]
    assert [found["rows"] for found in listed] == [60, 74, 73, 74, 60]
    assert not rollback(index, 5).changed
    with pytest.raises(ArtefactError, match="no version 9; there are: 1, 2, 3, 4, 5"):
        rollback(index, 9)
    # After adding again, rows have the numbers that others had.
    add(index, made / "more", shards=2)
    assert Index.open(index).verify()
    assert [len(Index.open(index, version=number).manifest.shards) for number in (2, 6)] == [4, 5]


def test_a_first_version_has_none_before_it(index):
    with pytest.raises(ArtefactError, match="one version only"):
        rollback(index)


def test_a_change_of_an_earlier_manifest_is_found_out(index):
    remove(index, ["image-0003"])
    path = next(index.glob("manifest-000001-*.json"))
    path.write_text(path.read_text().replace('"rows": 20', '"rows": 21', 1))
    for use in (lambda: rollback(index), lambda: versions(index), Index.open(index).verify):
        with pytest.raises(ArtefactError, match=r"manifest-000001-\w+\.json: damaged: its checksum"):
            use()
    assert Index.open(index).rows == 59


def test_pruning_deletes_what_no_version_needs(made, index, queries):
    add(index, made / "more")
    remove(index, ["image-0003"])
    reader = Index.open(index)
    hits = reader.search(queries, 9)
    change = compact(index, keep=1)
    assert (change.pruned.versions, change.pruned.kept) == ([3, 2, 1], [4])
    assert [found["version"] for found in versions(index)] == [4]
    assert len(list(index.glob("shards/*"))) == len(change.manifest.shards)
    assert list(index.glob("deletes/*")) == []
    assert_same(reader.search(queries, 9), hits)
    (index / "README").write_text("mine")
    (index / "manifest-notes.txt").write_text("mine")
    half = index / "shards" / "0123456789abcdef"
    half.mkdir()
    for name in (
        f"shards/{half.name}/codes.bin.tmp-0123456789ab",
        "deletes/0123456789abcdef.bin",
        "manifest-000009-0123456789ab.json",
        "CURRENT.tmp-ba9876543210",
    ):
        (index / name).parent.mkdir(exist_ok=True)
        (index / name).write_bytes(b"left behind")
    expected = prune(index, dry_run=True)
    assert (expected.files, expected.bytes, expected.versions) == (4, 44, [])
    assert (index / "manifest-000009-0123456789ab.json").exists()
    assert prune(index) == expected
    assert not half.exists()
    assert (index / "README").exists()
    assert (index / "manifest-notes.txt").exists()
    assert prune(index).files == 0
    assert Index.open(index).verify()
    with pytest.raises(QueryError, match="at least the current version is kept"):
        prune(index, 0)


def test_files_beside_an_index_that_are_not_of_it_are_never_deleted(made, tmp_path):
    mine = {
        "shards/train-0000.tar",
        "shards/extra/0001.tar",
        "shards/0123456789abcdef/deeper/0002.tar",
        "approximate/notes.txt",
        "local/0123456789ABCDEF/photo.jpg",
        "deletes/list.bin",
        "deletes/0123456789abcdef/0.bin",
        "manifest-7.json",
        "manifest-000007.json",
        "manifest-000007.json.tmp-mine",
        "CURRENT.tmp-mine",
    }
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "shards" / "to come").mkdir()
    build(made / "first", tmp_path, shards=3)
    remove(tmp_path, ["image-0003"])
    assert compact(tmp_path, keep=1).pruned.versions == [2, 1]
    assert prune(tmp_path, 1).files == 0
    assert {name for name in files_in(tmp_path) if (tmp_path / name).read_bytes() == b"mine"} == mine
    assert (tmp_path / "shards" / "to come").is_dir()


OPERATIONS = {
    "add": lambda index, made: add(index, made / "more", shards=2),
    "replace": lambda index, made: add(index, made / "again", replace=True),
    "remove": lambda index, made: remove(index, ["image-0005", "image-0033"]),
    "compact": lambda index, made: compact(index),
    "rollback": lambda index, made: rollback(index),
    "prune": lambda index, made: prune(index, 1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_anywhere_the_version_before_stays_and_the_same_again_succeeds(made, tmp_path, queries, name):
    start = shutil.copytree(made / "index", tmp_path / "start")
    write(made / "again", draw_codes(3, BITS, seed=1), images_of(3, 30))
    remove(start, ["image-0001", "image-0059"])
    add(start, write(tmp_path / "one", draw_codes(2, BITS, seed=2), images_of(2, 90)))
    whole = shutil.copytree(start, tmp_path / "whole")
    OPERATIONS[name](whole, made)
    keep = 1 if name == "prune" else 9 if name != "compact" else 2
    survives_kills(start, lambda index: OPERATIONS[name](index, made), files_in(whole), queries, keep)


# Writers


def test_a_second_writer_is_told_who_is_writing(made, index):
    with writing_alone(Folder(index), "compact"):
        uses = [
            lambda: add(index, made / "more"),
            lambda: build(made / "first", index),
            lambda: prune(index),
        ]
        for use in uses:
            with pytest.raises(ArtefactError, match=r"at work: 'compact', process \d+ on .+ since \d{4}-"):
                use()
        assert Index.open(index).rows == 60
    assert not (index / ".lock").exists()
    assert add(index, made / "more").changed


def test_the_lock_of_a_dead_writer_is_free_at_once(index):
    program = textwrap.dedent(
        """
        import os, sys
        from ray_retrieval.lock import writing_alone
        from ray_retrieval.storage import Folder
        with writing_alone(Folder(sys.argv[1]), "add"):
            os._exit(9)
        """
    )
    assert subprocess.run([sys.executable, "-c", program, str(index)], check=False).returncode == 9
    assert json.loads((index / ".lock").read_text())["operation"] == "add"
    assert remove(index, ["image-0003"]).changed
    assert not (index / ".lock").exists()


# What was written for one thing is never taken for another


def test_rows_that_come_again_are_written_at_their_new_place(made, index):
    for _ in range(2):
        add(index, made / "more")
        remove(index, [f"image-{row:04d}" for row in range(ROWS, ROWS + MORE)])
    add(index, made / "more")
    opened = Index.open(index)
    assert opened.verify()
    assert opened.row_of(f"image-{ROWS:04d}") == ROWS + 2 * MORE


def test_the_same_vectors_are_built_anew_with_other_ids_labels_and_lengths(tmp_path):
    vectors = np.eye(4, dtype=np.float32) * np.float32(0.9995)
    given = [
        {"ids": list("abcd"), "labels": ["x"] * 4},
        {"ids": list("abce"), "labels": ["x"] * 4},
        {"ids": list("abce"), "labels": ["x"] * 3 + [None]},
        {"ids": list("abce"), "labels": ["x"] * 3 + [None], "normalise": True},
    ]
    for number, settings in enumerate(given, start=1):
        build(imported(vectors, **settings), tmp_path)
        opened = Index.open(tmp_path)
        known = opened.records(opened.living())
        assert opened.version == number
        assert known["id"].to_pylist() == settings["ids"]
        assert known["label"].null_count == settings["labels"].count(None)
    assert (opened.vectors() == np.eye(4)).all()


def test_other_rows_that_are_left_are_written_anew(index):
    for gone in ("image-0001", "image-0002"):
        remove(index, [gone])
        compact(index, keep=9)
        opened = Index.open(index)
        assert opened.verify()
        assert (opened.rows, opened.row_of(gone)) == (ROWS - 1, None)
        rollback(index, 1)


def test_the_same_rows_are_added_with_other_numbers_of_classes(tmp_path):
    for name, classes in {"first": ["a"], "other": ["c"], "more": ["b", "a"]}.items():
        images = draw_images(3).set_column(0, "id", pa.array([f"{name}-{row}" for row in range(3)]))
        images = images.set_column(2, "label", pa.array([0, 0, len(classes) - 1]))
        write(tmp_path / name, draw_codes(3, 8), images, class_names=classes)
    for name, expected in (("first", [5, 0, 1, 2]), ("other", [5])):
        build(tmp_path / name, tmp_path / "index")
        add(tmp_path / "index", tmp_path / "more")
        opened = Index.open(tmp_path / "index")
        assert opened.verify()
        assert opened.living("label = b").tolist() == [3, 4]
        assert opened.living("label = a").tolist() == sorted(expected)
