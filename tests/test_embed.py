"""Descriptors of a photograph or a folder, in one process."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from samples import coloured_table, png, sized

from ray_retrieval import embed, model
from ray_retrieval.data.table import open_images
from ray_retrieval.descriptors import Local
from ray_retrieval.errors import ArtefactError, DataError, RecipeError
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.methods import build
from ray_retrieval.search.columns import descriptors_in
from ray_retrieval.storage import Folder

KINDS = {"vectors": "xbm", "codes": "greedyhash"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of each kind, and a folder of five images, one of which is broken."""
    folder = tmp_path_factory.mktemp("embed")
    for kind, name in KINDS.items():
        torch.manual_seed(0)
        backbone = BackboneConfig(name="small", weights="none")
        config = sized(name, 12, backbone=backbone, image={"size": 16})
        model.save(
            Folder(folder / kind),
            config=config.model_dump(mode="json"),
            weights=build(config, classes=3).state_dict(),
            classes=3,
            class_names=None,
            precision="float32",
            training={},
            metrics={},
        )
    table = coloured_table(4)
    (folder / "images").mkdir()
    for row in range(4):
        (folder / "images" / f"{row}.png").write_bytes(table.image_bytes(row))
    (folder / "images" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_a_folder_give_what_the_encoder_gives(made, kind):
    encoder = model.Encoder(str(made / kind))
    table = coloured_table(4)
    expected, _ = encoder.encode([table.image_bytes(row) for row in range(4)])
    found = embed.embed(str(made / kind), [open_images(str(made / "images"))])
    assert [name.rpartition("/")[2] for name in found.ids] == ["0.png", "1.png", "2.png", "3.png"]
    assert [name.rpartition("/")[2] for name, _ in found.failures] == ["broken.png"]
    np.testing.assert_allclose(found.descriptors.data, expected.data, atol=1e-6)
    single = embed.embed(made / kind, open_images(made / "images" / "2.png"))
    np.testing.assert_allclose(single.descriptors.data, expected.data[2:3], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", embed.SUFFIXES)
def test_a_file_holds_them_for_other_programs(made, tmp_path, kind, suffix):
    found = embed.embed(str(made / kind), [open_images(str(made / "images"))])
    embed.save(found, tmp_path / f"out{suffix}")
    if suffix == ".npy":
        data = np.load(tmp_path / "out.npy")
        assert json.loads((tmp_path / "out.ids.json").read_text()) == found.ids
    else:
        table = pq.read_table(tmp_path / "out.parquet")
        assert table["id"].to_pylist() == found.ids
        assert table.schema.metadata[b"ray_retrieval.model"].decode() == found.model
        read = table[kind[:-1]].to_pylist()
        data = np.stack([np.frombuffer(row, np.uint8) for row in read]) if kind == "codes" else np.array(read)
    np.testing.assert_array_equal(data, found.descriptors.data)
    assert {path.name for path in tmp_path.iterdir()} <= {f"out{suffix}", "out.ids.json"}


def test_they_can_be_printed(made):
    found = embed.embed(str(made / "vectors"), [open_images(str(made / "images"))])
    numbers = json.loads(found.rows_in_words()[1])
    np.testing.assert_allclose(numbers, found.descriptors.data[1], rtol=1e-5)
    said = json.loads(json.dumps(found.as_json()))
    assert (said["kind"], said["dimension"], len(said["images"])) == ("vectors", 12, 4)
    np.testing.assert_array_equal(np.float32(said["images"][3]["vector"]), found.descriptors.data[3])
    codes = embed.embed(str(made / "codes"), [open_images(str(made / "images"))])
    assert bytes.fromhex(codes.rows_in_words()[0]) == codes.descriptors.data[0].tobytes()


@pytest.mark.parametrize("ask", ["encode", "class_probabilities"])
def test_an_encoder_says_that_it_takes_the_bytes_of_files(made, ask):
    encoder, data = model.Encoder(made / "codes"), coloured_table(4).image_bytes(0)
    for wrong in ("0.png", made / "images" / "0.png", [made / "images" / "0.png"], np.zeros((8, 8, 3))):
        with pytest.raises(DataError, match=r"^image 0: an image is the bytes .*read_bytes.*encode_table"):
            getattr(encoder, ask)(wrong)
    expected, _ = getattr(encoder, ask)([data])
    for given in (data, (data,), iter([data]), [bytearray(data)]):
        found, failures = getattr(encoder, ask)(given)
        np.testing.assert_array_equal(getattr(found, "data", found), getattr(expected, "data", expected))
        assert failures == {}


def test_sets_of_local_features_are_saved_and_counted(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(3, 4))
    sets = Local(
        np.array([0, 2, 2, 3]),
        numbers.astype(np.float16),
        numbers[:, :2].astype(np.float32),
        np.array([1, 0.5, 2], np.float32),
        np.array([5, 4, 6], np.float32),
        np.full((3, 2), 64, np.int32),
        np.ones((3, 1), np.float32),
    )
    found = embed.Embedded(list("abc"), [None] * 3, sets, "model-a", [])
    embed.save(found, tmp_path / "out.parquet")
    read = descriptors_in(pq.read_table(tmp_path / "out.parquet"), found.form)
    np.testing.assert_array_equal(read.data, sets.data)
    np.testing.assert_array_equal(read.offsets, sets.offsets)
    with pytest.raises(RecipeError, match=r"no one array.*\.parquet"):
        embed.save(found, tmp_path / "out.npy")
    assert {path.name for path in tmp_path.iterdir()} == {"out.parquet"}
    assert found.rows_in_words() == ["2 local features", "0 local features", "1 local feature"]
    said = json.loads(json.dumps(found.as_json()))
    assert (said["kind"], said["dimension"], said["vectors"], said["rows"]) == ("local", 4, 1, 3)
    assert [image["features"] for image in said["images"]] == [2, 0, 1]
    assert said["images"][0]["scores"] == [5, 4]
    np.testing.assert_array_equal(np.float32(said["images"][2]["locations"]), sets.locations[2:])


def test_files_of_one_name_are_told_apart_by_their_paths(made, tmp_path):
    places = [tmp_path / folder / "x.png" for folder in ("a", "b")]
    for row, place in enumerate(places):
        place.parent.mkdir()
        place.write_bytes(coloured_table(4).image_bytes(row))
    found = embed.embed(str(made / "vectors"), [open_images(str(place)) for place in places])
    assert found.ids == [str(place) for place in places]


def test_an_array_and_its_ids_are_replaced_together(made, tmp_path, monkeypatch):
    found = embed.embed(made / "codes", open_images(made / "images"))
    embed.save(found, tmp_path / "codes.NPY")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {"codes.NPY", "codes.ids.json"}

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(ArtefactError, match="No space left"):
        embed.save(replace(found, ids=[*reversed(found.ids)]), tmp_path / "codes.NPY")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_cannot_be_done_is_said(made, tmp_path):
    found = embed.embed(str(made / "vectors"), [open_images(str(made / "images"))])
    with pytest.raises(RecipeError, match=r"'\.csv'.*end the name in \.npy or \.parquet"):
        embed.save(found, tmp_path / "out.csv")
    (tmp_path / "x.png").write_bytes(png(np.zeros((8, 8, 3), np.uint8))[:30])
    for paths in ("x.png", ["x.png"]):
        with pytest.raises(DataError, match=r"images come as tables, got str \(give open_images"):
            embed.embed(made / "vectors", paths)
    with pytest.raises(DataError, match="none of the images"):
        embed.embed(str(made / "vectors"), [open_images(str(tmp_path / "x.png"))])
