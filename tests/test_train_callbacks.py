"""What a training makes of Ray's trainer: the processes besides its workers, and what is tried again."""

import pytest
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from ray_retrieval.errors import ArtefactError, RecipeError, StoreError
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
