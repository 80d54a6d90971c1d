"""Image files as strangers send them: odd ones, which are taken, and hostile ones, which are refused."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

WIDE, HIGH = 24, 16
"""Size of the sound ones, upright."""


def _pixels() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HIGH, WIDE, 3)).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _exif(orientation: int, *, comment: int = 0) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if comment:
        exif[0x9286] = b"\0" * comment
    return exif.tobytes()


def _lying(kind: str) -> bytes:
    """Stored on its side, with a note to turn it."""
    return saved(_pixels().transpose(Image.Transpose.ROTATE_90), kind, exif=_exif(6))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_with(*chunks: bytes, at: int = 33) -> bytes:
    """A PNG with further chunks: behind its header at 33, before its end at -12."""
    data = saved(_pixels(), "PNG")
    return data[:at] + b"".join(chunks) + data[at:]


def _png_bomb(width: int, height: int) -> bytes:
    """A sound PNG of few bytes and many pixels."""
    row = b"\0" * (1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row * 1000) for _ in range(height // 1000)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _says_to_be(width: int, height: int) -> bytes:
    """A PNG whose header alone is large."""
    data = saved(_pixels(), "PNG")
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return data[:8] + _chunk(b"IHDR", header) + data[33:]


def _jpeg_of_scans(further: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more: each is a pass over all pixels."""
    data = saved(Image.new("L", (900, 900), 128), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), len(data) - 2
    return data[:end] + data[last:end] * further + data[end:]


def _gif_bomb() -> bytes:
    data = bytearray(saved(_pixels(), "GIF"))
    data[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(data)


def _gif_of_comments() -> bytes:
    data = saved(_pixels(), "GIF")
    place = data.index(b"\x2c", 13 + 3 * (2 << (data[10] & 7)))
    return data[:place] + b"\x21\xfe\x01a\x00" * 200_000 + data[place:]


def _frames() -> list[Image.Image]:
    return [_pixels(), Image.new("RGB", (WIDE, HIGH), "red"), Image.new("RGB", (WIDE, HIGH), "blue")]


def _animated(kind: str) -> bytes:
    first, *rest = _frames()
    return saved(first, kind, save_all=True, append_images=rest)


def _sixteen_bit() -> bytes:
    ramp = np.linspace(0, 65535, WIDE * HIGH).reshape(HIGH, WIDE).astype(np.uint16)
    return saved(Image.fromarray(ramp), "PNG")


def _palette() -> bytes:
    image = _pixels().quantize(16)
    return saved(image, "PNG", transparency=bytes(range(0, 256, 16)))


def _float_tiff() -> bytes:
    return saved(Image.fromarray(np.zeros((HIGH, WIDE), np.float32)), "TIFF")


def _turned_late() -> bytes:
    data = saved(_pixels().transpose(Image.Transpose.ROTATE_90), "PNG")
    return data[:-12] + _chunk(b"eXIf", _exif(6)[6:]) + data[-12:]


def _jpeg_of(more: bytes) -> bytes:
    data = saved(_pixels(), "JPEG")
    return data[:2] + more + data[2:]


Make = Callable[[], bytes]

TAKEN: dict[str, Make] = {
    "jpeg": lambda: saved(_pixels(), "JPEG"),
    "jpeg, lying on its side": lambda: _lying("JPEG"),
    "png, lying on its side": lambda: _lying("PNG"),
    "png, turned by a note behind its pixels": _turned_late,
    "webp, lying on its side": lambda: _lying("WEBP"),
    "tiff, lying on its side": lambda: _lying("TIFF"),
    "jpeg with a long exif": lambda: saved(_pixels(), "JPEG", exif=_exif(1, comment=60_000)),
    "jpeg with a broken exif": lambda: saved(
        _pixels(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 50
    ),
    "png with a long exif": lambda: _png_with(_chunk(b"eXIf", _exif(1, comment=60_000)[6:]), at=-12),
    "cmyk jpeg": lambda: saved(_pixels().convert("CMYK"), "JPEG"),
    "16-bit png": _sixteen_bit,
    "palette with transparency": _palette,
    "png with transparency": lambda: saved(_pixels().convert("RGBA"), "PNG"),
    "one-bit png": lambda: saved(_pixels().convert("1"), "PNG"),
    "grey jpeg": lambda: saved(_pixels().convert("L"), "JPEG"),
    "progressive jpeg": lambda: saved(_pixels(), "JPEG", progressive=True),
    "progressive jpeg with scans behind its end": lambda: (
        saved(_pixels(), "JPEG", progressive=True) + b"\xff\xda\x00\x02" * 2000
    ),
    "bmp": lambda: saved(_pixels(), "BMP"),
    "animated gif": lambda: _animated("GIF"),
    "animated png": lambda: _animated("PNG"),
    "animated webp": lambda: _animated("WEBP"),
    "tiff of several pages": lambda: _animated("TIFF"),
    "still gif": lambda: saved(_pixels(), "GIF"),
    "jpeg with something behind it": lambda: saved(_pixels(), "JPEG") + b"PK\x03\x04" + bytes(100),
}
"""Those that are handled, all `WIDE` x `HIGH` upright."""

ANIMATED = {"animated gif", "animated png", "animated webp", "tiff of several pages"}

REFUSED: dict[str, tuple[Make, int]] = {
    "empty": (lambda: b"", 400),
    "text": (lambda: b"not an image at all", 415),
    "html": (lambda: b"<!doctype html><script>alert(1)</script>", 415),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', 415),
    "pdf": (lambda: b"%PDF-1.7\n" + bytes(200), 415),
    "zip": (lambda: b"PK\x03\x04" + bytes(200), 415),
    "elf": (lambda: b"\x7fELF" + bytes(200), 415),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    "icon": (lambda: saved(_pixels(), "ICO"), 415),
    "pcx": (lambda: saved(_pixels(), "PCX"), 415),
    "first bytes of a png": (lambda: b"\x89PNG\r\n\x1a\n", 415),
    "first bytes of a jpeg": (lambda: b"\xff\xd8\xff\xe0junk", 415),
    "png cut in its pixels": (lambda: saved(_pixels(), "PNG")[:200], 400),
    "jpeg cut in its pixels": (lambda: saved(_pixels(), "JPEG")[:-200], 400),
    "webp cut": (lambda: saved(_pixels(), "WEBP", lossless=True)[:-100], 415),
    "gif cut": (lambda: saved(_pixels(), "GIF")[:-200], 400),
    "tiff cut in its pixels": (lambda: saved(_pixels(), "TIFF")[:-20], 400),
    "png with wrong pixels": (lambda: _png_with(_chunk(b"IDAT", b"junk" * 9)), 400),
    "bomb of a billion pixels": (lambda: _says_to_be(31_000, 31_000), 413),
    "bomb of two billion a side": (lambda: _says_to_be(2**31 - 1, 2**31 - 1), 413),
    "sound bomb of four million pixels": (lambda: _png_bomb(2000, 2000), 413),
    "gif bomb": (_gif_bomb, 413),
    "a line of pixels": (lambda: saved(Image.new("L", (3000, 1)), "PNG"), 422),
    "no pixels": (lambda: _says_to_be(0, 5), 415),
    "png of many chunks": (lambda: _png_with(_chunk(b"zzZz", b"") * 20_000), 422),
    "jpeg of many segments": (lambda: _jpeg_of(b"\xff\xfe\x00\x02" * 20_000), 422),
    "jpeg of much filling": (lambda: _jpeg_of(b"\xff" * 60_000), 422),
    "jpeg of many scans": (lambda: _jpeg_of_scans(2000), 422),
    "jpeg of many scans behind a marker of no length": (
        lambda: _jpeg_of_scans(2000).replace(b"\xff\xda", b"\xff\x01\xff\xff\xff\xda", 1),
        422,
    ),
    "gif of many comments": (_gif_of_comments, 422),
    "png whose text inflates": (
        lambda: _png_with(_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(90_000_000)))),
        415,
    ),
    "tiff of floats": (_float_tiff, 400),
}
"""Those that are not, with the status that says so."""
