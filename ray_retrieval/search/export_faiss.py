"""Descriptors as indices of FAISS.

A flat index is written some rows at a time: its file is a header, which FAISS itself writes, and the rows.
Graphs and approximate structures are made in memory, and written when all rows are there.
"""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import faiss as untyped_faiss
import numpy as np

from ray_retrieval.descriptors import DescriptorKind, Descriptors, Form
from ray_retrieval.errors import RecipeError
from ray_retrieval.search.faiss_index import one_faiss_thread
from ray_retrieval.search.files import trained_bytes
from ray_retrieval.search.index import Index
from ray_retrieval.search.structure_sizes import structure_bytes
from ray_retrieval.storage import Folder

faiss: Any = untyped_faiss  # Its own types leave out half of what is there.

Add = Callable[[Descriptors], object]

_LINKS = 32
"""Of a graph's rows, each to others."""
_BYTES_OF_LINKS = 272
"""Of a graph's row: twice as many links on its lowest floor, 4 bytes each, and what says where they begin."""
_ROWS_AT = 8
"""Where an index without any rows says how many there are: after its type and dimension, 4 bytes each."""
_CODES_ROWS_AT = 12
"""The same of an index of codes: after the bytes of a code as well."""


@contextmanager
def writing_flat(folder: Folder, name: str, form: Form, rows: int) -> Iterator[Add]:
    """Take codes or vectors, which become an IndexBinaryFlat or IndexFlatL2 when the block ends.

    Args:
        folder: where it goes.
        name: of the file.
        form: of the descriptors; codes are padded to whole bytes.
        rows: how many will come.

    Raises:
        RecipeError: if this release of FAISS has another format.
    """
    _check_header(form)
    with folder.writing(name) as stream:
        stream.write(_flat_header(form, rows))
        yield lambda descriptors: stream.write(np.ascontiguousarray(descriptors.data).tobytes())


def check_memory(index: Index, *, approximate: bool) -> None:
    """Refuse to build in memory what does not fit there.

    Args:
        index: to be exported.
        approximate: as its own structure; else as a graph.

    Raises:
        RecipeError: naming how much it takes.
    """
    form, structure = index.form, index.manifest.approximate
    row = _whole_bits(form) // 8 if form.kind is DescriptorKind.CODES else 4 * form.size
    needed = index.rows * (row + _BYTES_OF_LINKS)
    if approximate and structure is not None:
        told = structure_bytes(structure.factory, index.rows, form.size)
        needed = index.rows * row if told is None else told.bytes
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise RecipeError(
            f"it is built in memory: that takes {needed / 1e9:,.1f} GB, and there are {there / 1e9:,.1f} GB",
            where="`form`",
            mend="export as npy, or as faiss without `approximate`, which are written in blocks",
        )


@contextmanager
def writing_graph(folder: Folder, name: str, form: Form) -> Iterator[Add]:
    """Take codes or vectors, which become an IndexBinaryHNSW or IndexHNSWFlat when the block ends."""
    if form.kind is DescriptorKind.CODES:
        graph = faiss.IndexBinaryHNSW(_whole_bits(form), _LINKS)
    else:
        graph = faiss.IndexHNSWFlat(form.size, _LINKS, faiss.METRIC_L2)
    with _writing(folder, name, graph) as add:
        yield add


@contextmanager
def writing_structure(folder: Folder, name: str, index: Index) -> Iterator[Add]:
    """Take vectors, which become one index of what an index's approximate search was trained to.

    Args:
        folder: where it goes.
        name: of the file.
        index: of vectors, with an approximate search.
    """
    assert index.manifest.approximate is not None
    empty = trained_bytes(index.folder, index.manifest.approximate)
    trained = faiss.deserialize_index(np.frombuffer(empty, np.uint8))
    with _writing(folder, name, trained) as add:
        yield add


@contextmanager
def _writing(folder: Folder, name: str, made: Any) -> Iterator[Add]:
    """Fill an index of FAISS and write it; on one thread, so that a graph is the same each time."""

    def add(descriptors: Descriptors) -> None:
        rows = np.ascontiguousarray(descriptors.data)
        with one_faiss_thread():
            made.add_c(len(rows), faiss.swig_ptr(rows))

    yield add
    write = faiss.write_index_binary if isinstance(made, faiss.IndexBinary) else faiss.write_index
    with folder.writing(name) as stream:
        write(made, faiss.PyCallbackIOWriter(stream.write))


def _flat_header(form: Form, rows: int) -> bytes:
    """All of a flat index's file before its rows: that of an empty one, with other counts."""
    codes = form.kind is DescriptorKind.CODES
    if codes:
        header = bytearray(faiss.serialize_index_binary(faiss.IndexBinaryFlat(_whole_bits(form))).tobytes())
    else:
        header = bytearray(faiss.serialize_index(faiss.IndexFlatL2(form.size)).tobytes())
    values = rows * (_whole_bits(form) // 8 if codes else form.size)
    struct.pack_into("<q", header, _CODES_ROWS_AT if codes else _ROWS_AT, rows)
    struct.pack_into("<q", header, len(header) - 8, values)
    return bytes(header)


def _check_header(form: Form) -> None:
    """Refuse to write files in a way that FAISS, perhaps of another release, takes for something else."""
    codes = form.kind is DescriptorKind.CODES
    read = faiss.deserialize_index_binary if codes else faiss.deserialize_index
    size = _whole_bits(form) if codes else form.size
    row = np.arange(size // 8 if codes else size, dtype=np.uint8 if codes else np.float32)
    try:
        made = read(np.frombuffer(_flat_header(form, 1) + row.tobytes(), np.uint8))
        back = np.empty_like(row)
        made.reconstruct_c(0, faiss.swig_ptr(back))
        sound = (made.ntotal, made.d) == (1, size) and np.array_equal(back, row)
    except RuntimeError:
        sound = False
    if not sound:
        raise RecipeError(
            f"FAISS {faiss.__version__} writes flat indices in another way than is known here",
            where="the format faiss",
            mend="export as npy, and make the index with FAISS",
        )


def _whole_bits(form: Form) -> int:
    """Bits of a code with those that fill its last byte."""
    return 8 * ((form.size + 7) // 8)
