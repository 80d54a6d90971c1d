"""Images in Parquet shards, each read alone by its address."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.data import location, shards
from ray_retrieval.data.columns import IMAGE_TYPE
from ray_retrieval.data.table import open_images
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder


def table_of(data, first=0):
    paths = pa.array([f"{first + row}.jpg" for row in range(len(data))], pa.string())
    images = pa.StructArray.from_arrays([pa.array(data, pa.large_binary()), paths], fields=list(IMAGE_TYPE))
    ids = pa.array([f"{first + row:05d}" for row in range(len(data))], pa.string())
    labels = pa.array([row % 3 for row in range(len(data))], pa.int64())
    return pa.Table.from_arrays([ids, labels, images], schema=shards.SCHEMA)


def read_back(folder, data, group=4):
    groups = [table_of(data[start : start + group], start) for start in range(0, len(data), group)]
    shards.write(folder, "a.parquet", groups)
    addresses = shards.addresses("a.parquet", *shards.byte_ranges(folder, "a.parquet")).to_pylist()
    return [location.read_bytes(location.join(folder.uri, address), 1 << 30) for address in addresses]


# Values that repeat, that start as lengths and as page headers do, and that are empty.
values = st.binary(max_size=200) | st.sampled_from(
    [b"", b"\x15", b"\x04\x00\x00\x00", b"\x00" * 70, b"x" * 70]
)


@settings(max_examples=40, deadline=None)
@given(data=st.lists(values, max_size=12))
def test_every_image_is_read_from_its_address(tmp_path_factory, data):
    assert read_back(Folder(tmp_path_factory.mktemp("shard")), data) == data


def test_images_of_several_pages_are_found(tmp_path):
    generator = np.random.default_rng(0)
    data = [generator.bytes(length) for length in (700_000, 2_000_000, 10, 1_500_000, 400_000, 900_000)]
    folder = Folder(tmp_path)
    assert read_back(folder, data) == data
    # As any reader of Parquet has them.
    table = open_images(str(tmp_path / "a.parquet"))
    assert [table.image_bytes(row) for row in range(len(table))] == data
    assert table.labels.tolist() == [0, 1, 2, 0, 0, 1]


def test_a_list_of_addresses_is_a_table_of_images(tmp_path, make_image):
    folder = Folder(tmp_path / "built")
    data = [make_image(seed=seed, kind="JPEG") for seed in range(5)]
    shards.write(folder, "shards/a.parquet", [table_of(data)])
    found = shards.addresses("shards/a.parquet", *shards.byte_ranges(folder, "shards/a.parquet"))
    listing = pa.table({"id": list("abcde"), "image": found})
    pq.write_table(listing, tmp_path / "built" / "list.parquet")
    table = open_images(str(tmp_path / "built" / "list.parquet")).take(np.array([3, 0, 4]))
    assert [table.image_bytes(row) for row in range(3)] == [data[3], data[0], data[4]]
    assert (table.inline_lengths() == -1).all()


def test_compressed_images_have_no_address(tmp_path):
    pq.write_table(table_of([b"a" * 999]), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    pq.write_table(table_of([b"a" * 999]), tmp_path / "b.parquet", compression="none")
    for name in ("a.parquet", "b.parquet"):
        with pytest.raises(DataError, match="compressed or encoded"):
            shards.byte_ranges(Folder(tmp_path), name)


def test_a_shard_without_an_image_has_no_addresses(tmp_path):
    assert read_back(Folder(tmp_path), []) == []
    assert [len(piece) for piece in shards.in_groups(np.arange(600))] == [256, 256, 88]


def test_parts_of_files_are_read_as_files_are(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"0123456789")
    for base in (str(tmp_path), f"file://{tmp_path}"):
        assert location.read_bytes(f"{base}/x#bytes=2-5", 100) == b"2345"
        assert location.read_bytes(f"{base}/x#bytes=0-9", 3) == b"0123"
        assert location.read_bytes(f"{base}/x#bytes=4-3", 100) == b""
        assert location.exists(f"{base}/x#bytes=2-5")
        with pytest.raises(DataError, match="ends before this part"):
            location.read_bytes(f"{base}/x#bytes=8-10", 100)
        with pytest.raises(DataError, match="missing"):
            location.read_bytes(f"{base}/y#bytes=8-10", 100)
    assert location.join("s3://bucket/a?region=eu", "b#bytes=1-2") == "s3://bucket/a/b#bytes=1-2?region=eu"


def test_other_names_with_a_hash_stay_names(tmp_path: Path):
    (tmp_path / "a#bytes=1-x").write_bytes(b"hello")
    assert location.read_bytes(str(tmp_path / "a#bytes=1-x"), 100) == b"hello"
