"""GeM on views of photographs: two workers mine alike, whitening is learned, and a model is gone on from."""

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


def settings_of(photographs, tmp_path, name, *further):
    return [
        f"data={{name: views, images: {photographs}, views: 4, size: 24, cache: {tmp_path}/views}}",
        "method={name: gem, image: {size: 24, resize: long_side}, backbone: {name: small, weights: none},"
        " loss: {name: contrastive, negatives: 3, queries: 30, pool: 40, rounds: 2},"
        " whitening: {name: pca}, dimension: 10}",
        "train.optimizer={name: adam, lr: 0.001}",
        "train.schedule={name: exponential}",
        "train.workers=2",
        "train.batch_size=20",
        "train.epochs=2",
        "train.augmentation={}",
        "train.precision=float32",
        "train.threads=1",
        "encode.workers=1",
        "report.examples=2",
        f"output={tmp_path}/{name}",
        *further,
    ]


def test_gem_goes_the_whole_way_and_a_model_is_gone_on_from(local_ray, photographs, tmp_path):
    finished = Run(recipes.load(QUICKSTART, settings_of(photographs, tmp_path, "first"))).all()
    history = read_history(finished.folder)
    assert len(history) == 2
    assert {"tuples"} == set(history[-1]["terms"])
    assert 0 < history[-1]["observed"]["negative_distance"] < 2
    trained = tmp_path / "first" / "model"
    made = model.load(str(trained))
    assert made.form == Form(DescriptorKind.VECTORS, 10)
    assert int(made.method.whitened) == 1
    embeddings = Embeddings.open(tmp_path / "first" / "embeddings" / "database")
    np.testing.assert_allclose(np.linalg.norm(embeddings.descriptors.data, axis=1), 1, atol=1e-5)
    searcher = Searcher(f"{tmp_path}/first/index")
    (hits,) = searcher.search([embeddings.read_part(0)["image"][0].as_py()["bytes"]], k=3)
    assert hits[0].similarity == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "first" / "report.html").is_file()

    # The same network, described at two sizes and whitened for them, without another training.
    further = [f"train.start={trained}", "train.epochs=0", "method.scales=[1, 0.5]", "train.workers=1"]
    again = Run(recipes.load(QUICKSTART, settings_of(photographs, tmp_path, "second", *further)))
    again.train(again.prepare())
    assert read_history(again.folder) == []
    other = model.load(str(tmp_path / "second" / "model"))
    weights, before = other.method.state_dict(), made.method.state_dict()
    assert all(
        np.array_equal(weights[name], before[name]) for name in before if not name.startswith("whitening")
    )
    assert not np.array_equal(weights["whitening.weight"], before["whitening.weight"])
    assert other.fingerprint != made.fingerprint

    with pytest.raises(ModelError, match=r"a model of gem on small: .* tensors"):
        model.start_from(_with_another_backbone(), Folder(trained))


def _with_another_backbone():
    config = recipes.load(
        QUICKSTART, ["method={name: xbm, backbone: {name: resnet18, weights: none}}", "output=unused"]
    ).method
    return model.build(config, classes=3, pretrained=False)
