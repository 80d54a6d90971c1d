"""What `exporting` has written, read again."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import DataError
from ray_retrieval.search.column_values import Shape
from ray_retrieval.search.faiss_files import FaissFile
from ray_retrieval.search.table_files import TableFile, open_table
from ray_retrieval.search.vector_files import (
    ArrayFile,
    Block,
    VectorFile,
)
from ray_retrieval.storage import Folder, check_file, fingerprint, read_description

EXPORT, KNOWN = "export.json", "rows.parquet"
KIND, VERSION = "export of an index", 1


def is_export(place: str) -> bool:
    """Whether a folder holds an export."""
    return Folder(place).exists(EXPORT)


class ExportedFile:
    """The rows of an export: descriptors in one file, what else is known of them in another, or the same.

    Args:
        place: the folder.

    Raises:
        ArtefactError: if it holds no export, or a file is missing or damaged.
        DataError: if it is one of sets of local features, of an approximate structure, or of Lance.
    """

    def __init__(self, place: str) -> None:
        folder = Folder(place)
        about = read_description(folder, EXPORT, kind=KIND, version=VERSION)
        form = Form.from_json(about)
        names = [entry["file"] for entry in about["files"]]
        if form.kind is DescriptorKind.LOCAL or about["approximate"] or not names:
            what = f"a structure of {about['content']}" if about["approximate"] else about["content"]
            raise DataError(
                f"an export of {form} as {what} is not read again",
                where=place,
                mend="give one of codes or vectors as npy, faiss, parquet or arrow",
            )
        for entry in about["files"]:
            check_file(folder, entry, content=True)
        self.where, self._entries = place, about["files"]
        self._descriptors = _opened(folder.uri_of(names[0]))
        apart = len(names) > 1
        self._known = open_table(folder.uri_of(names[1])) if apart else None
        self.rows = self._descriptors.rows
        found = self._descriptors.shape
        bits = form.size if form.kind is DescriptorKind.CODES else None
        self.shape = Shape(found.dtype, found.width, bits)
        self.schema = self._known.schema.remove_metadata() if self._known else self._descriptors.schema
        self.model: str | None = about["model"]
        self.class_names: list[str] | None = about["class_names"]
        if self._known is not None and self._known.rows != self.rows:
            raise DataError(f"{self._known.rows:,} rows beside {self.rows:,} descriptors", where=place)

    def __reduce__(self) -> Any:
        """In another process the files are opened anew."""
        return ExportedFile, (self.where,)

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        for values, known in self._descriptors.blocks(start, stop):
            count = len(values)
            if self._known is not None and self.schema.names:
                batches = self._known.batches(self.schema.names, start, start + count, count)
                yield values, pa.Table.from_batches(batches)
            else:
                yield values, known
            start += count

    def column(self, name: str) -> pa.ChunkedArray:
        if self._known is None:
            return self._descriptors.column(name)
        batches = self._known.batches([name], 0, self.rows, self.rows)
        return pa.chunked_array([batch[name] for batch in batches], self.schema.field(name).type)

    def checksum(self) -> str:
        return fingerprint([entry["sha256"] for entry in self._entries])


def _opened(place: str) -> VectorFile:
    if place.endswith(".npy"):
        return ArrayFile.open(place)
    return FaissFile(place) if place.endswith(".faiss") else TableFile(place, None)
