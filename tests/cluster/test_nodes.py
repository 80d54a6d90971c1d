"""A cluster that loses nodes in the middle of the work, and gets others, ends like one that is left alone."""

import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loop_parts import LocalReporter
from nodes import Nodes, await_true
from samples import coloured_table
from test_cli import save_model
from watched import EPOCH, INTERVAL, read, training

from ray_retrieval.loop import Process, Trainer
from ray_retrieval.loop.checkpoints import LAST, OPTIMIZER
from ray_retrieval.loop.steplog import read_steps
from ray_retrieval.model import Encoder
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.storage import Folder
from ray_retrieval.train import checkpoint_folder, read_history, starting

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]

WORKERS = 2
EPOCHS, LONGER = 3, 5
"""Of the training that is disturbed, and of those that go on from where it ends."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster whose head does no work; each test adds the nodes that it needs."""
    made = Nodes(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The checkpoints of the longer training by as many processes, of which no Ray knows."""
    folder = tmp_path_factory.mktemp("undisturbed")
    multiprocessing.set_forkserver_preload(["ray_retrieval.loop", "ray_retrieval.methods"])
    mp.start_processes(_train, args=(folder,), nprocs=WORKERS, daemon=True, start_method="forkserver")
    return folder


def _train(rank, folder):
    method, config, benchmark = training(folder / "steps", workers=WORKERS, epochs=LONGER)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORKERS)
    torch.manual_seed(1)
    made = starting(method, config, benchmark)[0]
    # Nodes of one address share its cores.
    process = Process(rank, WORKERS, threads=1)
    trainer = Trainer(made, benchmark, config, seed=1, process=process)
    history = trainer.fit(LocalReporter(folder / f"{rank}"))
    (folder / f"history-{rank}.json").write_text(json.dumps(history))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def disturbed(nodes, tmp_path_factory):
    """A training on two nodes of which one is lost in its second epoch, while another joins."""
    folder = tmp_path_factory.mktemp("disturbed")
    run, log = folder / "run", folder / "steps"
    first, second = nodes.hold(2)
    job = nodes.start("train", run=str(run), log=str(log), workers=WORKERS, epochs=EPOCHS, seconds=0.15)
    # A step after a checkpoint that counts, with more to come before the next.
    await_true(lambda: committed(run) == f"epoch_0001_batch_{INTERVAL:06d}", "the checkpoint", job=job)
    await_true(lambda: read(log)[-1]["step"] > EPOCH + INTERVAL, "a step after it", job=job)
    leading = next(line["node"] for line in read(log) if line["rank"] == 0)
    assert leading in {first, second}
    nodes.kill(leading)
    joined = nodes.add()
    job.wait()
    return {"run": run, "steps": read(log), "lost": leading, "joined": joined, "nodes": {first, second}}


def committed(run):
    """The name of the newest checkpoint that a restart would go on from."""
    try:
        found = json.loads((run / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    except (FileNotFoundError, ValueError):  # none yet, or being written
        return None
    return found["latest_checkpoint_result"]["checkpoint_dir_name"]


def same_weights(mine, expected):
    found, wanted = safetensors.torch.load_file(mine), safetensors.torch.load_file(expected)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def timeless(history):
    """The records of a history without measured times."""
    return [{key: value for key, value in record.items() if "second" not in key} for record in history]


def test_a_node_lost_in_mid_epoch_changes_nothing(disturbed, undisturbed):
    run = disturbed["run"]
    assert same_weights(run / "model" / "model.safetensors", undisturbed / "0" / f"epoch_{EPOCHS:04d}" / LAST)
    expected = json.loads((undisturbed / "history-0.json").read_text())
    assert timeless(read_history(Folder(run))) == timeless(expected[:EPOCHS])
    assert [line["step"] for line in read_steps(Folder(run))] == list(range(1, EPOCH * EPOCHS + 1))


def test_a_lost_node_costs_at_most_the_steps_between_two_checkpoints(disturbed):
    led = [line for line in disturbed["steps"] if line["rank"] == 0]
    steps = [line["step"] for line in led]
    again = next(place for place in range(1, len(steps)) if steps[place] != steps[place - 1] + 1)
    before, after = steps[:again], steps[again:]
    assert before == list(range(before[-1] + 1))
    assert after == list(range(after[0], EPOCH * EPOCHS))
    # A line has the number of the steps that are finished.
    assert after[0] % INTERVAL == 0
    assert 0 <= before[-1] - after[0] <= INTERVAL


def test_the_node_that_joins_takes_the_place_of_the_lost_one(disturbed):
    attempts = {}
    for line in disturbed["steps"]:
        attempts.setdefault(line["process"], line["node"])
    worked = list(attempts.values())
    assert set(worked[:WORKERS]) == disturbed["nodes"]
    assert set(worked[WORKERS:]) == disturbed["nodes"] - {disturbed["lost"]} | {disturbed["joined"]}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_checkpoint_of_two_workers_is_gone_on_from_by_fewer_and_by_more(
    nodes, disturbed, undisturbed, tmp_path, workers
):
    nodes.hold(workers)
    run, log = shutil.copytree(disturbed["run"], tmp_path / "run"), tmp_path / "steps"
    nodes.start("train", run=str(run), log=str(log), workers=workers, epochs=LONGER, seconds=0.0).wait()
    lines = read(log)
    assert {line["world"] for line in lines} == {workers}
    assert len({line["node"] for line in lines}) == workers
    assert [line["step"] for line in lines if line["rank"] == 0] == list(
        range(EPOCH * EPOCHS, EPOCH * LONGER)
    )
    expected = json.loads((undisturbed / "history-0.json").read_text())
    losses = [[record["loss"] for record in history] for history in (read_history(Folder(run)), expected)]
    assert losses[0][:EPOCHS] == losses[1][:EPOCHS]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    with checkpoint_folder(Folder(run)) as folder:
        found = torch.load(folder / OPTIMIZER, weights_only=True)["method"]["memory"]
        weights = safetensors.torch.load_file(folder / LAST)
    last = undisturbed / "0" / f"epoch_{LONGER:04d}"
    memory = torch.load(last / OPTIMIZER, weights_only=True)["method"]["memory"]
    assert found.keys() == memory.keys()
    for name, value in memory.items():
        mine = torch.as_tensor(found[name])
        if mine.is_floating_point():
            assert torch.allclose(mine, value, atol=0.02), name
        else:
            assert torch.equal(mine, torch.as_tensor(value)), name
    for name, value in safetensors.torch.load_file(last / LAST).items():
        assert torch.allclose(weights[name].float(), value.float(), rtol=0.01, atol=0.01), name


IMAGES, PART = 120, 10


def test_with_an_encoder_and_then_a_node_lost_every_image_is_encoded_once(nodes, tmp_path):
    save_model(tmp_path / "model")
    log, out = tmp_path / "images", tmp_path / "out"
    nodes.hold(2)
    job = nodes.start(
        "encode",
        model=str(tmp_path / "model"),
        count=IMAGES,
        out=str(out),
        log=str(log),
        rows_per_part=PART,
        seconds=0.05,
    )

    def parts():
        return len(list(out.glob("part-*.json")))

    await_true(lambda: parts() >= 2, "two parts", job=job)
    os.kill(read(log)[-1]["process"], signal.SIGKILL)
    await_true(lambda: parts() >= 4, "two more parts", job=job)
    lost = read(log)[-1]["node"]
    nodes.kill(lost)
    seen = len(read(log))
    assert job.wait()["encoded"] == IMAGES

    made, table = Embeddings.open(str(out), check="content"), coloured_table(IMAGES)
    assert made.ids == table.ids
    assert [
        row for part in range(len(made.parts)) for row in made.read_part(part)["row"].to_pylist()
    ] == list(range(IMAGES))
    expected = Encoder(str(tmp_path / "model")).encode_table(table)[0]
    assert np.array_equal(made.descriptors.data, expected.data)
    lines = read(log)
    assert {line["node"] for line in lines[seen + PART :]} & {lost} == set()
    # Only parts under way when something was lost are made again: at most two encoders, twice.
    assert IMAGES < len(lines) <= IMAGES + 2 * 2 * PART
