"""The embeddings artefact: what is written is read, and nothing half written or damaged is."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
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

from ray_retrieval import storage
from ray_retrieval.descriptors import Codes, DescriptorKind, Form
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.search import Index, build, embeddings
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.storage import Folder, fingerprint, write_description


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """100 images in three parts, two of them broken."""
    folder = tmp_path_factory.mktemp("embeddings") / "made"
    write(folder, draw_codes(100, 12), draw_images(100), skip={5, 99}, class_names=list("abcdefg"))
    return folder


@pytest.mark.parametrize("bits", [1, 12, 64, 130])
def test_codes_and_ids_come_back(tmp_path, bits):
    codes, images = draw_codes(100, bits), draw_images(100)
    found = Embeddings.open(write(tmp_path, codes, images), check="content")
    assert (found.rows, found.form.size, found.model, found.error_count) == (100, bits, "model-a", 0)
    np.testing.assert_array_equal(found.descriptors.data, codes.data)
    assert found.ids == images["id"].to_pylist()
    assert found.errors == []


def test_labels_come_back(tmp_path):
    codes = draw_codes(100, 8)
    single = Embeddings.open(write(tmp_path / "int", codes, draw_images(100)))
    assert single.labels.tolist() == [row % 7 for row in range(100)]
    assert single.labels.dtype == np.int64
    several = Embeddings.open(write(tmp_path / "list", codes, draw_images(100, label="list"))).labels
    assert several.shape == (100, 7)
    assert several.dtype == np.bool_
    assert [set(np.flatnonzero(row)) for row in several] == [{row % 3, row % 5} for row in range(100)]
    assert Embeddings.open(write(tmp_path / "none", codes, draw_images(100, label="none"))).labels is None


def test_one_missing_label_means_none(tmp_path):
    images = draw_images(3).set_column(2, "label", pa.array([1, None, 2], pa.int64()))
    assert Embeddings.open(write(tmp_path, draw_codes(3, 8), images)).labels is None


def test_broken_images_are_left_out_and_listed(written):
    found = Embeddings.open(written)
    assert (found.rows, found.error_count) == (98, 2)
    assert found.errors == [("image-0005", "not an image"), ("image-0099", "not an image")]
    assert "image-0005" not in found.ids
    np.testing.assert_array_equal(
        found.descriptors.data, np.delete(draw_codes(100, 12).data, [5, 99], axis=0)
    )
    assert found.read_part(0)["row"].to_pylist() == [row for row in range(40) if row != 5]


def test_a_part_without_any_good_image(tmp_path):
    found = Embeddings.open(write(tmp_path, draw_codes(60, 8), draw_images(60), skip=set(range(40))))
    assert (found.rows, len(found.parts), len(found.descriptors)) == (20, 2, 20)


def test_further_columns_are_kept(tmp_path):
    images = draw_images(50, price=pa.array(range(50), pa.int32()))
    found = Embeddings.open(write(tmp_path, draw_codes(50, 8), images))
    assert found.read_part(1, ["price"])["price"].to_pylist() == list(range(40, 50))
    assert found.schema.names == ["row", "id", "image", "label", "price", "code"]
    assert found.schema.field("code").metadata == {b"bits": b"8"}


def test_images_can_be_left_out(tmp_path):
    found = Embeddings.open(write(tmp_path, draw_codes(5, 8), draw_images(5), keep_images=False))
    assert found.read_part(0)["image"].to_pylist() == [{"bytes": None, "path": None}] * 5
    assert found.parts[0]["images"] == 0


def test_a_column_without_values_in_one_part_has_the_type_of_the_others(tmp_path):
    images = draw_images(80)
    folder = Folder(tmp_path)
    codes = draw_codes(40, 8)
    empty = images.slice(0, 40).set_column(2, "label", pa.nulls(40))
    parts = [
        embeddings.write_part(
            folder, part, embeddings.part_table(rows, codes, first_row=40 * part, skip={}), key="", errors=[]
        )
        for part, rows in enumerate([empty, images.slice(40)])
    ]
    embeddings.finish(
        folder,
        model="m",
        form=Form(DescriptorKind.CODES, 8),
        classes=7,
        class_names=None,
        parts=parts,
        source="s",
    )
    assert Embeddings.open(folder).schema.field("label").type == pa.int64()
    assert Embeddings.open(folder).labels is None
    build(folder, tmp_path / "index", shards=2)
    records = Index.open(tmp_path / "index").records([0, 79])
    assert records["label"].to_pylist() == [None, 79 % 7]


@pytest.mark.parametrize("name", ["row", "code", "path"])
def test_a_column_with_a_reserved_name_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=f"column '{name}'"):
        write(tmp_path, draw_codes(3, 8), draw_images(3, **{name: pa.array([1, 2, 3])}))


def test_the_same_input_gives_the_same_bytes(tmp_path):
    codes, images = draw_codes(100, 12), draw_images(100, label="list")
    write(tmp_path / "a", codes, images)
    write(tmp_path / "b", codes, images)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


def test_another_content_has_another_fingerprint(tmp_path):
    images = draw_images(10)
    made = [
        Embeddings.open(write(tmp_path / str(seed), draw_codes(10, 8, seed=seed), images)) for seed in (0, 1)
    ]
    assert made[0].fingerprint != made[1].fingerprint


@pytest.mark.parametrize("before_rename", [True, False])
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, before_rename):
    codes, images = draw_codes(100, 12), draw_images(100)
    write(tmp_path / "whole", codes, images, skip={5})
    expected = files_in(tmp_path / "whole")
    for number in range(1, 9):  # three parts with their descriptions, the errors, the description
        folder = tmp_path / f"killed-{number}"
        with killed_at_write(monkeypatch, number, before_rename=before_rename), pytest.raises(KilledError):
            write(folder, codes, images, skip={5})
        if number < 8 or before_rename:
            with pytest.raises(ArtefactError, match=r"embeddings\.json is missing"):
                Embeddings.open(folder)
        write(folder, codes, images, skip={5})
        assert files_in(folder) == expected


def test_writing_over_another_models_embeddings_never_shows_a_mixture(tmp_path, monkeypatch):
    images = draw_images(100)
    old, new = draw_codes(100, 12, seed=1), draw_codes(100, 12, seed=2)
    write(tmp_path / "whole", new, images, model="model-b", part_rows=60)
    for number in range(1, 7):
        folder = tmp_path / f"killed-{number}"
        write(folder, old, images)
        with killed_at_write(monkeypatch, number, before_rename=True), pytest.raises(KilledError):
            write(folder, new, images, model="model-b", part_rows=60)
        if number == 1:  # nothing has taken the place of anything
            assert Embeddings.open(folder, check="content").model == "model-a"
        else:
            with pytest.raises(ArtefactError):
                Embeddings.open(folder)
        write(folder, new, images, model="model-b", part_rows=60)
        assert files_in(folder) == files_in(tmp_path / "whole")


def test_while_parts_are_written_over_there_are_none(written, tmp_path):
    shutil.copytree(written, tmp_path / "made")
    first = Embeddings.open(tmp_path / "made").read_part(0)
    embeddings.write_part(Folder(tmp_path / "made"), 0, first, key="another", errors=[])
    with pytest.raises(ArtefactError, match=r"embeddings\.json is missing"):
        Embeddings.open(tmp_path / "made")


def test_a_part_counts_only_for_its_key_and_whole(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "copy")
    assert embeddings.finished_part(Folder(folder), 1, "model-a 40")["rows"] == 40
    assert embeddings.finished_part(Folder(folder), 1, "model-b 40") is None
    assert embeddings.finished_part(Folder(folder), 9, "model-a 40") is None
    DAMAGES["changed"](folder / "part-00001.parquet")
    assert embeddings.finished_part(Folder(folder), 1, "model-a 40") is None
    (folder / "part-00002.json").write_text("{")
    assert embeddings.finished_part(Folder(folder), 2, "model-a 80") is None


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["embeddings.json", "errors.parquet", "part-00000.parquet", "part-00002.parquet"]
)
def test_damage_is_named(written, tmp_path, name, damage):
    folder = shutil.copytree(written, tmp_path / "copy")
    DAMAGES[damage](folder / name)
    with pytest.raises(ArtefactError, match=name):
        Embeddings.open(folder, check="content")
    if damage != "changed":
        with pytest.raises(ArtefactError, match=name):
            Embeddings.open(folder)


def test_damage_inside_a_part_of_the_right_size_is_named_when_read(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "copy")
    part = folder / "part-00001.parquet"
    part.write_bytes(b"\0" * part.stat().st_size)
    with pytest.raises(ArtefactError, match=r"part-00001\.parquet: damaged"):
        _ = Embeddings.open(folder).descriptors


def test_an_empty_folder_and_none_at_all(tmp_path):
    with pytest.raises(ArtefactError, match=r"embeddings\.json is missing"):
        Embeddings.open(tmp_path)
    with pytest.raises(ArtefactError, match=r"nowhere: no embeddings here: no such folder"):
        Embeddings.open(tmp_path / "nowhere")


def test_vectors_come_back_bit_for_bit(tmp_path):
    vectors, images = draw_vectors(100, 5), draw_images(100)
    found = Embeddings.open(write(tmp_path, vectors, images, skip={3, 99}))
    kept = np.delete(vectors.data, [3, 99], axis=0)
    assert (found.form, found.rows) == (Form(DescriptorKind.VECTORS, 5), 98)
    np.testing.assert_array_equal(found.descriptors.data, kept)
    # Any program reads them: a Parquet column of lists.
    table = pq.read_table(str(tmp_path / "part-00000.parquet"))
    assert table["vector"][0].as_py() == kept[0].tolist()


def test_what_does_not_fit_in_memory_is_mapped_from_a_file(tmp_path, monkeypatch):
    vectors = draw_vectors(70, 5)
    write(tmp_path, vectors, draw_images(70), part_rows=30)
    monkeypatch.setattr(embeddings, "_IN_MEMORY", 70 * 5 * 4 - 1)
    found = Embeddings.open(tmp_path).descriptors.data
    assert isinstance(found.base, np.memmap)
    np.testing.assert_array_equal(found, vectors.data)


def test_damage_in_a_store_is_told_with_the_uri_of_the_file(written, tmp_path, monkeypatch):
    shutil.copytree(written, tmp_path / "bucket" / "made")
    options = "?endpoint_override=http%3A%2F%2Fhost%3A9000"
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "store_at", lambda uri: (store, storage.split_query(uri)[0].removeprefix("s3://"))
    )
    made = Embeddings.open(f"s3://bucket/made{options}")
    part = tmp_path / "bucket" / "made" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(ArtefactError, match="damaged") as caught:
        made.read_part(1)
    assert caught.value.where == f"s3://bucket/made/part-00001.parquet{options}"
    description = part.with_name("embeddings.json")
    description.write_text(description.read_text().replace("model-a", "model-b"))
    with pytest.raises(ArtefactError, match="its fingerprint") as caught:
        Embeddings.open(made.folder)
    assert caught.value.where == f"s3://bucket/made/embeddings.json{options}"


def test_other_kinds_are_refused(tmp_path):
    folder = Folder(tmp_path)
    other = Form(DescriptorKind.CODES, 8)
    embeddings.finish(folder, model="m", form=other, classes=0, class_names=None, parts=[], source="s")
    text = (tmp_path / "embeddings.json").read_text().replace('"codes"', '"local"')
    (tmp_path / "embeddings.json").write_text(text)
    with pytest.raises(ArtefactError, match="damaged: its fingerprint"):
        Embeddings.open(folder)
    body = {**json.loads(text), "bits": 0}
    body = {key: value for key, value in body.items() if key not in ("format", "version", "fingerprint")}
    body["fingerprint"] = fingerprint(body)
    write_description(folder, "embeddings.json", kind="embeddings", version=1, body=body)
    with pytest.raises(ArtefactError, match="kind 'local'"):
        Embeddings.open(folder)


def test_empty_embeddings(tmp_path):
    found = Embeddings.open(write(tmp_path, Codes(np.zeros((0, 2), np.uint8), 12), draw_images(0)))
    assert (found.rows, found.ids, found.descriptors.data.shape) == (0, [], (0, 2))
