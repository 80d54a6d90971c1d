"""Local features of a shard: sets of them in files that are mapped into memory.

    offsets.bin       a header; int64 [n + 1], where the features of each image begin, and m
    descriptors.bin   float16 [m, d]
    locations.bin     float32 [m, 2]
    scales.bin        float32 [m]
    scores.bin        float32 [m]
    sizes.bin         int32 [n, 2]
    vectors.bin       float32 [n, g]; missing where no global descriptor comes with the features

They are the arrays of `descriptors.Local`, little-endian, row after row without gaps, so any program reads
them where they lie. The header has 64 bytes: 8 that name the kind, d and g as 32-bit numbers, n, the first
row and m as 64-bit numbers, and zeros.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Descriptors, Form, Local
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search.vectors import VectorSegment, norm_error
from ray_retrieval.storage import Folder, refusal

OFFSETS = "offsets.bin"
_HEADER, _MAGIC = struct.Struct("<8sIIQQQ24x"), b"RRLOCAL1"


class _Array(NamedTuple):
    """A file that holds one of the arrays of `Local`."""

    name: str
    file: str
    dtype: type[Any]


_OF_FEATURES = (
    _Array("data", "descriptors.bin", np.float16),
    _Array("locations", "locations.bin", np.float32),
    _Array("scales", "scales.bin", np.float32),
    _Array("scores", "scores.bin", np.float32),
)
_OF_IMAGES = (_Array("sizes", "sizes.bin", np.int32), _Array("vectors", "vectors.bin", np.float32))


def files_of(form: Form) -> tuple[str, ...]:
    """Names of the files that hold a shard's local features."""
    return (OFFSETS, *(array.file for array in _arrays(form)))


class LocalWriter:
    """Writes sets of local features, a few images at a time.

    Args:
        streams: one for each of the files that `files_of` names.
        form: of the features.
        first_row: number of the first image.

    Attributes:
        features: written so far.
        norm_error: of the global vectors so far, as `vectors.norm_error` has it; 0 without.
    """

    def __init__(self, streams: Mapping[str, IO[bytes]], form: Form, first_row: int) -> None:
        self.features, self.norm_error = 0, 0.0
        self._streams, self._form, self._first_row = streams, form, first_row
        self._ends = [np.zeros(1, np.int64)]

    def add(self, descriptors: Descriptors) -> None:
        """Append the sets of some images."""
        assert isinstance(descriptors, Local)
        for array in _arrays(self._form):
            values = np.ascontiguousarray(getattr(descriptors, array.name))
            self._streams[array.file].write(values.tobytes())
        if self._form.vectors and len(descriptors):
            self.norm_error = max(self.norm_error, norm_error(descriptors.vectors))
        self._ends.append(self.features + descriptors.offsets[1:])
        self.features += len(descriptors.data)

    def finish(self) -> None:
        """Write where the sets begin, which is known when all are there."""
        offsets = np.concatenate(self._ends)
        stream = self._streams[OFFSETS]
        stream.write(_header(self._form, len(offsets) - 1, self._first_row, self.features))
        stream.write(offsets.tobytes())


@dataclass(frozen=True)
class LocalSegment:
    """The local features of consecutive images.

    Attributes:
        local: the features; their arrays may be read-only memory-mapped files.
        first_row: row number of the first image.
        norm_error: of the global vectors, as `vectors.norm_error` has it.
    """

    local: Local
    first_row: int
    norm_error: float

    def __len__(self) -> int:
        """Number of images."""
        return len(self.local)

    def features(self, places: npt.NDArray[np.int64]) -> Local:
        """The sets of the images at some places, int64 [m], in the order asked, in memory."""
        return self.local.take(places)

    @property
    def vectors(self) -> VectorSegment:
        """The global vectors, to search."""
        return VectorSegment(self.local.vectors, self.first_row, self.norm_error)


def open_local(
    folder: Folder, form: Form, *, rows: int, first_row: int, features: int, norm_error: float
) -> LocalSegment:
    """Map the files that `LocalWriter` has written.

    Raises:
        ArtefactError: naming the file that is missing, or whose header or length is not that of these rows.
    """
    header = _header(form, rows, first_row, features)
    data = _mapped(folder, OFFSETS, np.uint8, (len(header) + 8 * (rows + 1),))
    if data[: len(header)].tobytes() != header:
        raise ArtefactError("its header is not that of the manifest", where=folder.uri_of(OFFSETS))
    widths = {"data": (form.size,), "locations": (2,), "sizes": (2,), "vectors": (form.vectors,)}
    arrays: dict[str, Any] = {"vectors": np.zeros((rows, 0), np.float32)}
    for array in _arrays(form):
        shape = (features if array in _OF_FEATURES else rows, *widths.get(array.name, ()))
        arrays[array.name] = _mapped(folder, array.file, array.dtype, shape)
    try:
        local = Local(offsets=data[len(header) :].view(np.int64), **arrays)
    except ArtefactError as error:
        raise ArtefactError(error.problem, where=folder.uri_of(OFFSETS)) from None
    return LocalSegment(local, first_row, norm_error)


def _arrays(form: Form) -> tuple[_Array, ...]:
    """What a shard stores beside the offsets."""
    return (*_OF_FEATURES, *(_OF_IMAGES if form.vectors else _OF_IMAGES[:1]))


def _mapped(folder: Folder, name: str, dtype: type[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A file as an array; one without a byte cannot be mapped, and need not be."""
    wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
    path = folder.local_path(name)
    try:
        if path.stat().st_size != wanted:
            raise ArtefactError("its length is not that of the manifest", where=folder.uri_of(name))
        if wanted == 0:
            return np.zeros(shape, dtype)
        return np.asarray(np.memmap(path, dtype, "r", shape=shape))
    except OSError as error:  # deleted just now
        raise refusal(error, folder.uri_of(name)) from error


def _header(form: Form, rows: int, first_row: int, features: int) -> bytes:
    return _HEADER.pack(_MAGIC, form.size, form.vectors, rows, first_row, features)
