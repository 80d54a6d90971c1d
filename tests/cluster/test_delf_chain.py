"""DELF on views of pictures: two trainings, one after another, then votes, verification, search and match."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from ray_retrieval import model
from ray_retrieval import recipe as recipes
from ray_retrieval.cli import app
from ray_retrieval.data import datasets
from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.run import Run
from ray_retrieval.search import Index
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.train import read_history, train
from ray_retrieval.tuning.here import train_here

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
PICTURES, VIEWS, SIDE, FEATURES = 10, 3, 144, 250


def textured(seed):
    """A picture with corners of several sizes, unlike those of other seeds."""
    generator = np.random.default_rng(seed)
    total = np.zeros((2 * SIDE, 2 * SIDE, 3))
    for cells in (6, 14, 30):
        noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def settings_of(folder):
    return [
        f"data={{name: views, images: {folder}/pictures, views: {VIEWS}, size: {SIDE},"
        f" cache: {folder}/views, geometry: {{rotation: 5, scale: 0.85, perspective: 0.05}},"
        " photometry: {brightness: 0.1, contrast: 0.1, saturation: 0.1, gamma: 0.1, blur: 0.5, noise: 2}}",
        "method={name: delf, backbone: {name: small, weights: none}, stage: attention, hidden: 16,"
        f" dimension: 16, image: {{size: {SIDE}, resize: long_side}}, crop: {{size: 48}},"
        f" pyramid: {{scales: [0.7071, 1], max_features: {FEATURES}}}}}",
        "train={steps: 4, batch_size: 8, precision: float32, threads: 1, optimizer: {name: sgd, lr: 0.01},"
        " schedule: {name: linear}, checkpoint: {min_seconds: 0}}",
        "stages=[{name: tuning, settings: {method.stage: tuning, train.steps: 6}}]",
        "encode.workers=1",
        "index={shards: 2, local: {shortlist: votes}}",
        "evaluate={at: [1, 5], rerank: [{name: geometric_verification, depth: 5}]}",
        "report.examples=2",
        f"output={folder}/run",
    ]


def stamps(folder):
    """When each file was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def contents(folder):
    """Bytes of each file but the measured times, which the report shows too."""
    timed = {"timings.json", "report.html"}
    return {path: path.read_bytes() for path in stamps(folder) if path.name not in timed}


@pytest.fixture(scope="module")
def finished(local_ray, tmp_path_factory):
    """A run that ended between its two trainings and was started again: the recipe's settings, and it."""
    folder = tmp_path_factory.mktemp("delf")
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        textured(number).save(folder / "pictures" / f"{number:02d}.png")
    settings = settings_of(folder)
    _train_the_first_stage_only(settings)
    tuned = stamps(folder / "run" / "stages" / "tuning" / "model")
    assert tuned
    assert not (folder / "run" / "model").exists()
    done = Run(recipes.load(QUICKSTART, settings), training=partial(train_here, threads=1)).all()
    assert stamps(folder / "run" / "stages" / "tuning" / "model") == tuned
    return settings, done


def _train_the_first_stage_only(settings):
    """As a run leaves it that is killed when its second training starts."""
    begun = []

    def one_training(config, *arguments, **further):
        begun.append(config.stage)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return train(config, *arguments, **further)

    with pytest.raises(KeyboardInterrupt):
        Run(recipes.load(QUICKSTART, settings), training=one_training).all()
    assert begun == ["tuning", "attention"]


@pytest.fixture(scope="module")
def views(finished):
    """The queries and the database of the test: views of the same three pictures."""
    settings, done = finished
    recipe = recipes.load(QUICKSTART, settings)
    found = datasets.load(recipe.data, seed=recipe.seed, splits=done.folder / "split")
    return found.queries, found.database


@pytest.fixture(scope="module")
def files(views, tmp_path_factory):
    """Files of two views of the first picture, and of a view of the second."""
    folder, (queries, database) = tmp_path_factory.mktemp("views"), views
    of_first = np.flatnonzero(database.labels == queries.labels[0])[0]
    chosen = {"a": (queries, 0), "same": (database, int(of_first)), "other": (queries, 1)}
    for name, (table, row) in chosen.items():
        (folder / f"{name}.jpg").write_bytes(table.image_bytes(row))
    return {name: folder / f"{name}.jpg" for name in chosen}


def said(*arguments):
    """What a command prints as JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_the_attention_is_trained_on_the_tuned_network_as_it_is(finished):
    _, done = finished
    tuned, trained = (model.load(str(done.folder / name)) for name in ("stages/tuning/model", "model"))
    assert [read_history(done.folder / name)[-1]["step"] for name in ("stages/tuning", ".")] == [6, 4]
    before, after = tuned.method.state_dict(), trained.method.state_dict()
    backbone = [name for name in before if name.startswith("backbone.")]
    assert backbone
    assert all(np.array_equal(before[name], after[name]) for name in backbone)
    assert trained.form == Form(DescriptorKind.LOCAL, 16)
    assert not np.array_equal(after["components"], np.eye(*after["components"].shape))


def test_votes_and_verification_are_measured_of_one_encoding(finished, views):
    _, done = finished
    queries, database = views
    measured = done.metrics["models"]["best"]["test"]
    values = {entry["name"]: entry["value"] for entry in measured}
    reranked = {name: value for name, value in values.items() if name.endswith("/reranked")}
    assert 0 < len(reranked) < len(values)
    assert max(reranked.values()) == 1
    made = Embeddings.open(done.folder / "embeddings" / "database")
    assert (made.rows, made.form) == (len(database), Form(DescriptorKind.LOCAL, 16))
    index = Index.open(done.folder / "index", check="content")
    assert (index.rows, index.manifest.local.kind) == (len(database), "votes")
    assert len(index.manifest.shards) == 2
    assert len(queries) == 3
    assert (Path(done.folder.path) / "report.html").is_file()


def test_a_view_finds_the_others_of_its_picture(finished, files):
    _, done = finished
    found = said("search", f"{done.folder}/index", files["a"], "-k", 4)
    hits = found["queries"][0]["hits"]
    picture = {hit["id"].split("#")[0] for hit in hits[: VIEWS - 1]}
    assert len(picture) == 1
    assert all(hit["inliers"] >= 12 for hit in hits[: VIEWS - 1])
    assert all(hit["inliers"] == 0 for hit in hits[VIEWS - 1 :])
    assert all(0 <= hit["similarity"] < 1 for hit in hits)


def test_two_views_match_and_two_pictures_do_not(finished, files, tmp_path):
    _, done = finished
    trained = f"{done.folder}/model"
    same = said("match", trained, files["a"], files["same"], "--picture", tmp_path / "pairs.png")
    assert (same["verdict"], same["inliers"] >= 12) == ("same scene", True)
    assert Image.open(tmp_path / "pairs.png").width > 2 * SIDE
    other = said("match", trained, files["a"], files["other"])
    assert (other["verdict"], other["same_scene"]) == ("no match found", False)


def test_features_can_be_had_as_a_file(finished, files, tmp_path):
    _, done = finished
    out = tmp_path / "features.parquet"
    said("embed", f"{done.folder}/model", files["a"], files["other"], "--out", out)
    rows = pq.read_table(out).to_pylist()
    assert [Path(row["path"]).name for row in rows] == ["a.jpg", "other.jpg"]
    for row in rows:
        assert row["size"] == [SIDE, SIDE]
        assert len(row["descriptors"]) == len(row["locations"]) == len(row["scores"]) == FEATURES
        np.testing.assert_allclose(np.linalg.norm(row["descriptors"], axis=1), 1, atol=2e-3)


def test_the_same_command_again_does_nothing_again(finished):
    settings, done = finished
    folder = Path(done.folder.path)
    before, written = stamps(folder), contents(folder)
    again = Run(recipes.load(QUICKSTART, settings)).all()
    after = stamps(folder)
    assert again.metrics == done.metrics
    assert contents(folder) == written
    made = [path for path in before if path.name.endswith((".safetensors", ".bin")) or "part-" in path.name]
    assert {path.suffix for path in made} >= {".safetensors", ".bin", ".parquet"}
    assert all(after[path] == before[path] for path in made)
