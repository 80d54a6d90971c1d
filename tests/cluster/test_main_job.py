"""The main job on a local Ray: whole, again, interrupted, and with more than one worker."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from loop_parts import LocalReporter
from samples import coloured_benchmark, coloured_table
from typer.testing import CliRunner

from ray_retrieval import recipe as recipes
from ray_retrieval.cli import app
from ray_retrieval.data.table import open_images
from ray_retrieval.encode import EncodeConfig, EncodeJob, encode
from ray_retrieval.errors import ClusterError, DataError, RecipeError
from ray_retrieval.loop import Process, Trainer, read_outcome
from ray_retrieval.loop.steplog import read_steps
from ray_retrieval.methods.greedyhash import GreedyHashConfig
from ray_retrieval.query import Searcher
from ray_retrieval.run import Run
from ray_retrieval.search import Index
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.storage import Folder
from ray_retrieval.train import read_history, starting, train

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
SHORT = [
    "method.image={size: 8}",
    "train.epochs=3",
    "train.precision=float32",
    "train.threads=1",
    "train.checkpoint.min_seconds=0",
    "train.log.every=1",
    "encode.rows_per_part=100",
    "encode.workers=1",
]


def short_recipe(folder, *settings):
    return recipes.load(QUICKSTART, [*SHORT, f"output={folder}", *settings])


def contents(folder):
    """Bytes of everything a run leaves but the measured times."""
    folder = Path(folder)
    names = ["model", "model-last", "embeddings", "index", "split", "metrics.json"]
    files = [
        f
        for name in names
        for f in ([folder / name] if name.endswith("json") else (folder / name).rglob("*"))
    ]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.is_file()}


@pytest.fixture(scope="module")
def finished(local_ray, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return Run(short_recipe(folder)).all()


def test_a_run_leaves_every_artefact(finished):
    folder = Path(finished.folder.path)
    for name in (
        "run.json",
        "recipe.yaml",
        "model/model.json",
        "index/CURRENT",
        "metrics.json",
        "report.html",
        "timings.json",
    ):
        assert (folder / name).is_file(), name
    assert recipes.load(folder / "recipe.yaml").train.epochs == 3
    assert len(read_history(finished.folder)) == 3
    assert Index.open(str(folder / "index"), check="content").rows == 1497
    assert Embeddings.open(str(folder / "embeddings/queries")).rows == 200


def test_every_number_carries_its_policy(finished):
    measured = finished.metrics["models"]["best"]["test"]
    by_name = {entry["name"]: entry for entry in measured}
    assert by_name["map@all"]["value"] > 0.5
    assert all(len(entry["policy"]) > 40 for entry in measured)
    report = Path(finished.report).read_text()
    assert by_name["map@all"]["policy"] in report


def test_the_index_answers_with_the_queries_class(finished, tmp_path):
    searcher = Searcher(f"{finished.folder}/index")
    image = searcher.index.image_bytes(42)
    (tmp_path / "digit.png").write_bytes(image)
    hits = searcher.search([str(tmp_path / "digit.png")], k=20)[0]
    assert hits[0].distance == 0
    assert 42 in [hit.row for hit in hits if hit.distance == 0] or hits[-1].distance == 0
    own = searcher.index.records(np.array([42])).to_pylist()[0]["label"]
    assert [hit.labels for hit in hits].count([str(own)]) >= 10


def test_the_same_command_again_changes_nothing(finished):
    before = contents(finished.folder.path)
    stamp = os.stat(f"{finished.folder.path}/model/model.safetensors").st_mtime_ns
    Run(short_recipe(finished.folder.path)).all()
    assert contents(finished.folder.path) == before
    assert os.stat(f"{finished.folder.path}/model/model.safetensors").st_mtime_ns == stamp


def test_a_folder_of_another_recipe_is_refused(finished):
    with pytest.raises(RecipeError, match=r"train.optimizer.lr: 0.05 → 0.5.*`fresh`"):
        Run(short_recipe(finished.folder.path, "train.optimizer.lr=0.5"))


@pytest.mark.long
def test_two_workers_train_like_one(finished, tmp_path):
    run = Run(short_recipe(tmp_path, "train.workers=2"))
    run.train(run.prepare())
    one, two = ([line["loss"] for line in read_steps(folder)] for folder in (finished.folder, run.folder))
    assert len(two) == len(one)
    # In float32 two workers add in another order, and now and then that turns the sign of a bit, which grows
    # from step to step. In float64 nothing grows: the loop's own test holds to 1e-9.
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert np.mean(two[:20]) == pytest.approx(np.mean(one[:20]), rel=0.01)
    assert np.mean(two) == pytest.approx(np.mean(one), rel=0.1)


def test_more_workers_than_the_cluster_holds_are_refused(local_ray, tmp_path):
    run = Run(short_recipe(tmp_path, "train.workers=9"))
    with pytest.raises(ClusterError, match=r"train.workers: 9 workers of 1 CPU each, but the cluster has 4"):
        run.train(run.prepare())


@pytest.mark.long
def test_a_lost_worker_changes_nothing(local_ray, tmp_path):
    benchmark = coloured_benchmark(240)
    method = GreedyHashConfig(bits=12, backbone={"name": "small", "weights": "none"}, image={"size": 32})
    settings = recipes.load(QUICKSTART, [*SHORT, "train.epochs=8", "train.batch_size=16"]).train
    killed = []

    def kill_after_three(_done, record):
        if record["epoch"] >= 3 and not killed:
            killed.extend(p for p in psutil.Process().children(recursive=True) if is_train_worker(p))
            for process in killed:
                process.kill()

    folder = Folder(tmp_path / "run")
    train(method, settings, benchmark, seed=1, run=folder, provenance={}, progress=kill_after_three)
    assert killed
    disturbed = safetensors.torch.load_file(tmp_path / "run" / "model" / "model.safetensors")

    # The same without Ray, as far as a worker knows of it.
    torch.manual_seed(1)
    undisturbed = LocalReporter(tmp_path / "undisturbed")
    made = starting(method, settings, benchmark)[0]
    Trainer(made, benchmark, settings, seed=1, process=Process(threads=1)).fit(undisturbed)
    expected = read_outcome(undisturbed.latest()).weights[settings.select]
    assert disturbed.keys() == expected.keys()
    assert all(torch.equal(disturbed[name], value) for name, value in expected.items())


def is_train_worker(process):
    try:
        return "ray::RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False  # it has just ended


def test_images_that_cannot_be_decoded_are_recorded(encoding_here, finished, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    table = coloured_table(20)
    for row in range(20):
        (folder / f"{row:02d}.png").write_bytes(table.image_bytes(row))
    (folder / "07.png").write_bytes(b"no image")
    (folder / "13.png").write_bytes(table.image_bytes(13)[:50])
    job = EncodeJob(finished.folder / "model", open_images(str(folder)), Folder(tmp_path / "out"))
    assert encode([job], EncodeConfig(rows_per_part=6, workers=1)) == 20
    made = Embeddings.open(str(tmp_path / "out"))
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert (made.rows, made.error_count) == (18, 2)
    assert ["07.png" in errors[0]["id"], "13.png" in errors[1]["id"]] == [True, True]
    assert made.read_part(1)["row"].to_pylist() == [6, 8, 9, 10, 11]


def test_embeddings_do_not_depend_on_who_made_them_and_finished_parts_stay(finished, tmp_path, request):
    table = coloured_table(40)

    def encoded(name, **settings):
        job = EncodeJob(finished.folder / "model", table, Folder(tmp_path / name))
        count = encode([job], EncodeConfig(rows_per_part=7, **settings))
        return count, {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}

    count, two = encoded("two", workers=2)
    assert count == 40
    request.getfixturevalue("encoding_here")
    one = encoded("one", workers=1)[1]
    assert one == two
    # As a killed job leaves it: one part missing, one half-written, one whose description never came.
    (tmp_path / "one" / "embeddings.json").unlink()
    (tmp_path / "one" / "part-00002.parquet").unlink()
    (tmp_path / "one" / "part-00003.parquet").write_bytes(b"half")
    (tmp_path / "one" / "part-00004.json").unlink()
    (tmp_path / "one" / "part-00005.parquet.tmp-0123456789ab").write_bytes(b"half")
    count, again = encoded("one", workers=1)
    assert count == 7 + 7 + 7
    assert again == one


def test_a_table_without_a_single_image_is_an_error(encoding_here, finished, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 1 images can be decoded"):
        encode(
            [EncodeJob(finished.folder / "model", open_images(str(folder)), Folder(tmp_path / "out"))],
            EncodeConfig(workers=1),
        )
    assert not (tmp_path / "out" / "embeddings.json").exists()


def command(folder):
    return ["run", str(QUICKSTART), *SHORT, f"output={folder}"]


def run_and_kill(folder, moment):
    """Start the command and kill its whole process group when `moment` says so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_retrieval.cli", *command(folder)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not moment(folder):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def epochs_done(folder):
    history = folder / "history.jsonl"
    return len(history.read_text().splitlines()) if history.exists() else 0


@pytest.mark.long
def test_killed_in_training_and_in_encoding_a_run_ends_like_an_undisturbed_one(finished, tmp_path):
    """Start the same command each time. Of an index killed at any write see search/test_index_versions."""
    cut = tmp_path / "cut"
    run_and_kill(cut, lambda f: epochs_done(f) >= 1)
    assert not (cut / "model" / "model.json").exists()
    run_and_kill(cut, lambda f: any((f / "embeddings" / "database").glob("part-*.json")))
    assert not (cut / "index").exists()
    ended = CliRunner().invoke(app, [*command(cut), "--json"])
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout.splitlines()[-1])["models"]["best"]["epoch"] > 0
    assert contents(cut) == contents(finished.folder.path)
