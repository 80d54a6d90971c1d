"""Trainings one after another: which of them are done again, and when a run is refused."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from samples import coloured_benchmark
from test_run import QUICKSTART

from ray_retrieval import model
from ray_retrieval import recipe as recipes
from ray_retrieval.data import datasets
from ray_retrieval.errors import RecipeError
from ray_retrieval.layers.backbones import SmallNet
from ray_retrieval.run import Run
from ray_retrieval.run_folder import refuse_foreign
from ray_retrieval.storage import Folder
from ray_retrieval.train import starting

STAGES = "stages=[{name: first, settings: {method.hidden: 4}}, {name: second, settings: {train.steps: 2}}]"
SETTINGS = [
    "method={name: delf, backbone: {name: small, weights: none}, image: {size: 24, resize: long_side},"
    " crop: {size: 16}, hidden: 8, dimension: 8}",
    "train={epochs: 1, batch_size: 8}",
    STAGES,
]


@pytest.fixture
def benchmark(monkeypatch):
    made = coloured_benchmark(12)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: replace(made, notes=[]))
    return made


class Trainings:
    """Stands for `train`: each leaves its starting weights, but for one that the process ends in."""

    def __init__(self):
        self.begun, self.killed_in = [], None

    def __call__(self, method, config, benchmark, *, seed, run, provenance, progress):
        self.begun.append(str(run).rsplit("/", 1)[-1])
        if self.begun[-1] == self.killed_in:
            raise KeyboardInterrupt
        torch.manual_seed(seed)
        model.save(
            run / "model",
            config=method.model_dump(mode="json"),
            weights=starting(method, config, benchmark)[0].state_dict(),
            classes=benchmark.train.classes,
            class_names=None,
            precision="float32",
            training=provenance,
            metrics={},
        )


@pytest.fixture
def trainings():
    return Trainings()


def train(trainings, folder, *settings):
    """As the command of that name does."""
    job = Run(recipes.load(QUICKSTART, [*SETTINGS, f"output={folder}", *settings]), training=trainings)
    job.train(job.prepare())


def begun_by(trainings, folder, *settings):
    """The trainings that the same command begins when it is given again."""
    trainings.begun.clear()
    train(trainings, folder, *settings)
    return trainings.begun


ALL = ["first", "second", "out"]


@pytest.mark.usefixtures("benchmark")
class TestGoingOn:
    def test_a_finished_run_does_not_need_its_stages(self, tmp_path, trainings):
        out = tmp_path / "out"
        assert begun_by(trainings, out) == ALL
        refuse_foreign(Folder(out / "stages" / "second"))
        assert begun_by(trainings, out) == []
        shutil.rmtree(out / "stages")
        assert begun_by(trainings, out, "evaluate.at=[2]") == []
        assert not (out / "stages").exists()

    def test_what_comes_before_a_finished_stage_is_not_trained_again(self, tmp_path, trainings):
        out, trainings.killed_in = tmp_path / "out", "out"
        with pytest.raises(KeyboardInterrupt):
            train(trainings, out)
        trainings.killed_in = None
        shutil.rmtree(out / "stages" / "first")
        assert begun_by(trainings, out) == ["out"]

    def test_a_run_that_was_killed_in_a_stage_goes_on_there(self, tmp_path, trainings):
        out, trainings.killed_in = tmp_path / "out", "second"
        with pytest.raises(KeyboardInterrupt):
            train(trainings, out)
        trainings.killed_in = None
        assert begun_by(trainings, out) == ALL[1:]

    def test_stages_that_are_gone_are_trained_for_a_run_that_is_not_finished(self, tmp_path, trainings):
        out, trainings.killed_in = tmp_path / "out", "out"
        with pytest.raises(KeyboardInterrupt):
            train(trainings, out)
        trainings.killed_in = None
        shutil.rmtree(out / "stages")
        assert begun_by(trainings, out) == ALL

    def test_a_start_that_is_gone_is_not_needed_by_what_is_finished(self, tmp_path, trainings):
        out, settings = tmp_path / "out", ["stages=[]", f"train.start={tmp_path}/start/model"]
        train(trainings, tmp_path / "start", "stages=[]")
        assert begun_by(trainings, out, *settings) == ["out"]
        shutil.rmtree(tmp_path / "start")
        assert begun_by(trainings, out, *settings) == []


class TestRefused:
    def test_other_images(self, tmp_path, trainings, benchmark):
        out = tmp_path / "out"
        train(trainings, out)
        shutil.rmtree(out / "stages")
        benchmark.train = benchmark.train.take(np.arange(11))
        with pytest.raises(RecipeError, match="not those that this run was begun with"):
            begun_by(trainings, out)
        assert trainings.begun == []

    @pytest.mark.usefixtures("benchmark")
    def test_other_weights_in_the_file_of_that_name(self, tmp_path, trainings):
        out, file = tmp_path / "out", tmp_path / "small.pth"
        settings = ["stages=[]", f"method.backbone.weights={file}"]
        weights = SmallNet().state_dict()
        torch.save(weights, file)
        assert begun_by(trainings, out, *settings) == ["out"]
        assert begun_by(trainings, out, *settings) == []
        torch.save({name: 2 * value for name, value in weights.items()}, file)
        with pytest.raises(RecipeError, match=r"begun from other weights than .*small\.pth now are"):
            begun_by(trainings, out, *settings)
        file.unlink()
        assert begun_by(trainings, out, *settings) == [], "a finished run does not need them"

    @pytest.mark.usefixtures("benchmark")
    def test_another_start(self, tmp_path, trainings):
        out = tmp_path / "out"
        train(trainings, out)
        train(trainings, tmp_path / "other", "seed=7")
        shutil.rmtree(out / "stages" / "second" / "model")
        shutil.copytree(
            tmp_path / "other" / "stages" / "second" / "model", out / "stages" / "second" / "model"
        )
        with pytest.raises(RecipeError, match=r"begun from another model than .*stages/second/model now is"):
            begun_by(trainings, out)
        assert trainings.begun == []
