"""Files that a search needs beside the shards: one for each, which counts once it is described.

Beside `0.faiss` lies `0.json` with its checksum, written after it. A build that starts again keeps what is as
its description says, and writes the rest anew.
"""

from collections.abc import Callable, Sequence

from ray_retrieval.errors import ArtefactError
from ray_retrieval.search.manifest import Approximate, FileEntry, LocalSearch, ShardEntry
from ray_retrieval.search.pool import Advance, Pool, Threads
from ray_retrieval.storage import Folder, check_file, file_entry, read_description, write_description

FILES_VERSION = 1
_KIND = "approximate index of a shard"
_TRAINED = "trained"

Fill = Callable[[int, Callable[[bytes], object]], object]
"""Gives the bytes of a shard's file, by its number, to what writes them."""


def complete(
    index: Folder,
    folder: str,
    suffix: str,
    names: Sequence[str],
    prepare: Callable[[], Fill],
    pool: Pool,
) -> tuple[FileEntry, ...]:
    """Write the files that are missing or damaged, several at a time.

    Args:
        index: the index's folder.
        folder: of the files, from there.
        suffix: of the files' names.
        names: of the files, one for each shard: `numbers` or `names_of`.
        prepare: called once, and only if a file is to be written.
        pool: who writes them.

    Returns:
        One entry a shard, named from the index's folder.
    """
    (index / folder).sweep()
    entries = [_finished(index, f"{folder}/{name}", suffix) for name in names]
    missing = [number for number, entry in enumerate(entries) if entry is None]
    if missing:
        fill = prepare()

        def write(number: int, _: Advance) -> FileEntry:
            name = f"{folder}/{names[number]}"
            with index.writing(f"{name}.{suffix}") as stream:
                fill(number, stream.write)
            entry = FileEntry(**file_entry(index, f"{name}.{suffix}"))
            body = entry.model_dump()
            write_description(index, f"{name}.json", kind=_KIND, version=FILES_VERSION, body=body)
            return entry

        for number, entry in zip(missing, pool.map(write, missing, lambda _: None), strict=True):
            if pool.elsewhere:
                check_file(index, entry.model_dump(), content=True)
            entries[number] = entry
    return tuple(entry for entry in entries if entry is not None)


def trained_once(index: Folder, folder: str, suffix: str, train: Callable[[], bytes]) -> FileEntry:
    """What the files of a folder are filled from, a file beside them; trained only if it is not there.

    Args:
        index: the index's folder.
        folder: of the files, from there.
        suffix: of the files' names.
        train: gives the bytes.
    """

    def prepare() -> Fill:
        return lambda _, write: write(train())

    (entry,) = complete(index, folder, suffix, [_TRAINED], prepare, Threads(1))
    return entry


def trained_bytes(index: Folder, built: Approximate | LocalSearch) -> bytes:
    """What the files of FAISS, or of cells, are filled from.

    Raises:
        ArtefactError: if it is missing or damaged.
    """
    assert built.trained is not None, "what is filled was trained"
    check_file(index, built.trained.model_dump(), content=True)
    return index.read_bytes(built.trained.file)


def numbers(shards: Sequence[ShardEntry]) -> list[str]:
    """Names of the files of shards in a folder whose name stands for just these shards."""
    return [str(number) for number in range(len(shards))]


def names_of(shards: Sequence[ShardEntry]) -> list[str]:
    """Names of the files of shards that came later: what stands for their content."""
    return [shard.folder.rpartition("/")[2] for shard in shards]


def _finished(index: Folder, name: str, suffix: str) -> FileEntry | None:
    """The entry of a shard's file that is there and sound."""
    try:
        body = read_description(index, f"{name}.json", kind=_KIND, version=FILES_VERSION)
        entry = FileEntry(**{key: value for key, value in body.items() if key not in ("format", "version")})
        if entry.file != f"{name}.{suffix}":
            return None
        check_file(index, entry.model_dump(), content=True)
    except (ArtefactError, ValueError):
        return None
    return entry
