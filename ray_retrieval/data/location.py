"""Where images and lists lie: local paths and the URIs of pyarrow.fs, read in the same way.

A location is a local path (`~` and environment variables are expanded) or a `scheme://` URI. It may name a
part of a file: `shard.parquet#bytes=4-1237`, see `storage.byte_range`.
"""

import functools
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow
from pyarrow import fs

from ray_retrieval.errors import ArtefactError, DataError, StoreError
from ray_retrieval.storage import byte_range, is_uri, plain_uri, split_query, store_at


def expand(location: str) -> str:
    """The location with `~` and environment variables filled in; a local path becomes absolute."""
    text = os.path.expandvars(os.path.expanduser(location))
    if is_uri(text):
        return plain_uri(text)
    return os.path.abspath(text)


def join(folder: str, name: str) -> str:
    """`name` inside `folder`; a name that is absolute or a URI already stays as it is."""
    if is_uri(name) or os.path.isabs(name):
        return name
    if is_uri(folder):
        base, query = split_query(folder)
        return f"{base}/{posixpath.normpath(name)}{query}"
    return os.path.normpath(os.path.join(folder, name))


def parent(location: str) -> str:
    """The folder that holds a file; that of a URI with a query has the query too."""
    if not is_uri(location):
        return os.path.dirname(location)
    base, query = split_query(location)
    return f"{posixpath.dirname(base)}{query}"


def name_of(location: str) -> str:
    """The last part of a path or URI, without the query of a URI."""
    return split_query(location)[0].rpartition("/")[2]


def find(location: str) -> fs.FileInfo:
    """What is there: a file, a folder or nothing.

    Raises:
        DataError: if the store is unknown or cannot be reached.
    """
    filesystem, path = store(location)
    with _listing(location):
        return filesystem.get_file_info(path)


def exists(location: str) -> bool:
    """Whether a file or a folder is there; of a part of a file, whether the file is.

    Raises:
        DataError: if the store is unknown or cannot be reached.
    """
    location, _, _ = byte_range(location)
    if not is_uri(location):
        return os.path.exists(location)
    return bool(find(location).type != fs.FileType.NotFound)


def open_file(location: str) -> pyarrow.NativeFile:
    """A random-access file; a local one is memory-mapped.

    Raises:
        DataError: if it is missing or cannot be read.
    """
    filesystem, path = store(location)
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            return pyarrow.memory_map(path)
        return filesystem.open_input_file(path)
    except OSError as error:
        raise _unreadable(location, error) from None


def read_bytes(location: str, limit: int) -> bytes:
    """A file's bytes, or those of a part of one, at most `limit` + 1, so that the caller can tell too many.

    Raises:
        DataError: if it is missing or cannot be read, or if the file ends before its part does.
    """
    file, first, length = byte_range(location)
    wanted = limit + 1 if length is None else min(length, limit + 1)
    try:
        data = _read(file, first, wanted)
    except OSError as error:
        raise _unreadable(location, error) from None
    if length is not None and len(data) < wanted:
        raise DataError("the file ends before this part of it", where=location, mend="restore the file")
    return data


def _read(file: str, first: int, count: int) -> bytes:
    """At most `count` bytes of a file from one on."""
    if not is_uri(file):
        with open(file, "rb") as local:
            local.seek(first)
            return local.read(count)
    filesystem, path = store(file)
    if first:
        with filesystem.open_input_file(path) as part:
            return bytes(part.read_at(count, first))
    with filesystem.open_input_stream(path) as remote:
        return bytes(remote.read(count))


def files_in(folder: str) -> list[str]:
    """Names of the files directly inside a folder, sorted; hidden ones are left out.

    Raises:
        DataError: if the folder is not there, or may not be listed.
    """
    filesystem, path = store(folder)
    with _listing(folder):
        if isinstance(filesystem, fs.LocalFileSystem):
            # pyarrow stops at a name that is not UTF-8, whatever the file is.
            with os.scandir(path) as entries:
                return sorted(i.name for i in entries if i.is_file() and not _hidden(i.name))
        found = filesystem.get_file_info(fs.FileSelector(path))
    return sorted(i.base_name for i in found if i.type == fs.FileType.File and not _hidden(i.base_name))


def walk(folder: str) -> Iterator[str]:
    """Paths of all files below a folder, relative to it, with `/`; hidden files and folders are left out.

    The order is not defined: sort what comes. Links to folders are followed, each real folder once.

    Raises:
        DataError: if a folder below a local one cannot be read; if one of a store is not there, or may not be
            listed.
    """
    filesystem, path = store(folder)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield from _walk_local(path)
        return
    with _listing(folder):
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    for info in found:
        name = info.path[len(path) :].lstrip("/")
        if info.type == fs.FileType.File and not any(_hidden(part) for part in name.split("/")):
            yield name


def _walk_local(top: str) -> Iterator[str]:
    seen = set()
    for here, folders, files in os.walk(top, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Sorted, so that of two links to one folder it is always the same that counts.
        folders[:] = sorted(name for name in folders if not _hidden(name))
        prefix = os.path.relpath(here, top)
        for name in files:
            if not _hidden(name):
                yield name if prefix == "." else f"{prefix.replace(os.sep, '/')}/{name}"


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"the folder cannot be read: {error.strerror or error}",
        where=error.filename,
        mend="make it readable, or leave it out by a name that begins with a dot",
    ) from None


def _hidden(name: str) -> bool:
    # lost+found lies at the top of a disk, and only root may read it.
    return name.startswith(".") or name in ("__MACOSX", "lost+found")


@contextmanager
def _listing(location: str) -> Iterator[None]:
    """Say of which place a store cannot tell what is there."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"the store cannot be reached: {reason}", where=location) from None


def _unreadable(location: str, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError("the file is missing", where=location)
    kind = StoreError if is_uri(location) else DataError
    return kind(f"cannot be read: {error.strerror or error}", where=location)


def store(location: str) -> tuple[fs.FileSystem, str]:
    """The filesystem that a location lies on, and its path there.

    Raises:
        DataError: if the store is unknown or cannot be reached.
    """
    if not is_uri(location):
        return _local(), location
    try:
        return store_at(location)
    except ArtefactError as error:
        raise DataError(error.problem, where=error.where, mend=error.mend) from None


@functools.lru_cache(maxsize=1)
def _local() -> fs.FileSystem:
    return fs.LocalFileSystem()
