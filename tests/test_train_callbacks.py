"""Which processes of Ray a training starts besides its workers."""

import pytest
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

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
