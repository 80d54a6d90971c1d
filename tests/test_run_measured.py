"""What a run measures of its models and leaves of it: no training, and no Ray."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from samples import coloured_benchmark
from test_run import run_on

from ray_retrieval import model, run
from ray_retrieval.data import datasets
from ray_retrieval.data.table import ImageTable
from ray_retrieval.export import export
from ray_retrieval.methods import build
from ray_retrieval.run import Run
from ray_retrieval.storage import Folder

SETTINGS = ["train={epochs: 1, batch_size: 8}", "method.bits=8", "report.examples=1"]
VECTORS = "method={name: xbm, dimension: 8, backbone: {name: small, weights: none}, image: {size: 16}}"


def train(method, _config, benchmark, *, run, provenance, **_):
    """Stands for `train`: two models of random weights, of which the last is not the best."""
    for name, seed in (("model-last", 2), ("model", 1)):
        torch.manual_seed(seed)
        model.save(
            run / name,
            config=method.model_dump(mode="json"),
            weights=build(method, classes=benchmark.train.classes).state_dict(),
            classes=benchmark.train.classes,
            class_names=None,
            precision="float32",
            training={**provenance, "epoch": seed},
            metrics={"validation": {"map": seed / 10}},
        )


def with_a_broken_one(table):
    """A table whose first image cannot be decoded."""
    rows = table.table.to_pylist()
    rows[0]["image"] = {"bytes": b"no image", "path": None}
    return ImageTable(pa.Table.from_pylist(rows, schema=table.table.schema), name=table.name, classes=3)


@pytest.fixture
def runs(tmp_path, monkeypatch, encoding_here):
    """Gives a run with some settings, always of the same folder."""
    made = coloured_benchmark(24)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: replace(made, notes=[]))
    monkeypatch.setattr(run, "connect", nullcontext)
    return lambda *more: Run(run_on(tmp_path / "out", *SETTINGS, *more).recipe, training=train)


def test_the_best_model_and_the_last_are_measured_each_by_its_own_codes(runs):
    found = runs().all().metrics
    assert (found["selected"], list(found["models"])) == ("best", ["best", "last"])
    best, last = found["models"].values()
    assert [(one["epoch"], one["validation"]["map"]) for one in (best, last)] == [(1, 0.1), (2, 0.2)]
    assert best["test"] != last["test"]
    alone = runs("evaluate.both=false").all().metrics
    assert alone["models"] == {"best": best}


@pytest.mark.parametrize(("settings", "same", "errors"), [((), False, 2), ((VECTORS,), True, 1)])
def test_images_that_cannot_be_decoded_are_counted_once(runs, monkeypatch, settings, same, errors):
    made = coloured_benchmark(24)
    database = with_a_broken_one(made.database)
    queries = database if same else with_a_broken_one(made.queries)
    broken = replace(made, queries=queries, database=database, queries_in_database=same, notes=[])
    monkeypatch.setattr(datasets, "load", lambda *_, **__: broken)
    found = runs("evaluate.both=false", *settings).all().metrics["dataset"]
    assert (found["errors"], found["queries"], found["database"]) == (errors, len(queries), 24)


def test_numbers_of_a_trial_that_was_stopped_say_so(runs, tmp_path):
    folder = Folder(tmp_path / "out" / "model")
    runs().only_train()
    said = folder.read_json("model.json")
    folder.write_json(
        "model.json", {**said, "training": {**said["training"], "unfinished": True, "of_epochs": 1}}
    )
    best, last = runs().only_measure()["models"].values()
    assert best["notes"][-1].startswith("the training was stopped after epoch 1:")
    assert not any("was stopped" in note for note in last["notes"])


def test_the_time_of_the_index_is_that_of_the_build_that_made_it(runs, tmp_path):
    folder, settings = Folder(tmp_path / "out"), ("evaluate.both=false",)
    runs(*settings).all()
    timings = folder.read_json("timings.json")
    folder.write_json("timings.json", {**timings, "stages": {**timings["stages"], "index": 999.0}})
    runs(*settings).all()
    assert folder.read_json("timings.json")["stages"]["index"] == 999.0
    runs(*settings, "index.shards=1").all()
    assert folder.read_json("timings.json")["stages"]["index"] < 999.0


def test_numbers_by_an_export_say_so(runs, tmp_path):
    settings, folder = ("evaluate.both=false",), tmp_path / "out"
    by_model = runs(*settings).all().metrics["models"]["best"]
    assert not any("onnx" in note for note in by_model["notes"])
    export(str(folder / "model"), images=coloured_benchmark(24).train)
    found = runs(*settings, "encode.engine=onnx").all().metrics["models"]["best"]
    assert found["notes"][-1] == "the descriptors were computed by onnx, an export of the model"
    assert "computed by onnx" in (folder / "report.html").read_text()


def test_a_report_that_is_there_has_the_numbers_of_the_last_measurement(runs, tmp_path):
    folder = tmp_path / "out"
    runs().all()
    assert "precision@3<" not in (folder / "report.html").read_text()
    found = runs("evaluate.at=[3]").only_measure()
    assert found == json.loads((folder / "metrics.json").read_text())
    assert "precision@3<" in (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    runs().only_measure()
    assert not (folder / "report.html").exists()
