"""List files as they come: prefixes before missing images, lists that contradict, files that are cut off."""

import json
from pathlib import Path

import numpy as np
import pytest

from ray_retrieval.data.datasets import lists, load
from ray_retrieval.data.datasets.coco import CLASS_NAMES, CocoConfig
from ray_retrieval.data.datasets.images import ImagesConfig
from ray_retrieval.data.datasets.lists import ListsConfig, strip_prefixes
from ray_retrieval.data.datasets.survey import every_config, survey
from ray_retrieval.data.datasets.voc2012 import CLASS_NAMES as VOC_NAMES
from ray_retrieval.data.datasets.voc2012 import Voc2012Config
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder


def write(root, *, images=(), **files):
    root.mkdir(parents=True, exist_ok=True)
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, lines in files.items():
        (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return root


def opened(root, **settings):
    return load(ListsConfig(root=str(root), **settings), seed=0, splits=Folder(root / "split"))


def touch(root, *names):
    write(root, images=names)
    return str(root)


class TestPrefixes:
    def test_missing_images_at_the_start_do_not_hide_the_prefix(self, tmp_path):
        root = touch(tmp_path, "im/4.jpg", "im/5.jpg")
        found = strip_prefixes([f"/home/u/data/im/{n}.jpg" for n in range(6)], root)
        assert found == [f"im/{n}.jpg" for n in range(6)]

    def test_a_prefix_after_paths_that_need_none(self, tmp_path):
        root = touch(tmp_path, "im/0.jpg", "im/1.jpg")
        assert strip_prefixes(["im/0.jpg", "../data/im/1.jpg", "im/2.jpg"], root) == [
            f"im/{n}.jpg" for n in range(3)
        ]

    def test_of_two_prefixes_the_longer_one_goes(self, tmp_path):
        root = touch(tmp_path, "im/0.jpg", "im/1.jpg")
        assert strip_prefixes(["a/b/im/0.jpg", "a/im/1.jpg", "a/b/im/2.jpg"], root) == [
            f"im/{n}.jpg" for n in range(3)
        ]

    def test_without_any_image_the_search_is_given_up(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(lists.location, "exists", asked.append)
        names = [f"x/im/{n}.jpg" for n in range(1000)]
        assert strip_prefixes(names, str(tmp_path)) == names
        assert len(asked) == lists._TRIES * 3

    def test_flat_names_are_not_looked_for(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lists.location, "exists", pytest.fail)
        assert strip_prefixes(["./1.jpg", "2.jpg"], str(tmp_path)) == ["1.jpg", "2.jpg"]

    def test_a_copy_that_lacks_the_first_image_loads_without_it(self, tmp_path):
        lines = [f"./data/nus/im/{n}.jpg {n % 2} {1 - n % 2}" for n in range(8)]
        kept = [f"im/{n}.jpg" for n in range(1, 8)]
        root = write(tmp_path, images=kept, train=lines[:4], test=lines[4:6], database=lines)
        benchmark = opened(root, missing="drop")
        assert benchmark.train.ids == kept[:3]
        assert benchmark.database.ids == kept
        assert any("1 images of the lists are missing and left out" in note for note in benchmark.notes)


def test_lists_that_contradict_are_noted_and_the_database_counts(tmp_path):
    names = [f"im/{n}.jpg" for n in range(3)]
    root = write(
        tmp_path,
        images=names,
        train=["im/0.jpg 1 0", "im/1.jpg 1 0"],
        test=["im/2.jpg 1 0"],
        database=["im/0.jpg 0 1", "im/1.jpg 1 0"],
    )
    benchmark = opened(root)
    assert benchmark.train.labels.tolist() == [[False, True], [True, False]]
    assert [note for note in benchmark.notes if "other labels" in note] == [
        "1 images have other labels in another list, the first is 'im/0.jpg': those of the database count, "
        "then those of train"
    ]


def test_lists_that_agree_are_not_noted(tmp_path):
    lines = ["im/0.jpg 0", "im/1.jpg 1"]
    root = write(tmp_path, images=["im/0.jpg", "im/1.jpg"], train=lines, test=lines[:1], database=lines)
    assert not any("other labels" in note for note in opened(root).notes)


def test_a_list_without_labels_is_refused(tmp_path):
    lines = ["im/0.jpg 0", "im/1.jpg 1"]
    bare = ["im/0.jpg", "im/1.jpg"]
    root = write(tmp_path, images=bare, train=lines, test=lines, database=bare)
    with pytest.raises(DataError, match="database: the list has no labels"):
        opened(root)


def test_one_class_a_line_is_no_list_of_a_benchmark_with_several_labels(tmp_path):
    lines = ["train2014/0.jpg 0", "train2014/1.jpg 1"]
    images = ["train2014/0.jpg", "train2014/1.jpg"]
    root = write(tmp_path, images=images, train=lines, test=lines, database=lines)
    with pytest.raises(DataError, match="train: one class a line, 80 are expected"):
        load(CocoConfig(root=str(root)), seed=0, splits=Folder(tmp_path / "split"))


@pytest.mark.parametrize("images_of_each", [1, 2])
def test_validation_stays_within_its_number_where_classes_are_many(tmp_path, images_of_each):
    names = [f"im/{n}.jpg" for n in range(320)]
    lines = [f"{name} {n // images_of_each}" for n, name in enumerate(names)]
    root = write(tmp_path, images=names, train=lines[:10], test=lines[10:20], database=lines[20:])
    benchmark = opened(root, validation_queries=30, validation_database=50)
    assert len(benchmark.validation_queries) == 30
    assert len(benchmark.validation_database) == 50
    assert not {*benchmark.validation_queries.ids} & {*benchmark.validation_database.ids}


def coco_line(name, column):
    return f"{name} {' '.join('1' if c == column else '0' for c in range(80))}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"images": [', "JSONDecodeError"),
        ('{"images": []}', "KeyError"),
        ("[]", "TypeError"),
        ('{"images": [], "annotations": [], "categories": []}', "no image has an object"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "unicorn"}]}', "ValueError"),
    ],
)
def test_annotations_that_are_none_are_named(tmp_path, text, reason):
    name = "train2014/a.jpg"
    root = write(tmp_path, images=[name], train=[coco_line(name, 3)], test=[coco_line(name, 3)])
    for part in ("train2014", "val2014"):
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}.json").write_text(text)
    with pytest.raises(DataError, match=f"instances_train2014.json: not COCO's annotations.*{reason}"):
        load(CocoConfig(root=str(root)), seed=0, splits=Folder(tmp_path / "split"))


def write_annotations(root, labels):
    """Image number → column, in two files."""
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": 90 - column, "name": name} for column, name in enumerate(CLASS_NAMES)]
    for part, numbers in (("train2014", [*labels][::2]), ("val2014", [*labels][1::2])):
        content = {
            "images": [{"id": n, "file_name": f"{n}.jpg"} for n in numbers],
            "annotations": [{"image_id": n, "category_id": 90 - labels[n]} for n in numbers],
            "categories": categories,
        }
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


class TestSurvey:
    def test_annotations_stand_for_the_list_of_cocos_database(self, tmp_path):
        root = write(
            tmp_path,
            images=["train2014/0.jpg", "val2014/1.jpg", "train2014/2.jpg", "val2014/3.jpg"],
            train=[coco_line("train2014/0.jpg", 5)],
            test=[coco_line("val2014/1.jpg", 7)],
        )
        config = CocoConfig(root=str(root))
        before = survey(config)
        assert not before["complete"]
        assert "database" not in before["parts"]
        write_annotations(root, {0: 5, 1: 7, 2: 5, 3: 0})
        after = survey(config)
        assert after["complete"]
        assert not any(entry["file"].endswith("database.txt") for entry in after["files"])
        assert after["parts"]["database"]["images"] == 3
        assert {"parts": ["queries", "database"], "images": 1} in after["overlaps"]
        assert {"parts": ["train", "database"], "images": 0} in after["overlaps"]

    def test_image_sets_stand_for_the_lists_of_voc(self, tmp_path):
        (tmp_path / "JPEGImages").mkdir()
        config = Voc2012Config(root=str(tmp_path))
        assert [Path(entry["file"]).name for entry in survey(config)["files"] if not entry["found"]] == [
            "train.txt",
            "test.txt",
            "database.txt",
        ]
        (tmp_path / "ImageSets/Main").mkdir(parents=True)
        for name in VOC_NAMES:
            (tmp_path / "ImageSets/Main" / f"{name}_trainval.txt").touch()
        assert survey(config)["complete"]

    def test_every_benchmark_appears_and_your_own_too(self):
        assert {"images", "lists"} <= {config.name for config in every_config()}

    def test_your_own_images_are_looked_for_where_they_are(self, tmp_path):
        config = ImagesConfig(database=str(tmp_path), root="elsewhere")
        assert survey(config)["files"] == [{"file": str(tmp_path), "found": True}]


def test_drawing_by_groups_leaves_labels_alone_where_classes_are_few():
    labels = np.array([0, 0, 1, 1])
    assert lists._groups(labels, 2) is labels
    assert lists._groups(labels, 1).tolist() == [0, 0, 0, 0]
    hot = np.eye(4, dtype=bool)
    assert lists._groups(hot, 1) is hot
