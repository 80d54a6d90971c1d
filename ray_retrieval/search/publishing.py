"""Making a version of an index the current one.

On a local disk its writer holds the lock. Elsewhere two writers, or a writer and somebody who prunes, may be
at work: nothing that was published is ever written over, so the one that is overtaken is told so, and the
index stays what the other made it. What cannot be had without a lock is the comparison of `CURRENT` and its
replacement in one step: of two that publish within that moment one may not hear that it was overtaken.
"""

from typing import Any

from ray_retrieval.errors import ArtefactError, ConflictError
from ray_retrieval.search.manifest import CURRENT, Manifest, as_file, number_of, read_pointer
from ray_retrieval.storage import Folder


def publish(index: Folder, manifest: Manifest, *, parent: Manifest | None) -> Manifest:
    """Make a version current. Its shards must be complete; readers see the old version or this one.

    Args:
        index: its folder; on a local disk its lock is held (`lock.writing_alone`).
        manifest: what it consists of; its number and parent are set here.
        parent: the version that it was made from; None: there was no index.

    Returns:
        The manifest as it was published.

    Raises:
        ConflictError: if another version was published since `parent` was read, or files that this one needs
            were pruned meanwhile.
    """
    _check_parent(index, parent)
    place: dict[str, Any] = {"number": 1, "parent": None, "parent_sha256": None}
    if parent is not None:
        place = {"number": parent.number + 1, "parent": parent.number, "parent_sha256": parent.sha256}
    manifest = Manifest.model_validate({**manifest.model_dump(), **place})
    data, manifest = as_file(manifest)
    index.write_bytes(manifest.name, data)
    _check_there(index, manifest)
    # Stores without locks cannot compare and replace in one step: what is left is this moment.
    _check_parent(index, parent)
    index.write_text(CURRENT, manifest.pointer)
    if read_pointer(index) != manifest.pointer:
        raise _overtaken(index)
    try:
        _check_there(index, manifest)
    except ArtefactError:
        if parent is None:
            index.remove(CURRENT)
        else:
            index.write_text(CURRENT, parent.pointer)
        raise
    return manifest


def _check_parent(index: Folder, parent: Manifest | None) -> None:
    """Refuse to go on where the current version is not, or no longer, the one that was read."""
    pointer = read_pointer(index) if index.exists(CURRENT) else None
    if pointer != (None if parent is None else parent.pointer):
        raise _overtaken(index)


def _overtaken(index: Folder) -> ConflictError:
    found = "it was deleted"
    if index.exists(CURRENT):
        found = f"version {number_of(read_pointer(index).partition(' ')[0])} was published"
    return ConflictError(f"{found} meanwhile", where=index, mend="run it again")


def _check_there(index: Folder, manifest: Manifest) -> None:
    """Refuse a version of which a file is missing: somebody who does not know of it may have pruned it."""
    there = index.files()
    for name, size in manifest.needed():
        if name not in there or size not in (None, there[name].size):
            raise ConflictError(
                "missing or damaged: it may have been pruned meanwhile",
                where=f"{index}/{name}",
                mend="run it again",
            )
