"""How the structures of codes, and of vectors, are trained, filled and opened."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ray_retrieval.descriptors import Codes, DescriptorKind, Descriptors, Form, Vectors
from ray_retrieval.search import cells, faiss_index
from ray_retrieval.search.approximate import ApproximateConfig, ApproximateSegment, Structure
from ray_retrieval.search.effort import refuse_needless
from ray_retrieval.search.manifest import FileEntry
from ray_retrieval.search.scan import Segment
from ray_retrieval.search.segments import AnySegment
from ray_retrieval.search.shard import Shard
from ray_retrieval.search.vectors import VectorSegment
from ray_retrieval.storage import Folder


class Kind(NamedTuple):
    """How structures of a kind of descriptor are made.

    suffix: of their files.
    check: raises RecipeError where a factory string is none of so many bits or dimensions, or asks for more
        than so many rows to train on; gives `Structure.settings` of what it makes.
    train: from a factory string, a sample and a seed, on so many threads: what all of them are filled from.
    fill: writes one, from that and a shard's rows.
    open: one that was filled with these rows, of so many bits.
    """

    suffix: str
    check: Callable[[str, int, int], frozenset[str]]
    train: Callable[[str, Descriptors, int, int], bytes]
    fill: Callable[[bytes, AnySegment, Callable[[bytes], object]], None]
    open: Callable[[Path, AnySegment, int], Structure]


def _check_vectors(factory: str, dimension: int, rows: int) -> frozenset[str]:
    return faiss_index.settings_of(faiss_index.untrained(factory, dimension, rows))


def _train_vectors(factory: str, sample: Descriptors, seed: int, threads: int) -> bytes:
    assert isinstance(sample, Vectors)
    return faiss_index.train(factory, sample.data, seed, threads=threads)


def _fill_vectors(trained: bytes, rows: AnySegment, write: Callable[[bytes], object]) -> None:
    assert isinstance(rows, VectorSegment)
    faiss_index.fill(trained, rows.vectors, write)


def _open_vectors(path: Path, rows: AnySegment, _: int) -> Structure:
    assert isinstance(rows, VectorSegment)
    return ApproximateSegment(path, rows)


def _check_codes(factory: str, _: int, rows: int) -> frozenset[str]:
    faiss_index.check_sample(factory, cells.cells_in(factory), rows)
    return cells.SETTINGS


def _train_codes(factory: str, sample: Descriptors, seed: int, _: int) -> bytes:
    assert isinstance(sample, Codes)
    return cells.train(factory, sample, seed)


def _fill_codes(trained: bytes, rows: AnySegment, write: Callable[[bytes], object]) -> None:
    assert isinstance(rows, Segment)
    cells.fill(trained, rows, write)


def _open_codes(path: Path, rows: AnySegment, bits: int) -> Structure:
    assert isinstance(rows, Segment)
    return cells.CellSegment(path, rows, bits)


_FAISS = Kind("faiss", _check_vectors, _train_vectors, _fill_vectors, _open_vectors)
_CELLS = Kind("cells", _check_codes, _train_codes, _fill_codes, _open_codes)


def kind_of(form: Form) -> Kind:
    """That of codes or vectors."""
    return _CELLS if form.kind is DescriptorKind.CODES else _FAISS


def check_search(form: Form, factory: str, rows: int, config: ApproximateConfig) -> None:
    """Raise RecipeError if a search cannot be built, or has no use for what is asked for.

    Args:
        form: of the descriptors.
        factory: that is asked for, or what `auto` comes to, which is asked to look in one way or another
            before it is known which counts.
        rows: that there are to train on.
        config: what is asked for.
    """
    settings = kind_of(form).check(factory, form.size, rows)
    if config.search != "auto":
        refuse_needless(config.stated, settings, factory)


def opened_structures(
    index: Folder, shards: Sequence[Shard], files: Sequence[FileEntry | None]
) -> dict[int, Structure]:
    """The structures of the shards that have a file, by their places among them."""
    return {
        number: kind_of(shard.form).open(index.local_path(file.file), shard.segment, shard.form.size)
        for number, (shard, file) in enumerate(zip(shards, files, strict=True))
        if file is not None
    }
