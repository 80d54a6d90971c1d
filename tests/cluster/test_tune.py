"""Searches on a local Ray: killed and resumed, with failed and stopped trials, with several workers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from here_parts import encoding_in_this_process
from samples import write_images
from typer.testing import CliRunner

from ray_retrieval import recipe as recipes
from ray_retrieval.cli import app
from ray_retrieval.errors import ArtefactError, ClusterError, RecipeError, RetrievalError
from ray_retrieval.model import load
from ray_retrieval.model_folder import read_model_description
from ray_retrieval.results import read_run
from ray_retrieval.storage import Folder
from ray_retrieval.tune import Search
from ray_retrieval.tuning.ledger import Ledger

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
RATES = "{searcher: grid, concurrent: 1, space: {train.optimizer.lr: {grid: [0.05, 1.0e+30, 1.0e-7, 0.02]}}}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), 90)


def settings(photos, folder, tune, *more):
    return [
        f"data={{name: images, database: {photos}}}",
        f"output={folder}",
        "method.bits=8",
        "method.image={size: 8}",
        "train.epochs=3",
        "train.batch_size=16",
        "train.precision=float32",
        "train.threads=1",
        "train.validation.every=1",
        f"tune={tune}",
        *more,
    ]


def lines(folder):
    file = Path(folder) / "trials.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def killed(given, folder):
    """Start the command and kill all its processes when one trial is finished and another has begun."""
    command = [sys.executable, "-m", "ray_retrieval.cli", "tune", str(QUICKSTART), *given]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while [line["state"] for line in lines(folder)] != ["finished", "running"]:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def tuned(local_ray, photos, tmp_path_factory):
    """A search that was killed and has gone on, and when its first trial's model was written."""
    folder = tmp_path_factory.mktemp("tune") / "search"
    given = settings(photos, folder, RATES)
    killed(given, folder)
    stamp = (folder / "trials/0000/model/model.safetensors").stat().st_mtime_ns
    with encoding_in_this_process():
        return Search(recipes.template(QUICKSTART, given)).all(), stamp


def test_a_killed_search_goes_on_without_doing_anything_twice(tuned):
    found, stamp = tuned
    folder = Path(found.folder.path)
    assert (folder / "trials/0000/model/model.safetensors").stat().st_mtime_ns == stamp
    assert [trial.number for trial in found.trials] == [0, 1, 2, 3]
    assert [line["parameters"]["train.optimizer.lr"] for line in lines(folder)] == [0.05, 1e30, 1e-7, 0.02]
    assert found.trials[0].state == "finished"
    assert [epoch for epoch, _ in found.trials[0].curve] == [1, 2, 3]


def test_failed_and_stopped_trials_are_kept_with_what_they_have(tuned):
    found, _ = tuned
    failed, stopped = found.trials[1:3]
    assert (failed.state, failed.failures, failed.final) == ("failed", 1, True)
    assert "the loss is not finite in epoch 1" in failed.error
    assert (stopped.state, stopped.epochs) == ("stopped", 1)
    training = read_model_description(found.folder / "trials/0002/model")[0]["training"]
    assert (training["unfinished"], training["epoch"], training["of_epochs"]) == (True, 1, 1)
    load(found.folder / "trials/0002/model")


def test_the_best_model_is_kept_with_its_recipe_and_metrics(tuned):
    found, _ = tuned
    best = found.best[0]
    assert best.state == "finished"
    assert best.values["map"] == max(t.values["map"] for t in found.trials if t.state == "finished")
    trial = found.folder / f"trials/{best.name}"
    assert load(found.folder / "model").fingerprint == load(trial / "model").fingerprint
    kept = recipes.load(f"{found.folder.path}/recipe.yaml")
    assert (kept.output, kept.train.optimizer.lr) == (trial.uri, best.parameters["train.optimizer.lr"])
    assert found.metrics == found.folder.read_json("metrics.json")
    assert read_run(trial)["metrics"] == found.metrics["models"]["best"]["test"], "it is a run like others"
    assert "Trials across the space" in Path(found.report).read_text()
    assert not (found.folder / "tune").exists(), "Tune's own files are pickles"


def test_the_traceback_of_a_failed_trial_is_kept(tuned):
    found, _ = tuned
    text = (found.folder / "trials/0001").read_bytes("error.txt").decode()
    assert text.startswith("Traceback")
    assert "RecipeError" in text
    assert not (found.folder / "trials/0000").exists("error.txt")


def test_a_finished_search_only_reports_and_another_is_refused(tuned, photos):
    found, _ = tuned
    given = settings(photos, found.folder.path, RATES)
    again = Search(recipes.template(QUICKSTART, given)).all()
    assert again.as_json() == found.as_json()
    with pytest.raises(RecipeError, match=r"another search .*recipe.train.epochs: 3 → 4"):
        Search(recipes.template(QUICKSTART, [*given, "train.epochs=4"]))


def kill_a_trial(folder):
    """Kill the process of a trial when two are under way and one of them has come past its first epoch."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        running = [line for line in lines(folder) if line["state"] == "running"]
        if len(running) == 2 and any(line["epochs"] for line in running):
            named = psutil.Process().children(recursive=True)
            trials = [process for process in named if "ImplicitFunc" in " ".join(process.cmdline())]
            if trials:
                trials[0].send_signal(signal.SIGKILL)
                return
        time.sleep(0.02)


@pytest.mark.long
def test_a_trial_whose_process_is_lost_is_tried_again(local_ray, photos, tmp_path):
    pytest.importorskip("optuna")
    folder = tmp_path / "search"
    tune = (
        "{searcher: optuna, scheduler: none, trials: 3, concurrent: 2, evaluate: false, "
        "space: {method.penalty: {loguniform: [0.01, 1.0]}}}"
    )
    killer = threading.Thread(target=kill_a_trial, args=(folder,))
    killer.start()
    given = settings(photos, folder, tune, "train.epochs=15")
    result = CliRunner().invoke(app, ["tune", str(QUICKSTART), *given, "--json"])
    killer.join()
    assert result.exception is None, result.output
    told = json.loads(result.stdout)
    assert [(trial["state"], trial["epochs"]) for trial in told["trials"]] == [("finished", 15)] * 3
    assert [len(trial["curve"]) for trial in told["trials"]] == [15] * 3
    assert sorted(trial["failures"] for trial in told["trials"]) == [0, 0, 1]
    assert (told["folder"], told["metrics"]) == (str(folder), None)


@pytest.mark.long
def test_records_that_cannot_be_written_end_a_search_with_their_error(
    local_ray, photos, tmp_path, monkeypatch
):
    tune = "{trials: 2, concurrent: 1, evaluate: false, space: {method.penalty: {uniform: [0.1, 0.2]}}}"
    made = recipes.template(QUICKSTART, settings(photos, tmp_path / "search", tune, "train.epochs=200"))
    write = Ledger.write

    def full(ledger):
        if any(trial.epochs == 2 for trial in ledger.in_order()):
            raise ArtefactError("the store refuses: No space left on device", where="trials.jsonl")
        write(ledger)

    monkeypatch.setattr(Ledger, "write", full)
    with pytest.raises(ArtefactError, match="No space left"):
        Search(made).all()
    assert [(line["state"], line["epochs"]) for line in lines(tmp_path / "search")] == [("running", 1)]


@pytest.mark.long
def test_when_every_trial_failed_the_report_says_of_what(local_ray, photos, tmp_path):
    tune = "{searcher: grid, concurrent: 1, space: {train.optimizer.lr: {grid: [1.0e+30]}}}"
    made = recipes.template(QUICKSTART, settings(photos, tmp_path / "search", tune))
    with pytest.raises(RetrievalError, match=r"every trial failed.*the loss is not finite.*`retry`"):
        Search(made).all()
    assert "the loss is not finite" in (tmp_path / "search/report.html").read_text()
    assert Search(made).trials.left == 0
    assert Search(made, retry=True).trials.left == 1


def assert_processors_are_free():
    """Workers of a trial that was stopped must not keep theirs."""
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


@pytest.mark.long
def test_trials_of_several_workers_are_stopped_and_leave_their_model(local_ray, photos, tmp_path):
    tune = (
        "{searcher: grid, workers: 2, space: {train.optimizer.lr: {grid: [0.05, 1.0e-7]}}, evaluate: false}"
    )
    made = recipes.template(QUICKSTART, settings(photos, tmp_path / "search", tune, "train.epochs=2"))
    found = Search(made).all()
    assert_processors_are_free()
    assert [(trial.state, trial.epochs) for trial in found.trials] == [("finished", 2), ("stopped", 1)]
    for number, whole in ((0, True), (1, False)):
        folder = Folder(tmp_path / f"search/trials/000{number}")
        assert recipes.load(f"{folder.path}/recipe.yaml").train.workers == 2
        training = load(folder / "model").description["training"]
        assert ("unfinished" not in training) == whole
    assert found.metrics is None
    assert not (tmp_path / "search/metrics.json").exists()


def test_a_plan_without_room_is_refused_before_anything_is_written_or_deleted(local_ray, photos, tmp_path):
    space = "space: {train.optimizer.lr: {uniform: [0.1, 0.2]}}"
    made = recipes.template(QUICKSTART, settings(photos, tmp_path / "search", f"{{workers: 4, {space}}}"))
    with pytest.raises(ClusterError, match=r"4 workers × 1 CPU \+ 0.01 for its driver\) = 4.01 CPUs"):
        Search(made).all()
    assert not (tmp_path / "search").exists()
    earlier = tmp_path / "search/study.json"
    earlier.parent.mkdir()
    earlier.write_text('{"format": "ray_retrieval/tuning"}')
    with pytest.raises(ClusterError, match=r"4.01 CPUs"):
        Search(made, fresh=True).all()
    assert earlier.exists()
