from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ray_retrieval.data.datasets import DigitsConfig, load
from ray_retrieval.data.datasets.digits import digits_table
from ray_retrieval.data.transforms import Preprocessing, prepare
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder


def test_images_are_the_scans_in_full_contrast() -> None:
    table = digits_table()
    scans = load_digits()
    assert len(table) == 1797
    assert (table.ids[0], table.ids[-1]) == ("digit-0000", "digit-1796")
    assert table.labels.tolist() == scans.target.tolist()
    for row in (0, 777, 1796):
        pixels = prepare(table.image_bytes(row), Preprocessing(size=8))
        expected = np.round(scans.images[row] * 255 / 16)
        assert (pixels == expected).all()
    assert table.class_names == [str(digit) for digit in range(10)]


def test_roles_have_the_stated_sizes_and_queries_are_nowhere_else(tmp_path: Path) -> None:
    found = load(DigitsConfig(), seed=0, splits=Folder(tmp_path))
    assert {role: len(table) for role, table in found.tables().items()} == {
        "train": 1497,
        "validation_queries": 100,
        "validation_database": 1497,
        "queries": 200,
        "database": 1497,
    }
    parts = [set(table.ids) for table in (found.queries, found.validation_queries, found.database)]
    assert len(set.union(*parts)) == 1797
    assert np.bincount(found.queries.labels).tolist() == [20] * 10
    assert np.bincount(found.validation_queries.labels).tolist() == [10] * 10
    assert found.train.ids == found.database.ids
    assert found.k is None
    assert not found.queries_in_database


def test_second_load_reads_the_split_and_another_seed_elsewhere_draws_another(tmp_path: Path) -> None:
    first = load(DigitsConfig(), seed=0, splits=Folder(tmp_path / "a"))
    files = {name: (tmp_path / "a" / name).read_bytes() for name in ("split.json", "split.parquet")}
    again = load(DigitsConfig(), seed=1, splits=Folder(tmp_path / "a"))
    other = load(DigitsConfig(), seed=1, splits=Folder(tmp_path / "b"))
    assert again.queries.ids == first.queries.ids
    assert other.queries.ids != first.queries.ids
    assert {name: (tmp_path / "a" / name).read_bytes() for name in files} == files


def test_saved_split_of_other_numbers_is_refused(tmp_path: Path) -> None:
    load(DigitsConfig(), seed=0, splits=Folder(tmp_path))
    with pytest.raises(DataError, match="the saved split was drawn with per_class"):
        load(DigitsConfig(queries_per_class=5), seed=0, splits=Folder(tmp_path))
