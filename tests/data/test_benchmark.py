import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_retrieval.data.benchmark import Benchmark, have_relevant, overlap, places_in
from ray_retrieval.data.table import ImageTable, open_images
from ray_retrieval.errors import DataError


def rows(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def by_path(paths: list[str | None], name: str = "files") -> ImageTable:
    images = pa.array(
        [{"bytes": None, "path": path} for path in paths],
        pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]),
    )
    return ImageTable(
        pa.table({"id": [f"{name}{row}" for row in range(len(paths))], "image": images}), name=name
    )


class TestOverlap:
    def test_equal_bytes_are_found_whatever_the_id(self, make_table: Any) -> None:
        first, second = (
            make_table(np.zeros(6, dtype=int), name="a"),
            make_table(np.zeros(6, dtype=int), name="b", seed=4),
        )
        assert overlap(first, second).tolist() == [4, 5]
        assert overlap(second, first).tolist() == [0, 1]
        assert overlap(second.take(rows(5, 1, 3)), first).tolist() == [1]

    def test_equal_ids_of_different_images_are_none(self, make_table: Any) -> None:
        assert overlap(make_table([0, 0]), make_table([0, 0], seed=50)).tolist() == []

    def test_equal_paths_are_found(self) -> None:
        assert overlap(by_path(["/a", "/b", None]), by_path(["/b", "/c", None], name="other")).tolist() == [1]

    def test_bytes_and_paths_do_not_mix(self, make_table: Any) -> None:
        assert overlap(make_table([0]), by_path(["/a"])).tolist() == []
        assert overlap(by_path(["/a"]), make_table([0])).tolist() == []

    def test_empty_tables(self, make_table: Any) -> None:
        table = make_table([0, 1])
        assert overlap(table.take(rows()), table).tolist() == []
        assert overlap(table, table.take(rows())).tolist() == []


class TestPlacesIn:
    def test_id_and_image_are_both_the_same(self) -> None:
        database = by_path(["/a", "/b", "/c", None])
        assert places_in(by_path(["/a", "/x", "/c", None]), database).tolist() == [0, -1, 2, -1]
        assert places_in(by_path(["/a", "/b"], name="other"), database).tolist() == [-1, -1]
        assert places_in(database.take(rows(2, 0)), database).tolist() == [2, 0]
        assert places_in(database.take(rows()), database).tolist() == []

    def test_of_images_in_the_table_the_bytes_are(self, make_table: Any) -> None:
        database, other = make_table([0, 1, 0, 1], name="a"), make_table([0, 1, 0, 1], name="a", seed=50)
        assert database.ids == other.ids
        assert places_in(database.take(rows(3, 1)), database).tolist() == [3, 1]
        assert places_in(other, database).tolist() == [-1] * 4
        files = by_path(["/0", "/1"], name="a-")
        assert files.ids == database.ids[:2]
        assert places_in(files, database).tolist() == [-1, -1]


@pytest.fixture
def pool(make_table: Any) -> ImageTable:
    return make_table(np.arange(20) % 2, name="pool")  # type: ignore[no-any-return]


def benchmark(pool: ImageTable, **changes: Any) -> Benchmark:
    tables = {
        "train": pool.take(np.arange(8, 20)),
        "validation_queries": pool.take(np.arange(4, 8)),
        "validation_database": pool.take(np.arange(8, 20)),
        "queries": pool.take(np.arange(4)),
        "database": pool.take(np.arange(8, 20)),
    }
    return Benchmark(name="toy", **(tables | changes))


def test_sound_benchmark_has_no_notes(pool: ImageTable) -> None:
    sound = benchmark(pool)
    sound.check({"train": 12, "queries": 4, "database": 12})
    assert sound.notes == []
    assert list(sound.tables()) == [
        "train",
        "validation_queries",
        "validation_database",
        "queries",
        "database",
    ]


def test_wrong_count_is_an_error(pool: ImageTable) -> None:
    with pytest.raises(DataError, match="validation queries: 5 images are expected, there are 4"):
        benchmark(pool).check({"train": 12, "validation_queries": 5})


def test_leaks_are_noted_once(pool: ImageTable) -> None:
    leaky = benchmark(pool, database=pool, train=pool.take(np.arange(3, 20)))
    leaky.check()
    leaky.check()
    assert leaky.notes == [
        "4 of 4 queries are also in database, the first is 'pool-0'",
        "1 of 4 queries are also in train, the first is 'pool-3'",
        "4 of 4 validation queries are also in train, the first is 'pool-4'",
    ]


def test_queries_that_belong_to_the_database_are_no_leak(pool: ImageTable) -> None:
    meant = benchmark(pool, database=pool, queries_in_database=True)
    meant.check()
    assert meant.notes == ["the queries are in the database"]
    published = benchmark(pool, database=pool, queries_in_database=True, counts_queries=True)
    published.check()
    assert published.notes[0] == "the queries are in the database"
    assert "codes count each query as its own hit" in published.notes[1]


def test_queries_without_relevant_image_are_noted(pool: ImageTable, make_table: Any) -> None:
    lost = benchmark(pool, queries=make_table([0, 7, 7], name="strange", seed=200))
    lost.check()
    assert lost.notes == ["queries: 2 of 3 have no relevant image in the database"]


def test_empty_label_lists_are_noted(make_table: Any) -> None:
    labels = pa.array([[0], [1], [], [0, 1], [1], [0]])
    pool = make_table(labels)
    several = Benchmark(
        "toy", *(pool.take(part) for part in (rows(2, 3, 4, 5), rows(1), rows(3, 4), rows(0), rows(2, 3)))
    )
    several.check()
    assert several.notes == [
        "train: 1 of 4 images have an empty list of labels",
        "database: 1 of 2 images have an empty list of labels",
    ]


def test_one_class_missing_labels_and_no_image_are_errors(pool: ImageTable, make_table: Any) -> None:
    with pytest.raises(DataError, match="all images are of one class"):
        benchmark(pool, database=pool.take(np.arange(0, 20, 2))).check()
    with pytest.raises(DataError, match="row 1 has no label"):
        benchmark(pool, train=make_table(pa.array([0, None, 1]))).check()
    with pytest.raises(DataError, match="queries: there is no image"):
        benchmark(pool, queries=pool.take(rows())).check()
    benchmark(pool, validation_queries=pool.take(rows())).check()


def test_files_in_two_roles_are_noted(tmp_path: Path, photo_folder: Path) -> None:
    table = open_images(str(photo_folder))
    found = benchmark(table, queries=table.take(rows(0, 8, 30)))
    found.check()
    assert found.notes == [
        "queries: 1 of 3 have no relevant image in the database",
        "1 of 3 queries are also in database, the first is 'cat/08.png'",
        "1 of 3 queries are also in train, the first is 'cat/08.png'",
    ]


def test_queries_that_are_the_database_are_no_relevant_image_to_themselves(make_table: Any) -> None:
    pool = make_table([0, 0, 1, 2, 2, 2], name="pool")
    other = make_table([3, 4, 4], name="other", seed=50)
    found = Benchmark("toy", other, pool, pool, pool, pool, queries_in_database=True)
    found.check()
    assert found.notes == [
        "validation queries: 1 of 6 have no relevant image in the database",
        "queries: 1 of 6 have no relevant image in the database",
        "the queries are the database: each is left out of its own results",
        "6 of 6 queries are also in validation queries, the first is 'pool-0'",
    ]
    several = make_table(pa.array([[0, 1], [1, 2], [2], [3]]), name="several", seed=90)
    found = Benchmark("toy", other, other, other, several, several, queries_in_database=True)
    found.check()
    assert "queries: 1 of 4 have no relevant image in the database" in found.notes
    sent = pickle.loads(pickle.dumps(found))
    assert sent.queries is sent.database


@pytest.mark.parametrize("several", [False, True])
def test_what_shares_a_label_with_a_query_that_is_there_is_another_image(
    make_table: Any, several: bool
) -> None:
    labels = [0, 0, 1, 2, 2]
    pool = make_table(pa.array([[label] for label in labels]) if several else labels, name="pool")
    queries = pool.take(rows(0, 2, 3))
    assert have_relevant(queries, pool).tolist() == [True, False, True]
    assert have_relevant(queries, pool, themselves=True).tolist() == [True, True, True]
    assert have_relevant(queries, pool.take(rows(1, 2))).tolist() == [True, False, False]
    assert have_relevant(pool, pool).tolist() == [True, True, False, True, True]
    for told in (False, True):
        found = Benchmark("toy", pool, queries, pool, queries, pool, queries_in_database=told)
        found.check()
        lost = "queries: 1 of 3 have no relevant image in the database"
        assert (lost in found.notes) == told


def test_validation_in_one_class_is_noted(pool: ImageTable) -> None:
    one = pool.take(np.arange(0, 8, 2))
    found = benchmark(pool, validation_queries=one, validation_database=one)
    found.check()
    assert any("every ranking of them is perfect" in note for note in found.notes)


def test_drawn_galleries_are_told(pool: ImageTable) -> None:
    draws = (rows(0, 1), rows(2, 5), rows(4, 7))
    some = pool.take(np.arange(8))
    found = benchmark(pool, queries=some, database=some, queries_in_database=True, gallery_draws=draws)
    found.check()
    assert found.notes[-2] == (
        "3 galleries of 2 images are drawn from the 8, the others are the queries: "
        "numbers are means over the draws"
    )
    assert not any("left out of its own results" in note for note in found.notes)
