"""Small copies of the index's images."""

import io
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from PIL import Image

from ray_retrieval.data.decode import decode

SMALLEST, LARGEST = 16, 1024
"""Bounds of a thumbnail's side in pixels."""


@dataclass(frozen=True)
class Thumbnail:
    """An encoded image.

    Attributes:
        data: the bytes of a PNG or JPEG file.
        media_type: which of the two it is.
        etag: stands for its content in HTTP caches.
    """

    data: bytes
    media_type: str
    etag: str


def shrink(image: bytes, size: int, *, etag: str) -> Thumbnail:
    """A copy of an image that fits a square of `size` pixels; the shape is kept and nothing is enlarged.

    An image that fits already is copied without loss. The copy holds pixels alone: no place, camera or
    comment, no colour profile, and nothing that a browser might run.

    Raises:
        DataError: if the image cannot be decoded.
    """
    # A JPEG may come at a part of its size, but at twice `size` still: so one that fits is the original.
    picture = decode(image, target=2 * size)
    fits = max(picture.size) <= size
    if not fits:
        picture.thumbnail((size, size), Image.Resampling.BICUBIC)
    picture.info.clear()  # Pillow would write parts of it into the copy.
    copy = io.BytesIO()
    if fits:
        picture.save(copy, "PNG", compress_level=3)
        return Thumbnail(copy.getvalue(), "image/png", etag)
    picture.save(copy, "JPEG", quality=88)
    return Thumbnail(copy.getvalue(), "image/jpeg", etag)


class ThumbnailCache:
    """The thumbnails used last, in bounded memory. Safe to share among threads.

    Args:
        capacity_bytes: total of the thumbnails' bytes; 0 keeps none.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._held = 0
        self._thumbnails: OrderedDict[Hashable, Thumbnail] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._thumbnails)

    def get(self, key: Hashable) -> Thumbnail | None:
        """The thumbnail under that key, which is now the last one to go."""
        with self._lock:
            found = self._thumbnails.get(key)
            if found is not None:
                self._thumbnails.move_to_end(key)
            return found

    def put(self, key: Hashable, thumbnail: Thumbnail) -> None:
        """Keep a thumbnail; those not used for longest go until all fit."""
        with self._lock:
            replaced = self._thumbnails.pop(key, None)
            self._held += len(thumbnail.data) - (0 if replaced is None else len(replaced.data))
            self._thumbnails[key] = thumbnail
            while self._held > self._capacity:
                _, dropped = self._thumbnails.popitem(last=False)
                self._held -= len(dropped.data)
