"""Benchmarks made of list files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_retrieval.config import validate
from ray_retrieval.data.datasets import lists, load
from ray_retrieval.data.datasets.lists import ListsConfig, strip_prefixes
from ray_retrieval.data.list_files import parse_list
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.storage import Folder

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(root, train, queries, database, *, classes=6, prefix="", single=False):
    """Images and lists of numbers of images; image n has the labels n % 3 and 3 + n % 2."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    for number in {*train, *queries, *database}:
        Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(root / "images" / f"{number}.png")
    for name, numbers in (("train", train), ("test", queries), ("database", database)):
        lines = []
        for number in numbers:
            hot = [int(c in (number % 3, 3 + number % 2)) for c in range(classes)]
            label = str(number % 3) if single else " ".join(map(str, hot))
            lines.append(f"{prefix}images/{number}.png {label}\n")
        (root / f"{name}.txt").write_text("".join(lines))
    return root


def opened(root, splits, **settings):
    return load(ListsConfig(root=str(root), **settings), seed=3, splits=Folder(splits))


@pytest.mark.parametrize("single", [False, True])
def test_parts_are_those_of_the_lists(tmp_path, single):
    root = write(tmp_path / "a", range(40), range(40, 50), range(50, 300), single=single)
    benchmark = opened(root, tmp_path / "split", k=7, validation_queries=20, validation_database=60)
    counts = {role: len(table) for role, table in benchmark.tables().items()}
    assert (counts["train"], counts["queries"], counts["database"]) == (40, 10, 250)
    # Where images have one class, each class gives its share, and shares are rounded.
    assert abs(counts["validation_queries"] - 20) <= single
    assert abs(counts["validation_database"] - 60) <= single
    assert (benchmark.k, benchmark.queries_in_database) == (7, False)
    assert benchmark.queries.ids == [f"images/{n}.png" for n in range(40, 50)]
    labels = np.asarray(benchmark.train.labels)
    expected = np.arange(40) % 3
    assert np.array_equal(labels if single else labels[:, :3].argmax(1), expected)
    held = {*benchmark.validation_queries.ids} | {*benchmark.validation_database.ids}
    assert not {*benchmark.validation_queries.ids} & {*benchmark.validation_database.ids}
    assert held <= {*benchmark.database.ids}
    assert benchmark.train.image_bytes(0).startswith(b"\x89PNG")


def test_validation_takes_neither_queries_nor_training_images(tmp_path):
    root = write(tmp_path / "a", range(100), range(100, 150), range(400))
    benchmark = opened(root, tmp_path / "split")
    assert benchmark.queries_in_database
    assert "the queries are in the database" in benchmark.notes
    assert any("codes count each query as its own hit" in note for note in benchmark.notes)
    held = [*benchmark.validation_queries.ids, *benchmark.validation_database.ids]
    assert not set(held) & {*benchmark.queries.ids, *benchmark.train.ids}
    assert (len(benchmark.validation_queries), len(held)) == (125, 250)
    again = opened(root, tmp_path / "split")
    assert again.validation_queries.ids == benchmark.validation_queries.ids
    other = load(ListsConfig(root=str(root)), seed=4, splits=Folder(tmp_path / "other"))
    assert other.validation_queries.ids != benchmark.validation_queries.ids


def test_some_queries_may_be_in_the_database(tmp_path):
    root = write(tmp_path / "a", range(40), range(45, 60), range(50, 300))
    benchmark = opened(root, tmp_path / "split", validation_queries=0)
    assert benchmark.queries_in_database
    assert benchmark.notes == [
        "10 of 15 queries are in the database",
        "codes count each query as its own hit, as published numbers do; vectors do not",
    ]


def test_training_images_are_held_out_where_the_database_leaves_none(tmp_path):
    root = write(tmp_path / "a", range(1000), range(1000, 1020), range(1020))
    benchmark = opened(root, tmp_path / "split")
    held = {*benchmark.validation_queries.ids, *benchmark.validation_database.ids}
    assert (len(benchmark.train), len(held)) == (900, 100)
    assert not held & {*benchmark.train.ids}
    assert any("100 training images are held out" in note for note in benchmark.notes)


def test_a_handful_of_images_has_no_validation(tmp_path):
    root = write(tmp_path / "a", range(9), range(9, 13), range(13))
    benchmark = opened(root, tmp_path / "split")
    assert (len(benchmark.train), len(benchmark.validation_queries)) == (9, 0)
    assert any("the last model is kept" in note for note in benchmark.notes)


@pytest.mark.parametrize("prefix", ["./", "/home/somebody/data/coco/", "../data/", "./data/coco/"])
def test_folders_of_another_machine_are_dropped(tmp_path, prefix):
    root = write(tmp_path / "a", range(9), range(9, 13), range(13), prefix=prefix)
    assert opened(root, tmp_path / "split").train.ids[0] == "images/0.png"


def test_each_list_may_have_a_prefix_of_its_own(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (tmp_path / "b" / name).touch()
    names = ["/x/b/1.jpg", "y/z/b/2.jpg", "./b/3.jpg", "/x/b/missing.jpg"]
    stripped = strip_prefixes(names, str(tmp_path))
    assert stripped == ["b/1.jpg", "b/2.jpg", "b/3.jpg", "b/missing.jpg"]


def test_missing_images_are_refused_or_left_out(tmp_path):
    root = write(tmp_path / "a", range(9), range(9, 13), range(13))
    (root / "images" / "4.png").unlink()
    with pytest.raises(
        DataError, match=r"1 of 13 images of the lists are missing, the first is images/4.png"
    ):
        opened(root, tmp_path / "split")
    benchmark = opened(root, tmp_path / "split", missing="drop")
    assert (len(benchmark.train), len(benchmark.database)) == (8, 12)
    assert any("1 images of the lists are missing and left out" in note for note in benchmark.notes)


def test_lists_that_do_not_fit_are_refused(tmp_path):
    root = write(tmp_path / "a", range(9), range(9, 13), range(13))
    text = (root / "test.txt").read_text()
    (root / "test.txt").write_text(text.replace(" 0\n", " 0 0\n").replace(" 1\n", " 1 0\n"))
    with pytest.raises(DataError, match="7 labels a line, 6 are expected"):
        opened(root, tmp_path / "split")
    (root / "test.txt").write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(DataError, match=r"queries: 'images/9.png' stands more than once"):
        opened(root, tmp_path / "split")
    (root / "test.txt").unlink()
    with pytest.raises(DataError, match=r"test.txt: no such list"):
        opened(root, tmp_path / "split")
    with pytest.raises(RecipeError, match="did you mean 'missing'"):
        validate(ListsConfig, {"mising": "drop"})


def test_class_names_can_be_given(tmp_path):
    root = write(tmp_path / "a", range(9), range(9, 13), range(13))
    benchmark = opened(root, tmp_path / "split", class_names=list("abcdef"))
    assert benchmark.database.class_names == list("abcdef")
    with pytest.raises(DataError, match="6 labels a line, 2 are expected"):
        opened(root, tmp_path / "other", class_names=["a", "b"])


def test_published_counts_are_asserted(tmp_path):
    root = write(tmp_path / "a", range(9), range(9, 13), range(13))
    config = ListsConfig(root=str(root))
    protocol = lists.Protocol("paper", 5, {"train": 10, "queries": 4, "database": None})
    with pytest.raises(DataError, match="paper: train: 10 images are expected, there are 9"):
        lists.from_parts(
            config, lists.read_parts(config), protocol, seed=0, splits=Folder(tmp_path / "split")
        )


def test_a_draw_is_saved_and_disjoint(tmp_path):
    root = write(tmp_path / "a", range(50), range(50, 60), range(60))
    listed = lists.read_part(str(root / "database.txt"), str(root))
    counts = {"train": 20, "queries": 5, "database": 30}
    parts, note = lists.drawn_parts(listed, counts, seed=1, splits=Folder(tmp_path / "s"), where="drawn")
    assert {part: len(found.names) for part, found in parts.items()} == counts
    assert len({name for found in parts.values() for name in found.names}) == 55
    assert "drawn (seed 1)" in note
    again, _ = lists.drawn_parts(listed, counts, seed=2, splits=Folder(tmp_path / "s"), where="drawn")
    assert again["queries"].names == parts["queries"].names
    with pytest.raises(DataError, match="70 images are expected, there are 60"):
        lists.drawn_parts(listed, {"train": 70}, seed=1, splits=Folder(tmp_path / "t"), where="drawn")


def test_lines_are_read_the_same_at_once_and_word_by_word(tmp_path, monkeypatch):
    from ray_retrieval.data import list_files

    text = "a b/1.jpg 0 1 1\nc.jpg  1 0 0 \n\nd.jpg 0 0 0\n"
    (tmp_path / "l.txt").write_text(text)
    at_once = parse_list(str(tmp_path / "l.txt"))
    monkeypatch.setattr(list_files, "_digits", lambda lines, count: None)
    by_word = parse_list(str(tmp_path / "l.txt"))
    assert at_once == by_word
    assert at_once.names == ["a b/1.jpg", "c.jpg", "d.jpg"]
    assert at_once.label.to_pylist() == [[1, 2], [0], []]


@pytest.mark.skipif(not (SHARED / "coco_lite").is_dir(), reason="COCO's photographs are not here")
def test_the_lite_lists_of_coco_load_as_they_are(tmp_path):
    benchmark = opened(SHARED / "coco_lite", tmp_path / "split", k=5000)
    assert [len(t) for t in (benchmark.train, benchmark.queries, benchmark.database)] == [9, 4, 13]
    assert benchmark.queries_in_database
    assert benchmark.train.classes == 80
    assert benchmark.train.image_bytes(0).startswith(b"\xff\xd8")
