"""What people are told of images found by their local features: inliers, scores, and why there is nothing."""

import json

import numpy as np
import pytest
from local_parts import draw_set, draw_view, local_set, together
from PIL import Image
from samples import coloured_table
from search_parts import draw_vectors, write
from typer.testing import CliRunner

from ray_retrieval import query, search
from ray_retrieval.answers import Hit
from ray_retrieval.cli import app
from ray_retrieval.descriptors import DescriptorKind, Form, Vectors
from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.examples import _search
from ray_retrieval.model_folder import model_of
from ray_retrieval.query import Searcher
from ray_retrieval.search import Index
from ray_retrieval.search.rerank import GeometricVerificationConfig, QueryExpansionConfig
from ray_retrieval.storage import Folder

VERIFY = GeometricVerificationConfig()


@pytest.fixture(scope="module")
def scene():
    return draw_set(120, seed=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory, scene):
    """An index of two views of the scene and four other images, and one of the same images' vectors."""
    folder = tmp_path_factory.mktemp("built")
    views = [draw_view(scene, shared, seed=shared)[0] for shared in (0, 60, 0, 40, 0)]
    sets, vectors = together([*views, draw_set(50, seed=9)]), draw_vectors(6, 8, seed=3)
    images = coloured_table(6, classes=2).table
    for name, descriptors, model in (("delf", sets, "model-l"), ("gem", vectors, "model-v")):
        write(folder / f"{name}-embeddings", descriptors, images, model=model)
        search.build(folder / f"{name}-embeddings", folder / name)
    for name in ("scene", "other", "empty", "unlike"):
        (folder / f"{name}.png").write_bytes(name.encode())
    return folder


@pytest.fixture
def encoders(monkeypatch, scene, built):
    """Encoders that describe files by their names: folder `l` makes local features, `v` vectors."""
    apart = draw_set(30, seed=50)
    sets = {
        b"scene": scene,
        b"other": draw_set(90, seed=40),
        b"empty": local_set(np.zeros((0, 16)), np.zeros((0, 2))),
        b"unlike": apart,
    }

    class FakeEncoder:
        class_names = None

        def __init__(self, model, threads, engine="torch"):
            self.kind = str(model)[-1]
            self.fingerprint = f"model-{self.kind}"

        def encode(self, images, box=None):
            if self.kind == "l":
                return together([sets[image] for image in images]), {}
            first = Index.open(built / "gem").vectors(np.array([3]))
            return Vectors(np.repeat(first, len(images), axis=0)), {}

        def class_probabilities(self, images):
            return None, {}

    monkeypatch.setattr(query, "Encoder", FakeEncoder)
    monkeypatch.setattr(query, "model_of", lambda index, **_: "l")


def searcher(built, name="delf", **options):
    return Searcher(str(built / name), "v" if name == "gem" else "l", threads=1, **options)


def test_a_verified_hit_says_its_inliers_and_keeps_its_score_of_the_search(built, encoders):
    plain = searcher(built, rerank=()).search([built / "scene.png"], 6)[0]
    hits = searcher(built).search([built / "scene.png"], 6)[0]
    form = Form(DescriptorKind.LOCAL, 16)
    assert [hit.inliers > 0 for hit in hits[:2]] == [True, True]
    assert 48 <= hits[0].inliers <= 62
    assert [hit.in_words(form) for hit in hits[:3]] == [
        f"{hits[0].inliers} inliers",
        f"{hits[1].inliers} inliers",
        "no match",
    ]
    known = {hit.row: hit for hit in plain}
    for hit in hits:
        assert (hit.distance, hit.similarity) == (known[hit.row].distance, known[hit.row].similarity)
        assert 0 <= hit.similarity < 1
        assert hit.as_json()["inliers"] == hit.inliers
    for hit in plain:
        assert hit.inliers is hit.score is None
        assert hit.in_words(form) == f"score {hit.similarity:.4f}"


def test_images_are_paths_or_bytes_in_any_sequence(built, encoders):
    step = GeometricVerificationConfig(local=str(built / "delf"))
    asked = searcher(built, "gem", rerank=[step])
    path = built / "scene.png"
    expected = asked.search([path, str(path)], 2)
    assert asked.search(iter([path, path.read_bytes()]), 2) == expected
    for wrong in (np.zeros((8, 8, 3), np.uint8), [None], Image.new("RGB", (8, 8))):
        with pytest.raises(QueryError, match="an image is a path, a URI or the bytes of a file, got"):
            asked.search(wrong, 2)


def test_what_is_too_deep_is_not_verified(built, encoders):
    step = GeometricVerificationConfig(depth=2)
    hits = searcher(built, rerank=[step]).search([built / "scene.png"], 6)[0]
    assert [hit.inliers is None for hit in hits] == [False] * 2 + [True] * (len(hits) - 2)
    assert hits[2].in_words(Form(DescriptorKind.LOCAL, 16)) == "not verified"


def test_vectors_say_both(built, encoders):
    step = GeometricVerificationConfig(local=str(built / "delf"))
    hits = searcher(built, "gem", rerank=[step]).search([built / "scene.png"], 6)[0]
    form = Form(DescriptorKind.VECTORS, 8)
    assert [hit.row for hit in hits[:2]] == [1, 3]
    assert hits[0].in_words(form) == f"{hits[0].inliers} inliers, cosine {hits[0].similarity:.4f}"
    assert hits[2].in_words(form) == f"no match, cosine {hits[2].similarity:.4f}"
    # Query expansion puts its own scores in the place of inliers.
    expanded = searcher(built, "gem", rerank=[step, QueryExpansionConfig(n=1)])
    for hit in expanded.search([built / "scene.png"], 6)[0]:
        assert hit.inliers is None
        assert hit.in_words(form) == f"cosine {hit.similarity:.4f}"


def test_examples_of_a_report_are_told_alike(built, encoders, scene):
    index = Index.open(built / "delf")
    (found,) = _search(index, scene, 3)
    assert found == searcher(built).search([built / "scene.png"], 3)[0]


def test_one_inlier_is_one():
    form = Form(DescriptorKind.LOCAL, 16)
    hit = Hit(1, "a", -0.1, 0.1, [], None, 0, score=-1.5, inliers=1)
    assert hit.in_words(form) == form.in_words(-0.1, 1) == "1 inlier"
    assert form.in_words(-0.1, 0) == "no match"
    assert form.in_words(-0.1) == "score 0.1000"


def test_predict_says_why_there_is_nothing(built, encoders):
    with pytest.raises(QueryError, match=r"empty.png: the model finds no features in the image"):
        searcher(built).predict(built / "empty.png")
    found = searcher(built).predict(built / "scene.png")
    assert (found.nearest.row, found.notes) == (1, [])
    assert searcher(built).predict(built / "other.png").notes == [
        "no match found: no image agrees with the query on where things are"
    ]


def test_predict_says_that_no_image_has_such_features(built, encoders, monkeypatch):
    def none(self, queries, k, where=None):
        return search.Hits(np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1))

    monkeypatch.setattr(Index, "search", none)
    with pytest.raises(QueryError, match=r"unlike.png: no image of the index has features like those"):
        searcher(built).predict(built / "unlike.png")


def test_the_command_says_what_it_found_and_what_it_did_not(built, encoders, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def said(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    command = ("search", built / "delf", built / "scene.png", "--model", "l")
    shown = said(*command)
    hits = searcher(built).search([built / "scene.png"])[0]
    assert f"{hits[0].inliers} inliers" in shown
    assert "no match" in shown
    assert "score" not in shown
    assert "note" not in shown
    plain = said(*command, "--rerank", "none")
    assert "score 0." in plain
    assert "inliers" not in plain
    found = json.loads(said(*command, "--json"))["queries"][0]
    assert [hit["inliers"] for hit in found["hits"]] == [hit.inliers for hit in hits]
    assert found["notes"] == []
    nothing = said("search", built / "delf", built / "empty.png", built / "other.png", "--model", "l")
    assert "note: the model finds no features in the image" in nothing
    assert "note: no match found" in nothing
    predicted = said("predict", built / "delf", built / "scene.png", "--model", "l")
    assert f"distance {hits[0].inliers} inliers" in predicted


def test_advice_on_a_missing_model_fits_the_index_it_is_of(built):
    """The command line has an option for the model of the index, none for that of `local`."""
    with pytest.raises(ArtefactError, match=r"made by model model-l.*as `model`"):
        Searcher(str(built / "delf"))
    with pytest.raises(ArtefactError, match=r"made by model model-l.*put the folder of the model .* beside"):
        model_of(Folder(built / "delf"))
