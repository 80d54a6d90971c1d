"""What the structures of an approximate search take: bytes of their files, and memory that is not mapped."""

import re
from typing import NamedTuple

from ray_retrieval.search.scan import words_per_row

_FACTORY = re.compile(
    r"(?:Pad(?P<padded>\d+),)?(?:IVF(?P<cells>\d+),)?"
    r"(?:(?P<flat>Flat)|(?P<sq8>SQ8)|PQ(?P<parts>\d+)x4fs|HNSW(?P<links>\d+)(?:,Flat)?)"
)
_CELLS = re.compile(r"BIVF(?P<cells>\d+)")
_NUMBER, _COUNT = 4, 8
"""Bytes of a float32 or a row in a graph, and of an id or a length in FAISS's files."""
_BLOCK_ROWS = 32
"""Rows whose 4-bit codes lie together; each cell's last block is filled up."""


class StructureSize(NamedTuple):
    """What an index of FAISS takes.

    Attributes:
        bytes: of its files.
        private: bytes of memory of each process that has it open; the rest is mapped.
    """

    bytes: int
    private: int


def cells_of_kind(factory: str) -> int:
    """How many cells a factory string asks for, 0 where none, or where it is not known here."""
    said = _FACTORY.fullmatch(factory) or _CELLS.fullmatch(factory)
    return 0 if said is None else int(said["cells"] or 0)


def structure_bytes(factory: str, rows: int, dimension: int, shards: int = 1) -> StructureSize | None:
    """What an index of FAISS takes over all shards; None of a string that is not known here.

    Inverted lists, codes and graphs are mapped; but FAISS reads lists of 4-bit codes, and where in a graph
    each row's neighbours begin. Cells hold half a block more than their rows, on average.

    Args:
        factory: FAISS's string, or that of cells of codes.
        rows: in all shards.
        dimension: of the vectors, or bits of the codes.
        shards: with a file each.
    """
    if (codes := _CELLS.fullmatch(factory)) is not None:
        width = 8 * words_per_row(dimension)
        return StructureSize(rows * (width + 4) + shards * int(codes["cells"]) * (width + 8), 0)
    said = _FACTORY.fullmatch(factory)
    if said is None:
        return None
    size = int(said["padded"] or dimension)
    cells, private = int(said["cells"] or 0), 0
    if said["links"]:
        links = int(said["links"])
        # Twice as many neighbours on the lowest level; each level has 1/links of the rows of the one below.
        graph = _NUMBER * links * (2 + 1 / (links - 1)) if links > 1 else 3 * _NUMBER
        private = rows * (_NUMBER + _COUNT)
        total = rows * int(_NUMBER * size + graph) + private
    elif said["parts"]:
        width = int(said["parts"]) // 2
        filled = rows + shards * (cells or 1) * _BLOCK_ROWS // 2
        total = filled * width + shards * 16 * _NUMBER * size
    else:
        total = rows * (_NUMBER * size if said["flat"] else size)
    if cells:
        total += rows * _COUNT + shards * cells * (_NUMBER * size + _COUNT)
        # Centroids are read; of 4-bit codes all is.
        private = total if said["parts"] else shards * cells * _NUMBER * size
    return StructureSize(total, private)


def private_bytes(factory: str, file_bytes: int, rows: int, dimension: int, shards: int) -> int | None:
    """Memory that a process needs to have the written files of a structure open; None if it is not known.

    Args:
        factory: FAISS's string.
        file_bytes: of the files.
        rows: as for `structure_bytes`.
        dimension: as for `structure_bytes`.
        shards: as for `structure_bytes`.
    """
    expected = structure_bytes(factory, rows, dimension, shards)
    if expected is None:
        return None
    return file_bytes if expected.private == expected.bytes else min(expected.private, file_bytes)
