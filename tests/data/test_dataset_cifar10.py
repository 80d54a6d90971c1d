import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_retrieval.config import validate
from ray_retrieval.data.datasets import Cifar10Config, cifar10, load
from ray_retrieval.data.source import ImageSource
from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.storage import Folder


def write_parts(folder: Path, *, train: int = 50_000, test: int = 10_000, wrong: bool = False) -> None:
    """Parquet files with CIFAR's row counts, and a few bytes that differ instead of each image."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 10
        if wrong:
            labels[0] = 1
        data = pa.array([b"%s%05d" % (part.encode(), row) for row in range(count)], pa.binary())
        images = pa.StructArray.from_arrays([data, pa.nulls(count, pa.string())], names=["bytes", "path"])
        pq.write_table(pa.table({"img": images, "label": labels}), folder / f"{part}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cifar") / "data"
    write_parts(folder)
    return str(folder.parent)


@pytest.mark.parametrize(
    ("protocol", "train", "queries", "database"),
    [("I", 5000, 1000, 59_000), ("disjoint", 5000, 1000, 54_000), ("II", 49_000, 10_000, 50_000)],
)
def test_protocols_have_the_published_counts(
    root: str, tmp_path: Path, protocol: str, train: int, queries: int, database: int
) -> None:
    config = validate(Cifar10Config, {"root": root, "protocol": protocol})
    found = load(config, seed=0, splits=Folder(tmp_path))
    counts = {role: len(table) for role, table in found.tables().items()}
    assert counts == {
        "train": train,
        "validation_queries": 1000,
        "validation_database": 5000,
        "queries": queries,
        "database": database,
    }
    for table in found.tables().values():
        assert np.bincount(table.labels).tolist() == [len(table) // 10] * 10
    rows = {role: set(table.ids) for role, table in found.tables().items()}
    assert not rows["queries"] & (rows["database"] | rows["train"] | rows["validation_queries"])
    assert not rows["validation_queries"] & (rows["train"] | rows["validation_database"])
    assert rows["validation_queries"] | rows["validation_database"] <= rows["database"]
    assert (rows["train"] <= rows["database"]) == (protocol != "disjoint")
    assert bool(rows["train"] & rows["database"]) == (protocol != "disjoint")
    assert bool(rows["train"] & rows["validation_database"]) == (protocol == "II")
    if protocol == "II":
        assert found.queries.ids == [f"test-{row:05d}" for row in range(10_000)]
        assert found.database.ids == [f"train-{row:05d}" for row in range(50_000)]
    assert found.k is None
    assert found.train.class_names == cifar10.CLASS_NAMES


def test_protocol_two_without_validation_trains_on_all(root: str, tmp_path: Path) -> None:
    config = Cifar10Config(root=root, protocol="II", validation_queries=0)
    found = load(config, seed=0, splits=Folder(tmp_path))
    assert len(found.train) == 50_000
    assert len(found.validation_queries) == 0


def test_ids_name_part_and_row(root: str) -> None:
    table = cifar10.cifar10_table(root)
    assert table.ids[17] == "train-00017"
    assert table.ids[50_003] == "test-00003"
    assert table.image_bytes(17) == b"train00017"
    assert table.image_bytes(50_003) == b"test00003"


def test_split_is_drawn_once_and_protocols_do_not_share_it(root: str, tmp_path: Path) -> None:
    first = load(Cifar10Config(root=root), seed=0, splits=Folder(tmp_path))
    again = load(Cifar10Config(root=root), seed=9, splits=Folder(tmp_path))
    assert again.queries.ids == first.queries.ids
    assert again.notes == ["the split is the saved one, drawn with seed 0, not 9"]
    with pytest.raises(DataError, match="protocol = I, asked is disjoint"):
        load(Cifar10Config(root=root, protocol="disjoint"), seed=0, splits=Folder(tmp_path))


def test_wrong_counts_are_errors(tmp_path: Path) -> None:
    write_parts(tmp_path / "few", train=49_990)
    with pytest.raises(DataError, match="train: 50000 images are expected, there are 49990"):
        cifar10.cifar10_table(str(tmp_path / "few"))
    write_parts(tmp_path / "wrong", wrong=True)
    with pytest.raises(DataError, match="5000 images of each class are expected, class airplane has 4999"):
        cifar10.cifar10_table(str(tmp_path / "wrong"))


def test_missing_images_are_one_line_with_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(Cifar10Config(root=str(tmp_path / "none")), seed=0, splits=Folder(tmp_path / "s"))
    assert "\n" not in str(caught.value)
    assert "put train-*.parquet and test-*.parquet or cifar-10-batches-py into" in str(caught.value)
    assert "download: true" in str(caught.value)


def test_failing_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    import torchvision.datasets

    def fails(*_: Any, **__: Any) -> None:
        raise URLError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fails)
    with pytest.raises(DataError) as caught:
        cifar10.cifar10_table(str(tmp_path), download=True)
    assert "CIFAR-10 cannot be fetched" in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/below: CIFAR-10 cannot be put there: Not a directory"):
        cifar10.cifar10_table(str(tmp_path / "file" / "below"), download=True)


def test_damaged_batches_are_refused_by_their_checksum(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DataError, match="damaged or not complete"):
        cifar10.cifar10_table(str(tmp_path))


def test_torchvisions_copy_is_converted_once_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets

    monkeypatch.setattr(cifar10, "_PARTS", {"train": 40, "test": 20})
    made = []

    class Fake:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            count = 40 if train else 20
            self.data = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            self.targets = [row % 10 for row in range(count)]
            made.append(self)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    with ThreadPoolExecutor(2) as pool:  # whoever comes second waits for it
        first, _ = pool.map(lambda _: cifar10.cifar10_table(str(tmp_path), download=True), range(2))
    again = cifar10.cifar10_table(str(tmp_path))
    assert len(made) == 2
    assert first.fingerprint == again.fingerprint
    pixels = np.concatenate([part.data for part in made])
    for row in (0, 39, 40, 59):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(again.image_bytes(row)))), pixels[row])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]


def test_numbers_must_divide_among_the_classes() -> None:
    with pytest.raises(RecipeError, match="multiple of 10"):
        validate(Cifar10Config, {"validation_queries": 55})


def test_real_images_open_in_about_a_second(real_data: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    found = load(Cifar10Config(root=str(real_data / "cifar10")), seed=0, splits=Folder(tmp_path))
    assert time.perf_counter() - start < 10
    with ImageSource(found.queries, Preprocessing(size=32), memory_bytes=0, threads=2) as source:
        images = source.batch(np.arange(50))
    assert images.float().std() > 30
