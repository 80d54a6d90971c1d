"""Descriptors as arrays in NumPy's format, written some rows at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Descriptors, Form, Local
from ray_retrieval.storage import Folder

Add = Callable[[Descriptors], object]

SETS = {
    "data": "descriptors.npy",
    "locations": "locations.npy",
    "scales": "scales.npy",
    "scores": "scores.npy",
    "sizes": "sizes.npy",
    "vectors": "vectors.npy",
}
"""Files of the arrays of sets of local features; those of image i are the rows of most of them from
`offsets[i]` to `offsets[i + 1]`, see `descriptors.Local`."""
OFFSETS = "offsets.npy"


@contextmanager
def writing_array(folder: Folder, name: str, form: Form, rows: int) -> Iterator[Add]:
    """Take codes or vectors, which become an array in a file when the block ends.

    Args:
        folder: where it goes.
        name: of the file.
        form: of the descriptors.
        rows: how many will come.
    """
    like = form.zeros(0).data
    with folder.writing(name) as stream:
        _write_header(stream, like.dtype, (rows, like.shape[1]))
        yield lambda descriptors: stream.write(np.ascontiguousarray(descriptors.data).tobytes())


@contextmanager
def writing_arrays(folder: Folder, form: Form, images: int, features: int) -> Iterator[Add]:
    """Take sets of local features, which become arrays in files when the block ends.

    Args:
        folder: where they go.
        form: of the features.
        images: how many sets will come.
        features: how many features in all.
    """
    like = form.zeros(0)
    ends, counts = [np.zeros(1, np.int64)], {"sizes": images, "vectors": images}
    with ExitStack() as stack:
        streams = {}
        for array in files_of_sets(form):
            stream = streams[array] = stack.enter_context(folder.writing(SETS[array]))
            empty = getattr(like, array)
            _write_header(stream, empty.dtype, (counts.get(array, features), *empty.shape[1:]))

        def add(descriptors: Descriptors) -> None:
            assert isinstance(descriptors, Local)
            ends.append(ends[-1][-1] + descriptors.offsets[1:])
            for array, stream in streams.items():
                stream.write(np.ascontiguousarray(getattr(descriptors, array)).tobytes())

        yield add
    offsets = np.concatenate(ends)
    with folder.writing(OFFSETS) as stream:
        _write_header(stream, offsets.dtype, offsets.shape)
        stream.write(offsets.tobytes())


def files_of_sets(form: Form) -> list[str]:
    """The arrays of `Local` that are written beside the offsets."""
    return [array for array in SETS if array != "vectors" or form.vectors]


def _write_header(stream: IO[bytes], dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    header: dict[str, Any] = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(stream, header)
