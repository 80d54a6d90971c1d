"""Decoded images by row number: by a pool of threads, from memory where they fit, ahead of their use."""

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ray_retrieval.cores import readers
from ray_retrieval.data.decode import decode, jpeg_size, upright_size
from ray_retrieval.data.mining import shares_by_pixels
from ray_retrieval.data.mixed import Images, MixedImages
from ray_retrieval.data.sizes import inside
from ray_retrieval.data.table import ImageTable, IntArray
from ray_retrieval.data.transforms import Preprocessing, decode_target, prepare, prepared_shape
from ray_retrieval.errors import DataError, StoreError
from ray_retrieval.storage import Folder, is_uri

Result = TypeVar("Result")
_NOTHING = np.empty((3, 0, 0), np.uint8)
_HEAD = 1 << 16  # bytes of a JPEG in which its size and orientation nearly always are
Rows = npt.NDArray[np.integer[Any]] | Sequence[int] | Tensor


@dataclass(frozen=True)
class ImageError:
    """An image that cannot be decoded: its row, its id and why."""

    row: int
    id: str
    reason: str


class ImageSource:
    """The decoded images of a table, by row.

    Args:
        table: the images.
        preprocessing: how they become pixels.
        memory_bytes: where all decoded images fit in this many bytes, each is decoded once, at its first use,
            and kept; else they are decoded each time.
        threads: decoders at work. PIL works outside Python's global lock, so threads suffice.

    Close it, or use it in a `with` block, to end its threads.
    """

    def __init__(
        self, table: ImageTable, preprocessing: Preprocessing, *, memory_bytes: int, threads: int
    ) -> None:
        self.table = table
        self.preprocessing = preprocessing
        # Of images with proportions of their own, what the largest may take.
        self._shape = (3, preprocessing.size, preprocessing.size)
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        self._memory: npt.NDArray[np.uint8] | list[npt.NDArray[np.uint8]] | None = None
        if len(table) * math.prod(self._shape) <= memory_bytes:
            # The system hands out pages as they are written: nothing is taken before it is used. And a numpy
            # array, as torch would wake all its threads for the copy of every single image.
            empty = np.empty((len(table), *self._shape), dtype=np.uint8) if preprocessing.square else None
            self._memory = [_NOTHING] * len(table) if empty is None else empty
        # A row is marked after its pixels are written; two threads that decode the same row write the same.
        self._filled = np.zeros(len(table), dtype=np.bool_)
        self._shapes = np.zeros((len(table), 2), dtype=np.int64)  # height and width, once they are known

    def __enter__(self) -> "ImageSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding threads, after what they are at."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def cached(self) -> bool:
        """Whether decoded images stay in memory."""
        return self._memory is not None

    def batch(self, rows: Rows) -> Images:
        """uint8 [n, 3, size, size]: the images of some rows, in the order given; mixed unless all are square.

        Raises:
            DataError: naming the image, if one is missing or cannot be decoded.
        """
        index = np.asarray(rows, dtype=np.int64)
        if self._memory is None:
            return self._decoded(index)
        missing = np.unique(index[~self._filled[index]])
        self._each(missing, lambda row: self._named(row, self._fill_row))
        if isinstance(self._memory, list):
            return MixedImages([self._memory[row] for row in index.tolist()])
        return torch.from_numpy(self._memory[index])

    def shares(self, rows: Rows, count: int) -> list[IntArray]:
        """Places in `rows` for each of `count` workers, of nearly equally many pixels.

        Squares stay in their order, and so does what one worker does alone. For several workers, images of
        several sizes are sorted by size. What has not been decoded yet is measured for that, once: by its
        header where it is a JPEG, else by the whole file. The result depends on the images alone.

        Raises:
            DataError: naming the image, if one is missing or is none.
        """
        if self.preprocessing.square or count == 1:
            return np.array_split(np.arange(len(rows)), count)
        index = np.asarray(rows, dtype=np.int64)
        missing = np.unique(index[self._shapes[index, 0] == 0])
        threads = self._readers if len(missing) else 1
        with ThreadPoolExecutor(threads, thread_name_prefix="measure") as pool:
            _in_pieces(pool, threads, missing, lambda row: self._named(row, self._measure))
        return shares_by_pixels(self._shapes[index], count)

    @functools.cached_property
    def _readers(self) -> int:
        return _readers_of(self.table, self._threads)

    def _measure(self, row: int) -> None:
        box = self.table.box(row)
        target = decode_target(self.preprocessing, box)
        head = self.table.image_bytes(row, _HEAD)
        size = jpeg_size(head, target=target)
        if size is None:
            # An image that lies in the table is whole already.
            data = head if len(head) != _HEAD + 1 else self.table.image_bytes(row)
            size = upright_size(data, target=target)
        self._shapes[row] = prepared_shape(size, self.preprocessing, box)

    def stream(self, batches: Iterable[Rows], ahead: int = 2) -> Generator[Images, None, None]:
        """`batch` of each, in order, with the next `ahead` decoded while the caller works.

        Ending early (by `break` or `close()`) stops the work behind; an error comes out at its batch's turn.
        """
        pending: deque[Future[Images]] = deque()
        remaining = iter(batches)
        worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            for rows in itertools.islice(remaining, max(1, ahead)):
                pending.append(worker.submit(self.batch, rows))
            while pending:
                ready = pending.popleft().result()
                for rows in itertools.islice(remaining, 1):
                    pending.append(worker.submit(self.batch, rows))
                yield ready
        finally:
            worker.shutdown(wait=True, cancel_futures=True)

    def _decoded(self, index: IntArray) -> Images:
        if not self.preprocessing.square:
            mixed = [_NOTHING] * len(index)

            def decode_one(position: int) -> None:
                mixed[position] = self._named(int(index[position]), self._prepared)

            self._each(np.arange(len(index)), decode_one)
            return MixedImages(mixed)
        images = torch.empty((len(index), *self._shape), dtype=torch.uint8)
        pixels = images.numpy()

        def decode_at(position: int) -> None:
            pixels[position] = self._named(int(index[position]), self._prepared)

        self._each(np.arange(len(index)), decode_at)
        return images

    def _fill_row(self, row: int) -> None:
        assert self._memory is not None
        if not self._filled[row]:
            self._memory[row] = self._prepared(row)
            self._filled[row] = True

    def _named(self, row: int, work: Callable[[int], Result]) -> Result:
        try:
            return work(row)
        except DataError as error:
            raise type(error)(
                error.problem,
                where=f"{self.table.name}, image '{self.table.ids[row]}' (row {row})",
                mend=error.mend or "put a sound file there, or leave the image out",
            ) from None

    def _prepared(self, row: int) -> npt.NDArray[np.uint8]:
        pixels = prepare(self.table.image_bytes(row), self.preprocessing, self.table.box(row))
        self._shapes[row] = pixels.shape[1:]
        return pixels

    def _each(self, items: IntArray, work: Callable[[int], object]) -> None:
        _in_pieces(self._pool, self._threads, items, work)


def _readers_of(table: ImageTable, threads: int) -> int:
    """Threads to look at images with, where so many decode: more of those in a store, which wait for it."""
    stored = any(is_uri(path) for path in table.paths if path is not None)
    return max(threads, readers(from_a_store=True)) if stored else max(1, threads)


def check_images(
    table: ImageTable, threads: int, progress: Callable[[int], None] | None = None
) -> list[ImageError]:
    """Decode every image once and return those that cannot be, or lie outside of their box, with the reason.

    JPEGs are decoded at an eighth of their size, which reads the whole file all the same. Nothing is raised
    for what an image holds or lacks.

    Args:
        table: the images.
        threads: decoders at work; more where images are in a store, as these wait for it.
        progress: called with the number of images seen so far.

    Returns:
        Them, by row.

    Raises:
        DataError: if one of the table's boxes is none.
    """

    def decode_row(row: int) -> None:
        data, box = table.image_bytes(row), table.box(row)
        decode(data, target=1)
        if box is not None:
            inside(box, upright_size(data))

    def attempt(rows: list[int]) -> list[ImageError]:
        errors = []
        for row in rows:
            try:
                decode_row(row)
            except StoreError:
                raise
            except DataError as error:
                errors.append(ImageError(row, table.id_column[row].as_py(), error.problem))
        return errors

    if len(table):
        table.box(0)  # A column of boxes that are none is a fault of the table, and not of each image.
    threads = _readers_of(table, threads)
    # Small pieces, so that progress moves; at most a thousand, so that handing them out costs nothing.
    pieces = np.array_split(np.arange(len(table)), min(len(table), max(4 * threads, 1000)) or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="check") as pool:
        futures = [pool.submit(attempt, piece.tolist()) for piece in pieces]
        found, seen = [], 0
        try:
            for future, piece in zip(futures, pieces, strict=True):
                found += future.result()
                seen += len(piece)
                if progress is not None:
                    progress(seen)
        finally:
            for future in futures:
                future.cancel()
        return found


_ERRORS_SCHEMA = pa.schema([("row", pa.int64()), ("id", pa.string()), ("reason", pa.string())])


def write_errors(folder: Folder, errors: Sequence[ImageError], name: str) -> None:
    """Write images that cannot be decoded as a Parquet file of row, id and reason; none give an empty one."""
    rows = [{"row": error.row, "id": error.id, "reason": error.reason} for error in errors]
    with folder.writing(name) as stream:
        pq.write_table(pa.Table.from_pylist(rows, schema=_ERRORS_SCHEMA), stream)


def read_errors(folder: Folder, name: str) -> list[ImageError]:
    """What `write_errors` wrote.

    Raises:
        ArtefactError: if the file is missing.
    """
    with folder.reading(name) as source:
        table = pq.read_table(source)
    return [ImageError(**row) for row in table.select(["row", "id", "reason"]).to_pylist()]


def _in_pieces(
    pool: ThreadPoolExecutor, threads: int, items: IntArray, work: Callable[[int], object]
) -> None:
    """Do the work for every item on a pool, in a few pieces a thread; the first error comes out."""
    if threads == 1 or len(items) < 2:
        _do_all(work, items.tolist())
        return
    pieces = np.array_split(items, min(len(items), 4 * threads))
    futures = [pool.submit(_do_all, work, piece.tolist()) for piece in pieces]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()


def _do_all(work: Callable[[int], object], items: Iterable[int]) -> None:
    for item in items:
        work(item)
