"""A shard: consecutive rows of an index in immutable, memory-mapped files.

    codes.bin       or vectors.bin, or offsets.bin and others: the descriptors, see `segments.py`
    rows.arrow      id · label · path · further columns of the images, see `rows.py`
    images.arrow    the images that came as bytes; missing where none did
    shard.json      the files with their checksums, written last: without it the shard does not count

The folder's name is a fingerprint of all that goes into the shard, so a build that starts again knows a
finished shard by its name. It is written in one pass over the rows, of which some are in memory at a time.
"""

import bisect
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.descriptors import Descriptors, Form, concatenate
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search.manifest import DESCRIPTION, FileEntry, ShardEntry
from ray_retrieval.search.rows import KnownRows, RowsWriter, stored_schema
from ray_retrieval.search.segments import AnySegment, Writer, files_of, open_segment, rows_of, writing
from ray_retrieval.storage import (
    Folder,
    check_file,
    file_entry,
    fingerprint,
    read_description,
    write_description,
)

if TYPE_CHECKING:
    from ray_retrieval.search.sources import RowSource

ROWS, IMAGES = "rows.arrow", "images.arrow"
_KIND, _VERSION = "index shard", 2
_LAYOUT = 3
"""Of what is written; what was written before is read as well."""
_MEND = "restore the file, or build the index again: what is sound is kept"


def write_shard(
    index: Folder,
    source: "RowSource",
    start: int,
    stop: int,
    *,
    first_row: int,
    first_id: int | None,
    keep_images: bool,
    advance: Callable[[int], None],
) -> ShardEntry:
    """Write rows of a source as a shard, unless it is already there and sound.

    Args:
        index: the index's folder.
        source: of the rows.
        start: place of the first of them in the source.
        stop: place after the last.
        first_row: number of the first in the index.
        first_id: its id, where ids are numbers that count on from row to row, which are not stored; None
            where they are stored.
        keep_images: store the images that came as bytes.
        advance: called with the number of rows written each time.
    """
    rows, form = stop - start, source.form
    contents = [_LAYOUT, source.fingerprint, start, first_row, rows, first_id, keep_images]
    name = f"shards/{fingerprint(contents)}"
    folder = index / name
    folder.sweep()
    finished = _finished(folder)
    if finished is not None:
        advance(rows)
        return finished
    writer, known = _write_rows(folder, source, range(start, stop), first_row, first_id, advance)
    names = [*files_of(form), *([ROWS] if known else [])]
    if keep_images and source.holds_images(start, stop):
        _write_images(folder, source.images(start, stop))
        names.append(IMAGES)
    files = tuple(FileEntry(**file_entry(folder, file)) for file in names)
    entry = ShardEntry(
        folder=name,
        first_row=first_row,
        first_id=first_id,
        rows=rows,
        files=files,
        features=writer.features,
        norm_error=writer.norm_error,
    )
    write_description(folder, DESCRIPTION, kind=_KIND, version=_VERSION, body=entry.model_dump(mode="json"))
    return entry


def _finished(folder: Folder) -> ShardEntry | None:
    try:
        entry = read_entry(folder)
        for file in entry.files:
            check_file(folder, file.model_dump(), content=True)
    except ArtefactError:
        return None
    return entry


def read_entry(folder: Folder) -> ShardEntry:
    """What a shard's own description says of it.

    Raises:
        ArtefactError: if it is missing or damaged.
    """
    body = read_description(folder, DESCRIPTION, kind=_KIND, version=_VERSION)
    try:
        return ShardEntry(**{key: value for key, value in body.items() if key not in ("format", "version")})
    except ValueError:
        raise ArtefactError("damaged", where=folder.uri_of(DESCRIPTION), mend=_MEND) from None


def _write_rows(
    folder: Folder,
    source: "RowSource",
    rows: range,
    first_row: int,
    first_id: int | None,
    advance: Callable[[int], None],
) -> tuple[Writer, bool]:
    """Write descriptors and what else is known; says of the latter whether there is anything."""
    known = len(stored_schema(source.schema, stored_ids=first_id is None)) > 0
    with writing(folder, source.form, len(rows), first_row) as writer, ExitStack() as stack:
        records = None
        if known:
            stream = stack.enter_context(folder.writing(ROWS))
            records = RowsWriter(stream, source.schema, stored_ids=first_id is None)
        for table, descriptors in source.tables(rows.start, rows.stop):
            writer.add(descriptors)
            if records is not None:
                records.add(table)
            advance(len(descriptors))
        if records is not None:
            records.finish()
    return writer, known


def _write_images(folder: Folder, pieces: Iterable[pa.ChunkedArray]) -> None:
    """One record batch a piece: only the images of one piece are in memory at a time."""
    schema = pa.schema([("image", pa.large_binary())])
    with folder.writing(IMAGES) as stream, pa.ipc.new_file(stream, schema) as writer:
        for column in pieces:
            images = column.cast(pa.large_binary()).combine_chunks()
            writer.write_batch(pa.RecordBatch.from_arrays([images], schema=schema))


def aligned(records: pa.Table, schema: pa.Schema) -> pa.Table:
    """What is known of rows in the columns of a schema; those that they lack are null."""
    if records.schema.equals(schema):
        return records
    columns = []
    for field in schema:
        if field.name not in records.schema.names:
            columns.append(pa.nulls(len(records), field.type))
            continue
        column = records[field.name]
        columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.table(columns, schema=pa.schema([(field.name, field.type) for field in schema]))


def joined(blocks: Iterable[pa.RecordBatch], schema: pa.Schema, rows: int) -> Iterator[pa.RecordBatch]:
    """Blocks of rows in their order, small ones together: of `rows` at least, but for the last block."""
    waiting: list[pa.RecordBatch] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= rows:
            yield _joined(waiting, schema)
            waiting = []
    if waiting:
        yield _joined(waiting, schema)


def _joined(blocks: list[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    if len(blocks) == 1:
        return blocks[0]
    tables = [aligned(pa.Table.from_batches([block]), schema) for block in blocks]
    (found,) = pa.concat_tables(tables).combine_chunks().to_batches()
    return found


class Shard:
    """A shard opened for reading; everything stays on disk until it is needed.

    Args:
        index: the index's folder.
        entry: the manifest's.
        form: of the descriptors.
        content: compare the files' checksums with the manifest, not just their sizes.

    Attributes:
        entry: the manifest's.

    Raises:
        ArtefactError: naming the file that is missing or damaged.
    """

    def __init__(self, index: Folder, entry: ShardEntry, form: Form, *, content: bool = False) -> None:
        self._index, self.entry, self.form = index, entry, form
        self._folder = index / entry.folder
        self.check_files(content=content)
        # Mapped at once, so that they stay readable once pruned; other stores are asked when need be.
        _ = self.segment, self.rows, self._image_file if self._folder.is_local else None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it maps the files again, when they are first needed."""
        return _to_be_mapped, (self._index, self.entry, self.form)

    @functools.cached_property
    def segment(self) -> AnySegment:
        """Its descriptors."""
        return self._map_segment()

    @functools.cached_property
    def rows(self) -> KnownRows:
        """What is known of its rows."""
        return self._map_rows()

    @functools.cached_property
    def _image_file(self) -> pa.ipc.RecordBatchFileReader | None:
        return self._mapped(IMAGES) if self.holds_images else None

    def check_files(self, *, content: bool) -> None:
        """Compare the files' sizes, or their checksums as well, with the manifest.

        Raises:
            ArtefactError: naming the file that is missing or damaged.
        """
        for file in self.entry.files:
            check_file(self._folder, file.model_dump(), content=content)

    def check_rows(self) -> None:
        """Compare the shard's own description with the manifest, and ids that are numbers with each other.

        Raises:
            ArtefactError: naming the file that disagrees.
        """
        if not self._folder.exists(DESCRIPTION) or read_entry(self._folder) != self.entry:
            raise self._damaged(DESCRIPTION, "it is missing, or does not say what the manifest says")
        if not self.rows.numbered or self.entry.first_id is not None:
            return
        last = -1
        for block in self.rows.blocks():
            ids = np.append(last, np.asarray(block["id"]))
            if (np.diff(ids) < 1).any():
                raise self._damaged(ROWS, "the numbers of its rows do not ascend")
            last = int(ids[-1])

    @property
    def holds_images(self) -> bool:
        """Whether there are images in it at all."""
        return any(file.file == IMAGES for file in self.entry.files)

    def descriptors(self, places: npt.NDArray[np.int64]) -> Descriptors:
        """Those of the rows at some places, int64 [m], in the order asked."""
        return rows_of(self.segment, self.form, places)

    def image(self, place: int) -> bytes | None:
        """Bytes of the image at a place, or None where the shard does not hold them."""
        starts, batches = self._images
        number = bisect.bisect_right(starts, place) - 1
        if number >= len(batches):
            return None
        found: bytes | None = batches[number][0][place - starts[number]].as_py()
        return found

    def image_lengths(self) -> npt.NDArray[np.int64]:
        """int64 [rows]: bytes of each image, which are not read; -1 where the shard does not hold it."""
        _, batches = self._images
        if not batches:
            return np.full(self.entry.rows, -1, np.int64)
        lengths = [pc.fill_null(pc.binary_length(batch[0]), -1).to_numpy() for batch in batches]
        return np.concatenate(lengths).astype(np.int64)

    @functools.cached_property
    def _images(self) -> tuple[list[int], list[pa.RecordBatch]]:
        """First places of the batches of images, with one past the end, and the batches."""
        if self._image_file is None:
            return [0], []
        batches = self._batches(IMAGES, self._image_file)
        starts = np.cumsum([0, *map(len, batches)]).tolist()
        if starts[-1] != self.entry.rows:
            raise self._damaged(IMAGES, f"{starts[-1]} images for {self.entry.rows} rows")
        return starts, batches

    def _map_segment(self) -> AnySegment:
        entry = self.entry
        try:
            return open_segment(
                self._folder,
                self.form,
                rows=entry.rows,
                first_row=entry.first_row,
                features=entry.features,
                norm_error=entry.norm_error,
            )
        except ArtefactError as error:
            raise ArtefactError(f"damaged: {error.problem}", where=error.where, mend=_MEND) from None

    def _map_rows(self) -> KnownRows:
        entry = self.entry
        stored = any(file.file == ROWS for file in entry.files)
        batches = self._batches(ROWS, self._mapped(ROWS)) if stored else []
        try:
            return KnownRows(batches, entry.rows, entry.first_row, entry.first_id)
        except ValueError as error:
            raise self._damaged(ROWS, str(error)) from None

    def _mapped(self, name: str) -> pa.ipc.RecordBatchFileReader:
        """An Arrow file, of which only the footer is read."""
        try:
            return pa.ipc.open_file(pa.memory_map(str(self._folder.local_path(name))))
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(name, str(error).splitlines()[0]) from None

    def _batches(self, name: str, file: pa.ipc.RecordBatchFileReader) -> list[pa.RecordBatch]:
        try:
            return [file.get_batch(number) for number in range(file.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(name, str(error).splitlines()[0]) from None

    def _damaged(self, name: str, why: str) -> ArtefactError:
        return ArtefactError(f"damaged: {why}", where=self._folder.uri_of(name), mend=_MEND)


def _to_be_mapped(index: Folder, entry: ShardEntry, form: Form) -> Shard:
    """A shard of which nothing was looked at yet."""
    shard = Shard.__new__(Shard)
    shard._index, shard.entry, shard.form = index, entry, form
    shard._folder = index / entry.folder
    return shard


def descriptors_of(shards: Sequence[Shard], rows: npt.NDArray[np.int64]) -> Descriptors:
    """Of rows, int64 [m] in ascending order, wherever in some shards they lie."""
    parts = []
    for shard in shards:
        places = rows - shard.entry.first_row
        parts.append(shard.descriptors(places[(places >= 0) & (places < shard.entry.rows)]))
    return concatenate(parts)
