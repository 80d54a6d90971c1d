"""Bytes of an image file to pixels, with limits before and one kind of error after.

Image files come from strangers: sizes are checked on the header, before any pixel is decoded, and whatever
a decoder does on malformed bytes comes out as `DataError`.
"""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from ray_retrieval.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded, told by content; the file's name does not matter."""

MAX_PIXELS = 50_000_000
MAX_BYTES = 160_000_000
"""A little more than an uncompressed image of `MAX_PIXELS`."""
MAX_RATIO = 100
"""A 1 × 1,000,000 image is within `MAX_PIXELS`; scaled to a short side of 224 it would be 150 gigabytes."""

_JPEG = b"\xff\xd8"
_JPEGS = ("JPEG", "MPO")  # what Pillow calls a JPEG, and one with further pictures behind it, as phones write
_BITS_PER_SAMPLE = 258  # TIFF 6.0, section 8
_ORIENTATION = 0x0112  # Exif 2.32, table 4
_FIRST_LYING = 5  # from here on, width and height change places
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    data: bytes, *, target: int | None = None, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """An upright RGB image.

    The EXIF orientation is applied; transparent pixels are laid on white; 12- and 16-bit grey keeps its
    upper 8 bits; of an animation or a multi-page file the first picture counts; colour profiles are ignored.

    Args:
        data: the file's bytes: JPEG, PNG, WebP, BMP, GIF or TIFF.
        target: the side, in pixels, that the image will be resized to. A JPEG is then decoded at 1/2, 1/4 or
            1/8 of its size as long as both sides stay at least `target`, which is several times faster.
        max_pixels: limit on width times height as the file's header states them.
        max_bytes: limit on the length of `data`.

    Raises:
        DataError: if the bytes are too many, no image, damaged or truncated, hold too many pixels, or pixels
            without a range (floating-point, 32-bit), or a side is more than `MAX_RATIO` times the other. No
            other exception comes out.
    """
    image = _opened(data, max_pixels, max_bytes)
    try:
        _reduce(image, target)
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        image = _rgb(image)
        return image if upright is None else image.transpose(upright)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"the image cannot be decoded: {_words(error)}") from None


def upright_size(data: bytes, *, target: int | None = None) -> tuple[int, int]:
    """Width and height of what `decode` gives with the same `target`, read from the file's header.

    Raises:
        DataError: if the bytes are no image, or one that `decode` refuses unseen.
    """
    return _upright_size(_opened(data, MAX_PIXELS, MAX_BYTES), target)


def jpeg_size(start: bytes, *, target: int | None = None) -> tuple[int, int] | None:
    """As `upright_size`, from the first bytes of a JPEG; None where they do not tell.

    Other formats may have what counts, such as the orientation, behind their pixels.
    """
    if not start.startswith(_JPEG):
        return None
    try:
        image = _opened(start, MAX_PIXELS, MAX_BYTES)
    except DataError:
        return None  # The header may be longer than this.
    return _upright_size(image, target) if image.format in _JPEGS else None


def _upright_size(image: Image.Image, target: int | None) -> tuple[int, int]:
    _reduce(image, target)
    # Pillow turns a TIFF itself, and tells the size that it will have.
    turned = image.format != "TIFF" and _orientation(image) >= _FIRST_LYING
    return (image.height, image.width) if turned else image.size


def _reduce(image: Image.Image, target: int | None) -> None:
    """Let a JPEG be decoded at a part of its size, of at least `target` pixels a side."""
    if target is not None and image.format in _JPEGS:
        image.draft(None, (target, target))


def _opened(data: bytes, max_pixels: int, max_bytes: int) -> Image.Image:
    """The image with its header read and found to be within the limits."""
    if len(data) > max_bytes:
        raise DataError(f"the file has more than {max_bytes} bytes")
    if not data:
        raise DataError("the file is empty")
    # A decoder meets malformed bytes with any exception there is: OSError, SyntaxError, KeyError, …
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise DataError("not a JPEG, PNG, WebP, BMP, GIF or TIFF image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"the image has more than {max_pixels} pixels") from None
    except Exception as error:
        raise DataError(f"the image's header cannot be read: {_words(error)}") from None
    if image.width * image.height > max_pixels:
        raise DataError(f"the image has {image.width} × {image.height} pixels, more than {max_pixels}")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise DataError(
            f"the image is {image.width} × {image.height}, more than {MAX_RATIO} times as long as wide"
        )
    return image


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """The PNG file of an array: uint8 [h, w] grey or [h, w, 3] RGB."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _orientation(image: Image.Image) -> int:
    # Cameras write broken EXIF now and then; the pixels are fine all the same.
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    # Older versions of Pillow open a PNG of 16-bit grey as "I", too.
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit integer"
        raise DataError(
            f"{kind} pixels have no agreed range", mend="save the image with 8 bits, or 16-bit grey"
        )
    if image.mode.startswith("I"):
        return _upper_bits(image).convert("RGB")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    """8-bit grey of 16-bit grey; Pillow leaves the 12 bits of some TIFFs as they are."""
    bits = 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = int(image.tag_v2[_BITS_PER_SAMPLE][0])
    grey = np.asarray(image)
    upper = np.clip(grey >> (bits - 8), 0, 255).astype(np.uint8)
    if "transparency" in image.info:
        upper[grey == image.info["transparency"]] = 255
    return Image.fromarray(upper)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
