"""GeM on views of photographs: pairs are mined, whitening is learned, and a model is gone on from."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from samples import coloured_table

from ray_retrieval import model
from ray_retrieval import recipe as recipes
from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import ModelError
from ray_retrieval.query import Searcher
from ray_retrieval.run import Run
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.storage import Folder
from ray_retrieval.train import read_history
from ray_retrieval.tuning.here import train_here

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Pictures of noise in several sizes: each is unlike the others."""
    folder = tmp_path_factory.mktemp("photographs")
    table = coloured_table(24, classes=24, mixed_sizes=True)
    for row in range(24):
        (folder / f"{row:02d}.png").write_bytes(table.image_bytes(row))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(local_ray, photographs, folder):
    """A run whose training does in this process what a worker does, bit for bit."""
    recipe = recipes.load(QUICKSTART, settings_of(photographs, folder, "first"))
    return Run(recipe, training=partial(train_here, threads=1)).all()


def settings_of(photographs, folder, name, *further):
    return [
        f"data={{name: views, images: {photographs}, views: 4, size: 24, cache: {folder}/views}}",
        "method={name: gem, image: {size: 24, resize: long_side}, backbone: {name: small, weights: none},"
        " loss: {name: contrastive, negatives: 3, queries: 30, pool: 40, rounds: 2},"
        " whitening: {name: pca}, dimension: 10}",
        "train.optimizer={name: adam, lr: 0.001}",
        "train.schedule={name: exponential}",
        "train.batch_size=20",
        "train.epochs=2",
        "train.augmentation={}",
        "train.precision=float32",
        "train.threads=1",
        "encode.workers=1",
        "report.examples=2",
        f"output={folder}/{name}",
        *further,
    ]


def test_gem_goes_the_whole_way(finished, folder):
    history = read_history(finished.folder)
    assert len(history) == 2
    assert {"tuples"} == set(history[-1]["terms"])
    assert 0 < history[-1]["observed"]["negative_distance"] < 2
    made = model.load(str(folder / "first" / "model"))
    assert made.form == Form(DescriptorKind.VECTORS, 10)
    assert int(made.method.whitened) == 1
    embeddings = Embeddings.open(folder / "first" / "embeddings" / "database")
    np.testing.assert_allclose(np.linalg.norm(embeddings.descriptors.data, axis=1), 1, atol=1e-5)
    searcher = Searcher(f"{folder}/first/index")
    (hits,) = searcher.search([embeddings.read_part(0)["image"][0].as_py()["bytes"]], k=3)
    assert hits[0].similarity == pytest.approx(1, abs=1e-4)
    assert (folder / "first" / "report.html").is_file()


@pytest.mark.long
def test_a_model_is_gone_on_from(finished, photographs, folder):
    """The same network, described at two sizes and whitened for them, without another training."""
    trained = folder / "first" / "model"
    made = model.load(str(trained))
    further = [f"train.start={trained}", "train.epochs=0", "method.scales=[1, 0.5]"]
    again = Run(recipes.load(QUICKSTART, settings_of(photographs, folder, "second", *further)))
    again.train(again.prepare())
    assert read_history(again.folder) == []
    other = model.load(str(folder / "second" / "model"))
    weights, before = other.method.state_dict(), made.method.state_dict()
    assert all(
        np.array_equal(weights[name], before[name]) for name in before if not name.startswith("whitening")
    )
    assert not np.array_equal(weights["whitening.weight"], before["whitening.weight"])
    assert other.fingerprint != made.fingerprint


def test_a_model_of_another_network_is_not_gone_on_from(finished, folder):
    trained = folder / "first" / "model"
    with pytest.raises(ModelError, match=r"a model of gem on small: .* tensors"):
        model.start_from(_with_another_backbone(), Folder(trained))


def _with_another_backbone():
    config = recipes.load(
        QUICKSTART, ["method={name: xbm, backbone: {name: resnet18, weights: none}}", "output=unused"]
    ).method
    return model.build(config, classes=3, pretrained=False)
