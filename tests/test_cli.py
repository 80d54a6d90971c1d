"""What a user can do wrong ends in one line and exit code 2."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from samples import coloured_table

from ray_retrieval import cli, model, search
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.methods.greedyhash import GreedyHash, GreedyHashConfig
from ray_retrieval.model import Encoder
from ray_retrieval.search import embeddings
from ray_retrieval.storage import Folder

QUICKSTART = Path(__file__).parents[1] / "jobs" / "quickstart.yaml"


def call(monkeypatch, capsys, *arguments):
    """Exit code, stdout, stderr of the command line."""
    monkeypatch.setattr(sys, "argv", ["ray-retrieval", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture
def cli_call(monkeypatch, capsys):
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


def save_model(folder, seed=0):
    torch.manual_seed(seed)
    backbone = BackboneConfig(name="small", weights="none")
    config = GreedyHashConfig(bits=16, backbone=backbone, image={"size": 16})
    made = GreedyHash(config, classes=3)
    model.save(
        Folder(folder),
        config=config.model_dump(mode="json"),
        weights=made.state_dict(),
        classes=3,
        class_names=["red", "green", "blue"],
        precision="float32",
        training={"epoch": 1},
        metrics={},
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A model, and an index of 30 images in two shards beside it."""
    folder = tmp_path_factory.mktemp("built")
    save_model(folder / "model")
    table = coloured_table(30)
    encoder = Encoder(str(folder / "model"))
    codes, failures = encoder.encode([table.image_bytes(row) for row in range(30)])
    assert not failures
    write_embeddings(folder / "embeddings", table, codes, encoder.fingerprint)
    search.build(folder / "embeddings", folder / "index", shards=2)
    (folder / "query.png").write_bytes(table.image_bytes(7))
    return folder


def write_embeddings(folder, table, codes, fingerprint):
    where = Folder(folder)
    part = embeddings.part_table(table.table, codes, first_row=0, skip={})
    embeddings.finish(
        where,
        model=fingerprint,
        kind=DescriptorKind.CODES,
        bits=codes.bits,
        classes=3,
        class_names=["red", "green", "blue"],
        parts=[embeddings.write_part(where, 0, part, key="k", errors=[])],
        source=table.fingerprint,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["run", QUICKSTART, "train.epoch=3"], "did you mean 'epochs'?"),
        (["run", QUICKSTART, "method.bits=0"], "'method.bits'"),
        (["train", QUICKSTART, "train.epochs=few"], "'train.epochs'"),
        (["search", "nowhere", "a.png"], "nowhere"),
        (["index", "info", "nowhere"], "nowhere"),
        (["index", "verify", "nowhere"], "nowhere"),
        (["index", "build", "nowhere", "--out", "x"], "nowhere"),
        (["encode", "nowhere", "also-nowhere", "--out", "x"], "nowhere"),
        (["serve", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(cli_call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli_call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(cli_call):
    code, _, err = cli_call("--debug", "run", "nowhere.yaml")
    assert code == 2
    assert "Traceback" in err


def test_unknown_commands_are_usage_errors(cli_call):
    assert cli_call("serch")[0] == 2
    assert cli_call("run")[0] == 2


def test_search_prints_the_nearest_first(cli_call, built):
    code, out, _ = cli_call("search", built / "index", built / "query.png", "-k", 3)
    assert code == 0
    assert "image-0007" in out
    assert "green" in out


def test_search_as_json(cli_call, built):
    code, out, _ = cli_call("search", built / "index", built / "query.png", "-k", 3, "--json")
    found = json.loads(out)["queries"][0]["hits"]
    assert code == 0
    assert [hit["rank"] for hit in found] == [1, 2, 3]
    assert found[0]["distance"] == 0
    assert "image-0007" in [hit["id"] for hit in found if hit["distance"] == 0]


def test_search_saves_a_picture(cli_call, built, tmp_path):
    code, _, _ = cli_call("search", built / "index", built / "query.png", "--picture", tmp_path / "grid.png")
    assert code == 0
    assert (tmp_path / "grid.png").stat().st_size > 1000
    code, _, err = cli_call(
        "search", built / "index", built / "query.png", "--picture", tmp_path / "grid.xyz"
    )
    assert code == 2
    assert "grid.xyz" in err


def test_a_query_that_is_no_image_is_named(cli_call, built, tmp_path):
    (tmp_path / "words.jpg").write_text("not an image")
    code, _, err = cli_call("search", built / "index", tmp_path / "words.jpg")
    assert code == 2
    assert "words.jpg" in err
    code, _, err = cli_call("search", built / "index", tmp_path / "missing.jpg")
    assert code == 2
    assert "missing.jpg: no such image file" in err


def test_an_index_of_another_model_is_refused_with_both_named(cli_call, built, tmp_path):
    save_model(tmp_path / "other", seed=1)
    mine, other = (model.read_model_description(Folder(f))[1] for f in (built / "model", tmp_path / "other"))
    code, _, err = cli_call("search", built / "index", built / "query.png", "--model", tmp_path / "other")
    assert code == 2
    assert mine in err
    assert other in err


def test_a_damaged_shard_is_named(cli_call, built, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    victim = sorted((tmp_path / "copy" / "index").rglob("codes.bin"))[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 255
    victim.write_bytes(data)
    code, _, err = cli_call("index", "verify", tmp_path / "copy" / "index")
    assert code == 2
    assert str(victim) in err
    assert cli_call("index", "verify", built / "index")[0] == 0


def test_info_as_json(cli_call, built):
    code, out, _ = cli_call("index", "info", built / "index", "--json")
    info = json.loads(out)
    assert code == 0
    assert info["rows"] == 30
    assert info["bits"] == 16


def folder_of_images(folder, counts):
    """Class folders with so many images each."""
    table = coloured_table(sum(counts.values()))
    row = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(table.image_bytes(row))
            row += 1
    return folder


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, "nothing is there"),
        ({}, "no image"),
        ({"one": 20}, "one class"),
        ({"one": 20, "two": 1}, "'two'"),
    ],
)
def test_folders_that_cannot_be_trained_on(cli_call, tmp_path, counts, message):
    images = tmp_path / "photos"
    if counts is not None:
        images.mkdir()
        folder_of_images(images, counts)
    data = f"data={{name: images, database: {images}}}"
    code, _, err = cli_call("run", QUICKSTART, data, f"output={tmp_path / 'out'}")
    print(err)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_named_before_anything_starts(cli_call, tmp_path):
    code, _, err = cli_call(
        "run",
        QUICKSTART,
        "method.backbone={name: resnet18, weights: nowhere.pth}",
        f"output={tmp_path / 'out'}",
    )
    assert code == 2
    assert "nowhere.pth: no such weights file" in err
    assert not (tmp_path / "out").exists()


def test_fresh_deletes_nothing_that_is_no_run(cli_call, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    code, _, err = cli_call("run", QUICKSTART, f"output={tmp_path}", "--fresh")
    assert code == 2
    assert "is no run" in err
    assert (tmp_path / "letters.txt").read_text() == "dear"
