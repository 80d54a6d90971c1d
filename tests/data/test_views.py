"""Synthetic views: what they show, what is drawn, what is kept."""

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_retrieval.config import validate
from ray_retrieval.data import datasets
from ray_retrieval.data.datasets import views as module
from ray_retrieval.data.datasets.survey import survey
from ray_retrieval.data.datasets.views import ViewsConfig, load, rendered, sample_photographs
from ray_retrieval.data.decode import decode
from ray_retrieval.data.rendering import Geometry, Photometry, render
from ray_retrieval.data.table import open_images
from ray_retrieval.errors import ArtefactError, DataError, RecipeError
from ray_retrieval.storage import Folder

PLAIN = Photometry(brightness=0, contrast=0, saturation=0, gamma=0, blur=0, noise=0, quality=(95, 95))


def project(homography, points):
    """float64 [n, 2]: where points (x, y), float64 [n, 2], lie after a homography, float64 [3, 3]."""
    moved = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ homography.T
    return np.asarray(moved[:, :2] / moved[:, 2:])


def views_of(image, *, name="photo", views=3, size=64, seed=0, geometry=None, photometry=PLAIN):
    found = render(
        image,
        name,
        views=views,
        size=size,
        seed=seed,
        geometry=geometry or Geometry(),
        photometry=photometry,
    )
    return list(found)


def pixels(view):
    return np.asarray(Image.open(io.BytesIO(view.data)))


def corners(width, height):
    """The outer corners of a picture, pixel centres at whole numbers."""
    return np.array([[0, 0], [width, 0], [width, height], [0, height]]) - 0.5


def ramp(width, height, axis):
    """A grey picture that grows from 0 to 255 along x (axis 0) or y (axis 1)."""
    place = np.mgrid[:height, :width][1 - axis] / ((width, height)[axis] - 1)
    return np.rint(255 * place).astype(np.uint8)


geometries = st.builds(
    Geometry,
    rotation=st.floats(0, 180),
    scale=st.floats(0.1, 1),
    perspective=st.floats(0, 0.3),
)


@settings(max_examples=60, deadline=None)
@given(geometries, st.integers(8, 90), st.integers(8, 90), st.integers(8, 100), st.integers(0, 2**32))
def test_every_pixel_of_a_view_comes_from_inside_the_photograph(geometry, width, height, size, seed):
    image = Image.new("RGB", (width, height), "white")
    for view in views_of(image, size=size, seed=seed, geometry=geometry, views=2):
        shown = Image.open(io.BytesIO(view.data))
        back = project(np.linalg.inv(view.homography), corners(*shown.size))
        tolerance = 1e-6 * max(width, height)
        assert (back >= -0.5 - tolerance).all()
        assert (back <= np.array([width, height]) - 0.5 + tolerance).all()
        # The four corners are seen from the front, and so is the whole photograph.
        third = np.column_stack([corners(width, height), np.ones(4)]) @ view.homography[2]
        assert (third > 0).all()
        assert view.homography[2, 2] == 1
        assert np.linalg.det(view.homography) > 0  # nothing is mirrored
        assert pixels(view).min() >= 250  # nothing is filled in


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("width", "height", "size"), [(200, 150, 100), (150, 200, 300), (640, 427, 256), (2000, 1500, 150)]
)
def test_the_homography_says_where_every_pixel_comes_from(width, height, size, axis):
    upwards = ramp(width, height, axis)
    pair = [views_of(Image.fromarray(grey).convert("RGB"), size=size) for grey in (upwards, 255 - upwards)]
    for up, down in zip(*pair, strict=True):
        assert np.array_equal(up.homography, down.homography)
        rows, columns = pixels(up).shape[:2]
        y, x = np.mgrid[2 : rows - 2, 2 : columns - 2]
        points = np.column_stack([x.ravel(), y.ravel()]).astype(float)
        there = project(np.linalg.inv(up.homography), points)[:, axis] / ((width, height)[axis] - 1)
        found = [pixels(view)[2:-2, 2:-2, 0].astype(float).ravel() for view in (up, down)]
        # Whole grey levels are cut off, upwards as downwards: half the difference is free of that.
        difference = (found[0] - found[1] + 255) / 2 - 255 * there
        assert np.abs(difference).max() < 4
        assert abs(difference.mean()) < 0.1  # a shift by half a pixel is 0.4 grey levels at the least


def test_a_view_shows_at_least_its_share():
    image = Image.new("RGB", (120, 80))
    geometry = Geometry(rotation=0, scale=0.5, perspective=0)
    shares = []
    for view in views_of(image, geometry=geometry, views=50):
        assert np.allclose(view.homography[2], [0, 0, 1])
        box = project(np.linalg.inv(view.homography), corners(*pixels(view).shape[1::-1]))
        sides = np.ptp(box, axis=0) / [120, 80]
        assert sides[0] == pytest.approx(sides[1], rel=0.05)  # 64 × 43 pixels are not quite 3 : 2
        shares.append(sides[0])
    assert 0.5 <= min(shares) < 0.55
    assert 0.95 < max(shares) <= 1


def test_with_all_bounds_at_zero_a_view_is_the_photograph(make_image):
    image = decode(make_image(48, 36, seed=3))
    (view,) = views_of(image, geometry=Geometry(rotation=0, scale=1, perspective=0), views=1, size=100)
    assert np.allclose(view.homography, np.eye(3), atol=1e-12)
    assert np.abs(pixels(view).astype(float) - np.asarray(image)).mean() < 5


@pytest.mark.parametrize(
    "changed", [{"brightness": 0.5}, {"contrast": 0.5}, {"saturation": 0.8}, {"gamma": 0.5}, {"noise": 20}]
)
def test_each_change_of_colour_does_what_it_says(changed, make_image):
    image = decode(make_image(64, 64, seed=1))
    geometry = Geometry(rotation=0, scale=1, perspective=0)
    plain = pixels(views_of(image, geometry=geometry, views=1)[0]).astype(float)
    strong = Photometry(**{**PLAIN.model_dump(), **changed})
    differences = [
        np.abs(pixels(view) - plain).mean()
        for view in views_of(image, geometry=geometry, photometry=strong, views=4)
    ]
    assert min(differences) != max(differences)
    assert max(differences) > 2


def test_blur_takes_detail_away():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    geometry = Geometry(rotation=0, scale=1, perspective=0)
    blurred = Photometry(**{**PLAIN.model_dump(), "blur": 5})
    plain, *found = (
        min(pixels(view).std() for view in views_of(Image.fromarray(noise), geometry=geometry, photometry=p))
        for p in (PLAIN, blurred)
    )
    assert found[0] < plain / 2


def test_what_is_drawn_depends_on_seed_photograph_and_view_alone(make_image):
    image = decode(make_image(40, 40))
    strong = Photometry()
    three = views_of(image, photometry=strong, views=3)
    five = views_of(image, photometry=strong, views=5)
    assert [view.data for view in five[:3]] == [view.data for view in three]
    assert len({view.data for view in five}) == 5
    for other in ({"seed": 1}, {"name": "other"}):
        assert views_of(image, photometry=strong, **other)[0].data != three[0].data


# The benchmark.


@pytest.fixture
def photos(tmp_path, make_image):
    """Twelve photographs of different sizes, without labels."""
    (tmp_path / "photos").mkdir()
    for number in range(12):
        data = make_image(60 + number, 48, seed=number, kind="JPEG")
        (tmp_path / "photos" / f"{number:02d}.jpg").write_bytes(data)
    return tmp_path / "photos"


def config_of(photos, **fields):
    given = {"images": str(photos), "cache": str(photos.parent / "cache"), "size": 32, "views": 3, **fields}
    return validate(ViewsConfig, {"name": "views", **given})


def loaded(photos, *, seed=0, splits="split", **fields):
    return datasets.load(config_of(photos, **fields), seed=seed, splits=Folder(photos.parent / splits))


def names_of(table):
    return set(table.table["photograph"].to_pylist())


def test_instances_are_learned_from_or_validated_on_or_tested_on(photos):
    benchmark = loaded(photos)
    train, validation, test = (
        names_of(table) for table in (benchmark.train, benchmark.validation_database, benchmark.database)
    )
    assert len(train | validation | test) == len(train) + len(validation) + len(test) == 12
    assert (len(train), len(validation), len(test)) == (6, 2, 4)
    assert names_of(benchmark.queries) == test
    assert names_of(benchmark.validation_queries) == validation
    sizes = {role: len(table) for role, table in benchmark.tables().items()}
    assert sizes == {
        "train": 18,
        "validation_queries": 2,
        "validation_database": 4,
        "queries": 4,
        "database": 8,
    }
    assert benchmark.queries.table["view"].to_pylist() == [0] * 4
    assert not any("no relevant image" in note for note in benchmark.notes)
    # A query's relevant images are the views of its photograph, and nothing else is.
    for query, label in zip(
        benchmark.queries.table["photograph"].to_pylist(), benchmark.queries.labels, strict=True
    ):
        same = benchmark.database.take(np.flatnonzero(benchmark.database.labels == label))
        assert names_of(same) == {query}
        assert same.table["view"].to_pylist() == [1, 2]


def test_several_queries_of_an_instance(photos):
    benchmark = loaded(photos, queries=2)
    assert (len(benchmark.queries), len(benchmark.database)) == (8, 4)
    with pytest.raises(RecipeError, match="none is left to be searched"):
        config_of(photos, queries=3)


def test_labels_of_the_photographs_do_not_count(photo_folder):
    config = config_of(photo_folder)
    table, _ = rendered(open_images(str(photo_folder)), config, views=2)
    assert table.classes == 36
    assert table.class_names[:2] == ["cat/00.png", "cat/01.png"]
    assert table.ids[:3] == ["cat/00.png#0", "cat/00.png#1", "cat/01.png#0"]


@pytest.mark.parametrize("fields", [{}, {"images": None}])
def test_a_root_is_for_the_paths_of_a_list(photos, fields):
    with pytest.raises(RecipeError, match=r"data\.root: it is for the paths in lists and tables"):
        loaded(photos, root=str(photos), **fields)
    (photos.parent / "photos.txt").write_text("".join(f"{number:02d}.jpg\n" for number in range(12)))
    listed = {"images": str(photos.parent / "photos.txt"), "distractors": None}
    assert names_of(loaded(photos, root=str(photos), **listed).database) < {f"{n:02d}.jpg" for n in range(12)}


def test_views_are_rendered_once(photos, monkeypatch):
    first = loaded(photos)
    monkeypatch.setattr(module, "_render_all", lambda *_: pytest.fail("rendered again"))
    again = loaded(photos, seed=5, splits="other")
    assert names_of(again.database) != names_of(first.database)
    files = sorted(path.suffix for path in (photos.parent / "cache").iterdir())
    assert files == [".arrow", ".json"]


@pytest.mark.parametrize("fields", [{"views": 4}, {"size": 40}, {"seed": 1}, {"geometry": {"rotation": 1}}])
def test_other_settings_are_rendered_anew(photos, fields):
    table, _ = rendered(open_images(str(photos)), config_of(photos), views=3)
    config = config_of(photos, **fields)
    other, _ = rendered(open_images(str(photos)), config, views=config.views)
    assert other.image_bytes(0) != table.image_bytes(0) or len(other) != len(table)
    assert len(list((photos.parent / "cache").glob("*.json"))) == 2


def test_a_photograph_that_has_changed_is_rendered_anew(photos, make_image):
    before, _ = rendered(open_images(str(photos)), config_of(photos), views=2)
    (photos / "00.jpg").write_bytes(make_image(60, 48, seed=99, kind="JPEG"))
    after, _ = rendered(open_images(str(photos)), config_of(photos), views=2)
    assert after.image_bytes(0) != before.image_bytes(0)
    assert after.image_bytes(2) == before.image_bytes(2)


def test_the_same_views_come_of_any_number_of_threads(photos, monkeypatch):
    tables = []
    for threads in (1, 5):
        monkeypatch.setattr(module, "cores", lambda threads=threads: threads)
        monkeypatch.setattr(module, "_AT_ONCE", 2 * threads)
        config = config_of(photos, cache=str(photos.parent / f"cache{threads}"))
        tables.append(rendered(open_images(str(photos)), config, views=2)[0].table)
    assert tables[0].equals(tables[1])


def test_the_homographies_of_the_table_are_those_of_its_images(photos):
    table, _ = rendered(open_images(str(photos)), config_of(photos), views=2)
    assert table.table.schema.field("homography").type == pa.list_(pa.float64())
    row = 7
    name, number = table.table["photograph"][row].as_py(), table.table["view"][row].as_py()
    image = decode((photos / name).read_bytes())
    view = views_of(image, name=name, views=2, size=32, photometry=Photometry())[number]
    assert view.data == table.image_bytes(row)
    assert np.array_equal(view.homography.ravel(), table.table["homography"][row].as_py())


def test_a_damaged_photograph_is_left_out_and_named(photos):
    (photos / "05.jpg").write_bytes(b"no image")
    benchmark = loaded(photos)
    assert any("1 of 12 photographs cannot be decoded" in n and "'05.jpg'" in n for n in benchmark.notes)
    everywhere = set().union(*(names_of(t) for t in benchmark.tables().values()))
    assert len(everywhere) == 11
    # It is remembered with the views.
    assert benchmark.notes[0] == loaded(photos, splits="other").notes[0]


def test_photographs_that_are_none_are_an_error_and_leave_nothing(photos):
    for path in photos.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no photograph can be decoded, the first is '00\.jpg'"):
        loaded(photos)
    assert list((photos.parent / "cache").iterdir()) == []


def test_too_few_photographs_are_told(photos):
    for path in sorted(photos.iterdir())[5:]:
        path.unlink()
    with pytest.raises(DataError, match="there are 5 photographs, 6 are needed"):
        loaded(photos)
    assert len(loaded(photos, validation_instances=0).validation_queries) == 0


def test_a_damaged_cache_is_told(photos):
    rendered(open_images(str(photos)), config_of(photos), views=2)
    (file,) = (photos.parent / "cache").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtefactError, match="damaged"):
        rendered(open_images(str(photos)), config_of(photos), views=2)


def test_distractors_join_the_test_database_alone(photos, make_image):
    further = photos.parent / "further"
    further.mkdir()
    for number in range(5):  # names that photographs have too
        (further / f"{number:02d}.jpg").write_bytes(make_image(50, 50, seed=50 + number, kind="JPEG"))
    plain, more = loaded(photos), loaded(photos, distractors=str(further), splits="more")
    assert len(more.database) == len(plain.database) + 5
    assert more.database.ids[:8] == plain.database.ids
    assert more.database.ids[-5:] == [f"distractor/{n:02d}.jpg#0" for n in range(5)]
    assert not set(more.database.labels[-5:]) & set(more.queries.labels)
    assert more.train.ids == plain.train.ids
    with pytest.raises(DataError, match="12 distractors are among the photographs"):
        loaded(photos, distractors=str(photos), splits="same")


def test_a_saved_split_of_other_numbers_is_refused(photos):
    loaded(photos)
    with pytest.raises(DataError, match="drawn with test_instances"):
        loaded(photos, test_instances=0.5)


def test_the_samples_are_there_and_all_different(tmp_path):
    pytest.importorskip("skimage")
    table = sample_photographs()
    assert len(table) == 20
    for row in range(20):
        assert min(decode(table.image_bytes(row)).size) >= 170
    benchmark = load(
        ViewsConfig(cache=str(tmp_path / "cache"), size=64, views=2),
        seed=0,
        splits=Folder(tmp_path / "split"),
    )
    assert len(benchmark.train) + 2 * len(benchmark.queries) + 2 * len(benchmark.validation_queries) == 40


def test_missing_samples_are_told(monkeypatch):
    monkeypatch.setattr(module, "_SAMPLES", {"no_such_package.data": ["a.png"]})
    with pytest.raises(DataError, match=r"data.images=null: .*pip install 'ray_retrieval\[samples\]'"):
        sample_photographs()


def test_survey_looks_where_the_photographs_are(photos):
    assert survey(config_of(photos))["files"] == [{"file": str(photos), "found": True}]
    assert survey(ViewsConfig())["complete"]
    assert not survey(ViewsConfig(images=str(photos / "none")))["complete"]


def test_qualities_are_in_order():
    with pytest.raises(RecipeError, match="90, is above the highest, 50"):
        validate(Photometry, {"quality": [90, 50]})
