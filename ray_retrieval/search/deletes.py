"""Tombstones: the rows of an index that were removed, in one immutable file a version.

`deletes/<fingerprint>.bin` holds all deleted rows of a version: int64, little-endian, ascending.
"""

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import ArtefactError
from ray_retrieval.search.manifest import FileEntry, Manifest
from ray_retrieval.storage import Folder, check_file, digest, file_entry

Rows = npt.NDArray[np.int64]


def write_deletes(index: Folder, rows: Rows) -> FileEntry | None:
    """Write the file of deleted rows, unless it is there; None without rows.

    Args:
        index: the index's folder.
        rows: int64 [n], ascending, without repeats.
    """
    if len(rows) == 0:
        return None
    data = rows.astype("<i8").tobytes()
    (index / "deletes").sweep()
    name = f"deletes/{digest(data)[:16]}.bin"
    if not index.exists(name) or index.checksum(name) != digest(data):
        index.write_bytes(name, data)
    return FileEntry(**file_entry(index, name))


def read_deletes(index: Folder, manifest: Manifest, *, content: bool = False) -> Rows:
    """The deleted rows of a version: int64 [n], ascending.

    Args:
        index: the index's folder.
        manifest: of the version.
        content: compare the file's checksum, not just its size.

    Raises:
        ArtefactError: if the file is missing or damaged.
    """
    entry = manifest.deletes
    if entry is None:
        return np.zeros(0, np.int64)
    check_file(index, entry.model_dump(), content=content)
    rows = np.frombuffer(index.read_bytes(entry.file), "<i8").astype(np.int64)
    bounded = np.concatenate([[-1], rows, [manifest.next_row]])
    if len(rows) != manifest.deleted or (np.diff(bounded) < 1).any():
        raise ArtefactError(
            f"damaged: it should name {manifest.deleted:,} rows below {manifest.next_row:,} in order",
            where=f"{index}/{entry.file}",
            mend="restore the file, or roll back to an earlier version",
        )
    return rows
