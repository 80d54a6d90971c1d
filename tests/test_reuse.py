"""A trained model where nothing can be trained: it is taken as it is, or the run is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from samples import coloured_benchmark

from ray_retrieval import model
from ray_retrieval.config import validate
from ray_retrieval.data import datasets
from ray_retrieval.data.datasets.landmarks import no_images
from ray_retrieval.errors import ArtefactError, DataError, ModelError, RecipeError
from ray_retrieval.methods import METHODS, build
from ray_retrieval.recipe import Recipe
from ray_retrieval.run import Run
from ray_retrieval.run.reuse import reuse
from ray_retrieval.storage import Folder

GEM = {
    "name": "gem",
    "backbone": {"name": "small", "weights": "none"},
    "image": {"size": 16, "resize": "long_side"},
    "whitening": {"name": "none"},
}


def method_of(**changes):
    given = {**GEM, **changes}
    return validate(METHODS[given["name"]][0], given)


@pytest.fixture
def trained(tmp_path):
    config = method_of()
    torch.manual_seed(0)
    method = build(config, classes=0, pretrained=False)
    model.save(
        Folder(tmp_path / "trained"),
        config=config.model_dump(mode="json"),
        weights=method.state_dict(),
        classes=0,
        class_names=None,
        precision="float32",
        training={"key": "k", "epoch": 7, "of_epochs": 9},
        metrics={"validation": {"map": 0.5}},
    )
    return str(tmp_path / "trained")


@pytest.fixture
def landmarks(monkeypatch):
    """The benchmark of every recipe: a test without anything to learn from."""
    none, made = no_images("train"), coloured_benchmark(12)
    made = replace(
        made,
        train=none,
        validation_queries=none,
        validation_database=none,
        ground_truth=tuple({"ok": np.array([0]), "junk": np.array([1])} for _ in range(len(made.queries))),
        protocol="classic",
        untrainable="there are no images to learn from",
    )
    made.check()
    monkeypatch.setattr(datasets, "load", lambda *_, **__: made)
    return made


def run_of(folder, **changes):
    values = {"name": "n", "output": str(folder), "data": {"name": "roxford5k"}, "method": GEM, **changes}
    return Run(validate(Recipe, values))


def test_the_weights_are_the_models_and_the_settings_the_recipes(tmp_path, trained):
    config = method_of(scales=[1.0, 0.5], image={"size": 24, "resize": "long_side"})
    reuse(trained, config, Folder(tmp_path / "out"))
    old, new = model.load(trained), model.load(tmp_path / "out")
    for name, values in old.method.state_dict().items():
        assert torch.equal(values, new.method.state_dict()[name])
    assert new.description["method"]["scales"] == [1.0, 0.5]
    assert new.preprocessing.size == 24
    assert new.description["training"] == {**old.description["training"], "start": old.fingerprint}
    assert new.description["metrics"] == {"validation": {"map": 0.5}}


def test_another_network_is_refused_in_one_line(tmp_path, trained):
    with pytest.raises(ModelError, match="do not fit the recipe's method") as caught:
        reuse(trained, method_of(projection=True), Folder(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtefactError):
        reuse(str(tmp_path / "nothing"), method_of(), Folder(tmp_path / "out"))


@pytest.mark.parametrize("train", [{}, {"epochs": 0}, {"start": "MODEL", "epochs": 3}])
def test_nothing_is_trained_without_images(tmp_path, landmarks, trained, train):
    train = {**train, **({"start": trained} if "start" in train else {})}
    with pytest.raises(DataError, match=r"nothing can be trained: there are no images .*train.epochs=0"):
        run_of(tmp_path / "out", train=train).prepare()
    assert not (tmp_path / "out").exists()


def test_the_model_to_start_from_is_measured_as_it_is(tmp_path, landmarks, trained):
    run = run_of(tmp_path / "out", train={"start": trained, "epochs": 0})
    benchmark = run.prepare()
    run.require_model()
    run.train(benchmark)  # needs no Ray: there is nothing to do
    assert model.load(tmp_path / "out/model").description["training"]["epoch"] == 7
    assert len(run.prepare().database) == 12


def test_another_model_in_the_place_of_the_one_that_is_measured_is_refused(tmp_path, landmarks, trained):
    run_of(tmp_path / "out", train={"start": trained, "epochs": 0}).prepare()
    description = Folder(trained).read_json("model.json")
    Folder(trained).write_json("model.json", {**description, "metrics": {"validation": {"map": 0.6}}})
    with pytest.raises(RecipeError, match=r"begun with another model than .*trained now is"):
        run_of(tmp_path / "out", train={"start": trained, "epochs": 0}).prepare()


def test_codes_have_no_ground_truth(tmp_path, landmarks):
    codes = {"name": "greedyhash", "bits": 16, "backbone": GEM["backbone"], "image": {"size": 16}}
    with pytest.raises(RecipeError, match="is measured with vectors, and greedyhash makes codes"):
        run_of(tmp_path / "out", method=codes).prepare()
