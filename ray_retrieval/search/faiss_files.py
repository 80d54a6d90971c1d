"""What indices of FAISS hold, read back some rows at a time.

Flat indices are mapped into memory. Of one that divides its rows into cells (IVF) the rows come in the order
of their ids. What an index holds compressed comes back as FAISS decodes it: near what went in, not equal.
A refined index gives the vectors that it refines by, a graph (HNSW) those that it stands on. Ids that an
index has been given, by an IDMap or IVF, are the rows' ids; else the rows have none but their numbers.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss as untyped_faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_retrieval.errors import DataError
from ray_retrieval.search.column_values import Shape
from ray_retrieval.search.vector_files import Block, absolute, bare, block_rows, split
from ray_retrieval.storage import fingerprint

faiss: Any = untyped_faiss  # Its own types leave out half of what is there.

Rows = npt.NDArray[np.int64]

_MEND = "give a flat index, or the vectors themselves"


class FaissFile:
    """The rows of an index of FAISS.

    Args:
        place: a path or URI.

    Raises:
        ArtefactError: if the file is missing.
        DataError: if it is no index of FAISS, or one that does not give back its rows.
    """

    model: str | None = None
    class_names: list[str] | None = None

    def __init__(self, place: str) -> None:
        self.where = place
        folder, name = split(place)
        path = folder.local_path(name)
        with open(path, "rb") as file:
            self._binary = file.read(2) == b"IB"
        with _reading(place):
            read = faiss.read_index_binary if self._binary else faiss.read_index
            self._opened = read(str(path), faiss.IO_FLAG_MMAP_IFC)
            self._index, ids = _unwrapped(self._opened)
            cells = _cells_of(self._index)
            ids_of_cells = None if cells is None else _ids_of_cells(cells)
            # Numbers by which the index knows its rows; None: 0, 1, 2 and so on.
            self._keys = None if ids_of_cells is None else np.sort(np.concatenate(ids_of_cells))
            self._places: _Places | None = None
            if ids_of_cells is not None and self._binary:
                self._places = _Places(cells.invlists, ids_of_cells, self._index.code_size)
            elif self._keys is not None:
                _restore_quantiser(cells)
                kind = faiss.DirectMap.Array if _in_order(self._keys) else faiss.DirectMap.Hashtable
                cells.set_direct_map_type(kind)
        self.rows = int(self._index.ntotal)
        if self._keys is not None and len(self._keys) != self.rows:  # of a kind that holds equal rows once
            raise DataError(
                f"its cells hold {len(self._keys):,} of its {self.rows:,} rows", where=place, mend=_MEND
            )
        own = ids
        if own is None and self._keys is not None and not _in_order(self._keys):
            own = self._keys
        self._known = bare(self.rows) if own is None else pa.table({"id": pa.array(own)})
        self.schema = self._known.schema
        width = self._index.d // 8 if self._binary else self._index.d
        self.shape = Shape(np.dtype(np.uint8 if self._binary else np.float32), width, None)

    def __reduce__(self) -> Any:
        """In another process the file is mapped anew."""
        return FaissFile, (absolute(self.where),)

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        step = block_rows(self.shape.bytes)
        for cut in range(start, stop, step):
            count = min(step, stop - cut)
            with _reading(self.where):
                yield self._rows(cut, count), self._known.slice(cut, count)

    def column(self, name: str) -> Iterator[pa.Array]:
        return iter(self._known[name].chunks)

    def checksum(self) -> str:
        folder, name = split(self.where)
        return fingerprint([folder.checksum(name)])

    def _rows(self, first: int, count: int) -> npt.NDArray[Any]:
        """Called past the methods for arrays, which other packages replace by some for torch's tensors."""
        found = np.empty((count, self.shape.width), self.shape.dtype)
        if self._keys is None:
            self._index.reconstruct_n_c(first, count, faiss.swig_ptr(found))
            return found
        if self._places is not None:
            return self._places.codes(first, count)
        keys = np.ascontiguousarray(self._keys[first : first + count])
        self._index.reconstruct_batch_c(count, faiss.swig_ptr(keys), faiss.swig_ptr(found))
        return found


class _Places:
    """Where the codes of a binary index with cells lie, of which FAISS itself gives back one a call.

    Args:
        lists: of the cells.
        ids: of the rows in each cell.
        width: bytes of a code.
    """

    def __init__(self, lists: Any, ids: list[Rows], width: int) -> None:
        self._lists, self._width = lists, width
        sizes = [len(some) for some in ids]
        order = np.argsort(np.concatenate(ids), kind="stable")
        # In the order of their ids: cell of each row, and place there.
        self._cells = np.repeat(np.arange(len(ids), dtype=np.int32), sizes)[order]
        starts = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
        self._at = (np.arange(len(order)) - starts)[order]

    def codes(self, first: int, count: int) -> npt.NDArray[np.uint8]:
        """uint8 [count, width]: of the rows from one place on, in the order of their ids."""
        cells, places = self._cells[first : first + count], self._at[first : first + count]
        by_cell = np.argsort(cells, kind="stable")
        bounds = np.flatnonzero(np.diff(cells[by_cell])) + 1
        found = np.empty((count, self._width), np.uint8)
        for rows in np.split(by_cell, bounds):
            number = int(cells[rows[0]])
            pointer = self._lists.get_codes(number)
            held = faiss.rev_swig_ptr(pointer, self._lists.list_size(number) * self._width)
            found[rows] = held.reshape(-1, self._width)[places[rows]]
            self._lists.release_codes(number, pointer)
        return found


def _unwrapped(index: Any) -> tuple[Any, Rows | None]:
    """The index that holds the rows, and the ids that it was given for them."""
    binary = isinstance(index, faiss.IndexBinary)
    index = faiss.downcast_IndexBinary(index) if binary else faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap | faiss.IndexBinaryIDMap):
        return _unwrapped(index.index)[0], faiss.vector_to_array(index.id_map)
    if isinstance(index, faiss.IndexRefine):
        return _unwrapped(index.refine_index)
    if isinstance(index, faiss.IndexHNSW | faiss.IndexBinaryHNSW):
        return _unwrapped(index.storage)
    return index, None


def _cells_of(index: Any) -> Any:
    """What divides an index into cells; None of others."""
    if isinstance(index, faiss.IndexBinary):
        return index if isinstance(index, faiss.IndexBinaryIVF) else None
    return faiss.try_extract_index_ivf(index)


def _restore_quantiser(cells: Any) -> None:
    """Tell cells of 4-bit codes what decodes them, without which FAISS's releases that forget it crash."""
    cells = faiss.downcast_index(cells)
    own = getattr(cells, "pq", None) or getattr(cells, "aq", None)
    if own is not None and getattr(cells, "fine_quantizer", own) is None:
        cells.fine_quantizer = own


def _ids_of_cells(cells: Any) -> list[Rows]:
    lists = cells.invlists
    return [_ids_of_cell(lists, number) for number in range(lists.nlist)]


def _in_order(keys: Rows) -> bool:
    """Whether they are 0, 1, 2 and so on, as ids are unless somebody has given others."""
    return bool(np.array_equal(keys, np.arange(len(keys))))


def _ids_of_cell(lists: Any, number: int) -> Rows:
    size = lists.list_size(number)
    if size == 0:
        return np.zeros(0, np.int64)
    pointer = lists.get_ids(number)
    ids: Rows = faiss.rev_swig_ptr(pointer, size).copy()
    lists.release_ids(number, pointer)
    return ids


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # After the signature and the line in FAISS's sources; and all of it is one line.
        reason = re.sub(r"^Error in .*?\.\w+:\d+: ", "", " ".join(str(error).split()))[-160:]
        raise DataError(
            f"FAISS does not read it, or not its rows: {reason}",
            where=where,
            mend=_MEND,
        ) from None
