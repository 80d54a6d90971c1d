"""However many rows there are, a few of them are in memory while an index is written."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from bare_parts import Bare, CodesFile, build_bare
from search_parts import draw_codes

from ray_retrieval import storage
from ray_retrieval.search import (
    Index,
    build,
    compact,
    imported,
    remove,
    rows,
    sources,
    table_files,
    vector_files,
)

ROWS = 200_000
POOLS = []
"""That counted what Arrow takes; kept, as arrays that were made meanwhile may outlive a test."""


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr(rows, "_BATCH_ROWS", 1 << 12)
    monkeypatch.setattr(sources, "_ROWS_AT_ONCE", 1 << 12)
    monkeypatch.setattr(storage, "_CHUNK", 1 << 14)


def peak(work):
    """Bytes that numpy and Python took at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def arrow_peak(work):
    """Bytes that Arrow took at most, beyond those that it had."""
    before = pa.default_memory_pool()
    POOLS.append(pa.proxy_memory_pool(before))
    pa.set_memory_pool(POOLS[-1])
    try:
        work()
        return POOLS[-1].max_memory()
    finally:
        pa.set_memory_pool(before)


def test_codes_alone_are_never_all_in_memory(tmp_path, few_at_once):
    build_bare(Bare(draw_codes(9, 64)), tmp_path / "compiled")
    path = tmp_path / "codes"
    draw_codes(ROWS, 64).data.tofile(path)
    source = CodesFile(path, 64, ROWS, step=1 << 12)
    index = tmp_path / "index"
    bytes_of_all = 8 * ROWS
    assert peak(lambda: build_bare(source, index)) < bytes_of_all / 2
    remove(index, ["7"])
    assert peak(lambda: compact(index)) < bytes_of_all / 2
    assert Index.open(index).records([7])["id"].to_pylist() == ["8"]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_ids_and_classes_in_a_column_are_never_all_in_memory(tmp_path, few_at_once, monkeypatch, ending):
    for module in (table_files, vector_files):
        monkeypatch.setattr(module, "BLOCK_ROWS", 1 << 12)
    count, width = 100_000, 36
    columns = {
        "code": pa.array([bytes(8)] * count, pa.binary(8)),
        "id": [f"{row:0{width}}" for row in range(count)],
        "label": [f"a class of some length {row % 7}" for row in range(count)],
    }
    table, path = pa.table(columns), tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(table, path, row_group_size=count // 4, use_dictionary=["label"])
    else:
        pyarrow.feather.write_feather(table, path, chunksize=1 << 12)
    bytes_of_all = table["id"].nbytes
    del columns, table
    assert arrow_peak(lambda: build(imported(path), tmp_path / "index")) < bytes_of_all / 2
    index = Index.open(tmp_path / "index")
    assert index.records([count - 1])["id"].to_pylist() == [f"{count - 1:0{width}}"]
    assert index.class_names == [f"a class of some length {number}" for number in range(7)]


def test_what_is_known_is_written_in_batches_of_equal_length(tmp_path, few_at_once):
    count = 10_000
    known = pa.table({"id": [f"image-{row}" for row in range(count)], "n": np.arange(count)})
    build_bare(Bare(draw_codes(count, 16), known, step=700), tmp_path / "a", shards=2)
    build_bare(Bare(draw_codes(count, 16), known, step=5000), tmp_path / "b", shards=2)
    files = [
        sorted(path.rglob("rows.arrow"), key=lambda file: file.stat().st_size) for path in tmp_path.iterdir()
    ]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    opened = pa.ipc.open_file(files[0][0])
    assert [len(opened.get_batch(n)) for n in range(opened.num_record_batches)] == [4096, 904]
    index = Index.open(tmp_path / "a")
    wanted = np.random.default_rng(0).integers(0, count, 300)
    found = index.records(wanted)
    assert found["n"].to_pylist() == wanted.tolist()
    assert found["id"].to_pylist() == [f"image-{row}" for row in wanted]
    assert [index.row_of(f"image-{row}") for row in (0, 4095, 4096, 9999)] == [0, 4095, 4096, 9999]
    assert index.living("n >= 4094 and n < 4098 or id = 'image-9999'").tolist() == [
        4094,
        4095,
        4096,
        4097,
        9999,
    ]


def test_rows_that_earlier_releases_wrote_are_read():
    """One batch, with the number of each row."""
    batch = pa.record_batch({"row": pa.array([5, 6, 7]), "id": pa.array(["c", "a", "b"], pa.large_string())})
    known = rows.KnownRows([batch], 3, 5, None)
    assert known.schema.names == ["row", "id"]
    assert known.take(np.array([2, 0])).to_pylist() == [{"row": 7, "id": "b"}, {"row": 5, "id": "c"}]
    assert [known.place_of(name) for name in "abcd"] == [1, 2, 0, None]
    assert [(place, ids.to_pylist()) for place, ids in known.ids()] == [(0, ["c", "a", "b"])]
    assert not known.numbered
    for wrong in ([batch.slice(0, 2)], []):
        with pytest.raises(ValueError, match="it should hold"):
            rows.KnownRows(wrong, 3, 5, None)
