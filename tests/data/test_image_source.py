import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ray_retrieval import cores
from ray_retrieval.data import source as module
from ray_retrieval.data.columns import images_at
from ray_retrieval.data.source import ImageError, ImageSource, check_images, read_errors, write_errors
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing, prepare
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.storage import Folder

SMALL = Preprocessing(size=8)
PLENTY = 1 << 30


def expected(table: ImageTable, rows: Any) -> torch.Tensor:
    return torch.stack([torch.from_numpy(prepare(table.image_bytes(int(row)), SMALL)) for row in rows])


@pytest.fixture
def damaged(make_image: Any, tmp_path: Path) -> ImageTable:
    """Ten images, of which 2, 5 and 9 are truncated, no image, and missing."""
    data: list[bytes | None] = [make_image(16, 16, row, kind="JPEG") for row in range(10)]
    paths: list[str | None] = [None] * 10
    data[2] = (data[2] or b"")[:-100]
    data[5] = b"no image at all"
    data[9], paths[9] = None, str(tmp_path / "gone.jpg")
    images = pa.StructArray.from_arrays(
        [pa.array(data, pa.large_binary()), pa.array(paths, pa.string())], names=["bytes", "path"]
    )
    return ImageTable(pa.table({"id": [f"id{row}" for row in range(10)], "image": images}), name="damaged")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory", [0, PLENTY])
def test_batches_hold_the_prepared_images_in_order(make_table: Any, threads: int, memory: int) -> None:
    table = make_table(np.zeros(20, dtype=np.int64))
    with ImageSource(table, SMALL, memory_bytes=memory, threads=threads) as source:
        assert source.cached == (memory > 0)
        for rows in ([3, 1, 19, 3], np.array([7]), torch.tensor([19, 0]), []):
            found = source.batch(rows)
            assert (found.dtype, found.shape) == (torch.uint8, (len(rows), 3, 8, 8))
            if len(rows):
                assert torch.equal(found, expected(table, rows))


def test_memory_decides_whether_images_are_kept(make_table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(np.zeros(6, dtype=np.int64))
    calls: list[bytes] = []

    def counted(data: bytes, preprocessing: Preprocessing, box: Any) -> Any:
        calls.append(data)
        return prepare(data, preprocessing, box)

    monkeypatch.setattr(module, "prepare", counted)
    for memory, decoded in ((6 * 3 * 64, 6), (6 * 3 * 64 - 1, 12)):
        calls.clear()
        with ImageSource(table, SMALL, memory_bytes=memory, threads=2) as source:
            first, second = source.batch(range(6)), source.batch(range(6))
        assert torch.equal(first, second)
        assert len(calls) == decoded


def test_a_batch_is_the_callers_own(make_table: Any) -> None:
    table = make_table(np.zeros(3, dtype=np.int64))
    with ImageSource(table, SMALL, memory_bytes=PLENTY, threads=1) as source:
        source.batch([0]).zero_()
        assert torch.equal(source.batch([0]), expected(table, [0]))


def test_many_callers_at_once_get_the_right_images(make_table: Any) -> None:
    table = make_table(np.zeros(40, dtype=np.int64))
    wanted = expected(table, range(40))
    wrong = []
    with ImageSource(table, SMALL, memory_bytes=PLENTY, threads=4) as source:

        def ask(seed: int) -> None:
            generator = np.random.default_rng(seed)
            for _ in range(20):
                rows = generator.integers(0, 40, 8)
                if not torch.equal(source.batch(rows), wanted[torch.from_numpy(rows)]):
                    wrong.append(seed)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("memory", [0, PLENTY])
def test_undecodable_image_of_a_batch_is_named(damaged: ImageTable, memory: int) -> None:
    with ImageSource(damaged, SMALL, memory_bytes=memory, threads=2) as source:
        with pytest.raises(DataError, match=r"damaged, image 'id5' \(row 5\): not a JPEG"):
            source.batch([0, 5, 1])
        assert torch.equal(source.batch([0, 1]), expected(damaged, [0, 1]))


class TestStream:
    def test_batches_come_in_order(self, make_table: Any) -> None:
        table = make_table(np.zeros(12, dtype=np.int64))
        batches = [[0, 1], [11], [], [5, 4, 3]]
        for ahead in (0, 1, 2, 10):
            with ImageSource(table, SMALL, memory_bytes=0, threads=2) as source:
                found = list(source.stream(batches, ahead))
            assert [len(images) for images in found] == [2, 1, 0, 3]
            assert torch.equal(found[3], expected(table, [5, 4, 3]))
        with ImageSource(table, SMALL, memory_bytes=0, threads=2) as source:
            assert list(source.stream([])) == []

    def test_only_as_many_as_asked_are_taken_ahead(self, make_table: Any) -> None:
        table = make_table(np.zeros(12, dtype=np.int64))
        taken = []

        def batches() -> Iterator[list[int]]:
            for row in range(12):
                taken.append(row)
                yield [row]

        with ImageSource(table, SMALL, memory_bytes=0, threads=1) as source:
            stream = source.stream(batches(), ahead=2)
            assert taken == []
            next(stream)
            assert taken == [0, 1, 2]
            next(stream)
            assert taken == [0, 1, 2, 3]
            stream.close()

    def test_early_exit_leaves_no_thread(self, make_table: Any) -> None:
        table = make_table(np.zeros(12, dtype=np.int64))
        before = set(threading.enumerate())
        with ImageSource(table, SMALL, memory_bytes=0, threads=2) as source:
            for _ in source.stream([[row] for row in range(12)], ahead=4):
                break
        assert set(threading.enumerate()) <= before

    def test_an_error_comes_at_its_batchs_turn(self, damaged: ImageTable) -> None:
        with ImageSource(damaged, SMALL, memory_bytes=0, threads=2) as source:
            stream = source.stream([[0], [1], [2], [3]], ahead=3)
            assert len(next(stream)) == len(next(stream)) == 1
            with pytest.raises(DataError, match="id2"):
                next(stream)
            assert list(stream) == []


class TestCheck:
    @pytest.mark.parametrize("threads", [1, 4])
    def test_all_undecodable_images_are_found_with_reasons(self, damaged: ImageTable, threads: int) -> None:
        seen: list[int] = []
        errors = check_images(damaged, threads, seen.append)
        assert [(error.row, error.id) for error in errors] == [(2, "id2"), (5, "id5"), (9, "id9")]
        assert "truncated" in errors[0].reason
        assert errors[1].reason == "not a JPEG, PNG, WebP, BMP, GIF or TIFF image"
        assert errors[2].reason == "the file is missing"
        assert seen == sorted(seen)
        assert seen[-1] == 10

    def test_sound_and_empty_tables_have_none(self, make_table: Any) -> None:
        table = make_table(np.zeros(5, dtype=np.int64))
        assert check_images(table, 2) == []
        assert check_images(table.take(np.zeros(0, dtype=np.int64)), 2) == []

    def test_truncation_is_found_at_reduced_size_too(self, make_image: Any) -> None:
        data = make_image(320, 240, kind="JPEG", quality=90)
        cut = [data[: len(data) * part // 20] for part in range(1, 20)]
        images = pa.array([{"bytes": item, "path": None} for item in cut])
        table = ImageTable(pa.table({"id": [str(i) for i in range(len(cut))], "image": images}), name="cut")
        assert len(check_images(table, 2)) == len(cut)


@pytest.mark.parametrize("look", ["check", "sizes"])
def test_images_in_a_store_are_waited_for_together(make_image: Any, monkeypatch: Any, look: str) -> None:
    together = threading.Barrier(24, timeout=60)
    data = make_image(40, 30, kind="JPEG")

    def image_bytes(*_: Any) -> bytes:
        together.wait()
        return bytes(data)

    monkeypatch.setattr(cores, "cores", lambda: 2)
    monkeypatch.setattr(ImageTable, "image_bytes", image_bytes)
    images = images_at([f"s3://bucket/{number}.jpg" for number in range(48)])
    table = ImageTable(pa.table({"id": [str(number) for number in range(48)], "image": images}), name="far")
    if look == "check":
        assert check_images(table, 2) == []
        return
    several = Preprocessing(size=32, resize="long_side")
    with ImageSource(table, several, memory_bytes=0, threads=1) as source:
        assert [len(share) for share in source.shares(range(48), 2)] == [24, 24]


def test_errors_file_round_trips_also_empty(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    errors = [ImageError(3, "a/b.png", "not an image"), ImageError(7, "ü", "truncated")]
    write_errors(folder, errors, "some.parquet")
    assert read_errors(folder, "some.parquet") == errors
    write_errors(folder, [], "none.parquet")
    assert read_errors(folder, "none.parquet") == []
    with pytest.raises(ArtefactError, match="missing"):
        read_errors(folder, "other.parquet")
