import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_retrieval.config import validate
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.datasets import ImagesConfig, images, load
from ray_retrieval.data.table import open_images
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.storage import Folder


def loaded(splits: Path, seed: int = 0, **fields: Any) -> Benchmark:
    texts = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    return load(ImagesConfig(**texts), seed=seed, splits=Folder(splits))


def sizes(benchmark: Benchmark) -> dict[str, int]:
    return {role: len(table) for role, table in benchmark.tables().items()}


def write_list(file: Path, folder: Path, rows: list[tuple[str, str]]) -> Path:
    file.write_text("".join(f"{folder}/{name} {labels}\n" for name, labels in rows))
    return file


def write_csv(file: Path, rows: list[tuple[str, str]]) -> Path:
    file.write_text("".join(f"{path},{label}\n" for path, label in [("path", "label"), *rows]))
    return file


def write_labelled(file: Path, folder: Path, rows: list[tuple[str, str]]) -> Path:
    return write_csv(file, [(f"{folder}/{name}", label) for name, label in rows])


def test_a_folder_is_enough(photo_folder: Path, tmp_path: Path) -> None:
    found = loaded(tmp_path / "s", database=photo_folder)
    assert sizes(found) == {
        "train": 30,
        "validation_queries": 3,
        "validation_database": 30,
        "queries": 3,
        "database": 30,
    }
    rows = [set(table.ids) for table in (found.queries, found.validation_queries, found.database)]
    assert len(set.union(*rows)) == 36
    assert found.train.ids == found.database.ids
    assert sorted(found.queries.labels.tolist()) == [0, 1, 2]
    assert found.notes == [
        "3 queries are drawn from the images and are not in the database",
        "3 validation queries are drawn from the images and are not in the database",
    ]
    again = loaded(tmp_path / "s", seed=8, database=photo_folder)
    assert again.queries.ids == found.queries.ids


def test_a_root_is_for_paths(photo_folder: Path, tmp_path: Path) -> None:
    rows = [(name, name.split("/")[0]) for name in open_images(photo_folder).ids]
    database = write_csv(tmp_path / "photos.csv", rows)
    found = loaded(tmp_path / "a", database=database, root=photo_folder)
    assert found.database.paths[0] == f"{photo_folder}/{found.database.ids[0]}"
    queries = write_csv(tmp_path / "queries.csv", rows[::6])
    assert len(loaded(tmp_path / "b", database=photo_folder, queries=queries, root=photo_folder).queries) == 6
    for folders in ({}, {"queries": photo_folder}):
        with pytest.raises(RecipeError, match=r"data\.root: it is for the paths in lists and tables"):
            loaded(tmp_path / "c", database=photo_folder, root=photo_folder, **folders)


def test_numbers_of_queries_are_kept_to(photo_folder: Path, tmp_path: Path) -> None:
    found = loaded(tmp_path / "a", database=photo_folder, queries_per_class=4, validation_queries_per_class=0)
    assert sizes(found) == {
        "train": 24,
        "validation_queries": 0,
        "validation_database": 24,
        "queries": 12,
        "database": 24,
    }
    few = loaded(
        tmp_path / "b", database=photo_folder, query_fraction=0.5, queries_at_most=6, validation_fraction=0
    )
    assert len(few.queries) == 6
    assert len(few.validation_queries) == 0
    small = loaded(tmp_path / "c", database=photo_folder, validation_database=15)
    assert sizes(small)["validation_database"] == 15
    assert sizes(small)["database"] == 30


def test_limits_hold_where_there_are_more_classes(make_table: Any) -> None:
    table = make_table(np.repeat(np.arange(40), 5))
    config = ImagesConfig(database="photos", queries_at_most=6, validation_database=30)
    roles = images._draw(config, {"database": table}, seed=0)
    assert {role: len(rows) for role, rows in roles.items()} == {
        "queries": 6,
        "validation_queries": 6,
        "database": 188,
        "validation_database": 30,
        "train": 188,
    }
    asked, searched = table.labels[roles["validation_queries"]], roles["validation_database"]
    everything = roles["database"][np.isin(table.labels[roles["database"]], asked)]
    assert set(everything) <= set(searched) <= set(roles["database"])
    fewer = images._at_most(10, table, roles["database"], asked, seed=0)
    assert set(table.labels[fewer]) == set(asked)
    given = {"database": table, "validation_queries": table.take(np.array([0, 199]))}
    searched = images._draw(config, given, seed=0)["validation_database"]
    assert len(searched) == 30
    assert {0, 39} <= set(table.labels[searched])


def test_moved_images_keep_their_split(photo_folder: Path, tmp_path: Path) -> None:
    found = loaded(tmp_path / "s", database=photo_folder)
    moved = photo_folder.rename(tmp_path / "elsewhere")
    again = loaded(tmp_path / "s", database=moved)
    assert again.queries.ids == found.queries.ids
    (moved / "owl" / "11.png").unlink()
    with pytest.raises(DataError, match="have changed"):
        loaded(tmp_path / "s", database=moved)


def test_given_queries_leave_the_database_whole(photo_folder: Path, tmp_path: Path, make_image: Any) -> None:
    for number, name in enumerate(("dog", "owl")):
        (tmp_path / "asked" / name).mkdir(parents=True)
        (tmp_path / "asked" / name / "00.png").write_bytes(make_image(20, 16, 900 + number))
    found = loaded(tmp_path / "s", database=photo_folder, queries=tmp_path / "asked", k=5)
    assert sizes(found) == {
        "train": 33,
        "validation_queries": 3,
        "validation_database": 33,
        "queries": 2,
        "database": 36,
    }
    # The two folders number their classes differently; the names decide.
    assert found.queries.labels.tolist() == [1, 2]
    assert found.queries.class_names == ["cat", "dog", "owl"]
    assert not set(found.train.ids) & set(found.validation_queries.ids)
    assert found.k == 5
    assert found.notes == ["3 validation queries are drawn from the images and stay in the database"]


def test_given_training_images_are_used_but_for_drawn_queries(photo_folder: Path, tmp_path: Path) -> None:
    found = loaded(tmp_path / "s", database=photo_folder, train=photo_folder)
    assert sizes(found) == {
        "train": 30,
        "validation_queries": 3,
        "validation_database": 30,
        "queries": 3,
        "database": 30,
    }
    assert not set(found.train.ids) & (set(found.queries.ids) | set(found.validation_queries.ids))
    assert "6 images of train are drawn as queries and not trained on" in found.notes


def test_validation_queries_come_from_outside_the_training_images(photo_folder: Path, tmp_path: Path) -> None:
    names = [f"{name}/{row:02d}.png" for name in ("cat", "dog", "owl") for row in range(12)]
    rows = [(name, str(index // 12)) for index, name in enumerate(names)]
    database = write_list(tmp_path / "database.txt", photo_folder, rows[1:])
    train = write_list(tmp_path / "train.txt", photo_folder, [row for row in rows[1:] if row[0][-5] in "012"])
    queries = write_list(tmp_path / "test.txt", photo_folder, rows[:1])
    found = loaded(tmp_path / "s", database=database, train=train, queries=queries)
    assert not set(found.validation_queries.ids) & set(found.train.ids)
    assert len(found.train) == sum(row[0][-5] in "012" for row in rows[1:])
    assert len(found.database) == 35
    assert sizes(found)["validation_database"] == 32


def test_validation_queries_can_be_given(photo_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(photo_folder, tmp_path / "other")
    found = loaded(tmp_path / "s", database=photo_folder, validation_queries=tmp_path / "other")
    assert sizes(found)["validation_queries"] == 36
    assert sizes(found)["validation_database"] == sizes(found)["database"] == 33


def test_several_labels_are_drawn_from_all(photo_folder: Path, tmp_path: Path) -> None:
    names = [f"cat/{row:02d}.png" for row in range(12)] + [f"dog/{row:02d}.png" for row in range(12)]
    rows = [(name, f"{index % 2} {(index // 2) % 2} 1") for index, name in enumerate(names)]
    found = loaded(tmp_path / "s", database=write_list(tmp_path / "all.txt", photo_folder, rows))
    assert sizes(found) == {
        "train": 20,
        "validation_queries": 2,
        "validation_database": 20,
        "queries": 2,
        "database": 20,
    }
    assert found.train.labels.shape == (20, 3)


def test_queries_that_are_all_in_the_database_are_declared(photo_folder: Path, tmp_path: Path) -> None:
    rows = [(f"{name}/{row:02d}.png", str(n)) for n, name in enumerate(("cat", "dog")) for row in range(12)]
    database = write_list(tmp_path / "database.txt", photo_folder, rows)
    queries = write_list(tmp_path / "queries.txt", photo_folder, rows[::8])
    found = loaded(tmp_path / "s", database=database, queries=queries)
    assert found.queries_in_database
    assert "the queries are in the database" in found.notes
    assert not set(found.train.ids) & set(found.queries.ids)


def test_queries_of_which_some_are_in_the_database_are_left_out_of_their_own_results(
    photo_folder: Path, tmp_path: Path
) -> None:
    rows = [(f"{name}/{row:02d}.png", str(n)) for n, name in enumerate(("cat", "dog")) for row in range(12)]
    database = write_list(tmp_path / "database.txt", photo_folder, rows[4:])
    queries = write_list(tmp_path / "queries.txt", photo_folder, rows[2:6])
    found = loaded(tmp_path / "a", database=database, queries=queries, validation_fraction=0)
    assert found.queries_in_database
    assert "2 of 4 queries are in the database, and left out of their own results" in found.notes
    assert not any("also in" in note for note in found.notes)
    assert not set(found.train.ids) & set(found.queries.ids)
    # One of them is there under another id, too: that is a leak.
    again, there = photo_folder / "cat" / "05.png", photo_folder / "cat" / "06.png"
    text = f"path,label,id\n{again},0,again\n{there},0,{there}\n"
    (tmp_path / "other.csv").write_text(text)
    found = loaded(tmp_path / "b", database=database, queries=tmp_path / "other.csv")
    assert found.queries_in_database
    assert "1 of 2 queries are also in database, the first is 'again'" in found.notes
    # An id is that of another image there: ids tell nothing.
    (tmp_path / "other.csv").write_text(text.replace("again", f"{photo_folder}/dog/01.png"))
    found = loaded(tmp_path / "c", database=database, queries=tmp_path / "other.csv")
    assert not found.queries_in_database
    assert any("2 of 2 queries are also in database" in note for note in found.notes)


def test_validation_queries_are_drawn_beside_the_test_queries(photo_folder: Path, tmp_path: Path) -> None:
    rows = [(f"{name}/{row:02d}.png", str(n)) for n, name in enumerate(("cat", "dog")) for row in range(12)]
    database = write_list(tmp_path / "database.txt", photo_folder, rows)
    asked = [*rows[:6], *rows[12:18]]
    queries = write_list(tmp_path / "asked.txt", photo_folder, asked)
    for seed in range(3):
        found = loaded(
            tmp_path / str(seed), seed, database=database, queries=queries, validation_queries_per_class=4
        )
        assert len(found.validation_queries) == 8
        assert not set(found.validation_queries.ids) & set(found.queries.ids)
    # Five of each class and two to learn from are not among the others: then it is all of the database.
    found = loaded(tmp_path / "s", database=database, queries=queries, validation_queries_per_class=5)
    assert len(found.validation_queries) == 10
    assert any("queries are also in validation queries" in note for note in found.notes)


def test_given_validation_queries_are_not_trained_on(photo_folder: Path, tmp_path: Path) -> None:
    rows = [(f"{name}/{row:02d}.png", str(n)) for n, name in enumerate(("cat", "dog")) for row in range(12)]
    database = write_list(tmp_path / "database.txt", photo_folder, rows)
    tried = write_list(tmp_path / "tried.txt", photo_folder, rows[::8])
    found = loaded(tmp_path / "s", database=database, validation_queries=tried, query_fraction=0.2)
    assert len(found.train) + len(set(found.validation_queries.ids) - set(found.queries.ids)) == len(
        found.database
    )
    assert not set(found.train.ids) & set(found.validation_queries.ids)
    assert not any("in train" in note for note in found.notes)


def test_numbers_of_articles_are_classes(photo_folder: Path, tmp_path: Path) -> None:
    names = [f"{name}/{row:02d}.png" for name in ("cat", "dog", "owl") for row in range(12)]
    numbers = ["7", "20000000", "4006381333931"]
    rows = [(name, numbers[index // 12]) for index, name in enumerate(names)]
    database = write_list(tmp_path / "database.txt", photo_folder, rows[1:])
    found = loaded(tmp_path / "a", database=database)
    assert found.train.classes == 3
    assert found.database.class_names == ["20000000", "4006381333931", "7"]
    asked = loaded(
        tmp_path / "b", database=database, queries=write_list(tmp_path / "asked.txt", photo_folder, rows[:1])
    )
    assert asked.queries.class_name(int(asked.queries.labels[0])) == "7"
    assert not any("no relevant image" in note for note in asked.notes)


@pytest.mark.parametrize(("first", "named"), [(100_001, True), (900, False)])
def test_classes_of_which_hardly_any_is_there_are_named_by_their_numbers(
    photo_folder: Path, tmp_path: Path, first: int, named: bool
) -> None:
    names = [f"{name}/{row:02d}.png" for name in ("cat", "dog", "owl") for row in range(12)]
    rows = [(name, str(first + index // 12)) for index, name in enumerate(names)]
    database = write_list(tmp_path / "database.txt", photo_folder, rows[1:])
    queries = write_list(tmp_path / "asked.txt", photo_folder, rows[:1])
    found = loaded(tmp_path / "a", database=database, queries=queries)
    numbers = [str(first + place) for place in range(3)]
    assert found.database.class_names == (numbers if named else None)
    assert found.database.classes == (3 if named else first + 3)
    assert found.queries.class_name(int(found.queries.labels[0])) == numbers[0]
    assert not any("no relevant image" in note for note in found.notes)


def test_several_sparse_classes_an_image_take_no_room(photo_folder: Path, tmp_path: Path) -> None:
    names = [f"{name}/{row:02d}.png" for name in ("cat", "dog", "owl") for row in range(12)]
    labels = [f"{100_001 + index // 12}|200000" for index in range(len(names))]
    lines = [f"{photo_folder / name},{label}" for name, label in zip(names, labels, strict=True)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *lines]))
    found = loaded(tmp_path / "a", database=str(tmp_path / "all.csv"))
    assert found.database.class_names == ["100001", "100002", "100003", "200000"]
    assert found.database.labels.shape == (len(found.database), 4)


@pytest.mark.parametrize(
    ("labels", "asked", "names"),
    [
        (["boot|brown", "brown|shoe", "shoe|white"], ["boot", "shoe"], ["boot", "brown", "shoe", "white"]),
        (["0|1", "1|2", "2|9"], ["0|1", "2"], None),
        (["0|1", "1|2", "2|9"], ["0", "2"], None),
        (["5|7", "7|8", "8|20000000"], ["5", "8"], ["20000000", "5", "7", "8"]),
    ],
)
def test_files_may_differ_in_how_many_labels_and_classes_they_have(
    photo_folder: Path, tmp_path: Path, labels: list[str], asked: list[str], names: list[str] | None
) -> None:
    rows = [(f"cat/{row:02d}.png", labels[row % 3]) for row in range(12)]
    database = write_labelled(tmp_path / "database.csv", photo_folder, rows)
    queries = write_labelled(
        tmp_path / "asked.csv", photo_folder, [("dog/00.png", asked[0]), ("dog/01.png", asked[1])]
    )
    found = loaded(tmp_path / "s", database=database, queries=queries)
    assert found.database.class_names == names
    assert found.queries.labels.shape == (2, found.database.classes)
    shared = found.queries.labels.astype(int) @ found.database.labels.T.astype(int) > 0
    assert shared.sum(axis=1).tolist() == [8 if "|" in asked[0] else 4, 8]


class TestErrors:
    def test_too_few_images_name_the_class(self, photo_folder: Path, tmp_path: Path) -> None:
        for row in range(9):
            (photo_folder / "dog" / f"{row:02d}.png").unlink()
        with pytest.raises(DataError) as caught:
            loaded(tmp_path / "s", database=photo_folder)
        assert "class 'dog' has 3 images, 4 are needed (1 queries, 1 validation queries, 2 to remain)" in str(
            caught.value
        )
        assert not (tmp_path / "s").exists()

    def test_one_class_only(self, photo_folder: Path, tmp_path: Path) -> None:
        for name in ("dog", "owl"):
            shutil.rmtree(photo_folder / name)
        with pytest.raises(DataError, match="all images are of one class"):
            loaded(tmp_path / "s", database=photo_folder)

    def test_no_labels(self, photo_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no image has a label"):
            loaded(tmp_path / "s", database=photo_folder / "cat")

    def test_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="no image in this folder"):
            loaded(tmp_path / "s", database=tmp_path / "empty")

    def test_labels_that_do_not_mean_the_same(self, photo_folder: Path, tmp_path: Path) -> None:
        one = write_list(tmp_path / "one.txt", photo_folder, [("cat/00.png", "1")])
        two = write_list(tmp_path / "two.txt", photo_folder, [("cat/00.png", "1 0")])
        three = write_list(tmp_path / "three.txt", photo_folder, [("cat/00.png", "1 0 0")])
        with pytest.raises(DataError, match="several labels and some have one"):
            loaded(tmp_path / "s", database=two, queries=one)
        with pytest.raises(DataError, match="some of the labels have names"):
            loaded(tmp_path / "s", database=photo_folder, queries=one)
        with pytest.raises(DataError, match=r"different numbers of labels: \[2, 3\]"):
            loaded(tmp_path / "s", database=two, queries=three)
        four = write_labelled(tmp_path / "four.csv", photo_folder, [("cat/00.png", "1|3")])
        with pytest.raises(DataError, match=r"different numbers of labels: \[3, 4\]"):
            loaded(tmp_path / "s", database=three, queries=four)

    def test_other_numbers_than_the_saved_split(self, photo_folder: Path, tmp_path: Path) -> None:
        loaded(tmp_path / "s", database=photo_folder)
        with pytest.raises(DataError, match="queries_per_class = None, asked is 2"):
            loaded(tmp_path / "s", database=photo_folder, queries_per_class=2)

    def test_the_database_must_be_given(self) -> None:
        with pytest.raises(RecipeError, match="database"):
            validate(ImagesConfig, {"name": "images"})


def test_real_photographs_make_a_benchmark(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "groceries"
    found = loaded(tmp_path / "s", database=folder / "train.parquet", queries=folder / "test.parquet")
    assert sizes(found)["queries"] == 2485
    assert sizes(found)["database"] == 2640
    assert np.unique(found.train.labels).tolist() == list(range(81))


def test_queries_that_are_the_database_are_one_table(tmp_path, photo_folder):
    learned = shutil.copytree(photo_folder, tmp_path / "learned")
    found = loaded(tmp_path / "s", database=photo_folder, queries=photo_folder, train=learned)
    assert found.queries is found.database
    assert found.queries_in_database
    assert any("left out of its own results" in note for note in found.notes)
