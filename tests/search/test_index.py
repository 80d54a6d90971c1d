"""The index: the same hits however it is cut, and what is known of its rows."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from search_parts import assert_same, draw_codes, draw_images, files_in, write

from ray_retrieval.descriptors import Codes, Vectors
from ray_retrieval.errors import ArtefactError, QueryError, StoreError
from ray_retrieval.finder import Finder
from ray_retrieval.search import NO_ROW, Index, build, imported, merge
from ray_retrieval.search import images as files
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.scan import scan

ROWS, BITS = 300, 12


@pytest.fixture(scope="module")
def codes():
    return draw_codes(ROWS, BITS, distinct=60)


@pytest.fixture(scope="module")
def made(tmp_path_factory, codes):
    """The same embeddings as one shard and as five."""
    folder = tmp_path_factory.mktemp("index")
    images = draw_images(ROWS, note=pa.array([f"note {row}" for row in range(ROWS)]))
    write(folder / "embeddings", codes, images, class_names=list("abcdefg"))
    for shards in (1, 5):
        build(folder / "embeddings", folder / f"index-{shards}", shards=shards)
    return folder


@pytest.fixture
def whole(made):
    return Index.open(made / "index-1")


@pytest.fixture
def sharded(made):
    return Index.open(made / "index-5", threads=2)


@pytest.mark.parametrize("k", [1, 10, ROWS, ROWS + 5])
def test_shards_find_bit_for_bit_what_one_finds(whole, sharded, codes, k):
    queries = Codes(np.concatenate([codes.data[:20], draw_codes(20, BITS, seed=9).data]), BITS)
    expected = scan(codes.data, queries.data, BITS, k)
    assert_same(whole.search(queries, k), expected)
    assert_same(sharded.search(queries, k), expected)


@pytest.mark.parametrize("groups", [[[0], [1, 2, 3, 4]], [[4, 1], [2], [3, 0]], [[0], [1], [2], [3], [4]]])
def test_merged_groups_of_shards_equal_the_index(made, sharded, codes, groups):
    opened = [Index.open(made / "index-5", shards=group) for group in groups]
    assert sum(group.rows for group in opened) == sharded.rows == ROWS
    for k in (1, 50, ROWS + 1):
        hits = [group.search(codes, k) for group in opened]
        assert_same(merge(hits, k), sharded.search(codes, k))


def test_a_group_knows_only_its_own_rows(made):
    group = Index.open(made / "index-5", shards=[1, 3])
    assert group.records([60, 239, 60])["id"].to_pylist() == ["image-0060", "image-0239", "image-0060"]
    assert group.row_of("image-0200") == 200
    assert group.row_of("image-0000") is None
    for row in (0, 120, 240, NO_ROW):
        with pytest.raises(QueryError, match=f"no row {row} "):
            group.records([60, row])
    assert len(group.verify()) == 5


@pytest.mark.parametrize("shards", [[], [5], [-1, 0]])
def test_unknown_shards_are_refused(made, shards):
    with pytest.raises(ArtefactError, match="shards 0 to 4, asked for"):
        Index.open(made / "index-5", shards=shards)


def test_records_come_in_the_order_asked(whole, sharded):
    rows = np.random.default_rng(0).integers(0, ROWS, 500)
    expected = {
        "row": rows.tolist(),
        "id": [f"image-{row:04d}" for row in rows],
        "label": [row % 7 for row in rows.tolist()],
        "path": [None] * 500,
        "note": [f"note {row}" for row in rows],
    }
    for index in (whole, sharded):
        assert index.records(rows).to_pydict() == expected
        assert index.records([]).to_pydict() == {name: [] for name in expected}


def test_rows_outside_are_refused(sharded):
    for row in (ROWS, NO_ROW, 10**15):
        with pytest.raises(QueryError, match=f"no row {row}") as error:
            sharded.records([0, row])
        assert error.value.status == 404


def test_every_id_leads_to_its_row(sharded):
    assert [sharded.row_of(f"image-{row:04d}") for row in range(ROWS)] == list(range(ROWS))
    for unknown in ("", "image", "image-0300", "zzz"):
        assert sharded.row_of(unknown) is None


def test_a_number_is_an_id_too(tmp_path, codes):
    build(imported(codes.data, bits=BITS), tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert [index.row_of(one) for one in (7, np.int64(7), "7", ROWS, -1)] == [7, 7, 7, None, None]


def test_ids_in_any_script(tmp_path):
    ids = ["ß", "z", "é/a.jpg", "日本", "🙂", "A", " ", "a", "\uffff"]
    images = draw_images(len(ids)).set_column(0, "id", pa.array(ids))
    build(write(tmp_path / "embeddings", draw_codes(len(ids), 8), images), tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert [index.row_of(name) for name in ids] == list(range(len(ids)))


@pytest.mark.parametrize("label", ["int", "list", "none"])
def test_labels_of_every_kind(tmp_path, label):
    images = draw_images(90, label=label)
    build(write(tmp_path / "embeddings", draw_codes(90, 8), images), tmp_path / "index", shards=2)
    found = Index.open(tmp_path / "index").records(range(90))["label"]
    assert found.to_pylist() == images["label"].to_pylist()


def test_further_columns_of_every_kind(tmp_path):
    columns = {
        "words": pa.array([["a", "b"], [], None]),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "box": pa.array([{"x": 1.5}, {"x": 2.5}, None]),
        "raw": pa.array([b"1", None, b"3"], pa.binary()),
    }
    images = draw_images(3, **columns)
    build(write(tmp_path / "embeddings", draw_codes(3, 8), images, part_rows=2), tmp_path / "index")
    found = Index.open(tmp_path / "index").records([2, 0, 1]).select(list(columns))
    assert found.to_pydict() == images.take([2, 0, 1]).select(list(columns)).to_pydict()


def test_images_come_from_the_index(sharded, made):
    assert [sharded.image_bytes(row) for row in (0, 59, 60, 299)] == [
        b"bytes of 0",
        b"bytes of 59",
        b"bytes of 60",
        b"bytes of 299",
    ]
    build(made / "embeddings", made / "without", keep_images=False)
    with pytest.raises(ArtefactError, match="does not hold image 'image-0003'"):
        Index.open(made / "without").image_bytes(3)
    with pytest.raises(QueryError):
        sharded.image_bytes(ROWS)


def test_images_come_from_their_paths(tmp_path):
    folder = tmp_path / "my images"
    folder.mkdir()
    names = ["a.jpg", "gone.jpg", "b.jpg"]
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(name.encode())
    paths = [str(folder / "a.jpg"), str(folder / "gone.jpg"), (folder / "b.jpg").as_uri()]
    images = draw_images(3).set_column(
        1, "image", pa.array([{"bytes": None, "path": path} for path in paths], draw_images(0)["image"].type)
    )
    build(write(tmp_path / "embeddings", draw_codes(3, 8), images), tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert not list((tmp_path / "index").rglob("images.arrow"))
    assert [index.image_bytes(0), index.image_bytes(2)] == [b"a.jpg", b"b.jpg"]
    assert index.records([1])["path"].to_pylist() == [paths[1]]
    with pytest.raises(ArtefactError, match=r"gone\.jpg: the file of image 'image-0001' cannot be read"):
        index.image_bytes(1)
    assert names[1] in paths[1]


def test_an_image_that_a_store_does_not_give_is_not_taken_to_be_gone(monkeypatch):
    class Refusing:
        """A store that answers by an error."""

        error = OSError("AWS Error ACCESS_DENIED during HeadObject operation")

        def open_input_file(self, path):
            raise self.error

    monkeypatch.setattr(files, "store_at", lambda location: (Refusing(), "a.jpg"))
    assert files.fetch_image("s3://bucket/a.jpg") is None
    Refusing.error = OSError("timed out")
    with pytest.raises(StoreError, match=r"s3://bucket/a\.jpg: cannot be read: timed out"):
        files.fetch_image("s3://bucket/a.jpg")
    assert files.read_image("s3://bucket/a.jpg") is None

    def silent(location):
        raise ArtefactError("cannot be opened: timed out", where=location)

    monkeypatch.setattr(files, "store_at", silent)
    with pytest.raises(StoreError, match="timed out"):
        files.fetch_image("gs://bucket/a.jpg")


def test_a_part_beyond_the_end_of_a_file_and_a_folder_are_no_images(tmp_path):
    (tmp_path / "shard").write_bytes(b"0123456789")
    assert files.fetch_image(f"file://{tmp_path}/shard#bytes=2-9") == b"23456789"
    assert files.fetch_image(f"{tmp_path}/shard#bytes=2-10") is None
    assert files.fetch_image(f"file://{tmp_path}") is None


def test_what_an_index_says_of_itself(sharded, made):
    info = sharded.info()
    assert json.loads(json.dumps(info)) == info
    assert (info["rows"], info["bits"], info["shards"], info["model"]) == (ROWS, BITS, 5, "model-a")
    assert info["bytes"] == sum(
        path.stat().st_size for path in made.glob("index-5/shards/*/*") if path.name != "shard.json"
    )
    assert (sharded.version, sharded.form.size, sharded.rows, len(sharded)) == (1, BITS, ROWS, ROWS)
    assert sharded.class_names == list("abcdefg")
    assert sharded.manifest.embeddings == Embeddings.open(made / "embeddings").fingerprint
    assert [shard.rows for shard in sharded.manifest.shards] == [60] * 5
    assert len(sharded.verify()) == 8


def test_codes_are_raw_words_behind_a_header(made, codes):
    data = next((made / "index-1" / "shards").rglob("codes.bin")).read_bytes()
    assert data[:8] == b"RRCODES2"
    words = np.frombuffer(data, np.uint8, offset=64).reshape(ROWS, 8)
    np.testing.assert_array_equal(words[:, :2], codes.data)
    assert not words[:, 2:].any()


def test_more_shards_than_rows(tmp_path):
    build(write(tmp_path / "embeddings", draw_codes(3, 8), draw_images(3)), tmp_path / "index", shards=10)
    index = Index.open(tmp_path / "index")
    assert [shard.rows for shard in index.manifest.shards] == [1, 1, 1]
    assert len(index.verify()) == 6


def test_broken_images_leave_no_gap(tmp_path):
    codes, images = draw_codes(100, 16), draw_images(100)
    build(write(tmp_path / "embeddings", codes, images, skip={0, 50}), tmp_path / "index", shards=3)
    index = Index.open(tmp_path / "index")
    assert index.rows == 98
    assert index.records([0, 48, 49])["id"].to_pylist() == ["image-0001", "image-0049", "image-0051"]
    assert index.image_bytes(49) == b"bytes of 51"


def test_progress_counts_to_the_end(tmp_path, made):
    seen = []
    build(made / "embeddings", tmp_path / "index", shards=4, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == ROWS
    again = []
    build(made / "embeddings", tmp_path / "index", shards=4, progress=again.append)
    assert again == [75, 150, 225, 300]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.zeros((2, 2), np.uint8), r"got uint8 \[2, 2\] \(.*Codes\(array, bits\)"),
        ([[0, 0]], "got a list"),
        ((draw_codes(2, BITS), {}), r"got a tuple \(.*of what an encoder returns, they are the first"),
    ],
)
def test_queries_that_are_no_descriptors_are_refused_in_one_line(sharded, queries, message):
    with pytest.raises(ArtefactError, match=f"descriptors are Codes, Vectors or Local, {message}"):
        sharded.search(queries, 3)


def test_lists_and_other_types_are_no_codes_or_vectors():
    for wrong in ([[1, 2]], np.zeros((1, 2), np.int64), np.zeros(2, np.uint8)):
        with pytest.raises(ArtefactError, match=r"codes of 12 bits are uint8 \[n, 2\].*numpy\.packbits"):
            Codes(wrong, BITS)
    for wrong in ([[1.0, 0.0]], np.eye(2), np.ones(1, np.float32)):
        with pytest.raises(ArtefactError, match=r"float32 \[n, dimension\].*numpy\.asarray"):
            Vectors(wrong)


@pytest.mark.parametrize("k", ["3", 3.0, None])
def test_a_number_of_hits_is_a_whole_one(sharded, k):
    with pytest.raises(QueryError, match="a whole one and at least 1, got"):
        sharded.search(draw_codes(1, BITS), k)
    with pytest.raises(QueryError, match="a whole one and at least 1, got"):
        Finder(sharded.folder, threads=1).find(draw_codes(1, BITS), k)
    assert len(sharded.search(draw_codes(1, BITS), np.int64(3)).rows[0]) == 3


def test_a_filter_is_text(sharded):
    for ask in (sharded.count, sharded.check_filter):
        with pytest.raises(QueryError, match=r"a filter is text, got dict \(write it as 'label = dog"):
            ask({"label": "dog"})


def test_queries_of_other_bits_are_refused(sharded):
    with pytest.raises(ArtefactError, match="12-bit codes, the queries are 16-bit codes"):
        sharded.search(draw_codes(1, 16), 3)
    with pytest.raises(QueryError, match="got 0"):
        sharded.search(draw_codes(1, BITS), 0)
    with pytest.raises(QueryError, match=r"at most 2,147,483,647, got 1,000,000,000,000 \(.* 300 rows"):
        sharded.search(draw_codes(1, BITS), 10**12)


def test_another_model_is_refused_with_both_named(made, tmp_path, codes):
    Index.open(made / "index-5", model="model-a")
    with pytest.raises(ArtefactError, match=r"model model-a.*model model-b"):
        Index.open(made / "index-5", model="model-b")
    write(tmp_path / "embeddings", codes, draw_images(ROWS), model="model-b")
    before = files_in(made / "index-5")
    with pytest.raises(ArtefactError, match=r"model model-a.*model model-b"):
        build(tmp_path / "embeddings", made / "index-5")
    with pytest.raises(ArtefactError, match=r"12-bit codes, made by model model-a.* vectors of 4 .*else"):
        build(imported(np.eye(4, dtype=np.float32)), made / "index-5")
    assert files_in(made / "index-5") == before


def test_an_index_of_nothing_is_refused(tmp_path):
    write(tmp_path / "embeddings", draw_codes(2, 8), draw_images(2), skip={0, 1})
    with pytest.raises(ArtefactError, match="no rows to index"):
        build(tmp_path / "embeddings", tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_no_index_at_all(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtefactError, match=r"no index here: (CURRENT is missing|no such folder)"):
            Index.open(folder)
    with pytest.raises(ArtefactError, match=r"embeddings\.json is missing"):
        build(tmp_path, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_an_index_can_be_moved(made, tmp_path, codes, sharded):
    moved = tmp_path / "moved"
    for name, data in files_in(made / "index-5").items():
        (moved / name).parent.mkdir(parents=True, exist_ok=True)
        Path(moved / name).write_bytes(data)
    assert_same(Index.open(moved.as_uri()).search(codes, 5), sharded.search(codes, 5))
