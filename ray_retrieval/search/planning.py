"""What an index takes: files that are mapped into memory, and memory that each process needs for itself.

What is mapped is shared by all processes of a machine, and may be more than its memory: what is not in use
makes room. What a process holds for itself is there as often as there are processes.

The sizes are those of the files as they are written, but for a few kilobytes a shard. What is known of the
rows (ids, labels, paths) and images come on top; see `known_bytes`.
"""

import itertools
import re
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.search.choosing import EXACT_CODES, EXACT_VECTORS, choose_for_codes, choose_for_vectors
from ray_retrieval.search.scan import words_per_row
from ray_retrieval.search.sources import RowSource
from ray_retrieval.search.votes import LocalSearchConfig, choose_shortlist

_FACTORY = re.compile(
    r"(?:Pad(?P<padded>\d+),)?(?:IVF(?P<cells>\d+),)?"
    r"(?:(?P<flat>Flat)|(?P<sq8>SQ8)|PQ(?P<parts>\d+)x4fs|HNSW(?P<links>\d+)(?:,Flat)?)"
)
_CELLS = re.compile(r"BIVF(?P<cells>\d+)")
_NUMBER, _COUNT = 4, 8
"""Bytes of a float32 or a row in a graph, and of an id or a length in FAISS's files."""
_BLOCK_ROWS = 32
"""Rows whose 4-bit codes lie together; each cell's last block is filled up."""
_ASKED_ROWS = 1000
"""Rows by which what is known of all is estimated."""


class Structure(NamedTuple):
    """What an index of FAISS takes.

    Attributes:
        bytes: of its files.
        private: bytes of memory of each process that has it open; the rest is mapped.
    """

    bytes: int
    private: int


@dataclass(frozen=True)
class Footprint:
    """What an index of one kind takes.

    Attributes:
        kind: of search: `exact`, or what FAISS calls it; of local features the shortlist.
        mapped: bytes of files that are mapped.
        private: bytes of memory of each process that has it open, without those of a search.
        rows: of the index.
        auto: whether it is what `auto` chooses.
    """

    kind: str
    mapped: int
    private: int
    rows: int
    auto: bool = False

    @property
    def bytes_per_row(self) -> float:
        """Of both."""
        return (self.mapped + self.private) / max(1, self.rows)

    def as_json(self) -> dict[str, Any]:
        """As plain values; the bytes of a row are the megabytes of a million rows."""
        return {**asdict(self), "bytes_per_row": round(self.bytes_per_row, 2)}


def plan(
    form: Form, rows: int, *, features: int = 0, shards: int = 1, memory: int | None = None
) -> list[Footprint]:
    """What an index of some rows would take, for each kind of search that it can be built for.

    Args:
        form: of the descriptors.
        rows: of the index.
        features: local features in all.
        shards: of the index.
        memory: as `auto` is told of it.

    Raises:
        RecipeError: if no structure fits the memory.
    """
    stored = descriptor_bytes(form, rows, features)
    if form.kind is DescriptorKind.CODES:
        return _of_codes(form, rows, shards, memory)
    if form.kind is DescriptorKind.LOCAL:
        return _of_local(form, rows, features, shards)
    chosen = choose_for_vectors(rows, form.size, memory).factory
    fast = chosen or choose_for_vectors(max(rows, EXACT_VECTORS + 1), form.size, memory).factory or ""
    cells = _FACTORY.fullmatch(fast)
    assert cells is not None, "what `auto` chooses is known"
    coarse = f"IVF{cells['cells']}"
    found = [Footprint("exact", stored, 0, rows, auto=chosen is None)]
    for factory in (fast, f"{coarse},SQ8", f"{coarse},Flat", "SQ8", "HNSW32"):
        taken = structure_bytes(factory, rows, form.size, shards)
        found.append(_beside(factory, stored, taken, rows, auto=factory == chosen))
    return found


def _of_codes(form: Form, rows: int, shards: int, memory: int | None) -> list[Footprint]:
    """Of the exact search, and of cells."""
    stored, chosen = descriptor_bytes(form, rows), choose_for_codes(rows, form.size, memory).factory
    cells = chosen or choose_for_codes(max(rows, EXACT_CODES + 1), form.size).factory or ""
    taken = structure_bytes(cells, rows, form.size, shards)
    return [
        Footprint("exact", stored, 0, rows, auto=chosen is None),
        _beside(cells, stored, taken, rows, auto=chosen is not None),
    ]


def _of_local(form: Form, rows: int, features: int, shards: int) -> list[Footprint]:
    """Of the shortlists."""
    stored = descriptor_bytes(form, rows, features)
    auto = choose_shortlist(LocalSearchConfig(), features=features, vectors=form.vectors).kind
    found = [Footprint("exact", stored, 0, rows, auto=auto == "exact")]
    if form.vectors:
        found.append(Footprint("global", stored, 0, rows))
    for kind in ("votes", "asmk") if features else ():
        config = LocalSearchConfig.model_validate({"shortlist": kind})
        asked = choose_shortlist(config, features=features, vectors=form.vectors)
        if asked.factory is not None:
            taken = structure_bytes(asked.factory, features, form.size, shards)
        else:
            # At most: features of an image that belong to one word become one posting.
            posting, codebook = 4 + 8 * -(-form.size // 64), asked.words * (4 * form.size + 8)
            taken = Structure(features * posting + 4 * rows + shards * codebook, 0)
        found.append(_beside(kind, stored, taken, rows, auto=kind == auto))
    return found


def _beside(kind: str, stored: int, taken: Structure | None, rows: int, *, auto: bool) -> Footprint:
    assert taken is not None, f"{kind} is known"
    return Footprint(kind, stored + taken.bytes - taken.private, taken.private, rows, auto)


def descriptor_bytes(form: Form, rows: int, features: int = 0) -> int:
    """Of the files that hold the descriptors of some rows, without headers.

    Args:
        form: of the descriptors.
        rows: how many.
        features: local features in all.
    """
    if form.kind is DescriptorKind.CODES:
        return rows * 8 * words_per_row(form.size)
    if form.kind is DescriptorKind.VECTORS:
        return rows * 4 * form.size
    return features * (2 * form.size + 8 + 4 + 4) + rows * (8 + 8 + 4 * form.vectors)


def structure_bytes(factory: str, rows: int, dimension: int, shards: int = 1) -> Structure | None:
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
        return Structure(rows * (width + 4) + shards * int(codes["cells"]) * (width + 8), 0)
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
    return Structure(total, private)


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


def known_bytes(source: RowSource) -> int:
    """About how much is known of all rows of a source, by the first of them; images are not looked at."""
    rows = min(_ASKED_ROWS, len(source))
    tables = [table.slice(0, rows) for table, _ in itertools.islice(source.tables(0, rows), 1)]
    asked = sum(len(table) for table in tables)
    return round(sum(table.nbytes for table in tables) / asked * len(source)) if asked else 0
