"""Hashing methods on photographs with several labels: train, encode, index, evaluate, search."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_retrieval import recipe as recipes
from ray_retrieval.query import Searcher
from ray_retrieval.run import Run
from ray_retrieval.train import read_history

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
COCO_LITE = Path(__file__).parents[3] / "shared" / "data" / "coco_lite"
TRAIN, QUERIES = 9, 4


def made_lite(folder):
    """Lists and photographs like COCO's smoke test: 9 to train, 4 queries, all 13 in the database."""
    generator = np.random.default_rng(0)
    lines = []
    for row in range(TRAIN + QUERIES):
        part = "train2014" if row < TRAIN else "val2014"
        (folder / part).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC)
        picture.save(folder / part / f"{row:012d}.jpg")
        labels = np.zeros(6, int)
        labels[[row % 3, 3 + row % 2]] = 1
        lines.append(f"{part}/{row:012d}.jpg {' '.join(map(str, labels))}\n")
    (folder / "train.txt").write_text("".join(lines[:TRAIN]))
    (folder / "test.txt").write_text("".join(lines[TRAIN:]))
    (folder / "database.txt").write_text("".join(lines[TRAIN:] + lines[:TRAIN]))
    return folder


@pytest.fixture
def lite(tmp_path):
    """COCO's photographs where they are, else made ones."""
    return COCO_LITE if COCO_LITE.is_dir() else made_lite(tmp_path / "lite")


@pytest.mark.long
def test_hashnet_goes_the_whole_way_with_two_workers(local_ray, lite, tmp_path):
    method = (
        "{name: hashnet, preset: deephash, bits: 16, image: {size: 32, resize: short_side, resize_to: 36},"
    )
    recipe = recipes.load(
        QUICKSTART,
        [
            f"data={{name: lists, root: {lite}, k: 5000}}",
            f"method={method} backbone: {{name: small, weights: none}}}}",
            "train.augmentation={random_crop: true, flip: true}",
            "train.workers=2",
            "train.batch_size=4",
            "train.epochs=3",
            "train.precision=float32",
            "train.threads=1",
            "train.checkpoint.min_seconds=0",
            "encode.workers=1",
            f"output={tmp_path}/run",
        ],
    )
    finished = Run(recipe).all()
    assert [record["epoch"] for record in read_history(finished.folder)] == [1, 2, 3]
    facts = finished.metrics["dataset"]
    assert (facts["train"], facts["queries"], facts["database"]) == (9, 4, 13)
    assert any("the queries are in the database" in note for note in facts["notes"])
    (measured,) = finished.metrics["models"].values()
    values = {entry["name"]: entry["value"] for entry in measured["test"]}
    assert 0 < values["map@5000"] <= 1
    # Queries are in the database, so each finds itself: at distance 0, first among equals by row.
    searcher = Searcher(f"{tmp_path}/run/index")
    query = lite / (lite / "test.txt").read_text().split()[0]
    (hits,) = searcher.search([query], k=13)
    assert hits[0].distance == 0
    assert str(query) in [hit.path for hit in hits if hit.distance == 0]
    assert len(hits) == 13
