"""The smoke chain for several bit lengths: train, encode, index, evaluate, compare, predict."""

import json
from pathlib import Path

import pytest
from samples import write_images

from ray_retrieval import recipe as recipes
from ray_retrieval.errors import RecipeError
from ray_retrieval.query import Searcher
from ray_retrieval.study import Study

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"


@pytest.mark.long
def test_a_study_of_two_lengths_goes_on_compares_and_predicts(local_ray, tmp_path):
    photos = write_images(tmp_path / "photos", 90)
    settings = [
        f"data={{name: images, database: {photos}}}",
        f"output={tmp_path}/study",
        "method.bits=[8, 12]",
        "method.image={size: 8}",
        "train.epochs=1",
        "train.batch_size=16",
        "train.precision=float32",
        "train.threads=1",
        "encode.workers=1",
        "published=[{source: the paper, metric: map@all, values: {8: 0.0, 12: 1.0}, tolerance: 0}]",
    ]
    members = recipes.load_study(QUICKSTART, settings)
    study = Study(members)
    with pytest.raises(RecipeError, match="8bits: no trained model here"):
        study.evaluate()
    # As a killed study leaves it: the first member is done.
    study.runs[0].all()
    weights = tmp_path / "study" / "8bits" / "model" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns

    found = Study(members).all()
    assert weights.stat().st_mtime_ns == stamp
    assert [(run["size"], run["unit"]) for run in found["runs"]] == [(8, "bits"), (12, "bits")]
    for run in found["runs"]:
        metrics = json.loads((Path(run["folder"]) / "metrics.json").read_text())
        assert run["metrics"] == metrics["models"]["best"]["test"]
        assert metrics["published"][0]["measured"] == run["metrics"][0]["value"]
        assert "the paper" in (Path(run["folder"]) / "report.html").read_text()
    assert found["published"][0]["reached"] is True
    assert json.loads((tmp_path / "study" / "comparison.json").read_text()) == found
    assert (tmp_path / "study" / "comparison.html").is_file()

    searcher = Searcher(tmp_path / "study" / "12bits" / "index")
    inside = searcher.index.records([5]).to_pylist()[0]
    prediction = searcher.predict(inside["path"])
    assert prediction.nearest.distance == 0
    assert prediction.notes == [f"the image itself is in the index, as {inside['id']}"]
    assert sum(guess.probability for guess in prediction.classes) == pytest.approx(1, abs=1e-4)
    assert {guess.name for guess in prediction.classes} == {"red", "green", "blue"}
