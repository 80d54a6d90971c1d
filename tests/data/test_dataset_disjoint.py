"""SOP, CUB-200, Cars196, In-shop and VehicleID in miniature: the published numbers are swapped for small
ones, everything else is as it is."""

import json

import numpy as np
import pytest
from scipy.io import savemat
from typer.testing import CliRunner

from ray_retrieval.cli import app
from ray_retrieval.config import validate
from ray_retrieval.data import datasets
from ray_retrieval.data.datasets import cars196, cub200, inshop, sop, vehicleid
from ray_retrieval.data.datasets.disjoint import Count
from ray_retrieval.data.datasets.survey import survey
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.storage import Folder

EACH = 3
"""Images of each class."""


def touch(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def sizes(train, test):
    """The published form of as many classes of three images."""
    searched = (Count(EACH * test, test),)
    return {"train": (Count(EACH * train, train),), "queries": searched, "database": searched}


def write_sop(root, *, official=True, prefix="", first_test=21):
    """Classes 1…20 to train on and ten from `first_test`, of two kinds."""
    root.mkdir()
    for part, classes in (("train", range(1, 21)), ("test", range(first_test, first_test + 10))):
        rows = [
            (f"{('bicycle', 'chair')[c % 2]}_final/{part}{c}_{n}.JPG", c)
            for c in classes
            for n in range(EACH)
        ]
        touch(root, [path for path, _ in rows])
        if official:
            lines = [f"{n} {c} {c % 2} {path}\n" for n, (path, c) in enumerate(rows, 1)]
            text = "image_id class_id super_class_id path\n" + "".join(lines)
            (root / f"Ebay_{part}.txt").write_text(text)
        else:
            lines = [f"{prefix}{path} {c} {n}\n" for n, (path, c) in enumerate(rows)]
            (root / f"{part}_list.txt").write_text("".join(lines))
    return root


def write_cub(root):
    """Species 1…20 and 21…30; the split of classification is there too, to be left alone."""
    names = [f"{c:03d}.Bird_{c}/Bird_{c}_{n}.jpg" for c in range(1, 31) for n in range(EACH)]
    touch(root / "images", names)
    (root / "images.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(names, 1)))
    labels = [f"{n} {int(name[:3])}\n" for n, name in enumerate(names, 1)]
    (root / "image_class_labels.txt").write_text("".join(labels))
    (root / "train_test_split.txt").write_text("".join(f"{n} {n % 2}\n" for n in range(1, len(names) + 1)))
    return root


def write_cars(root, *, kit=False):
    """Models 1…20 and 21…30 in a mixed order, each in both parts of the classification split."""
    root.mkdir()
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 31), EACH))
    models = np.array([f"Maker Model {c} 2012" for c in range(1, 31)], dtype=object)
    if not kit:
        names = [f"car_ims/{n:06d}.jpg" for n in range(len(order))]
        kind = [("relative_im_path", object), ("class", object), ("test", object)]
        rows = np.array([(n, c, i % 2) for i, (n, c) in enumerate(zip(names, order, strict=True))], kind)
        savemat(root / "cars_annos.mat", {"annotations": rows, "class_names": models})
    else:
        (root / "devkit").mkdir()
        savemat(root / "devkit/cars_meta.mat", {"class_names": models})
        names = []
        files = ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")
        for part, (folder, file) in enumerate(zip(("cars_train", "cars_test"), files, strict=True)):
            mine = order[part::2]
            rows = [(f"{n:05d}.jpg", c) for n, c in enumerate(mine, 1)]
            names += [f"{folder}/{name}" for name, _ in rows]
            savemat(root / file, {"annotations": np.array(rows, [("fname", object), ("class", object)])})
    touch(root, names)
    return root


def write_inshop(root, *, inside="", where="Eval/list_eval_partition.txt"):
    """Items 1…20 to train on; of 21…30 one image is a query and two are searched."""
    rows = []
    for item in range(1, 31):
        for n in range(EACH):
            status = "train" if item <= 20 else "query" if n == 0 else "gallery"
            rows.append((f"img/WOMEN/Dresses/id_{item:08d}/0{n}_1_front.jpg", f"id_{item:08d}", status))
    touch(root, [inside + row[0] for row in rows])
    lines = [f"{a:<60}{b:<14}{c}\n" for a, b, c in rows]
    (root / where).parent.mkdir(exist_ok=True)
    (root / where).write_text(f"{len(rows)}\nimage_name item_id evaluation_status\n" + "".join(lines))
    return root


def write_vehicles(root):
    """Vehicles 1…20 and 21…30."""
    lists = {"train_list.txt": range(1, 21), "test_list_10.txt": range(21, 31)}
    for name, vehicles in lists.items():
        rows = [(f"{100 * v + n:07d}", v) for v in vehicles for n in range(EACH)]
        touch(root, [f"image/{number}.jpg" for number, _ in rows])
        (root / "train_test_split").mkdir(exist_ok=True)
        (root / "train_test_split" / name).write_text("".join(f"{number} {v}\n" for number, v in rows))
    return root


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Twenty classes to learn from, ten to search."""
    for module in (sop, cub200, cars196):
        monkeypatch.setattr(module, "COUNTS", sizes(20, 10))
    for module in (cub200, cars196):
        monkeypatch.setattr(module, "TRAIN_CLASSES", 20)
    counts = {"train": (Count(60, 20),), "queries": (Count(10, 10),), "database": (Count(20, 10),)}
    monkeypatch.setattr(inshop, "COUNTS", counts)
    monkeypatch.setattr(vehicleid, "TRAIN", (Count(1, 1), Count(60, 20)))
    monkeypatch.setattr(vehicleid, "VEHICLES", {"small": 10, "medium": 20, "large": 30})


WRITERS = {
    "sop": write_sop,
    "cub200": write_cub,
    "cars196": write_cars,
    "inshop": write_inshop,
    "vehicleid": write_vehicles,
}


def config_of(name, root, **fields):
    return validate(datasets.CONFIGS[name], {"name": name, "root": str(root), **fields})


def loaded(name, tmp_path, *, seed=0, write=None, splits="split", **fields):
    root = tmp_path / name
    if not root.exists():
        (write or WRITERS[name])(root)
    return datasets.load(config_of(name, root, **fields), seed=seed, splits=Folder(tmp_path / splits))


def classes_of(table):
    return {table.class_name(label) for label in table.labels.tolist()}


@pytest.mark.parametrize("name", WRITERS)
def test_no_class_is_both_learned_from_and_searched(tmp_path, name):
    found = loaded(name, tmp_path)
    train, validation = classes_of(found.train), classes_of(found.validation_queries)
    test = classes_of(found.queries)
    assert test == classes_of(found.database)
    assert (len(train), len(validation), len(test)) == (18, 2, 10)
    assert not train & validation
    assert not (train | validation) & test
    assert len(found.train) == 18 * EACH
    assert len(found.validation_queries) == 2 * EACH
    assert found.validation_queries is found.validation_database
    for table in found.tables().values():
        assert set(table.labels.tolist()) == set(range(table.classes))
        assert all(path.startswith(str(tmp_path)) for path in table.paths)
    assert any("2 of 20 training classes (6 of 60 images) are held out" in note for note in found.notes)
    assert found.ks[0] == 1


@pytest.mark.parametrize("name", ["sop", "cub200", "cars196", "vehicleid"])
def test_queries_that_are_the_database_are_the_same_table(tmp_path, name):
    found = loaded(name, tmp_path)
    assert found.queries is found.database
    assert found.queries_in_database
    assert len(found.queries) == 10 * EACH


@pytest.mark.parametrize("name", WRITERS)
def test_a_split_is_drawn_once_and_read_ever_after(tmp_path, name):
    first, again = (loaded(name, tmp_path, seed=seed) for seed in (0, 1))
    for role, table in first.tables().items():
        assert table.fingerprint == again.tables()[role].fingerprint
    assert all(map(np.array_equal, first.gallery_draws, again.gallery_draws))
    assert "the split is the saved one, drawn with seed 0, not 1" in again.notes
    other = loaded(name, tmp_path, seed=1, splits="other")
    assert other.train.ids != first.train.ids
    assert other.queries.ids == first.queries.ids
    with pytest.raises(DataError, match=r"validation_classes = 0\.1, asked is 0\.2"):
        loaded(name, tmp_path, validation_classes=0.2)


def test_validation_on_the_test_images_is_said_loudly(tmp_path):
    found = loaded("sop", tmp_path, validation="test")
    assert found.validation_queries is found.queries is found.database
    assert len(found.train) == 60
    assert any("its numbers are optimistic" in note for note in found.notes)
    apart = loaded("inshop", tmp_path, validation="test", splits="other")
    assert apart.validation_queries is apart.queries
    assert apart.validation_database is apart.database


def test_no_validation(tmp_path):
    found = loaded("cub200", tmp_path, validation="none")
    assert len(found.validation_queries) == len(found.validation_database) == 0
    assert len(found.train) == 60
    assert "there is no validation: the last model is kept" in found.notes


def test_the_share_of_validation_classes_is_an_option(tmp_path):
    found = loaded("cub200", tmp_path, validation_classes=0.5)
    assert (found.train.classes, found.validation_queries.classes) == (10, 10)
    with pytest.raises(RecipeError, match="validation_classes"):
        config_of("cub200", tmp_path, validation_classes=0.6)


@pytest.mark.parametrize("first_test", [21, 1, 15])
@pytest.mark.parametrize("prefix", ["", "./data/Stanford_Online_Products/"])
def test_sop_in_list_files(tmp_path, prefix, first_test):
    def write(root):
        write_sop(root, official=False, prefix=prefix, first_test=first_test)

    found = loaded("sop", tmp_path, write=write)
    assert (found.train.classes, found.queries.classes) == (18, 10)
    assert found.queries.ids[0] == f"chair_final/test{first_test}_0.JPG"


def test_sop_has_the_names_of_its_kinds_and_the_official_lists_go_first(tmp_path):
    write_sop(tmp_path / "sop", official=True)
    (tmp_path / "sop/train_list.txt").write_text("wrong\n")
    (tmp_path / "sop/test_list.txt").write_text("wrong\n")
    found = loaded("sop", tmp_path)
    assert found.queries.class_names[:2] == ["chair 21", "bicycle 22"]
    assert found.ks == (1, 10, 100, 1000)


def test_official_numbers_that_do_not_run_on_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"6 classes are both in train and in the test, the first is 'chair 15'"
    ):
        loaded("sop", tmp_path, write=lambda root: write_sop(root, first_test=15))


@pytest.mark.parametrize("kit", [False, True])
def test_cars_in_both_forms_by_class_and_not_by_the_classification_split(tmp_path, kit):
    found = loaded("cars196", tmp_path, write=lambda root: write_cars(root, kit=kit))
    assert found.queries.class_names == [f"Maker Model {c} 2012" for c in range(21, 31)]
    folders = {name.split("/")[0] for name in found.queries.ids}
    assert folders == ({"cars_train", "cars_test"} if kit else {"car_ims"})
    assert found.ks == (1, 2, 4, 8)


def test_cars_without_test_labels_or_damaged_are_refused(tmp_path):
    root = write_cars(tmp_path / "cars196", kit=True)
    kind = [("fname", object), ("bbox_x1", object)]
    unlabelled = np.array([("00001.jpg", 3), ("00002.jpg", 3)], kind)
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": unlabelled})
    with pytest.raises(DataError, match="no annotations with 'fname' and 'class'"):
        loaded("cars196", tmp_path)
    (root / "cars_test_annos_withlabels.mat").write_bytes(b"not a MATLAB file" * 20)
    with pytest.raises(DataError, match="not a MATLAB file"):
        loaded("cars196", tmp_path)
    (root / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DataError, match=r"withlabels.mat: the file is missing"):
        loaded("cars196", tmp_path)


@pytest.mark.parametrize("inside", ["", "Img/"])
@pytest.mark.parametrize("where", inshop.PARTITION)
def test_inshop_has_queries_apart_from_the_gallery(tmp_path, inside, where):
    found = loaded("inshop", tmp_path, write=lambda root: write_inshop(root, inside=inside, where=where))
    assert (len(found.queries), len(found.database)) == (10, 20)
    assert not found.queries_in_database
    assert not set(found.queries.ids) & set(found.database.ids)
    # Both count their classes alike.
    assert found.queries.class_names == found.database.class_names
    assert found.queries.class_name(found.queries.labels[4]) == "id_00000025"
    assert not any("no relevant image" in note for note in found.notes)


def test_vehicles_are_searched_in_galleries_of_one_image_each(tmp_path):
    found = loaded("vehicleid", tmp_path)
    assert found.name == "VehicleID (small)"
    assert len(found.gallery_draws) == 10
    for rows in found.gallery_draws:
        assert rows.dtype == np.int64
        assert sorted(found.database.labels[rows].tolist()) == list(range(10))
    assert len({tuple(rows.tolist()) for rows in found.gallery_draws}) > 1
    assert any("10 galleries of 10 images are drawn from the 30" in note for note in found.notes)
    other = loaded("vehicleid", tmp_path, seed=1, splits="other")
    assert [r.tolist() for r in other.gallery_draws] != [r.tolist() for r in found.gallery_draws]


def test_other_numbers_than_the_published_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(DataError) as caught:
        loaded("sop", tmp_path)
    assert "train: 59,551 images of 11,318 classes are expected, there are 60 images of 20 classes" in str(
        caught.value
    )
    root = write_vehicles(tmp_path / "vehicleid")
    (root / "train_test_split/test_list_800.txt").write_text("1 1\n")
    with pytest.raises(DataError, match="113,346 images of 13,164 classes or 110,178 images of 13,134"):
        loaded("vehicleid", tmp_path)


def test_missing_images_and_lists_are_named(tmp_path):
    root = write_cub(tmp_path / "cub200")
    (root / "images/021.Bird_21/Bird_21_0.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 90 images are missing, the first is images/021.Bird_21"):
        loaded("cub200", tmp_path)
    (root / "images.txt").unlink()
    with pytest.raises(DataError, match=r"images.txt: the file is missing"):
        loaded("cub200", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("cub200", "image_class_labels.txt", "1 x\n", "not a class number for each image"),
        ("cub200", "images.txt", "1 a.jpg\n\n2\n", "line 3 has 1 words, 2 are expected"),
        ("sop", "Ebay_test.txt", "image_id class_id super_class_id path\n", "the file has no row"),
        ("inshop", "Eval/list_eval_partition.txt", "1\nx y z\na b val\n", "'val' is none of train, query"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, file, text, message):
    root = tmp_path / name
    WRITERS[name](root)
    (root / file).write_text(text)
    with pytest.raises(DataError, match=message):
        loaded(name, tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_each_is_surveyed_with_and_without_its_files(tmp_path, name):
    absent = survey(config_of(name, tmp_path / "nowhere"))
    assert not absent["complete"]
    assert absent["files"]
    assert absent["parts"] == {}
    root = tmp_path / name
    WRITERS[name](root)
    result = CliRunner().invoke(app, ["datasets", name, f"root={root}", "--json"])
    found = json.loads(result.stdout)
    assert found["complete"]
    assert found["parts"]["train"]["images"] == 60
    assert found["parts"]["train"]["classes"] == 20
    assert found["ks"][0] == 1
    page = CliRunner().invoke(app, ["datasets", name, f"root={root}"]).stdout
    assert "recall@1" in page


def test_the_published_numbers_of_cub_cars_and_inshop_add_up(monkeypatch):
    monkeypatch.undo()
    together = {
        module: sum(module.COUNTS[part][0].images for part in ("train", "queries"))
        for module in (sop, cub200, cars196, inshop)
    }
    assert together[sop] == 120_053
    assert together[cub200] == 11_788 == 5_994 + 5_794
    assert together[cars196] == 16_185 == 8_144 + 8_041
    assert together[inshop] + inshop.COUNTS["database"][0].images == 52_712
