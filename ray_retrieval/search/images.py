"""Images that an index refers to by path, wherever they lie."""

import pyarrow as pa
from pyarrow import fs

from ray_retrieval.errors import ArtefactError, StoreError
from ray_retrieval.storage import byte_range, is_remote, is_uri, store_at

_LOCAL = fs.LocalFileSystem()


def fetch_image(path: str) -> bytes | None:
    """The bytes of an image, which may be a part of a file; None where it is not there, or not for us.

    Args:
        path: a local path or a URI; see `storage.byte_range`.

    Raises:
        StoreError: if it lies in a store that does not answer.
    """
    file, first, length = byte_range(path)
    try:
        filesystem, inner = _at(file)
        with filesystem.open_input_file(inner) as source:
            if length is None:
                return bytes(source.read())
            return bytes(source.read_at(length, first)) if first + length <= source.size() else None
    except (FileNotFoundError, PermissionError):
        return None
    except (pa.ArrowException, OSError, ArtefactError) as error:
        if is_remote(file) and "ACCESS_DENIED" not in str(error):  # as S3 may say of a file that is missing
            raise StoreError(f"cannot be read: {error}", where=file) from None
        return None


def read_image(path: str) -> bytes | None:
    """`fetch_image`, where None says too that a store does not give it."""
    try:
        return fetch_image(path)
    except StoreError:
        return None


def image_length(path: str) -> int | None:
    """The length of an image in bytes, without reading it; None where it is not there."""
    file, _, length = byte_range(path)
    if length is not None:
        return length
    try:
        filesystem, inner = _at(file)
        info = filesystem.get_file_info(inner)
    except (pa.ArrowException, OSError, ArtefactError):
        return None
    return int(info.size) if info.type == fs.FileType.File else None


def _at(file: str) -> tuple[fs.FileSystem, str]:
    return store_at(file) if is_uri(file) else (_LOCAL, file)
