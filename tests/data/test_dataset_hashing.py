"""COCO, NUS-WIDE, ImageNet-100, MIRFlickr and VOC, in miniature: the published numbers are swapped for small
ones, everything else is as it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ray_retrieval.data import datasets
from ray_retrieval.data.datasets import coco, imagenet100, mirflickr, nuswide, voc2012
from ray_retrieval.data.datasets.survey import survey
from ray_retrieval.data.labels import positive_pair_rate
from ray_retrieval.data.list_files import parse_list
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder

LISTS = Path(__file__).parents[3] / "shared" / "data" / "coco_lists"


def hot(classes, *columns):
    return " ".join(str(int(column in columns)) for column in range(classes))


def write_coco(root, *, database=True, annotations=False):
    """30 labelled images: 0…9 train, 10…14 queries; category ids as COCO's, with gaps."""
    names = []
    for number in range(30):
        part = "train2014" if number < 20 else "val2014"
        (root / part).mkdir(parents=True, exist_ok=True)
        names.append(f"{part}/COCO_{part}_{number:012d}.jpg")
        (root / names[-1]).touch()
    labels = {number: sorted({number % 80, (7 * number) % 80}) for number in range(30)}
    lines = [f"{name} {hot(80, *labels[number])}\n" for number, name in enumerate(names)]
    (root / "train.txt").write_text("".join(lines[:10]))
    (root / "test.txt").write_text("".join(lines[10:15]))
    if database:
        (root / "database.txt").write_text("".join(lines[10:]))
    if annotations:
        (root / "annotations").mkdir()
        ids = {name: 2 * place + 1 for place, name in enumerate(reversed(coco.CLASS_NAMES))}
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        for part, numbers in (("train2014", range(20)), ("val2014", range(20, 30))):
            images = [{"id": n, "file_name": f"COCO_{part}_{n:012d}.jpg"} for n in numbers]
            images.append({"id": 1000 + numbers[0], "file_name": "without_an_object.jpg"})
            found = [
                {"image_id": n, "category_id": ids[coco.CLASS_NAMES[label]]}
                for n in reversed(numbers)
                for label in labels[n]
            ]
            content = {"images": images, "annotations": found, "categories": categories}
            (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def few(monkeypatch):
    """COCO's counts in miniature: 30 labelled = 20 + 10, of which the 5 queries leave 25."""
    monkeypatch.setattr(
        coco,
        "COUNTS",
        {
            "hashnet": {"train": 10, "queries": 5, "database": 20},
            "clean": {"train": 10, "queries": 5, "database": 25},
        },
    )


@pytest.mark.parametrize("from_annotations", [False, True])
@pytest.mark.parametrize("protocol", ["hashnet", "clean"])
def test_coco_in_both_protocols_from_lists_or_annotations(tmp_path, few, protocol, from_annotations):
    root = write_coco(tmp_path / "coco", database=not from_annotations, annotations=from_annotations)
    config = coco.CocoConfig(root=str(root), protocol=protocol)
    benchmark = datasets.load(config, seed=0, splits=Folder(tmp_path / "split"))
    train, queries, database = (
        {*table.ids} for table in (benchmark.train, benchmark.queries, benchmark.database)
    )
    assert benchmark.k == 5000
    assert benchmark.train.class_names == list(coco.CLASS_NAMES)
    if protocol == "hashnet":
        assert queries <= database
        assert not train & database
        assert benchmark.queries_in_database
    else:
        assert not queries & database
        assert train <= database
    # Image 25 has the labels 25 and 7 · 25 mod 80 = 15 either way.
    row = next(r for r, name in enumerate(benchmark.database.ids) if name.endswith("25.jpg"))
    assert np.flatnonzero(benchmark.database.labels[row]).tolist() == [15, 25]


@pytest.mark.parametrize(("protocol", "database"), [("hashnet", 20), ("clean", 25)])
def test_coco_is_surveyed_from_annotations_without_any_image(tmp_path, few, protocol, database):
    root = write_coco(tmp_path / "coco", database=False, annotations=True)
    for name in ("train.txt", "test.txt"):
        text = (root / name).read_text()
        (root / name).write_text(text.replace("train2014/", "./data/coco/train2014/"))
    for part in ("train2014", "val2014"):
        shutil.rmtree(root / part)
    found = survey(coco.CocoConfig(root=str(root), protocol=protocol))
    assert found["parts"]["database"]["images"] == database
    overlaps = {tuple(entry["parts"]): entry["images"] for entry in found["overlaps"]}
    inside = protocol == "hashnet"
    assert overlaps["queries", "database"] == (5 if inside else 0)
    assert overlaps["train", "database"] == (0 if inside else 10)
    assert not found["complete"]


def test_coco_without_a_database_says_what_would_do(tmp_path, few):
    root = write_coco(tmp_path / "coco", database=False)
    with pytest.raises(DataError, match=r"neither a list of the database nor .*instances_train2014.json"):
        datasets.load(coco.CocoConfig(root=str(root)), seed=0, splits=Folder(tmp_path / "split"))


def test_coco_with_another_number_of_images_is_refused(tmp_path):
    root = write_coco(tmp_path / "coco")
    with pytest.raises(DataError, match="train: 10000 images are expected, there are 10"):
        datasets.load(coco.CocoConfig(root=str(root)), seed=0, splits=Folder(tmp_path / "split"))


def test_the_published_numbers_of_coco_agree_with_each_other():
    counts = coco.COUNTS
    labelled = 122_218  # images with an annotated object among the 123,287 of train2014 and val2014
    assert labelled == counts["hashnet"]["database"] + counts["hashnet"]["train"]
    assert counts["clean"]["database"] == labelled - counts["clean"]["queries"] == 117_218


@pytest.mark.skipif(not LISTS.is_dir(), reason="COCO's lists are not here")
def test_the_lists_in_use_have_the_published_facts():
    train, queries = (parse_list(str(LISTS / name)) for name in ("train.txt", "test.txt"))
    assert (len(train.names), len(queries.names)) == (10_000, 5_000)
    assert not {*train.names} & {*queries.names}
    hot = np.zeros((10_000, 80), bool)
    lengths = [len(row) for row in train.label.to_pylist()]
    hot[np.repeat(np.arange(10_000), lengths), np.asarray(train.label.flatten())] = True
    assert round(positive_pair_rate(hot), 3) == 0.350
    assert round(1 / positive_pair_rate(hot), 2) == 2.86
    assert hot.any(axis=1).all()
    # Columns are in the order of the alphabet: persons are on more than half of the photographs.
    commonest = np.argsort(-hot.sum(axis=0))[:4]
    assert [coco.CLASS_NAMES[c] for c in commonest] == ["person", "chair", "car", "dining table"]


def write_lists(root, classes, *, bare=()):
    (root / "images").mkdir(parents=True)
    lines = []
    for number in range(30):
        (root / "images" / f"{number}.jpg").touch()
        columns = () if number in bare else (number % classes, (3 * number + 1) % classes)
        lines.append(f"./data/images/{number}.jpg {hot(classes, *columns)}\n")
    (root / "train.txt").write_text("".join(lines[:10]))
    (root / "test.txt").write_text("".join(lines[10:15]))
    (root / "database.txt").write_text("".join(lines[:10] + lines[15:]))
    return root


@pytest.mark.parametrize("classes", [21, 81])
def test_nus_wide_notes_images_without_a_label(tmp_path, monkeypatch, classes):
    counts = {"train": 10, "queries": 5, "database": 25 if classes == 21 else None}
    monkeypatch.setitem(nuswide.COUNTS, classes, counts)
    root = write_lists(tmp_path / "nus", classes, bare=(3, 4))
    config = nuswide.NusWideConfig(root=str(root), classes=classes)
    benchmark = datasets.load(config, seed=0, splits=Folder(tmp_path / "split"))
    assert benchmark.k == 5000
    assert any("train: 2 of 10 images have an empty list of labels" in note for note in benchmark.notes)
    assert not benchmark.queries_in_database


def test_lists_of_the_other_number_of_concepts_are_refused(tmp_path):
    root = write_lists(tmp_path / "nus", 21)
    with pytest.raises(DataError, match="21 labels a line, 81 are expected"):
        datasets.load(nuswide.NusWideConfig(root=str(root)), seed=0, splits=Folder(tmp_path / "split"))


def test_imagenet_100(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet100, "COUNTS", {"train": 10, "queries": 5, "database": 25})
    root = write_lists(tmp_path / "imagenet", 100)
    config = imagenet100.ImageNet100Config(root=str(root))
    benchmark = datasets.load(config, seed=0, splits=Folder(tmp_path / "split"))
    assert (benchmark.k, benchmark.train.classes) == (1000, 100)


def test_mirflickr_is_drawn_from_its_annotations(tmp_path, monkeypatch):
    monkeypatch.setattr(mirflickr, "IMAGES", 60)
    monkeypatch.setattr(mirflickr, "COUNTS", {"train": 20, "queries": 10, "database": 30})
    root = tmp_path / "mirflickr"
    (root / "annotations").mkdir(parents=True)
    for number in range(1, 61):
        (root / f"im{number}.jpg").touch()
    for column in range(38):
        numbers = [n for n in range(1, 61) if n % 38 == column or (n * 5) % 38 == column]
        (root / "annotations" / f"label{column:02d}.txt").write_text("".join(f"{n}\n" for n in numbers))
    (root / "annotations" / "README.txt").write_text("not a label")
    config = mirflickr.MirFlickrConfig(root=str(root))
    benchmark = datasets.load(config, seed=0, splits=Folder(tmp_path / "split"))
    assert [len(t) for t in (benchmark.train, benchmark.queries, benchmark.database)] == [20, 10, 30]
    assert any("they are not the published lists" in note for note in benchmark.notes)
    number = int(benchmark.queries.ids[0].removeprefix("im").removesuffix(".jpg"))
    assert np.flatnonzero(benchmark.queries.labels[0]).tolist() == sorted({number % 38, number * 5 % 38})
    (root / "annotations" / "label00.txt").unlink()
    with pytest.raises(DataError, match=r"the 38 annotation files are there \(37 found\)"):
        datasets.load(config, seed=0, splits=Folder(tmp_path / "other"))


def test_voc_is_drawn_from_its_image_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(voc2012, "COUNTS", {"train": 20, "queries": 10, "database": 30})
    root = tmp_path / "VOC2012"
    for name in ("JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for number in range(60):
        (root / "JPEGImages" / f"2008_{number:06d}.jpg").touch()
    for column, name in enumerate(voc2012.CLASS_NAMES):
        marks = [1 if n % 20 == column else 0 if (n + 1) % 20 == column else -1 for n in range(60)]
        lines = [f"2008_{n:06d} {mark:2d}\n" for n, mark in enumerate(marks)]
        (root / "ImageSets/Main" / f"{name}_trainval.txt").write_text("".join(lines))
    config = voc2012.Voc2012Config(root=str(root))
    benchmark = datasets.load(config, seed=0, splits=Folder(tmp_path / "split"))
    assert [len(t) for t in (benchmark.train, benchmark.queries, benchmark.database)] == [20, 10, 30]
    number = int(benchmark.train.ids[0][-8:-4])
    assert np.flatnonzero(benchmark.train.labels[0]).tolist() == [number % 20]
    assert benchmark.train.class_name(14) == "person"
