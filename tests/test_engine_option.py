"""`--engine` from the command line to the hits."""

import json
import shutil
from typing import get_args

import pytest
from export_parts import made, saved
from samples import coloured_table
from test_cli import write_embeddings

from ray_retrieval import config, engines, export, search
from ray_retrieval.model import Encoder
from ray_retrieval.query import Searcher
from ray_retrieval.search.embeddings import Embeddings


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A model, its export, and an index of twelve images beside it."""
    folder = tmp_path_factory.mktemp("engine")
    table = coloured_table(12)
    source = saved(folder / "model", made("greedyhash", table))
    encoder = Encoder(source)
    codes, _ = encoder.encode_table(table)
    write_embeddings(folder / "embeddings", table, codes, encoder.fingerprint)
    search.build(folder / "embeddings", folder / "index")
    (folder / "query.png").write_bytes(table.image_bytes(7))
    return folder


def test_search_runs_the_export_once_there_is_one(cli_call, built):
    arguments = ("search", built / "index", built / "query.png", "-k", "3", "--json")
    code, out, err = cli_call(*arguments, "--engine", "onnx")
    assert (code, out) == (2, "")
    assert f"make it: ray-retrieval export {built}/model)" in err
    assert len(err.strip().splitlines()) == 1
    assert cli_call("export", built / "model")[0] == 0
    own = cli_call(*arguments)
    assert cli_call(*arguments, "--engine", "onnx") == own
    assert json.loads(own[1])["queries"][0]["hits"][0]["id"] == "image-0007"


def test_a_warning_names_the_option(cli_call, built, tmp_path):
    shutil.copytree(built / "model", tmp_path / "model")
    found = Embeddings.open(built / "embeddings")
    table = coloured_table(12)
    write_embeddings(tmp_path / "embeddings", table, found.descriptors, found.model, engine="onnx-int8")
    search.build(tmp_path / "embeddings", tmp_path / "index")
    code, _, err = cli_call("search", tmp_path / "index", built / "query.png", "-k", "1")
    assert code == 0
    assert err.startswith("warning rows were encoded by onnx-int8, the queries by torch: ")
    assert "search with --engine onnx-int8" in err


def test_what_another_tool_left_beside_an_index_is_passed_over(cli_call, built, tmp_path):
    for name in ("index", "model", "query.png"):
        (shutil.copytree if (built / name).is_dir() else shutil.copy)(built / name, tmp_path / name)
    (tmp_path / "a").mkdir()  # before the model
    (tmp_path / "a" / "model.json").write_text('{"modelTopology": {}}')
    assert cli_call("search", tmp_path / "index", tmp_path / "query.png", "-k", "1")[0] == 0
    shutil.rmtree(tmp_path / "model")
    code, _, err = cli_call("search", tmp_path / "index", tmp_path / "query.png", "-k", "1")
    assert code == 2
    assert "beside it a cannot be used, " in err


def test_an_unknown_engine_is_named_with_those_there_are(cli_call, built):
    code, _, err = cli_call("search", built / "index", built / "query.png", "--engine", "x")
    assert code == 2
    assert "unknown engine 'x', known are: torch, onnx, onnx-int8" in err
    code, _, err = cli_call("encode", built / "model", built, "--out", built / "out", "--engine", "x")
    assert code == 2
    assert "'torch', 'onnx' or 'onnx-int8'" in err
    assert set(engines.ENGINES) == set(get_args(config.EngineName))


def test_an_engine_is_named_once(cli_call, built):
    twice = ("--engine", "onnx", "--set", "engine=torch")
    for command in (("encode", built / "model", built, "--out", built / "out"), ("serve", built / "index")):
        code, _, err = cli_call(*command, *twice)
        assert (code, err.splitlines()) == (
            *(2, ["error: --engine: the engine is set by --set too (leave one of them out)"]),
        )


def test_serve_looks_for_the_export_before_it_starts(cli_call, built):
    code, _, err = cli_call("serve", built / "index", "--engine", "onnx-int8")
    assert code == 2
    assert "for the engine onnx-int8 in the model's folder" in err


def test_a_searcher_has_the_engine_for_its_queries(built, monkeypatch):
    asked = []

    class Fake(Encoder):
        def __init__(self, *arguments, engine, **settings):
            asked.append(engine)
            super().__init__(*arguments, **settings)

    monkeypatch.setattr("ray_retrieval.query.Encoder", Fake)
    Searcher(built / "index", engine="onnx-int8")
    assert asked == ["onnx-int8"]


def test_the_command_says_what_8_bits_cost(cli_call, tmp_path, monkeypatch):
    table = coloured_table(24, size=24)
    source = saved(tmp_path / "model", made("xbm"), precision="bf16")
    (tmp_path / "images").mkdir()
    for row in range(24):
        place = tmp_path / "images" / str(row % 3) / f"{row}.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(table.image_bytes(row))
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli_call("export", source, "--int8", "--images", tmp_path / "images")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("export  model/onnx-int8/model.onnx, 0.3 MB")
    assert lines[1].startswith("parity  at most, vectors by ")
    assert lines[2].startswith("note    the model describes images in bf16, the export in float32: cosines")
    assert lines[3].startswith("int8    15 operations, calibrated on 24 of 24 images of ")
    assert lines[4].endswith(" with float32, on 24 images calibrated on")
    assert lines[5].startswith("loss    0.0000 of recall@1 (allowed 0.02): ")
    code, _, err = cli_call("export", export.default_folder(export.Folder(source), "x", False))
    assert code == 2
    assert "no model here" in err


def test_embeddings_by_the_model_itself_say_nothing_of_an_engine(tmp_path):
    table = coloured_table(4)
    source = saved(tmp_path / "model", made("greedyhash", table))
    codes, _ = Encoder(source).encode_table(table)
    write_embeddings(tmp_path / "out", table, codes, "model-a")
    assert Embeddings.open(str(tmp_path / "out")).engine == "torch"
    assert "engine" not in (tmp_path / "out" / "embeddings.json").read_text()
