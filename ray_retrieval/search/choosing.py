"""What `auto` comes to: which search is for so many codes or vectors.

Up to `EXACT_VECTORS`, or `EXACT_CODES`, all rows are compared, which misses nothing. Above it vectors lie in
cells, compressed as far as the memory asks for, and codes lie in cells as they are. How hard a search then
looks is measured when the structure is there: see `tuning`.
"""

import math
from typing import NamedTuple

from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import RecipeError
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.faiss_index import ROWS_PER_CELL
from ray_retrieval.search.scan import words_per_row
from ray_retrieval.search.structure_sizes import structure_bytes

EXACT_VECTORS = 200_000
"""A few milliseconds, no training, nothing missed."""
EXACT_CODES = 100_000_000
"""Of 64 bits, tens of milliseconds a query on two cores, and no memory but the mapped codes."""

_TRAIN_ROWS = 131_072

RECALL_TARGET = 0.95
"""What `auto` aims at unless told."""


WORTH = 3
"""Times as many bytes as an approximate search looks at have to be in all rows; else it is not worth
its files, nor that a hit may be missed."""


class Choice(NamedTuple):
    """What `auto` comes to.

    Attributes:
        factory: string of FAISS; None for the exact search.
        why: in a sentence.
    """

    factory: str | None
    why: str


def choose_for_vectors(
    rows: int,
    dimension: int,
    memory: int | None = None,
    *,
    shards: int = 1,
    train_rows: int = _TRAIN_ROWS,
) -> Choice:
    """The search for so many rows of a dimension.

    Above `EXACT_VECTORS`, rows are divided into about √rows cells, and each is held as 4 bits for every 2
    dimensions, or for every 4, 8 or 16 where the memory is short.

    Args:
        rows: of the whole database.
        dimension: of the vectors.
        memory: bytes that the structure may take, over all shards; None: any.
        shards: each of which has cells of its own.
        train_rows: rows that it will be trained on; each cell needs 39.

    Raises:
        RecipeError: if no structure fits the memory.
    """
    if rows <= EXACT_VECTORS:
        return Choice(None, _exactly(rows, EXACT_VECTORS))
    cells, as_many = _cells(rows, train_rows)
    needed = 0
    for width in (2, 4, 8, 16):
        parts = 2 * -(-dimension // (2 * width))  # An even number, which is what FAISS stores.
        filled = f"Pad{parts * width}," if parts * width != dimension else ""
        factory = f"{filled}IVF{cells},PQ{parts}x4fs"
        needed = _bytes_of(factory, rows, dimension, shards)
        if memory is None or needed <= memory:
            return Choice(
                factory,
                f"{rows:,} rows in {cells:,} cells ({as_many}), 4 bits for every {width} dimensions: "
                f"{parts // 2 + 8} bytes a row, {needed / 1e6:,.0f} MB in all",
            )
    raise RecipeError(
        f"approximate search over {rows:,} rows in {shards:,} shards takes at least {needed:,} bytes, "
        f"allowed are {memory:,}",
        where="memory",
        mend="allow more memory, or search exactly: that takes none of its own",
    )


def choose_for_codes(
    rows: int,
    bits: int,
    memory: int | None = None,
    *,
    shards: int = 1,
    train_rows: int = _TRAIN_ROWS,
) -> Choice:
    """The search for so many codes; see `choose_for_vectors`.

    Where cells do not fit the memory, codes are searched exactly still: it takes none of its own, and at 10⁹
    codes of 64 bits half a second.
    """
    if rows <= EXACT_CODES:
        return Choice(None, _exactly(rows, EXACT_CODES))
    cells, as_many = _cells(rows, train_rows)
    row, factory = 8 * words_per_row(bits) + 4, f"BIVF{cells}"
    needed = _bytes_of(factory, rows, bits, shards)
    if memory is not None and needed > memory:
        return Choice(None, f"{rows:,} rows in cells take {needed:,} bytes, allowed are {memory:,}")
    return Choice(
        factory,
        f"{rows:,} rows in {cells:,} cells ({as_many}): {row} bytes a row, {needed / 1e6:,.0f} MB in all",
    )


def most_to_train_on(form: Form, config: ApproximateConfig) -> int:
    """Rows that a structure is trained on, at most: so many as are asked for, and as the memory holds.

    Args:
        form: of the descriptors.
        config: what is asked for.
    """
    if config.memory is None:
        return config.train_rows
    return max(1, min(config.train_rows, config.memory // training_bytes(form, 1)))


def training_bytes(form: Form, rows: int) -> int:
    """Memory that so many rows take to train on at least: they are drawn, and put into another order.

    FAISS copies some of them once more, such as what is left of them beyond their centres.
    """
    return 2 * rows * (8 * words_per_row(form.size) if form.kind is DescriptorKind.CODES else 4 * form.size)


def choose(form: Form, rows: int, config: ApproximateConfig, shards: int = 1) -> Choice:
    """What is asked for, or what `auto` comes to.

    Args:
        form: codes or vectors.
        rows: of the whole database.
        config: what is asked for.
        shards: of the database.

    Raises:
        RecipeError: if no structure fits the memory, or what is asked for is of no use to the search.
    """
    config.check_of_use()
    if config.search != "auto":
        return Choice(None if config.search == "exact" else config.search, "asked for")
    if config.recall_target == 1:
        return Choice(None, "only the exact search finds all that is near")
    chosen = choose_for_codes if form.kind is DescriptorKind.CODES else choose_for_vectors
    train_rows = most_to_train_on(form, config)
    return chosen(rows, form.size, config.memory, shards=shards, train_rows=train_rows)


def _bytes_of(factory: str, rows: int, size: int, shards: int) -> int:
    """Of all files of a structure that is chosen here."""
    taken = structure_bytes(factory, rows, size, shards)
    assert taken is not None, "what is chosen is known"
    return taken.bytes


def _exactly(rows: int, most: int) -> str:
    return f"{rows:,} rows are searched exactly, as all databases up to {most:,} are"


def _cells(rows: int, train_rows: int) -> tuple[int, str]:
    """How many, a power of two, and how that is said."""
    cells, sample = 2 ** round(math.log2(math.sqrt(rows))), min(train_rows, rows)
    as_many = "about √rows"
    while cells > 1 and cells * ROWS_PER_CELL > sample:
        cells, as_many = cells // 2, f"as many as {sample:,} rows to train on allow"
    return cells, as_many
