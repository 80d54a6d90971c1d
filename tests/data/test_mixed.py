"""Images that keep their proportions: how they are prepared, grouped, kept and shared out."""

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_retrieval.config import validate
from ray_retrieval.data.decode import MAX_BYTES, jpeg_size, upright_size
from ray_retrieval.data.mixed import MixedImages, groups_of, in_order
from ray_retrieval.data.source import ImageSource, check_images
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing, decode_target, prepare, prepared_shape
from ray_retrieval.errors import DataError, RecipeError


def picture(width, height, *, seed=0, kind="PNG", orientation=1):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, format=kind, exif=exif)
    return buffer.getvalue(), Image.fromarray(pixels)


def long_side(size=32, shapes="exact"):
    return Preprocessing(size=size, resize="long_side", shapes=shapes)


class TestPrepare:
    @pytest.mark.parametrize("size", [(64, 48), (48, 64), (640, 31), (33, 33), (100, 7)])
    def test_the_longer_side_is_the_size_as_pillow_makes_thumbnails(self, size):
        data, image = picture(*size)
        image.thumbnail((32, 32), Image.Resampling.LANCZOS, reducing_gap=None)
        found = prepare(data, long_side())
        assert max(found.shape[1:]) == 32
        np.testing.assert_array_equal(found, np.asarray(image).transpose(2, 0, 1))

    @pytest.mark.parametrize("shapes", ["exact", "pad"])
    def test_small_images_are_not_enlarged(self, shapes):
        data, image = picture(20, 12)
        found = prepare(data, long_side(shapes=shapes))
        inside = found if shapes == "exact" else found[:, 10:22, 6:26]
        np.testing.assert_array_equal(inside, np.asarray(image).transpose(2, 0, 1))

    def test_padding_is_the_mean_colour(self):
        found = prepare(picture(64, 32)[0], long_side(shapes="pad"))
        assert found.shape == (3, 32, 32)
        mean = np.rint(255 * np.array([0.485, 0.456, 0.406])).astype(np.uint8)
        for rows in (found[:, :8], found[:, 24:]):
            assert (rows == mean[:, None, None]).all()

    @pytest.mark.parametrize(
        ("size", "shape"),
        [
            ((640, 480), (24, 32)),  # 3 : 4
            ((480, 640), (32, 24)),
            ((650, 480), (24, 32)),  # nearest to 3 : 4
            ((512, 510), (32, 32)),
            ((640, 360), (18, 32)),
            ((330, 100), (9, 32)),  # 2 : 7 is nearer than 1 : 3
            ((800, 100), (4, 32)),  # longer than 1 : 4, so it stays as it is
            ((100, 5000), (32, 1)),
        ],
    )
    def test_buckets_are_the_nearest_proportions(self, size, shape):
        assert prepare(picture(*size)[0], long_side(shapes="buckets")).shape[1:] == shape

    def test_buckets_are_few(self):
        sizes = [size for other in range(40, 161) for size in ((40, other), (other, 40))]
        assert len({prepared_shape(size, long_side(shapes="buckets")) for size in sizes}) == 19

    @settings(max_examples=200, deadline=None)
    @given(width=st.integers(1, 3000), height=st.integers(1, 3000), size=st.integers(100, 400))
    def test_a_bucket_stretches_by_twelve_per_cent_at_most(self, width, height, size):
        found = prepared_shape((width, height), long_side(size, "buckets"))
        longer = max(found)
        assert longer <= min(max(width, height), size)
        exact = longer * min(width, height) / max(width, height)
        bound = 1.1181 if 4 * min(width, height) >= max(width, height) else 1.0
        assert exact / bound - 0.51 <= min(found) <= max(exact * bound + 0.51, 1)

    def test_a_box_is_cut_out_first_and_keeps_the_scale_of_the_image(self):
        data, image = picture(128, 96)
        found = prepare(data, long_side(), box=[10.2, 20.0, 74.4, 60.0])
        part = image.crop((10, 20, 74, 60))  # 64 × 40: half of the longer side, so at most 16 of 32
        part.thumbnail((16, 16), Image.Resampling.LANCZOS, reducing_gap=None)
        np.testing.assert_array_equal(found, np.asarray(part).transpose(2, 0, 1))

    def test_a_box_in_a_square(self):
        data, image = picture(128, 96)
        found = prepare(data, Preprocessing(size=16), box=[0, 0, 64, 48])
        part = image.crop((0, 0, 64, 48)).resize((16, 16), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found, np.asarray(part).transpose(2, 0, 1))

    def test_a_box_beyond_the_image_is_cut_at_its_border(self):
        data, _ = picture(40, 30)
        whole = prepare(data, long_side(64))
        np.testing.assert_array_equal(prepare(data, long_side(64), box=[-5, -5, 45, 35]), whole)
        with pytest.raises(DataError, match="nothing of the image, 40 × 30, is in the box"):
            prepare(data, long_side(64), box=[50, 0, 60, 10])

    @pytest.mark.parametrize("box", [[1, 2, 3], "1234", ["1", "2", "3", "4"]])
    def test_a_box_is_four_numbers(self, box):
        data, _ = picture(40, 30)
        for preprocessing in (long_side(64), Preprocessing(size=16)):
            with pytest.raises(DataError, match=r"a box is left, top, right, bottom in pixels, got"):
                prepare(data, preprocessing, box=box)

    @settings(max_examples=60, deadline=None)
    @given(
        width=st.integers(1, 90),
        height=st.integers(1, 90),
        size=st.integers(1, 64),
        shapes=st.sampled_from(["exact", "buckets", "pad"]),
        boxed=st.booleans(),
        kind=st.sampled_from(["PNG", "JPEG"]),
        orientation=st.integers(1, 8),
    )
    def test_the_shape_is_known_beforehand(self, width, height, size, shapes, boxed, kind, orientation):
        data = picture(width, height, kind=kind, orientation=orientation)[0]
        preprocessing = long_side(size, shapes)
        upright = (height, width) if orientation >= 5 else (width, height)
        box = [0.4, 0, (upright[0] + 1) // 2 + 0.3, (upright[1] + 1) // 2] if boxed else None
        found = prepare(data, preprocessing, box).shape[1:]
        measured = upright_size(data, target=decode_target(preprocessing, box))
        assert found == prepared_shape(measured, preprocessing, box)
        assert max(found) <= size
        assert jpeg_size(data) == (upright if kind == "JPEG" else None)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"shapes": "pad"}, "for resize: long_side"),
            ({"resize": "long_side", "resize_to": 300}, "keeps the whole image"),
        ],
    )
    def test_what_does_not_go_together(self, wrong, message):
        with pytest.raises(RecipeError, match=message):
            validate(Preprocessing, wrong)


def images_of(shapes):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (3, *shape), dtype=np.uint8) for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(2, 3), (3, 2), (3, 3)]), min_size=1, max_size=12),
    limit=st.none() | st.integers(1, 5),
)
def test_groups_hold_every_image_once_and_results_come_back_in_order(shapes, limit):
    images = images_of(shapes)
    mixed = MixedImages(images)
    assert len(mixed) == len(images)
    groups = groups_of(mixed, limit)
    assert sorted(np.concatenate([places for places, _ in groups]).tolist()) == list(range(len(images)))
    assert limit is None or max(len(places) for places, _ in groups) <= limit
    for places, some in groups:
        for place, image in zip(places.tolist(), some, strict=True):
            np.testing.assert_array_equal(image.numpy(), images[place])
    sums = in_order([places for places, _ in groups], [some.long().sum(dim=(1, 2, 3)) for _, some in groups])
    assert sums.tolist() == [int(image.astype(int).sum()) for image in images]


def table_of(sizes, boxes=None):
    rows = [
        {"id": f"{row}", "image": {"bytes": picture(*size, seed=row)[0], "path": None}, "label": 0}
        for row, size in enumerate(sizes)
    ]
    image_type = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.string()), ("image", image_type), ("label", pa.int64())])
    table = pa.Table.from_pylist(rows, schema=schema)
    if boxes is not None:
        table = table.append_column("box", pa.array(boxes, pa.list_(pa.float32())))
    return ImageTable(table, name="mixed")


SIZES = [(40, 30), (30, 40), (40, 30), (20, 20), (64, 16), (30, 40)]


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_source_gives_each_image_its_own_size(memory):
    table = table_of(SIZES)
    with ImageSource(table, long_side(), memory_bytes=memory, threads=2) as source:
        for _ in range(2):
            batch = source.batch([5, 0, 3, 0])
            assert isinstance(batch, MixedImages)
            for places, some in batch.groups:
                for place, image in zip(places.tolist(), some, strict=True):
                    expected = prepare(table.image_bytes([5, 0, 3, 0][place]), long_side())
                    np.testing.assert_array_equal(image.numpy(), expected)


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_shares_have_about_as_many_pixels_each(count):
    sizes = np.random.default_rng(1).integers(8, 60, (80, 2)).tolist()
    with ImageSource(table_of(sizes), long_side(), memory_bytes=0, threads=1) as source:
        rows = np.random.default_rng(2).permutation(80)[:50]
        shares = source.shares(rows, count)
        assert len(shares) == count
        assert sorted(np.concatenate(shares).tolist()) == list(range(50))
        pixels = np.array([prepare(picture(*sizes[row])[0], long_side())[0].size for row in rows])
        loads = [pixels[share].sum() for share in shares]
        assert max(loads) - min(loads) <= 3 * pixels.max()


def files_of(folder, sizes, kind, filler):
    """A table of files, with `filler` in their headers."""
    paths = []
    for row, size in enumerate(sizes):
        data = picture(*size, seed=row, kind=kind, orientation=1 + row % 8)[0]
        path = folder / f"{row}.{kind.lower()}"
        path.write_bytes(data[:2] + filler + data[2:])
        paths.append(str(path))
    images = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.large_binary()), pa.array(paths)], names=["bytes", "path"]
    )
    return ImageTable(pa.table({"id": paths, "image": images}), name="files")


LONG_HEADER = 2 * (b"\xff\xed\xff\xff" + bytes(65533))  # two of APP13


@pytest.mark.parametrize(
    ("kind", "filler", "whole"), [("JPEG", b"", 0), ("JPEG", LONG_HEADER, 8), ("PNG", b"", 8)]
)
def test_the_beginning_of_a_jpeg_is_enough_to_share_out(tmp_path, monkeypatch, kind, filler, whole):
    table = files_of(tmp_path, [(400 - 20 * row, 200) for row in range(8)], kind, filler)
    expected = [list(prepare(table.image_bytes(row), long_side()).shape[1:]) for row in range(8)]
    read = []
    inner = ImageTable.image_bytes

    def spied(self, row, limit=MAX_BYTES):
        data = inner(self, row, limit)
        read.append(len(data))
        return data

    monkeypatch.setattr(ImageTable, "image_bytes", spied)
    with ImageSource(table, long_side(), memory_bytes=0, threads=1) as source:
        for _ in range(2):
            assert sorted(np.concatenate(source.shares(range(8), 3)).tolist()) == list(range(8))
        assert source._shapes.tolist() == expected
    assert len(read) == 8 + whole
    assert sum(length > (1 << 16) + 1 for length in read) == whole


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_what_is_decoded_or_for_one_worker_is_not_measured(monkeypatch, memory):
    sizes = np.random.default_rng(1).integers(8, 60, (20, 2)).tolist()
    table = table_of(sizes)
    with ImageSource(table, long_side(), memory_bytes=0, threads=1) as source:
        measured = source.shares(range(20), 3)
    with ImageSource(table, long_side(), memory_bytes=memory, threads=2) as source:
        monkeypatch.setattr(source, "_measure", None)
        assert [share.tolist() for share in source.shares([7, 3, 5], 1)] == [[0, 1, 2]]
        source.batch(range(20))
        shares = source.shares(range(20), 3)
    assert [share.tolist() for share in shares] == [share.tolist() for share in measured]


def test_images_outside_of_their_boxes_are_found_beforehand():
    boxes = [None, [3, 4, 23, 24], None, [20, 0, 30, 10], [0, 0, 8, 8], None]
    errors = check_images(table_of(SIZES, boxes), 2)
    assert [(error.row, error.reason.split(",")[0]) for error in errors] == [(3, "nothing of the image")]
    refused = r"mixed, image '3' \(row 3\).*mend the box"
    source = ImageSource(table_of(SIZES, boxes), long_side(), memory_bytes=0, threads=1)
    with source, pytest.raises(DataError, match=refused):
        source.batch([3])
    with pytest.raises(DataError, match="a box is left, top, right, bottom"):
        check_images(table_of(SIZES, [[1, 2], *[None] * 5]), 1)


def test_the_box_of_a_table_is_what_counts_of_an_image():
    boxes = [None, [3, 4, 23, 24], None, None, [0, 0, 8, 8], None]
    table = table_of(SIZES, boxes)
    assert (table.box(0), table.box(1)) == (None, [3, 4, 23, 24])
    assert table.fingerprint != table_of(SIZES).fingerprint
    with ImageSource(table.take(np.array([4, 1])), long_side(), memory_bytes=0, threads=1) as source:
        batch = source.batch([1])
    expected = prepare(table.image_bytes(1), long_side(), [3, 4, 23, 24])
    np.testing.assert_array_equal(batch.groups[0][1][0].numpy(), expected)


@pytest.mark.parametrize("box", [[1, 2, 3], [5, 0, 5, 9], [0, 9, 4, 3]])
def test_what_is_no_box_is_named(box):
    with pytest.raises(DataError, match=r"mixed, image '2'.*left, top, right, bottom"):
        table_of(SIZES, [None, None, box, None, None, None]).box(0)
