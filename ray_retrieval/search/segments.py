"""Descriptors of a shard as files, and the exact search of several shards.

    codes.bin      packed codes, each filled up with zeros to whole 64-bit words
    vectors.bin    float32 vectors
    offsets.bin    and others: sets of local features, see `local.py`; how they are searched is said in
                   `shortlist.py`

The first two begin with a header of 64 bytes, little-endian: 8 bytes that name the kind, size (bits or
dimension) and bytes of a row as 32-bit numbers, rows and first row as 64-bit numbers, and zeros. The rows
follow without gaps, so a mapped file is searched where it lies, by any program.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes, DescriptorKind, Descriptors, Form, Vectors
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search import local
from ray_retrieval.search.hits import Hits
from ray_retrieval.search.local import LocalSegment
from ray_retrieval.search.scan import Segment, scan_segments, to_words, words_per_row
from ray_retrieval.search.vectors import VectorSegment, search_vectors, unit_error
from ray_retrieval.storage import Folder, refusal

AnySegment = Segment | VectorSegment | LocalSegment
"""Rows of one kind of descriptor."""

_HEADER = struct.Struct("<8sIIQQ32x")
_MAGIC = {DescriptorKind.CODES: b"RRCODES2", DescriptorKind.VECTORS: b"RRVECTS2"}
_FILE = {DescriptorKind.CODES: "codes.bin", DescriptorKind.VECTORS: "vectors.bin"}


def files_of(form: Form) -> tuple[str, ...]:
    """Names of the files that hold a shard's descriptors."""
    return local.files_of(form) if form.kind is DescriptorKind.LOCAL else (_FILE[form.kind],)


class Writer(Protocol):
    """Takes the descriptors of a shard, some rows at a time.

    Attributes:
        features: local features so far; 0 of other kinds.
        norm_error: of the vectors so far, as `vectors.norm_error` has it; 0 without any.
    """

    features: int
    norm_error: float

    def add(self, descriptors: Descriptors) -> None:
        """Append rows."""


@contextmanager
def writing(folder: Folder, form: Form, rows: int, first_row: int) -> Iterator[Writer]:
    """Take descriptors of a form, which become the shard's files when the block ends without an error."""
    with ExitStack() as stack:
        streams = {name: stack.enter_context(folder.writing(name)) for name in files_of(form)}
        if form.kind is DescriptorKind.LOCAL:
            sets = local.LocalWriter(streams, form, first_row)
            yield sets
            sets.finish()
        else:
            yield _RowWriter(streams[_FILE[form.kind]], form, rows, first_row)


@dataclass
class _RowWriter:
    """Writes codes or vectors into a stream, header first."""

    stream: IO[bytes]
    form: Form
    rows: int
    first_row: int
    features: int = 0
    norm_error: float = 0.0

    def __post_init__(self) -> None:
        self.stream.write(_header(self.form, self.rows, self.first_row))

    def add(self, descriptors: Descriptors) -> None:
        if isinstance(descriptors, Codes):
            self._write(to_words(descriptors.data, descriptors.bits))
            return
        assert isinstance(descriptors, Vectors)
        self.norm_error = max(self.norm_error, unit_error(descriptors.data))
        self._write(descriptors.data)

    def _write(self, rows: npt.NDArray[Any]) -> None:
        self.stream.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)


def open_segment(
    folder: Folder, form: Form, *, rows: int, first_row: int, features: int, norm_error: float
) -> AnySegment:
    """Map the files that were written.

    Args:
        folder: the shard's.
        form: of the descriptors.
        rows: in the shard.
        first_row: number of the first.
        features: local features in the shard; 0 of other kinds.
        norm_error: what the writer found.

    Raises:
        ArtefactError: naming the file whose header or length is not that of these rows.
    """
    if form.kind is DescriptorKind.LOCAL:
        return local.open_local(
            folder, form, rows=rows, first_row=first_row, features=features, norm_error=norm_error
        )
    name = _FILE[form.kind]
    try:
        data: npt.NDArray[np.uint8] = np.memmap(folder.local_path(name), np.uint8, "r")
    except OSError as error:  # deleted just now
        raise refusal(error, folder.uri_of(name)) from error
    header, width = _header(form, rows, first_row), _row_bytes(form)
    if data[: len(header)].tobytes() != header or len(data) != len(header) + width * rows:
        raise ArtefactError("its header or length is not that of the manifest", where=folder.uri_of(name))
    table = data[len(header) :].reshape(rows, width)
    if form.kind is DescriptorKind.CODES:
        return Segment(to_words(table, form.size), first_row)
    return VectorSegment(table.view(np.float32), first_row, norm_error)


def rows_of(segment: AnySegment, form: Form, places: npt.NDArray[np.int64]) -> Descriptors:
    """The descriptors at some places of a segment, int64 [m], in the order asked."""
    if isinstance(segment, LocalSegment):
        return segment.features(places)
    if isinstance(segment, VectorSegment):
        return Vectors(np.ascontiguousarray(segment.vectors[places]))
    packed = segment.words[places].view(np.uint8)
    return Codes(np.ascontiguousarray(packed[:, : (form.size + 7) // 8]), form.size)


def search_segments(segments: Sequence[AnySegment], queries: Descriptors, k: int, *, threads: int) -> Hits:
    """The `k` nearest rows of all segments for each query, exactly, sorted by (distance, row).

    Args:
        segments: of the queries' form, in ascending order of rows.
        queries: one or more codes or vectors.
        k: at least 1.
        threads: to share the work among.
    """
    if isinstance(queries, Codes):
        codes = [segment for segment in segments if isinstance(segment, Segment)]
        return scan_segments(codes, queries.data, queries.bits, k, threads=threads)
    assert isinstance(queries, Vectors), "local features are searched by their shortlist"
    vectors = [segment for segment in segments if isinstance(segment, VectorSegment)]
    return search_vectors(vectors, queries.data, k, threads=threads)


def _row_bytes(form: Form) -> int:
    return 8 * words_per_row(form.size) if form.kind is DescriptorKind.CODES else 4 * form.size


def _header(form: Form, rows: int, first_row: int) -> bytes:
    return _HEADER.pack(_MAGIC[form.kind], form.size, _row_bytes(form), rows, first_row)
