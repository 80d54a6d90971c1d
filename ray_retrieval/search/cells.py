"""Approximate search over binary codes: codes near each other lie in one cell, and near cells are looked at.

A cell's centre is a code too: k-means over a sample, rounded to bits. A code belongs to the cell whose centre
is nearest to it by the Hamming distance, the lower number first. Each shard has a file of its own in which
its codes lie cell after cell, with the number of the row of each. A search looks at the `nprobe` cells whose
centres are nearest to the query, and at all codes in them: distances are exact, hits are sorted by
(distance, row), and a near row is missed where its cell is not among those. As all shards have the same
centres, a database has the same hits however it is cut into shards.

    header      64 bytes, little-endian: 8 bytes that name the kind, bits and bytes of a row as 32-bit
                numbers, rows and cells as 64-bit numbers, and zeros
    centres     64-bit words, as codes are held in `segments`
    offsets     int64 [cells + 1]: where each cell begins
    rows        uint32 [rows], filled up to a multiple of 8 bytes: places in the shard, ascending in a cell
    words       64-bit words of the codes, cell after cell, and of 64 more that are zero

The file is mapped into memory: 8 bytes a word and 4 a row, none of them private.
"""

import itertools
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes
from ray_retrieval.errors import ArtefactError, RecipeError
from ray_retrieval.search.cell_kernels import BLOCK_ROWS, assign, search_cells
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.faiss_index import check_sample, faiss, one_faiss_thread
from ray_retrieval.search.hits import Hits, check_k, merge, no_hits
from ray_retrieval.search.scan import (
    Segment,
    Words,
    query_words,
    scan_segments,
    to_words,
    words_per_row,
)
from ray_retrieval.search.selection import Bits

_HEADER = struct.Struct("<8sIIQQ32x")
_MAGIC = b"RRCELLS1"
_FACTORY = re.compile(r"BIVF([1-9]\d{0,6})")
_ROWS_AT_ONCE = 1 << 16


class _Cells(NamedTuple):
    """What a file holds.

    bits: of a code.
    centres: uint64 [cells, w].
    offsets: int64 [cells + 1].
    rows: uint32 [n].
    words: uint64 [(n + 64) * w].
    """

    bits: int
    centres: Words
    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.uint32]
    words: Words


def cells_in(factory: str) -> int:
    """Number of cells that a factory string for codes asks for: `BIVF1024`.

    Raises:
        RecipeError: if it is another one.
    """
    found = _FACTORY.fullmatch(factory)
    if found is None:
        raise RecipeError(
            f"'{factory}' is no search of codes",
            where="search",
            mend="search codes exactly, by 'auto', or in cells: BIVF1024 has 1,024 of them",
        )
    return int(found[1])


def train(factory: str, sample: Codes, seed: int) -> bytes:
    """The file of no rows: centres of cells, the same for the same arguments.

    Args:
        factory: such as `BIVF1024`.
        sample: codes drawn from the whole database.
        seed: of the order in which the sample is seen.

    Raises:
        RecipeError: if the factory string is another one, or needs a larger sample.
    """
    cells, count = cells_in(factory), len(sample.data)
    check_sample(factory, cells, count)
    shuffled = np.ascontiguousarray(sample.data[np.random.default_rng(seed).permutation(count)])
    index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(8 * shuffled.shape[1]), 8 * shuffled.shape[1], cells)
    index.cp.min_points_per_centroid = 1
    with one_faiss_thread():
        index.train(shuffled)
    centres = faiss.vector_to_array(faiss.downcast_IndexBinary(index.quantizer).xb).reshape(cells, -1)
    nothing = Segment(to_words(sample.data[:0], sample.bits))
    parts = _parts(sample.bits, to_words(centres, sample.bits), np.zeros(0, np.uint32), nothing)
    return b"".join(parts)


def fill(trained: bytes, segment: Segment, write: Callable[[bytes], object]) -> None:
    """Write the file of one shard; the same for the same arguments. It takes about 12 bytes of memory a row.

    Args:
        trained: by `train`.
        segment: the shard's codes; hits are places in it.
        write: takes the next bytes of the file.
    """
    known = _parsed(np.frombuffer(trained, np.uint8), "what was trained")
    columns = np.ascontiguousarray(known.centres.T)
    cells = np.empty(len(segment.words), np.uint32)
    for start in range(0, len(cells), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        assign(segment.words[some], columns, cells[some])
    for part in _parts(known.bits, known.centres, cells, segment):
        write(part)


def _parts(bits: int, centres: Words, cells: npt.NDArray[np.uint32], segment: Segment) -> Iterator[bytes]:
    """A file, some bytes at a time, of codes whose cells are known."""
    count = len(cells)
    narrow = cells.astype(np.uint16) if len(centres) <= 1 << 16 else cells  # sorted in linear time
    order = np.argsort(narrow, kind="stable").astype(np.uint32)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=len(centres)))]).astype(np.int64)
    yield _HEADER.pack(_MAGIC, bits, 8 * centres.shape[1], count, len(centres))
    yield centres.tobytes()
    yield offsets.tobytes()
    yield order.tobytes() + bytes(4 * (count % 2))
    for start in range(0, count, _ROWS_AT_ONCE):
        yield segment.words[order[start : start + _ROWS_AT_ONCE]].tobytes()
    yield bytes(8 * centres.shape[1] * BLOCK_ROWS)


def _parsed(data: npt.NDArray[np.uint8], where: str | Path) -> _Cells:
    """The parts of a file, without a copy."""
    damaged = ArtefactError(
        "damaged: its header or length is not that of cells of codes",
        where=where,
        mend="restore the file, or build the index again",
    )
    if len(data) < _HEADER.size:
        raise damaged
    magic, bits, width, rows, cells = _HEADER.unpack(data[: _HEADER.size].tobytes())
    if magic != _MAGIC or bits < 1 or width != 8 * words_per_row(bits):
        raise damaged
    lengths = [cells * width, 8 * (cells + 1), 4 * (rows + rows % 2), width * (rows + BLOCK_ROWS)]
    ends = np.cumsum([_HEADER.size, *lengths])
    if len(data) != ends[-1]:
        raise damaged
    centres, offsets, places, words = (data[a:b] for a, b in itertools.pairwise(ends))
    found = _Cells(
        bits,
        centres.view(np.uint64).reshape(cells, -1),
        offsets.view(np.int64),
        places.view(np.uint32)[:rows],
        words.view(np.uint64),
    )
    if found.offsets[0] != 0 or found.offsets[-1] != rows or (np.diff(found.offsets) < 0).any():
        raise damaged
    return found


SETTINGS = frozenset({"nprobe"})
"""As `approximate.Structure.settings`."""


class CellSegment:
    """The cells of one shard, opened for searching, beside its codes.

    Args:
        path: of the file that `fill` wrote; it is mapped into memory.
        segment: what it was filled with.
        bits: of a code.

    Raises:
        ArtefactError: if the file is missing, damaged or of other codes.
    """

    graph, compares = False, False
    settings = SETTINGS

    def __init__(self, path: str | Path, segment: Segment, bits: int) -> None:
        try:
            data: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise ArtefactError(
                f"damaged: {error}", where=path, mend="restore the file, or build the index again"
            ) from None
        self._held = _parsed(data.view(np.ndarray), path)
        if (self._held.bits, len(self._held.rows)) != (bits, len(segment.words)):
            raise ArtefactError(
                f"it holds {len(self._held.rows):,} codes of {self._held.bits} bits, the shard "
                f"{[len(segment.words), bits]}",
                where=path,
                mend="build the index again",
            )
        self.segment = segment

    def __len__(self) -> int:
        return len(self.segment.words)

    @property
    def cells(self) -> int:
        return len(self._held.centres)

    def cost(self, effort: Effort, hits: int) -> float:  # noqa: ARG002
        """Bytes that a search looks at, about."""
        row = self._held.centres.shape[1] * 8
        return float(row * (self.cells + len(self) * min(1.0, effort.nprobe / self.cells)))

    def search(
        self,
        queries: npt.NDArray[np.uint8],
        k: int,
        effort: Effort,
        allowed: Bits | None = None,
    ) -> Hits:
        """The `k` nearest rows for each query in the cells that it looks at, sorted by (distance, row).

        Args:
            queries: uint8 [q, ceil(bits / 8)], packed codes.
            k: hits per query; `NO_ROW` where there are fewer.
            effort: `nprobe` says how many cells; nothing else of it is looked at.
            allowed: which rows of the shard may be hits; default all.

        Raises:
            ArtefactError: if the queries' type or width does not fit.
            QueryError: if `k` < 1.
        """
        check_k(k)
        held = self._held
        wanted = query_words(queries, held.bits)
        if len(self) == 0 or len(wanted) == 0:
            return no_hits(len(wanted), k)
        probes = scan_segments([Segment(held.centres)], queries, held.bits, min(effort.nprobe, self.cells))
        found = no_hits(len(wanted), min(k, len(self)))
        selected = np.zeros(0, np.uint8) if allowed is None else allowed.view()
        selected.flags.writeable = False  # compiled code knows read-only arrays apart
        search_cells(
            held.words,
            held.rows,
            held.offsets,
            probes.rows,
            wanted,
            (0,) * wanted.shape[1],
            held.bits,
            selected,
            found.distances,
            found.rows,
        )
        real = found.rows >= 0
        found.rows[real] += self.segment.first_row
        return merge([found], k)
