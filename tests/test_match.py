"""Two photographs matched: by sets of features made by hand, and by SIFT where there are real ones."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from local_parts import SIZE, draw_set, draw_view, local_set
from PIL import Image
from samples import png
from typer.testing import CliRunner

from ray_retrieval import match as matching
from ray_retrieval import match_picture, pictures
from ray_retrieval.cli import app
from ray_retrieval.data.decode import decode
from ray_retrieval.descriptors import Codes, Vectors
from ray_retrieval.errors import DataError, ModelError, QueryError, RetrievalError
from ray_retrieval.search.verify import VerifyConfig

LANDMARKS = Path(__file__).parents[2] / "shared" / "data" / "landmarks"
RIGHT = 60


@pytest.fixture(scope="module")
def scene():
    """Features of an image, of a view of it, of something else, and of nothing."""
    first = draw_set(150, seed=1)
    view, affine, truth = draw_view(first, RIGHT, seed=2, noise=0.5)
    nothing = local_set(np.zeros((0, 16)), np.zeros((0, 2)))
    return {"a": first, "b": view, "other": draw_set(150, seed=5), "empty": nothing}, affine, truth


@pytest.fixture
def photographs(scene, tmp_path, monkeypatch):
    """Files whose features are those of `scene`, whatever the model."""
    sets, known = scene[0], {}
    for number, (name, features) in enumerate(sets.items()):
        pixels = np.full((SIZE[1], SIZE[0], 3), 60 + 40 * number, np.uint8)
        (tmp_path / f"{name}.png").write_bytes(png(pixels))
        known[(tmp_path / f"{name}.png").read_bytes()] = features
    (tmp_path / "broken.png").write_bytes(b"no image")

    class FakeEncoder:
        def __init__(self, model, threads):
            assert (model, threads > 0) == ("model", True)

        def encode(self, images):
            assert len(images) == 1
            if images[0] not in known:
                return sets["empty"], {0: "not an image"}
            return known[images[0]], {}

        def close(self):
            pass

    monkeypatch.setattr("ray_retrieval.model.Encoder", FakeEncoder)
    return tmp_path


def test_a_view_of_the_scene_is_found_where_it_is(scene, photographs):
    _, affine, truth = scene
    found = matching.match("model", photographs / "a.png", photographs / "b.png")
    assert (found.same_scene, found.verdict) == (True, "same scene")
    assert RIGHT - 2 <= found.inliers <= RIGHT + 4
    assert found.significance > 50
    first, second = found.locations()
    assert first.shape == second.shape == (found.inliers, 2)
    inliers = {tuple(pair) for pair in found.pairs[found.geometry.inliers].tolist()}
    assert len(inliers & {tuple(pair) for pair in truth.tolist()}) >= RIGHT - 2
    np.testing.assert_allclose(found.geometry.matrix[:2, :2], affine[:, :2], atol=0.03)


def test_plain_values_say_what_agrees_where(photographs):
    found = matching.match("model", photographs / "a.png", photographs / "b.png")
    values = json.loads(json.dumps(found.as_json()))
    assert values["verdict"] == "same scene"
    assert values["inliers"] == len(values["pairs"]) == found.inliers
    assert values["putatives"] == len(found.pairs)
    assert values["model"] == "affine"
    assert [image["size"] for image in values["images"]] == [list(SIZE)] * 2
    assert [image["features"] for image in values["images"]] == [150, 150]
    matrix = np.array(values["matrix"])
    for start, end in values["pairs"]:
        assert np.linalg.norm((matrix @ [*start, 1])[:2] - end) <= 20 * SIZE[0] / 1024


@pytest.mark.parametrize("name", ["other", "empty"])
def test_nothing_in_common_is_no_match(photographs, name):
    for first, second in (("a", name), (name, "a")):
        found = matching.match("model", photographs / f"{first}.png", photographs / f"{second}.png")
        assert found.verdict == "no match found"
        assert found.inliers < 12
        json.dumps(found.as_json())
        match_picture.picture(found)


def test_the_floor_of_inliers_decides(photographs):
    images = (photographs / "a.png", photographs / "b.png")
    assert not matching.match("model", *images, VerifyConfig(min_inliers=100)).same_scene
    assert matching.match("model", *images, VerifyConfig(min_inliers=50)).same_scene


def test_what_cannot_be_matched_is_named(photographs):
    good = photographs / "a.png"
    with pytest.raises(QueryError, match=r"broken.png: not an image"):
        matching.match("model", good, photographs / "broken.png")
    with pytest.raises(QueryError, match=r"5 images, one is matched with one"):
        matching.match("model", photographs, good)
    with pytest.raises(DataError, match="nowhere"):
        matching.match("model", good, photographs / "nowhere.png")


@pytest.mark.parametrize(
    "made", [Vectors(np.eye(1, 4, dtype=np.float32)), Codes(np.zeros((1, 1), np.uint8), 8)]
)
def test_models_without_local_features_are_refused(made):
    class Other:
        def encode(self, images):
            return made, {}

    with pytest.raises(ModelError, match=r"matched by local features, the model makes .*delf"):
        matching.photograph(Other(), "a.png", b"")


def test_lines_are_drawn_between_the_inliers(photographs):
    """A pixel on each end and in the middle of each line is coloured; the photographs are grey."""
    found = matching.match("model", photographs / "a.png", photographs / "b.png")
    shown = match_picture.picture(found)
    scale = match_picture.SIDE / SIZE[0]
    width = match_picture.SIDE
    height = round(SIZE[1] * scale)
    top = pictures.MARGIN + 2 * pictures.LINE + pictures.GAP
    assert shown.size == (2 * pictures.MARGIN + pictures.GAP + 2 * width, top + height + pictures.MARGIN)
    pixels = np.asarray(shown).astype(int)
    colourful = np.ptp(pixels, axis=2) > 40
    first, second = found.locations()
    starts = first * scale + [pictures.MARGIN, top]
    ends = second * scale + [pictures.MARGIN + width + pictures.GAP, top]
    for start, end in zip(starts, ends, strict=True):
        for x, y in (start, end, (start + end) / 2):
            if y < top + height and x < shown.width - pictures.MARGIN:
                assert colourful[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2].any()
    other = matching.match("model", photographs / "a.png", photographs / "other.png", VerifyConfig())
    none = matching.compared(
        other.first, matching.match("model", *[photographs / "empty.png"] * 2).first, VerifyConfig()
    )
    assert not (np.ptp(np.asarray(match_picture.picture(none)).astype(int), axis=2) > 40).any()


def test_the_command_prints_draws_and_tells(photographs, monkeypatch):
    monkeypatch.chdir(photographs)
    run = CliRunner().invoke
    said = run(app, ["match", "model", "a.png", "b.png", "--picture", "out.png"])
    assert said.exit_code == 0, said.output
    assert said.output.startswith("same scene: ")
    assert "significance" in said.output
    assert said.output.splitlines()[1] == "picture out.png"
    assert Image.open("out.png").width > 2 * match_picture.SIDE
    arguments = ["match", "model", "a.png", "other.png", "--json", "--set", "geometry.model=homography"]
    values = json.loads(run(app, arguments).output)
    assert (values["verdict"], values["model"], values["picture"]) == ("no match found", "homography", None)
    wrong = run(app, ["match", "model", "a.png", "b.png", "--set", "geometry.modle=affine"])
    assert isinstance(wrong.exception, RetrievalError)
    assert "did you mean 'model'?" in str(wrong.exception)


class Sift:
    """RootSIFT (Arandjelović and Zisserman 2012) in place of a trained network, for real photographs."""

    def encode(self, images):
        image = np.asarray(decode(images[0]).convert("L"))
        scale = 800 / max(image.shape)
        found, descriptors = cv2.SIFT_create(1000).detectAndCompute(
            cv2.resize(image, None, fx=scale, fy=scale), None
        )
        descriptors = np.sqrt(descriptors / descriptors.sum(axis=1, keepdims=True))
        points = np.array([point.pt for point in found]) / scale
        return local_set(descriptors, points, size=(image.shape[1], image.shape[0])), {}


@pytest.mark.skipif(not LANDMARKS.is_dir(), reason="no real photographs here")
def test_real_photographs_of_one_scene_match_and_others_do_not():
    names = [
        "pairs/DSC_0410.JPG",
        "pairs/DSC_0411.JPG",
        "sacre_coeur/02928139_3448003521.jpg",
        "sacre_coeur/03903474_1471484089.jpg",
    ]
    files = [(LANDMARKS / name).read_bytes() for name in names]
    shots = [matching.photograph(Sift(), name, data) for name, data in zip(names, files, strict=True)]
    config = VerifyConfig(matching={"max_distance": 0.7})
    for i in range(4):
        for j in range(i):
            found = matching.compared(shots[i], shots[j], config)
            assert found.same_scene == (i // 2 == j // 2), (names[i], names[j], found.inliers)
