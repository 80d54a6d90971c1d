"""XBM on classes that are not those it is tested on: train, encode once, index, evaluate, search, embed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_retrieval import recipe as recipes
from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.metrics import retrieval
from ray_retrieval.query import Searcher
from ray_retrieval.run import Run
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.train import read_history

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
CLASSES, EACH = 12, 6


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Noisy images of twelve colours, a folder each; one file is no image."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        colour = generator.integers(30, 226, 3)
        (folder / f"colour-{label:02d}").mkdir()
        for number in range(EACH):
            pixels = np.clip(colour + generator.normal(0, 20, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"colour-{label:02d}" / f"{number}.png")
    return folder


def test_xbm_goes_the_whole_way_with_two_workers(local_ray, encoding_here, photographs, tmp_path):
    settings = [
        f"data={{name: images, database: {photographs}, split: classes, validation_classes: 0.3}}",
        "method={name: xbm, dimension: 9, images_per_class: 2, warmup_steps: 3, image: {size: 16},"
        " backbone: {name: small, weights: none}}",
        "train.optimizer={name: adam, lr: 0.002}",
        "train.schedule={name: plateau, patience: 0}",
        "train.workers=2",
        "train.batch_size=8",
        "train.epochs=4",
        "train.augmentation={}",
        "train.precision=float32",
        "train.threads=1",
        "train.checkpoint.min_seconds=0",
        "encode.workers=1",
        "report.examples=3",
        f"output={tmp_path}/run",
    ]
    finished = Run(recipes.load(QUICKSTART, settings)).all()
    history = read_history(finished.folder)
    assert "memory" in history[-1]["terms"]
    assert {"map", "map@r", "recall@1"} <= set(history[-1]["validation"])
    facts = finished.metrics["dataset"]
    assert (facts["train"] + facts["validation_queries"], facts["queries"]) == (36, 36)
    assert any("left out of its own results" in note for note in facts["notes"])
    # Queries are the database: they are encoded once, and measured without themselves.
    assert not (tmp_path / "run" / "embeddings" / "queries").exists()
    made = Embeddings.open(tmp_path / "run" / "embeddings" / "database")
    assert made.form == Form(DescriptorKind.VECTORS, 9)
    expected = retrieval.evaluate(made.descriptors.data, made.labels, ks=(1, 10, 100, 1000))
    (measured, *_) = finished.metrics["models"].values()
    values = {entry["name"]: entry["value"] for entry in measured["test"]}
    assert values == {name: metric.value for name, metric in expected.items()}
    assert values["recall@1"] > 1 / 6  # colours tell these classes apart, even unseen ones
    # The index finds an image by its file, at the cosine 1.
    searcher = Searcher(f"{tmp_path}/run/index")
    path = made.read_part(0)["image"][0].as_py()["path"]
    (hits,) = searcher.search([path], k=5)
    assert hits[0].path == path
    assert hits[0].similarity == pytest.approx(1, abs=1e-5)
    assert searcher.predict(path).classes is None
    page = (tmp_path / "run" / "report.html").read_text()
    assert "cosine" in page
    assert page.count('class="shown query"') == 3
