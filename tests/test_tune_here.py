"""Training in this process: interrupted anywhere, it ends like an undisturbed one."""

from types import SimpleNamespace

import pytest
import ray.train
import torch
from loop_parts import LocalReporter
from samples import coloured_benchmark, sized

from ray_retrieval import model
from ray_retrieval.history import read_history
from ray_retrieval.loop import STATE, Outcome, Process, TrainConfig, Trainer, read_outcome
from ray_retrieval.loop.folders import fetch_newest, put
from ray_retrieval.methods import build
from ray_retrieval.model import load
from ray_retrieval.storage import Folder
from ray_retrieval.train import _RayReporter, save_models, start_weights
from ray_retrieval.tune.keeping import copy_model, keep_best_so_far
from ray_retrieval.tuning.here import newest_checkpoint, train_here

METHOD = sized("greedyhash", 8, backbone={"name": "small", "weights": "none"}, image={"size": 16})
CONFIG = TrainConfig(
    epochs=4, batch_size=16, precision="float32", checkpoint={"min_seconds": 0, "keep": 2}, select="last"
)


@pytest.fixture(scope="module")
def benchmark():
    return coloured_benchmark(30)


def trained(run, benchmark, after=lambda _run: None, **settings):
    provenance = {"key": "k", "data": "d", "images": "i", "seed": 3}
    given = {"seed": 3, "run": run, "provenance": provenance, "threads": 1, "after_checkpoint": after}
    return train_here(METHOD, CONFIG, benchmark, **given, **settings)


def epochs_of_newest(run):
    with newest_checkpoint(run) as newest:
        return None if newest is None else read_outcome(newest).epochs["last"]


def untimed(run):
    return [{key: v for key, v in record.items() if "second" not in key} for record in read_history(run)]


@pytest.fixture(scope="module")
def whole(benchmark, tmp_path_factory):
    run = Folder(tmp_path_factory.mktemp("whole"))
    trained(run, benchmark)
    return run


def test_it_is_the_training_of_the_loop(whole, benchmark, tmp_path):
    """What Ray Train's workers run, from the weights that the seed gives."""
    torch.manual_seed(3)
    method = build(METHOD, classes=3)
    Trainer(method, benchmark, CONFIG, seed=3, process=Process(threads=1)).fit(LocalReporter(tmp_path))
    kept = load(whole / "model").method.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in method.state_dict().items())


class KilledError(Exception):
    """In place of a signal."""


def killed_after(epochs):
    def after(run):
        if len(read_history(run)) == epochs:
            raise KilledError

    return after


def test_an_interrupted_training_ends_like_an_undisturbed_one(whole, benchmark, tmp_path):
    run = Folder(tmp_path / "cut")
    with pytest.raises(KilledError):
        trained(run, benchmark, killed_after(2))
    # As a process leaves it that is killed while it writes a checkpoint, and after an epoch that none holds.
    (run / "checkpoints-here/epoch_0003").write_bytes("last.safetensors", b"half")
    run.write_bytes("history.jsonl", run.read_bytes("history.jsonl") + b'{"epoch": 3}\n')
    seen = []
    trained(run, benchmark, lambda found: seen.append(len(read_history(found))))
    assert seen == [3, 4], "it goes on after the second epoch"
    assert load(run / "model").fingerprint == load(whole / "model").fingerprint
    assert untimed(run) == untimed(whole)
    assert not run.exists("checkpoints-here"), "a finished training needs none"


def test_only_the_newest_checkpoints_are_kept_and_hold_the_model_so_far(benchmark, tmp_path):
    run = Folder(tmp_path / "cut")
    with pytest.raises(KilledError):
        trained(run, benchmark, killed_after(3))
    folder = run / "checkpoints-here"
    assert folder.names() == ["epoch_0002", "epoch_0003"]
    assert epochs_of_newest(run) == 3
    # Half deleted: the oldest one no longer counts.
    (folder / "epoch_0003").remove(STATE)
    assert epochs_of_newest(run) == 2


def test_what_was_stopped_keeps_its_best_model_so_far_until_it_is_trained_to_its_end(
    whole, benchmark, tmp_path
):
    run = Folder(tmp_path / "cut")
    recipe = SimpleNamespace(output=run.uri, seed=3, method=METHOD, train=CONFIG)
    keep_best_so_far(recipe, benchmark)
    assert not run.exists("model"), "there is no checkpoint yet"
    with pytest.raises(KilledError):
        trained(run, benchmark, killed_after(2))
    keep_best_so_far(recipe, benchmark)
    training = load(run / "model").description["training"]
    assert {key: training[key] for key in ("key", "unfinished", "epoch", "of_epochs")} == {
        "key": "unfinished",
        "unfinished": True,
        "epoch": 2,
        "of_epochs": 2,
    }
    trained(run, benchmark)
    assert load(run / "model").fingerprint == load(whole / "model").fingerprint


def test_of_a_trials_model_its_exports_are_not_copied(tmp_path):
    trial, search = Folder(tmp_path / "trial"), Folder(tmp_path / "search")
    for name in ("recipe.yaml", "model/model.json", "model/model.safetensors", "model/onnx/export.json"):
        trial.write_text(name, "the best")
    for name in ("model/model.json", "model/onnx/export.json"):
        search.write_text(name, "another")
    copy_model(trial, search)
    found = ["model/model.json", "model/model.safetensors", "recipe.yaml"]
    assert {name: search.read_bytes(name) for name in search.files()} == dict.fromkeys(found, b"the best")
    search.write_text("model/onnx/export.json", "of the same model")
    copy_model(trial, search)
    assert search.exists("model/onnx/export.json")


def test_before_the_first_checkpoint_there_is_none(tmp_path):
    assert epochs_of_newest(Folder(tmp_path / "nothing")) is None


def test_ray_train_goes_on_from_where_it_was_trained_here(whole, benchmark, tmp_path, monkeypatch):
    """As `run` does with the recipe of a trial that was stopped."""
    run = Folder(tmp_path / "cut")
    with pytest.raises(KilledError):
        trained(run, benchmark, killed_after(2))
    method = build(METHOD, classes=3)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    reporter = _RayReporter(run)
    monkeypatch.setattr(ray.train, "report", lambda *_, **__: None)
    Trainer(method, benchmark, CONFIG, seed=3, process=Process(threads=1)).fit(reporter)
    kept = load(whole / "model").method.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in method.state_dict().items())
    assert untimed(run) == untimed(whole)


def test_of_both_kinds_the_newer_checkpoint_counts(benchmark, tmp_path, monkeypatch):
    here, other = Folder(tmp_path / "here"), Folder(tmp_path / "other")
    for run, epochs in ((here, 1), (other, 2)):
        with pytest.raises(KilledError):
            trained(run, benchmark, killed_after(epochs))
    found = ray.train.Checkpoint(f"{other.path}/checkpoints-here/epoch_0002")
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: found)
    for run in (here, other):
        reporter = _RayReporter(run)
        assert read_outcome(reporter.latest()).epochs["last"] == 2


@pytest.mark.parametrize(
    "names",
    [
        ["epoch_9998", "epoch_9999", "epoch_9999_batch_000010", "epoch_10000"],
        ["epoch_0001", "epoch_0001_batch_999999", "epoch_0001_batch_1000000", "epoch_0002"],
    ],
)
def test_checkpoints_are_in_the_order_of_the_numbers_in_their_names(tmp_path, names):
    folder = Folder(tmp_path / "checkpoints")
    for done, name in enumerate(names, start=1):
        put(folder, name, lambda into, name=name: (into / STATE).write_text(name), keep=2)
        assert set(folder.names()) == set(names[:done][-2:])
        newest = fetch_newest(folder, tmp_path / "newest")
        assert (newest.name, (newest / STATE).read_text()) == (name, name)


@pytest.mark.parametrize(
    ("select", "written"), [("best", ["model-last", "model"]), ("last", ["model-best", "model"])]
)
def test_the_selected_model_is_written_last(tmp_path, benchmark, monkeypatch, select, written):
    outcome = Outcome(
        weights={"best": {}, "last": {}},
        epochs={"best": 1, "last": 2},
        steps={"best": 1, "last": 2},
        validation={"best": {}, "last": {}},
        precision="float32",
    )
    names = []
    monkeypatch.setattr(model, "save", lambda folder, **_: names.append(folder.path.rpartition("/")[2]))
    config = CONFIG.model_copy(update={"select": select})
    save_models(outcome, METHOD, config, benchmark, Folder(tmp_path), {})
    assert names == written


def test_of_a_training_that_was_stopped_and_went_on_no_other_model_is_left(tmp_path, benchmark, monkeypatch):
    """Its last model differed from the best one when it was stopped, and is the best one at the end."""
    monkeypatch.setattr(model, "save", lambda folder, **_: folder.write_text("model.json", "{}"))
    best, last = {}, {}
    for weights in ({"best": best, "last": last}, {"best": last, "last": last}):
        of_both = {"epochs": {"best": 1, "last": 2}, "steps": {"best": 1, "last": 2}}
        outcome = Outcome(weights, **of_both, validation={"best": {}, "last": {}}, precision="float32")
        save_models(outcome, METHOD, TrainConfig(), benchmark, Folder(tmp_path), {})
    assert Folder(tmp_path).names() == ["model"]


def test_progress_and_weights_that_are_made_elsewhere(whole, benchmark, tmp_path):
    told, asked = [], []

    def made(method, config, benchmark, *, seed):
        asked.append(seed)
        return start_weights(method, config, benchmark, seed=seed)

    run = Folder(tmp_path / "run")
    trained(
        run, benchmark, progress=lambda done, record: told.append((done, record["epoch"])), make_start=made
    )
    assert (told, asked) == ([(1, 1), (1, 2), (1, 3), (1, 4)], [3])
    assert load(run / "model").fingerprint == load(whole / "model").fingerprint


def test_what_it_does_not_know_is_refused(benchmark, tmp_path):
    with pytest.raises(TypeError, match="callbacks"):
        trained(Folder(tmp_path), benchmark, callbacks=[])
