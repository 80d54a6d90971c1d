import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ray_retrieval.data.decode import FORMATS, decode, jpeg_size, png, upright_size
from ray_retrieval.errors import DataError


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_decodes_to_rgb(kind: str) -> None:
    source = photo(40, 30)
    image = decode(
        saved(
            source.quantize(64) if kind == "GIF" else source,
            kind,
            **({"quality": 95} if kind == "WEBP" else {}),
        )
    )
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(source)).mean() < (12 if kind == "GIF" else 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_as_pillow_does(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(24, 16), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
    assert expected is not None
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright is not None
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright.convert("RGB")))
    assert upright_size(data) == upright.size


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_leaves_the_pixels() -> None:
    data = saved(photo(16, 16), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode(data).size == (16, 16)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "P", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    assert decode(saved(photo(16, 16).convert(mode), kind)).mode == "RGB"


def test_transparent_pixels_are_white() -> None:
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    image = np.asarray(decode(saved(Image.fromarray(pixels), "PNG")))
    assert image[0, 0].tolist() == [10, 20, 30]
    assert (image[1] == 255).all()
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([1, 2, 3, 4, 5, 6])
    assert np.asarray(decode(saved(palette, "PNG", transparency=1))).min() == 255
    keyed = Image.new("RGB", (2, 2), (9, 9, 9))
    assert np.asarray(decode(saved(keyed, "PNG", transparency=(9, 9, 9)))).min() == 255


def test_sixteen_bit_grey_keeps_the_upper_half() -> None:
    grey = np.array([[0, 255, 256], [0x8000, 0xFFFF, 0x1234]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        image = np.asarray(decode(saved(Image.fromarray(grey), kind)))
        assert image[..., 0].tolist() == (grey >> 8).tolist()


def test_a_transparent_grey_of_sixteen_bits_is_white() -> None:
    grey = np.array([[0x1234, 0x1235], [0x4000, 0x1234]], dtype=np.uint16)
    image = np.asarray(decode(saved(Image.fromarray(grey), "PNG", transparency=0x1234)))
    assert image[..., 0].tolist() == [[255, 0x12], [0x40, 255]]


def test_twelve_bit_grey_keeps_the_upper_half() -> None:
    """As microscopes write it: two pixels in three bytes, 0x0FF and 0x801."""
    pixels = bytes([0x0F, 0xF8, 0x01])
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 134), (277, 1), (278, 1), (279, 3)]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    data = b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)
    assert np.asarray(decode(data.ljust(134, b"\0") + pixels))[..., 0].tolist() == [[0x0F, 0x80]]


@pytest.mark.parametrize(
    ("dtype", "words"), [(np.float32, "floating-point"), (np.int32, "signed or 32-bit integer")]
)
def test_pixels_without_a_range_are_refused(dtype: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"{words} pixels have no agreed range"):
        decode(saved(Image.fromarray(np.full((4, 4), 200, dtype=dtype)), "TIFF"))


def test_first_picture_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _, blue = np.asarray(decode(data))[4, 4]
        assert (red > 200, blue < 50) == (True, True)


@pytest.mark.parametrize("target", [None, 50])
def test_multi_picture_jpeg_of_a_phone_decodes_as_its_first_picture(target: int | None) -> None:
    first, exif = photo(800, 600), Image.Exif()
    exif[0x0112] = 6
    alone = saved(first, "JPEG", exif=exif)
    data = saved(first, "MPO", exif=exif, save_all=True, append_images=[photo(64, 48, 1)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    image = decode(data, target=target)
    assert image.size == ((600, 800) if target is None else (75, 100))
    assert np.array_equal(np.asarray(image), np.asarray(decode(alone, target=target)))
    assert jpeg_size(data[:2000], target=target) == upright_size(data, target=target) == image.size


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((800, 600), 75, (100, 75)),
        ((800, 600), 76, (200, 150)),
        ((800, 600), 150, (200, 150)),
        ((800, 600), 151, (400, 300)),
        ((800, 600), 301, (800, 600)),
        ((800, 600), 2000, (800, 600)),
        ((801, 601), 75, (101, 76)),
    ],
)
def test_draft_never_goes_below_the_target(
    size: tuple[int, int], target: int, expected: tuple[int, int]
) -> None:
    assert decode(saved(photo(*size), "JPEG"), target=target).size == expected


def test_draft_costs_no_quality_after_the_resize() -> None:
    data = saved(photo(800, 600), "JPEG", quality=95)
    full = decode(data).resize((128, 128), Image.Resampling.BILINEAR)
    drafted = decode(data, target=128).resize((128, 128), Image.Resampling.BILINEAR)
    difference = np.asarray(full).astype(int) - np.asarray(drafted)
    assert np.abs(difference).mean() < 1
    assert np.abs(difference).max() <= 6


def test_limits_hold_before_decoding() -> None:
    assert decode(saved(photo(20, 10), "PNG"), max_pixels=200).size == (20, 10)
    with pytest.raises(DataError, match=r"20 × 10 pixels, more than 199"):
        decode(saved(photo(20, 10), "PNG"), max_pixels=199)
    data = saved(photo(20, 10), "PNG")
    with pytest.raises(DataError, match="bytes"):
        decode(data, max_bytes=len(data) - 1)
    with pytest.raises(DataError, match="times as long"):
        decode(png(np.zeros((1, 101), dtype=np.uint8)))
    assert decode(png(np.zeros((1, 100), dtype=np.uint8))).size == (100, 1)


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8000, 8000), (12_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_data_errors(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="pixels"):
        decode(png_header(*size))


@pytest.mark.filterwarnings("error")
def test_bombs_are_data_errors_where_warnings_are_errors() -> None:
    with pytest.raises(DataError, match="pixels"):
        decode(png_header(12_000, 10_000))


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a", b"%PDF-1.7", bytes(1000), b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError):
        decode(data)


def test_formats_outside_the_list_are_refused() -> None:
    for kind in ("PPM", "TGA", "ICO", "EPS"):
        with pytest.raises(DataError, match="not a JPEG"):
            decode(saved(photo(16, 16), kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files_are_data_errors(kind: str, part: float) -> None:
    data = saved(photo(64, 64), kind)
    with pytest.raises(DataError):
        decode(data[: int(len(data) * part)])


_CORPUS = [saved(photo(24, 16).quantize(16) if kind == "GIF" else photo(24, 16), kind) for kind in FORMATS]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore:Image size")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_CORPUS), st.data())
def test_damaged_bytes_give_an_image_or_a_data_error(original: bytes, data: st.DataObject) -> None:
    damaged = bytearray(original[: data.draw(st.integers(0, len(original)))])
    for _ in range(data.draw(st.integers(0, 6))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        assert decode(bytes(damaged), target=8).mode == "RGB"


def test_png_round_trip() -> None:
    for shape in ((5, 7), (5, 7, 3)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        expected = pixels if len(shape) == 3 else np.repeat(pixels[..., None], 3, axis=2)
        assert np.array_equal(np.asarray(decode(png(pixels))), expected)
