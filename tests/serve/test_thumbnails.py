import io

import numpy as np
import pytest
from PIL import Image
from serving_parts import picture, pixels

from ray_retrieval.errors import DataError
from ray_retrieval.serve.thumbnails import Thumbnail, ThumbnailCache, shrink


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_an_image_that_fits_is_copied_without_loss(kind: str) -> None:
    original = picture(0, side=32, kind=kind)
    copy = shrink(original, 32, etag="x")
    assert copy.media_type == "image/png"
    np.testing.assert_array_equal(pixels(copy.data), pixels(original))


@pytest.mark.parametrize(("width", "height"), [(600, 300), (300, 600), (2000, 20), (257, 257)])
def test_a_larger_image_is_shrunk_to_fit_in_its_shape(width: int, height: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "JPEG")
    copy = shrink(file.getvalue(), 256, etag="x")
    assert copy.media_type == "image/jpeg"
    shown = Image.open(io.BytesIO(copy.data))
    assert shown.format == "JPEG"
    scale = 256 / max(width, height)
    assert shown.width == pytest.approx(width * scale, abs=1)
    assert shown.height == pytest.approx(height * scale, abs=1)


def test_what_a_camera_noted_is_left_out_but_its_turn_is_made() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010F] = "Maker of cameras"
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(
        file, "JPEG", exif=exif, comment="Note of somebody", icc_profile=b"Colours"
    )
    for size, shape in ((64, (20, 40)), (20, (10, 20))):
        copy = shrink(file.getvalue(), size, etag="x")
        assert Image.open(io.BytesIO(copy.data)).size == shape
        for noted in (b"Maker", b"Note", b"Colours"):
            assert noted in file.getvalue()
            assert noted not in copy.data


def test_a_damaged_image_is_a_data_error() -> None:
    with pytest.raises(DataError):
        shrink(picture(0, side=64, kind="JPEG")[:700], 32, etag="x")


def thumbnail(size: int) -> Thumbnail:
    return Thumbnail(bytes(size), "image/png", str(size))


def test_the_cache_drops_what_was_not_used_for_longest() -> None:
    cache = ThumbnailCache(100)
    cache.put("a", thumbnail(40))
    cache.put("b", thumbnail(40))
    assert cache.get("a") is not None
    cache.put("c", thumbnail(40))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert cache.get("c") is not None


def test_the_cache_counts_a_replaced_thumbnail_once() -> None:
    cache = ThumbnailCache(100)
    for _ in range(10):
        cache.put("a", thumbnail(60))
    cache.put("b", thumbnail(40))
    assert len(cache) == 2


def test_a_thumbnail_larger_than_the_cache_is_not_kept() -> None:
    cache = ThumbnailCache(100)
    cache.put("a", thumbnail(101))
    assert len(cache) == 0
    cache.put("b", thumbnail(100))
    assert cache.get("b") is not None
