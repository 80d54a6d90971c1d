"""Files of descriptors that other programs wrote, read some rows at a time.

    .npy                      an array [n, width], mapped into memory
    .npz                      an array [n, width] among others; those of one value a row are columns; for
                              small data: it is unpacked from its beginning for each shard
    .parquet                  a column of lists of numbers, or of bytes; the others are columns
    .arrow .feather .ipc      the same, in Arrow's file format
    .faiss .index             what an index of FAISS holds, see `faiss_files`

Bytes (uint8) are packed codes, floating-point numbers are vectors. Whether the values are what an index can
hold is looked at by `importing`.
"""

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_retrieval.errors import DataError
from ray_retrieval.search.column_values import Shape
from ray_retrieval.storage import Folder, digest, fingerprint, split_query

Block = tuple[npt.NDArray[Any], pa.Table]
"""The descriptors of some rows, [b, width], and what else the file says of them, b rows."""

TABLES = (".parquet", ".arrow", ".feather", ".ipc")
FAISS = (".faiss", ".index")
SUFFIXES = (".npy", ".npz", *TABLES, *FAISS)

_NPY = b"\x93NUMPY"
"""How a file of NumPy begins."""

_BLOCK_BYTES, BLOCK_ROWS = 1 << 24, 1 << 16


class VectorFile(Protocol):
    """Descriptors in a file, and what it says of them.

    Attributes:
        where: the file, for errors.
        rows: how many.
        shape: of one descriptor.
        schema: types of the other columns.
        model: fingerprint of the model that made the descriptors, where the file says so.
        class_names: of the classes that labels count in, where the file says so.
    """

    where: str
    rows: int
    shape: Shape
    schema: pa.Schema
    model: str | None
    class_names: list[str] | None

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """The rows from one place to another, in order."""
        ...

    def column(self, name: str) -> Iterator[pa.Array]:
        """One of the other columns: its values of all rows, in order, some at a time."""
        ...

    def checksum(self) -> str:
        """Stands for the content."""
        ...


def bare(rows: int) -> pa.Table:
    """A table of so many rows without any column."""
    return pa.Table.from_batches([pa.RecordBatch.from_struct_array(pa.array([{}] * rows, pa.struct([])))])


def split(place: str | Path) -> tuple[Folder, str]:
    """The folder that a file lies in, and its name there."""
    whole = Folder(place)
    return whole.parent, whole.path.rpartition("/")[2]


def suffix_of(place: str) -> str:
    """How the name of a file ends, such as `.npy`, in small letters; a URI's options are no part of it."""
    return Path(split_query(place)[0]).suffix.lower()


def is_folder(place: str) -> bool:
    """Whether there is a folder, rather than a file or nothing."""
    folder = Folder(place)
    return folder.is_local and os.path.isdir(folder.path)


def absolute(place: str) -> str:
    """A path or URI for another process, which may stand in another folder."""
    return Folder(place).uri


def lines_of(data: bytes) -> list[str]:
    """The lines of a text file, as an editor shows them: without a mark of the byte order at the start.

    Raises:
        UnicodeDecodeError: if it is no UTF-8.
    """
    lines = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def block_rows(width_bytes: int) -> int:
    """Rows that are read at a time."""
    return max(1, min(BLOCK_ROWS, _BLOCK_BYTES // max(1, width_bytes)))


class ArrayFile:
    """An array: in memory, or a `.npy` file that is mapped into it.

    Args:
        array: [n, width].
        where: the file.

    Raises:
        DataError: if the array has another number of axes, or holds what is no number.
    """

    model: str | None = None
    class_names: list[str] | None = None

    def __init__(self, array: npt.NDArray[Any], where: str) -> None:
        self._array, self.where, self._mapped = array, where, False
        self.shape, self.schema = _shape_of_array(array.dtype, array.shape, where), pa.schema([])
        self.rows = len(array)

    @classmethod
    def open(cls, place: str) -> "ArrayFile":
        """The `.npy` file at a path or URI.

        Raises:
            ArtefactError: if it is missing.
            DataError: if it is no such file.
        """
        folder, name = split(place)
        with readable(place, ValueError, EOFError):
            file = cls(load_npy(folder.local_path(name), place, mapped=True), place)
        file._mapped = True
        return file

    def __reduce__(self) -> Any:
        """In another process the file is mapped anew."""
        if self._mapped:
            return ArrayFile.open, (absolute(self.where),)
        return ArrayFile, (np.asarray(self._array), self.where)

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        step = block_rows(self.shape.bytes)
        for cut in range(start, stop, step):
            some = np.ascontiguousarray(self._array[cut : min(cut + step, stop)])
            yield some, bare(len(some))

    def column(self, name: str) -> Iterator[pa.Array]:
        raise KeyError(name)

    def checksum(self) -> str:
        return fingerprint([digest(some.tobytes()) for some, _ in self.blocks(0, self.rows)])


class NpzFile:
    """An array among those of a `.npz` file, which is unpacked from its beginning for each shard.

    Args:
        place: a path or URI.
        column: name of the array; None: the only one of two axes.

    Raises:
        ArtefactError: if the file is missing.
        DataError: if it is no such file, or it is not clear which array is meant.
    """

    model: str | None = None
    class_names: list[str] | None = None

    def __init__(self, place: str, column: str | None) -> None:
        folder, name = split(place)
        self.where, self._path = place, folder.local_path(name)
        errors = (zipfile.BadZipFile, ValueError, EOFError, pa.ArrowException)
        with readable(place, *errors), zipfile.ZipFile(self._path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            heads = {name: self._head(archive, name) for name in names}
            wide = [name for name, (shape, _) in heads.items() if len(shape) == 2]
            self._name = chosen(column, names, wide, place)
            shape, dtype = heads[self._name]
            self.shape, self.rows = _shape_of_array(dtype, shape, place), shape[0]
            columns = [name for name, (shape, _) in heads.items() if shape == (self.rows,)]
            arrays = {name: pa.array(self._whole(archive, name)) for name in columns}
        self._known = pa.table(arrays) if arrays else bare(self.rows)
        self.schema = self._known.schema

    def __reduce__(self) -> Any:
        """In another process the file is opened anew."""
        return NpzFile, (absolute(self.where), self._name)

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        step, width = block_rows(self.shape.bytes), self.shape.bytes
        with zipfile.ZipFile(self._path) as archive, self._stream(archive, self._name) as stream:
            _, dtype = _array_header(stream, self.where)
            stream.seek(stream.tell() + start * width)
            for cut in range(start, stop, step):
                count = min(step, stop - cut)
                with readable(self.where, zipfile.BadZipFile, ValueError):
                    some = np.frombuffer(stream.read(count * width), dtype).reshape(count, -1)
                yield some, self._known.slice(cut, count)

    def column(self, name: str) -> Iterator[pa.Array]:
        return iter(self._known[name].chunks)

    def checksum(self) -> str:
        folder, name = split(self._path)
        return fingerprint([folder.checksum(name), self._name])

    def _stream(self, archive: zipfile.ZipFile, name: str) -> IO[bytes]:
        return archive.open(f"{name}.npy")

    def _head(self, archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        with self._stream(archive, name) as stream:
            return _array_header(stream, f"{self.where}, {name}")

    def _whole(self, archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
        with self._stream(archive, name) as stream:
            array = np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
        return array.astype(array.dtype.newbyteorder("="), copy=False)


def load_npy(path: Path, where: str, *, mapped: bool = False) -> npt.NDArray[Any]:
    """The array of a `.npy` file, mapped into memory or read.

    Args:
        path: of the file.
        where: what errors call it.
        mapped: rather than read.

    Raises:
        DataError: if it is not in NumPy's format, or holds pickled objects.
        ValueError: if it is damaged; EOFError if it is empty after its header.
    """
    with path.open("rb") as stream:
        _numbers_header(stream, where, "numpy.save")
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    return array


def chosen(asked: str | None, names: Sequence[str], fitting: Sequence[str], where: str) -> str:
    """The array or column that holds the descriptors.

    Args:
        asked: the one that is named; None: the only fitting one.
        names: of all there are.
        fitting: of those that may hold descriptors.
        where: the file, for errors.

    Raises:
        DataError: if the one that is named is not there; or if none is named, and not just one is fitting.
    """
    listed = ", ".join(names) or "none"
    if asked is not None:
        if asked not in names:
            raise DataError(
                f"no column '{asked}'; there are: {listed}", where=where, mend="name one of them as `column`"
            )
        return asked
    if len(fitting) != 1:
        found = f"{len(fitting)} columns may hold the descriptors: {', '.join(fitting)}"
        raise DataError(
            found if fitting else f"no column holds descriptors; there are: {listed}",
            where=where,
            mend="name the one that is meant as `column`",
        )
    return fitting[0]


def _shape_of_array(dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> Shape:
    if len(shape) != 2 or shape[1] == 0:
        raise DataError(
            f"descriptors are an array [rows, width], got {list(shape)}", where=where, mend="give one a row"
        )
    if dtype != np.uint8 and not np.issubdtype(dtype, np.floating):
        raise DataError(
            f"codes are packed bytes (uint8), vectors floating-point numbers, got {dtype}",
            where=where,
            mend="convert them; numpy.packbits(bits, axis=1) packs codes",
        )
    return Shape(np.dtype(dtype), shape[1], None)


def _array_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in NumPy's format; the stream then stands at its first byte."""
    shape, columns_first, dtype = _numbers_header(stream, where, "numpy.savez")
    if columns_first and len(shape) > 1:
        raise DataError(
            "an array that lies column after column", where=where, mend="save numpy.ascontiguousarray of it"
        )
    return shape, dtype


def _numbers_header(
    stream: IO[bytes], where: str, saved_by: str
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it lies column after column, and type of an array in NumPy's format.

    Looked at before NumPy opens the file, as NumPy offers to unpickle what it does not know.

    Raises:
        DataError: if it is not in that format, or holds pickled objects.
        ValueError: if it is damaged.
    """
    start = stream.read(np.lib.format.MAGIC_LEN)
    read = {b"\1\0": np.lib.format.read_array_header_1_0, b"\2\0": np.lib.format.read_array_header_2_0}
    prefix, version = start[: len(_NPY)], start[len(_NPY) :]
    if prefix != _NPY or version not in read:
        problem = "it is not in NumPy's format" if prefix != _NPY else f"an array of format {tuple(version)}"
        raise DataError(problem, where=where, mend=f"save it with {saved_by}")
    shape, columns_first, dtype = read[version](stream)
    if dtype.hasobject:
        raise DataError("it holds Python objects", where=where, mend="save it as numbers or text")
    return shape, columns_first, dtype


@contextmanager
def readable(where: str, *errors: type[Exception]) -> Iterator[None]:
    """Say which file cannot be read.

    Raises:
        DataError: in place of the given errors.
    """
    try:
        yield
    except errors as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot be read: {reason}", where=where, mend="save it again") from None
