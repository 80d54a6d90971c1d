"""What an index takes: files that are mapped into memory, and memory that each process needs for itself.

What is mapped is shared by all processes of a machine, and may be more than its memory: what is not in use
makes room. What a process holds for itself is there as often as there are processes.

The sizes are those of the files as they are written, but for a few kilobytes a shard. What is known of the
rows (ids, labels, paths) and images come on top; see `known_bytes`.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import RecipeError
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.choosing import (
    EXACT_CODES,
    EXACT_VECTORS,
    Choice,
    choose,
    choose_for_codes,
    choose_for_vectors,
    most_to_train_on,
    training_bytes,
)
from ray_retrieval.search.scan import words_per_row
from ray_retrieval.search.sources import RowSource
from ray_retrieval.search.structure_kinds import check_search
from ray_retrieval.search.structure_sizes import StructureSize, cells_of_kind, structure_bytes
from ray_retrieval.search.votes import LocalSearchConfig, choose_shortlist

_ASKED_ROWS = 1000
"""Rows by which what is known of all is estimated."""


@dataclass(frozen=True)
class Footprint:
    """What an index of one kind takes.

    Attributes:
        kind: of search: `exact`, or what FAISS calls it; of local features the shortlist.
        mapped: bytes of files that are mapped.
        private: bytes of memory of each process that has it open, without those of a search.
        rows: of the index.
        auto: whether it is what `auto` chooses, or what is asked for.
        train_rows: drawn at random to train on, while it is built; 0 without training.
        training: bytes of memory that these take then.
    """

    kind: str
    mapped: int
    private: int
    rows: int
    auto: bool = False
    train_rows: int = 0
    training: int = 0

    @property
    def bytes_per_row(self) -> float:
        """Of both."""
        return (self.mapped + self.private) / max(1, self.rows)

    def as_json(self) -> dict[str, Any]:
        """As plain values; the bytes of a row are the megabytes of a million rows."""
        return {**asdict(self), "bytes_per_row": round(self.bytes_per_row, 2)}


def plan(
    form: Form,
    rows: int,
    *,
    features: int = 0,
    shards: int = 1,
    config: ApproximateConfig | None = None,
    local: LocalSearchConfig | None = None,
) -> list[Footprint]:
    """What an index of some rows would take, for each kind of search that it can be built for.

    Args:
        form: of the descriptors.
        rows: of the index.
        features: local features in all.
        shards: of the index.
        config: the search of codes or vectors that is asked for, `auto` unless told. Where it is another
            kind than is planned for anyway, that comes too, if its size is known; where no structure fits the
            memory, nothing is chosen.
        local: the shortlist of local features that is asked for, `auto` unless told.

    Raises:
        RecipeError: if what is asked for is of no use to the search, or is no search of such descriptors.
    """
    stored = descriptor_bytes(form, rows, features)
    if form.kind is DescriptorKind.CODES:
        kinds = [_fast(choose_for_codes, form, max(rows, EXACT_CODES + 1), shards)]
    elif form.kind is DescriptorKind.LOCAL:
        return _of_local(form, rows, features, shards, local or LocalSearchConfig())
    else:
        fast = _fast(choose_for_vectors, form, max(rows, EXACT_VECTORS + 1), shards)
        coarse = f"IVF{cells_of_kind(fast)}"
        kinds = [fast, f"{coarse},SQ8", f"{coarse},Flat", "SQ8", "HNSW32"]
    asked = config or ApproximateConfig(search="auto")
    if asked.search not in ("exact", "auto"):
        check_search(form, asked.search, rows, asked)
    try:
        chosen = choose(form, rows, asked, shards).factory or "exact"
    except RecipeError:
        asked.check_of_use()
        chosen = None
    if chosen is not None and chosen not in ("exact", *kinds):
        kinds.insert(0, chosen)
    found = [Footprint("exact", stored, 0, rows, auto=chosen == "exact")]
    for factory in kinds:
        taken = structure_bytes(factory, rows, form.size, shards)
        if taken is not None:
            some = min(rows, most_to_train_on(form, asked))
            beside = _beside(factory, stored, taken, rows, auto=factory == chosen)
            found.append(replace(beside, train_rows=some, training=training_bytes(form, some)))
    return found


def _fast(choose_fast: Callable[..., Choice], form: Form, rows: int, shards: int) -> str:
    """What `auto` takes above the rows that it searches exactly, were there no limit of memory."""
    factory = choose_fast(rows, form.size, shards=shards).factory
    assert factory is not None, "so many rows are not searched exactly"
    return factory


def _of_local(
    form: Form, rows: int, features: int, shards: int, config: LocalSearchConfig
) -> list[Footprint]:
    """Of the shortlists."""
    stored = descriptor_bytes(form, rows, features)
    chosen = choose_shortlist(config, features=features, vectors=form.vectors).kind
    found = [Footprint("exact", stored, 0, rows, auto=chosen == "exact")]
    if form.vectors:
        found.append(Footprint("global", stored, 0, rows, auto=chosen == "global"))
    for kind in ("votes", "asmk") if features else ():
        factory = config.factory if kind == "votes" else None
        one = config.model_copy(update={"shortlist": kind, "factory": factory})
        asked = choose_shortlist(one, features=features, vectors=form.vectors)
        if asked.factory is not None:
            taken = structure_bytes(asked.factory, features, form.size, shards)
        else:
            # At most: features of an image that belong to one word become one posting.
            posting, codebook = 4 + 8 * -(-form.size // 64), asked.words * (4 * form.size + 8)
            taken = StructureSize(features * posting + 4 * rows + shards * codebook, 0)
        if taken is not None:
            found.append(_beside(kind, stored, taken, rows, auto=kind == chosen))
    return found


def _beside(kind: str, stored: int, taken: StructureSize, rows: int, *, auto: bool) -> Footprint:
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


def known_bytes(source: RowSource) -> int:
    """About how much is known of all rows of a source, by the first of them; images are not looked at."""
    rows = min(_ASKED_ROWS, len(source))
    tables = [table.slice(0, rows) for table, _ in itertools.islice(source.tables(0, rows), 1)]
    asked = sum(len(table) for table in tables)
    return round(sum(table.nbytes for table in tables) / asked * len(source)) if asked else 0
