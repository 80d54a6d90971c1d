"""Your own images, parted by class."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_retrieval.config import validate
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.datasets import ImagesConfig, load
from ray_retrieval.data.table import ImageTable
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.storage import Folder


@pytest.fixture
def animals(tmp_path: Path, make_image: Any) -> Path:
    """Ten classes of three images, but one of the last, with a group for every two of them; as CSV."""
    lines = ["path,label,family\n"]
    (tmp_path / "images").mkdir()
    for number in range(10):
        for row in range(1 if number == 9 else 3):
            name = f"{number}_{row}.png"
            (tmp_path / "images" / name).write_bytes(make_image(8, 8, 10 * number + row))
            lines.append(f"images/{name},class{number},family{number // 2}\n")
    (tmp_path / "animals.csv").write_text("".join(lines))
    return tmp_path / "animals.csv"


def loaded(database: Path, splits: Path, seed: int = 0, **fields: Any) -> Benchmark:
    values = {"name": "images", "database": str(database), "split": "classes", **fields}
    return load(validate(ImagesConfig, values), seed=seed, splits=Folder(splits))


def classes_of(table: ImageTable) -> set[str]:
    return {table.class_name(label) for label in table.labels.tolist()}


def test_no_class_is_both_learned_from_and_searched(animals: Path, tmp_path: Path) -> None:
    found = loaded(animals, tmp_path / "s")
    parts = [classes_of(table) for table in (found.train, found.validation_queries, found.queries)]
    assert [len(part) for part in parts] == [3, 2, 5]
    assert set.union(*parts) == {f"class{number}" for number in range(10)}
    assert found.queries is found.database
    assert found.validation_queries is found.validation_database
    assert found.queries_in_database
    for table in (found.train, found.validation_queries, found.queries):
        assert sorted(set(table.labels.tolist())) == list(range(table.classes))
    assert found.notes[0] == "whole classes are drawn: 3 to train, 2 to validate, 5 to test on"


def test_a_single_image_of_a_class_is_kept_and_noted(animals: Path, tmp_path: Path) -> None:
    lone = {"train": "1 of 3 training classes have a single image"} | {
        role: f"{role}: 1 of {count} have no relevant image in the database"
        for role, count in (("validation queries", 4), ("queries", 13))
    }
    seen = set()
    for seed in range(12):
        found = loaded(animals, tmp_path / str(seed), seed=seed)
        assert sum(map(len, (found.train, found.validation_queries, found.queries))) == 28
        tables = {
            "train": found.train,
            "validation queries": found.validation_queries,
            "queries": found.queries,
        }
        for role, table in tables.items():
            assert (lone[role] in found.notes) == ("class9" in classes_of(table))
            seen |= {role} if lone[role] in found.notes else set()
    assert seen == set(lone)


def test_groups_of_a_column_are_kept_together(animals: Path, tmp_path: Path) -> None:
    found = loaded(animals, tmp_path / "s", split_by="family")
    families = [
        set(table.table["family"].to_pylist())
        for table in (found.train, found.validation_queries, found.queries)
    ]
    assert [len(part) for part in families] == [1, 1, 3]
    assert not families[0] & families[1]
    assert not (families[0] | families[1]) & families[2]


def test_the_split_is_drawn_once_and_read_ever_after(animals: Path, tmp_path: Path) -> None:
    first, again = (loaded(animals, tmp_path / "s", seed=seed) for seed in (0, 1))
    assert first.train.fingerprint == again.train.fingerprint
    assert first.queries.fingerprint == again.queries.fingerprint
    assert "the split is the saved one, drawn with seed 0, not 1" in again.notes
    assert loaded(animals, tmp_path / "other", seed=1).queries.ids != first.queries.ids
    with pytest.raises(DataError, match=r"test_classes = 0\.5, asked is 0\.3"):
        loaded(animals, tmp_path / "s", test_classes=0.3)
    with pytest.raises(DataError, match="the saved split was drawn with"):
        loaded(animals, tmp_path / "s", split="images")


def test_validation_classes_do_not_move_the_test(animals: Path, tmp_path: Path) -> None:
    with_validation = loaded(animals, tmp_path / "s")
    without = loaded(animals, tmp_path / "t", validation_classes=0)
    assert without.queries.ids == with_validation.queries.ids
    assert len(without.validation_queries) == 0
    assert without.validation_queries is without.validation_database
    assert classes_of(without.train) == classes_of(with_validation.train) | classes_of(
        with_validation.validation_queries
    )


def test_a_folder_will_do(photo_folder: Path, tmp_path: Path, make_image: Any) -> None:
    with pytest.raises(DataError) as caught:
        loaded(photo_folder, tmp_path / "s")
    assert "there are 3 classes, 6 are needed: 2 to test on, 2 to validate on, 2 to train on" in str(
        caught.value
    )
    for name in ("ant", "bee", "emu"):
        (photo_folder / name).mkdir()
        (photo_folder / name / "0.png").write_bytes(make_image(8, 8, len(name)))
    found = loaded(photo_folder, tmp_path / "s", test_classes=0.34)
    assert [t.classes for t in (found.train, found.validation_queries, found.queries)] == [2, 2, 2]
    with pytest.raises(DataError, match=r"no column 'family'.*there is none beside"):
        loaded(photo_folder, tmp_path / "t", split_by="family")


class TestErrors:
    def test_other_sources_of_images(self) -> None:
        for role in ("queries", "train", "validation_queries"):
            with pytest.raises(RecipeError, match=f"drawn from the database, {role} is given"):
                validate(ImagesConfig, {"database": "x", "split": "classes", role: "y"})
        with pytest.raises(RecipeError, match="split_by needs split: classes"):
            validate(ImagesConfig, {"database": "x", "split_by": "y"})

    def test_columns_that_are_no_groups_of_classes(self, animals: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no column 'genus'.*there are: family"):
            loaded(animals, tmp_path / "s", split_by="genus")
        lines = animals.read_text().splitlines()
        animals.write_text("\n".join([*lines[:3], lines[3].replace("family0", "family3"), *lines[4:]]))
        with pytest.raises(DataError, match="class 'class0' is in 'family0' and in 'family3' of family"):
            loaded(animals, tmp_path / "s", split_by="family")
        animals.write_text("\n".join([*lines[:3], lines[3].replace("family0", ""), *lines[4:]]))
        with pytest.raises(DataError, match="row 2 has no family"):
            loaded(animals, tmp_path / "s", split_by="family")

    def test_several_labels(self, photo_folder: Path, tmp_path: Path) -> None:
        rows = [f"{photo_folder}/cat/{n:02d}.png {n % 2} 1\n" for n in range(12)]
        (tmp_path / "list.txt").write_text("".join(rows))
        with pytest.raises(DataError, match="several labels cannot be parted by class"):
            loaded(tmp_path / "list.txt", tmp_path / "s")


def test_real_characters_by_alphabet(real_data: Path, tmp_path: Path) -> None:
    found = loaded(real_data / "omniglot/omniglot.parquet", tmp_path / "s", split_by="alphabet")
    alphabets = [
        set(table.table["alphabet"].to_pylist())
        for table in (found.train, found.validation_queries, found.queries)
    ]
    assert sum(map(len, alphabets)) == len(set.union(*alphabets)) == 8
    assert sum(map(len, (found.train, found.validation_queries, found.queries))) == 4840
    assert np.bincount(found.train.labels).tolist() == [20] * found.train.classes


def test_real_groceries_by_class(real_data: Path, tmp_path: Path) -> None:
    found = loaded(real_data / "groceries/train.parquet", tmp_path / "s")
    assert [t.classes for t in (found.train, found.validation_queries, found.queries)] == [36, 4, 41]
    assert not set(found.train.ids) & set(found.queries.ids)
