"""What a training makes of Ray's trainer: the processes besides its workers, what is tried again, and what
is told meanwhile."""

import threading

import pytest
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from ray_retrieval import train
from ray_retrieval.errors import ArtefactError, RecipeError, StoreError
from ray_retrieval.loop import TrainConfig
from ray_retrieval.storage import Folder
from ray_retrieval.train import _TorchTrainer


def callbacks_of(kind):
    trainer = kind(print, scaling_config=ScalingConfig(num_workers=1))
    return {type(one).__name__ for one in trainer._create_default_callbacks()}


@pytest.mark.parametrize(
    ("address", "left_out"),
    [(None, {"DatasetsCallback", "PlacementGroupCleanerCallback"}), ("head:6379", {"DatasetsCallback"})],
)
def test_those_that_have_nothing_to_do_are_left_out(monkeypatch, address, left_out):
    monkeypatch.setenv("RAY_RETRIEVAL_ALONE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert callbacks_of(TorchTrainer) - callbacks_of(_TorchTrainer) == left_out


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (RecipeError("the loss is not finite"), 1),
        (StoreError("the store does not answer"), 3),
        (ArtefactError("the store refuses"), 3),
        (MemoryError(), 3),
    ],
)
def test_what_would_fail_alike_is_not_tried_again(monkeypatch, error, attempts):
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda _, **given: given)
    config = RunConfig(failure_config=FailureConfig(max_failures=2))
    trainer = _TorchTrainer(print, scaling_config=ScalingConfig(num_workers=2), run_config=config)
    policy = trainer._initialize_and_run_controller(failure_policy="Ray's own")["failure_policy"]
    failed = WorkerGroupError("a worker failed", {0: RuntimeError("connection reset"), 1: error})
    decisions = [policy.make_decision(failed).value for _ in range(attempts)]
    assert decisions == ["RETRY"] * (attempts - 1) + ["RAISE"]


def test_a_store_that_does_not_answer_for_a_while_ends_no_progress(monkeypatch, tmp_path):
    run, seen, asked = Folder(tmp_path), threading.Event(), []
    run.write_text("history.jsonl", '{"epoch": 1}\n')
    read = train.read_history

    def now_and_then(folder):
        asked.append(folder)
        if len(asked) == 1:
            raise ArtefactError("the store refuses")
        return read(folder)

    monkeypatch.setattr(train, "read_history", now_and_then)
    told = []

    def progress(done, record):
        told.append((done, record["epoch"]))
        seen.set()

    with train._following(run, TrainConfig(), progress):
        assert seen.wait(20)
    assert told == [(1, 1)]


def test_nor_does_one_that_does_not_answer_at_the_end_fail_a_training(monkeypatch, tmp_path):
    def refuse(*_):
        raise ArtefactError("the store refuses")

    monkeypatch.setattr(Folder, "exists", refuse)
    with train._following(Folder(tmp_path), TrainConfig(), lambda *_: None):
        pass
