"""Training in this process: interrupted anywhere, it ends like an undisturbed one."""

import pytest
import torch
from loop_parts import LocalReporter
from samples import coloured_benchmark, sized

from ray_retrieval.history import read_history
from ray_retrieval.loop import STATE, Process, TrainConfig, Trainer
from ray_retrieval.methods import build
from ray_retrieval.model import load
from ray_retrieval.storage import Folder
from ray_retrieval.tuning.here import outcome_here, train_here

METHOD = sized("greedyhash", 8, backbone={"name": "small", "weights": "none"}, image={"size": 16})
CONFIG = TrainConfig(
    epochs=4, batch_size=16, precision="float32", checkpoint={"min_seconds": 0, "keep": 2}, select="last"
)


@pytest.fixture(scope="module")
def benchmark():
    return coloured_benchmark(30)


def trained(run, benchmark, after=lambda _run: None):
    provenance = {"key": "k", "data": "d", "images": "i", "seed": 3}
    return train_here(
        METHOD, CONFIG, benchmark, seed=3, run=run, provenance=provenance, threads=1, after_checkpoint=after
    )


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
    outcome = outcome_here(run)
    assert outcome.epochs["last"] == 3
    # Half deleted: the oldest one no longer counts.
    (folder / "epoch_0003").remove(STATE)
    assert outcome_here(run).epochs["last"] == 2


def test_before_the_first_checkpoint_there_is_no_outcome(tmp_path):
    assert outcome_here(Folder(tmp_path / "nothing")) is None
