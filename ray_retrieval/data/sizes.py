"""Widths and heights of images that keep their proportions, in whole pixels."""

import math
from collections.abc import Sequence

from ray_retrieval.errors import DataError

_PROPORTIONS = (1.0, 4 / 5, 3 / 4, 2 / 3, 9 / 16, 1 / 2, 2 / 5, 1 / 3, 2 / 7, 1 / 4)
"""Of the shorter to the longer side: each is a bucket upright and lying, a square one. Neighbours are at most
a factor of 1.25 apart, so that an image is stretched by at most its root, 1.12."""


def inside(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is in a box, in whole pixels.

    Args:
        box: left, top, right, bottom in pixels.
        size: width and height of the upright image.

    Raises:
        DataError: if that is nothing, or the box is not four numbers.
    """
    try:
        left, top, right, bottom = box
        # Cut off before they are rounded, as no whole number is infinite.
        left, top = max(left, 0), max(top, 0)
        right, bottom = min(right, size[0]), min(bottom, size[1])
    except (TypeError, ValueError):
        raise DataError(
            f"a box is left, top, right, bottom in pixels, got {box!r}", mend="give four numbers"
        ) from None
    if left < right and top < bottom:  # so that NaN is refused
        whole = round(left), round(top), round(right), round(bottom)
        if whole[0] < whole[2] and whole[1] < whole[3]:
            return whole
    raise DataError(
        f"nothing of the image, {size[0]} × {size[1]}, is in the box {list(box)}",
        mend="mend the box, or leave the image out",
    )


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height, of the same proportions, whose longer one is at most `side`; as Pillow's thumbnail.

    The shorter side is rounded to the number of pixels whose proportion is nearest.
    """
    width, height = size
    if max(size) <= side:
        return size
    proportion = width / height
    if proportion <= 1:
        exact = side * proportion
        return max(1, min(int(exact), math.ceil(exact), key=lambda n: abs(proportion - n / side))), side
    exact = side / proportion
    # Zero pixels count as the nearest there, and become one.
    nearest = min(int(exact), math.ceil(exact), key=lambda n: abs(proportion - side / n) if n else 0)
    return side, max(1, nearest)


def bucket(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height, of the nearest proportions in `_PROPORTIONS`, or the image's own beyond the last.

    The longer side is `side`, or, of a smaller image, its own in whole multiples of 32 pixels.
    """
    longer, shorter = max(size), min(size)
    proportion = shorter / longer
    if proportion > _PROPORTIONS[-1]:
        proportion = min(_PROPORTIONS, key=lambda one: abs(math.log(proportion / one)))
    if longer < side:
        side = max(longer // 32 * 32, min(longer, 32))
    other = max(1, round(side * proportion))
    return (side, other) if size[0] >= size[1] else (other, side)
