"""The versions of an index: which there are, and deleting those that are no longer needed."""

import itertools
import re
import time
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs

from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.lock import seems_free, writing_alone
from ray_retrieval.search.manifest import (
    CURRENT,
    Manifest,
    backwards,
    number_of,
    read_current,
    read_pointer,
)
from ray_retrieval.storage import Folder, meant_by

_TOPS = ("shards", "approximate", "local")
"""Folders of folders that we write; somebody else may have folders of these names beside an index."""
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_BUILT = re.compile(rf"({'|'.join(_TOPS)})/{_FINGERPRINT.pattern}/[^/]+")
"""Files of a build, in a folder that may be no index."""
_DELETES = re.compile(rf"deletes/{_FINGERPRINT.pattern}\.bin")
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
        for manifest in backwards(Folder(uri))
    ]


def prune(uri: str | Path | Folder, keep: int = 2, *, dry_run: bool = False) -> Pruned:
    """Delete all but the newest versions, and the files that no version needs.

    Where a first build was not finished, there is no version yet, and what it has written is deleted.
    Readers that have a version open keep it: on a local disk what is mapped into memory stays readable, and
    of other stores what they have fetched, which the images that nobody has asked for yet are not.

    Args:
        uri: the index directory.
        keep: how many versions stay, at least 1.
        dry_run: only say what would be deleted, also while somebody else is writing.

    Raises:
        ArtefactError: if there is no index, the manifest of a version that stays is damaged, or somebody is
            writing to it.
        QueryError: if `keep` < 1.
    """
    index = Folder(uri)
    begun = _only_begun(index)
    if not begun:
        read_current(index)
    with nullcontext(seems_free(index)) if dry_run else writing_alone(index, "prune") as alone:
        if begun and _only_begun(index):
            return _collect_begun(index, begun, alone=alone, dry_run=dry_run)
        return collect(index, keep, alone=alone, dry_run=dry_run)


def _only_begun(index: Folder) -> dict[str, fs.FileInfo]:
    """Files of a first build that was not finished; none where there is, or was, a version."""
    files = index.files()
    if any(name == CURRENT or number_of(name) is not None for name in files):
        return {}
    return {name: info for name, info in files.items() if _BUILT.fullmatch(name)}


def _collect_begun(index: Folder, files: dict[str, fs.FileInfo], *, alone: bool, dry_run: bool) -> Pruned:
    """Delete what a build has left that never made a version."""
    spared = set() if alone else _recent(files, files)
    deleted = [name for name in _in_order(files) if name not in spared]
    for name in () if dry_run else deleted:
        index.remove(name)
    if alone and not dry_run:
        _remove_empty_folders(index)
    return Pruned(files=len(deleted), bytes=sum(files[name].size for name in deleted), spared=len(spared))


def collect(
    index: Folder, keep: int, *, alone: bool, dry_run: bool = False, coming: Collection[str] | None = None
) -> Pruned:
    """As `prune`, for a writer.

    Args:
        index: the index's folder.
        keep: how many versions stay, at least 1.
        alone: whether it holds the lock; else files that may be another writer's are spared, and nothing more
            is deleted once another version is published.
        dry_run: only say what would be deleted.
        coming: files that are there and that a version needs which will be published before; None: none will.

    Raises:
        ArtefactError: if the manifest of a version that stays is damaged, or another one is published
            meanwhile.
        QueryError: if `keep` < 1.
    """
    if keep < 1:
        raise QueryError(f"at least the current version is kept, asked for {keep}", where=index)
    current = read_current(index)
    # Those before are not read: what is damaged of them is deleted like the rest.
    more = int(coming is not None)
    kept = list(itertools.islice(backwards(index, current), keep - more))
    oldest = kept[-1].number if kept else current.number + 1
    needed = {name for manifest in kept for name, _ in manifest.needed()}.union(coming or ())
    unneeded = {name: info for name, info in index.files().items() if _is_ours(name) and name not in needed}
    gone = {number for number in map(number_of, unneeded) if number is not None and number < oldest}
    spared = set() if alone else _recent(unneeded, unneeded.keys() - _listed(index, current))
    deleted = [name for name in _in_order(unneeded) if name not in spared]
    for name in () if dry_run else deleted:
        if not alone and read_pointer(index) != current.pointer:
            raise ArtefactError("another version was published meanwhile", where=index, mend="run it again")
        index.remove(name)
    if alone and not dry_run:  # else an empty one may be a writer's who has only just begun
        _remove_empty_folders(index)
    return Pruned(
        versions=sorted(gone, reverse=True),
        kept=[*([current.number + 1] * more), *(manifest.number for manifest in kept)],
        files=len(deleted),
        bytes=sum(unneeded[name].size for name in deleted),
        spared=len(spared),
    )


def _listed(index: Folder, current: Manifest) -> set[str]:
    """Files of the versions that are there; without a lock, no other file is known to be nobody's."""
    try:
        return {name for manifest in backwards(index, current) for name, _ in manifest.needed()}
    except ArtefactError:
        return set()


def _is_ours(name: str) -> bool:
    """Whether a file has a name that we write, or write under; whatever else is there is left alone."""
    meant = meant_by(name)
    written = meant or name
    if _BUILT.fullmatch(written) or _DELETES.fullmatch(written) or number_of(written) is not None:
        return True
    return meant == CURRENT


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
    for top in _TOPS:
        for name in (index / top).names():
            if _FINGERPRINT.fullmatch(name) and f"{top}/{name}" not in used:
                index.remove(f"{top}/{name}")
