"""The versions of an index: which there are, and deleting those that are no longer needed."""

import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs

from ray_retrieval.errors import QueryError
from ray_retrieval.search.lock import writing_alone
from ray_retrieval.search.manifest import CURRENT, Manifest, history, read_current
from ray_retrieval.search.shard import DESCRIPTION
from ray_retrieval.storage import Folder

_OURS = ("shards", "approximate", "local", "deletes")
"""Folders whose files are all written by us."""
_AT_THE_TOP = re.compile(rf"manifest-\d+\.json(\.tmp-.*)?|{CURRENT}\.tmp-.*")
_RECENT_NS = 24 * 3600 * 10**9
"""Where there are no locks, files younger than a day may be those of somebody who is writing."""


@dataclass(frozen=True)
class Pruned:
    """What was deleted, or would be.

    Attributes:
        versions: numbers of versions.
        kept: numbers of those that stay.
        files: how many.
        bytes: of them.
        spared: files that no version needs, but that somebody may be writing just now.
    """

    versions: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    spared: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def versions(uri: str | Path | Folder) -> list[dict[str, Any]]:
    """The versions that are there, the newest first, as plain values.

    Raises:
        ArtefactError: if there is no index, or a manifest is damaged.
    """
    return [
        {
            "version": manifest.number,
            "parent": manifest.parent,
            "operation": manifest.operation,
            "rows": manifest.rows,
            "deleted": manifest.deleted,
            "shards": len(manifest.shards),
            "bytes": manifest.bytes,
        }
        for manifest in history(Folder(uri))
    ]


def prune(uri: str | Path | Folder, keep: int = 2, *, dry_run: bool = False) -> Pruned:
    """Delete all but the newest versions, and the files that no version needs.

    Readers that have a version open keep it: on a local disk, what is mapped into memory stays readable.

    Args:
        uri: the index directory.
        keep: how many versions stay, at least 1.
        dry_run: only say what would be deleted.

    Raises:
        ArtefactError: if there is no index, a manifest is damaged, or somebody is writing to it.
        QueryError: if `keep` < 1.
    """
    index = Folder(uri)
    read_current(index)
    with writing_alone(index, "prune"):
        return collect(index, keep, dry_run=dry_run)


def collect(index: Folder, keep: int, *, dry_run: bool = False, coming: int = 0) -> Pruned:
    """As `prune`, for whoever holds the lock.

    Args:
        index: the index's folder.
        keep: how many versions stay, at least 1.
        dry_run: only say what would be deleted.
        coming: versions that will be published before.

    Raises:
        ArtefactError: if a manifest is damaged.
        QueryError: if `keep` < 1.
    """
    if keep < 1:
        raise QueryError(f"at least the current version is kept, asked for {keep}", where=index)
    known = history(index)
    kept, gone = known[: max(0, keep - coming)], known[max(0, keep - coming) :]
    needed = {name for manifest in kept for name in files_of(manifest)}
    unneeded = {name: info for name, info in index.files().items() if _is_ours(name) and name not in needed}
    listed = {name for manifest in known for name in files_of(manifest)}
    spared = set() if index.is_local else _recent(unneeded, unneeded.keys() - listed)
    deleted = [name for name in _in_order(unneeded) if name not in spared]
    if not dry_run:
        for name in deleted:
            index.remove(name)
        _remove_empty_folders(index)
    return Pruned(
        versions=[manifest.number for manifest in gone],
        kept=[manifest.number for manifest in kept],
        files=len(deleted),
        bytes=sum(unneeded[name].size for name in deleted),
        spared=len(spared),
    )


def files_of(manifest: Manifest) -> Iterable[str]:
    """Every file that a version needs, from the index's folder."""
    yield manifest.name
    for shard in manifest.shards:
        yield from (f"{shard.folder}/{file.file}" for file in shard.files)
        yield f"{shard.folder}/{DESCRIPTION}"
    for file in manifest.files:
        yield file.file
        yield f"{file.file.rpartition('.')[0]}.json"
    if manifest.deletes is not None:
        yield manifest.deletes.file


def _is_ours(name: str) -> bool:
    """Whether a file can be one of an index; what somebody else has put there is left alone."""
    top, slash, _ = name.partition("/")
    return top in _OURS if slash else _AT_THE_TOP.fullmatch(top) is not None


def _in_order(files: Iterable[str]) -> list[str]:
    """Manifests first, the oldest first, and what makes a shard count before its other files."""
    return sorted(
        files, key=lambda name: (not name.startswith("manifest-"), not name.endswith(".json"), name)
    )


def _recent(files: dict[str, fs.FileInfo], names: Iterable[str]) -> set[str]:
    """Those of some files that were written in the last day."""
    since = time.time_ns() - _RECENT_NS
    return {name for name in names if (files[name].mtime_ns or 0) > since}


def _remove_empty_folders(index: Folder) -> None:
    """Delete folders of shards, and of files beside them, that have lost their last file."""
    used = {"/".join(name.split("/")[:2]) for name in index.files()}
    for top in _OURS:
        for name in (index / top).names():
            if f"{top}/{name}" not in used:
                index.remove(f"{top}/{name}")
