"""Artefact directories on any pyarrow filesystem: written whole or not at all, and checked when read.

An artefact is a directory with one JSON file that describes it (format, version, fingerprint) beside its
data. It lives at a URI: a local path, `s3://…` or `gs://…`. Every file is written under a temporary name
and renamed, so a reader sees the old file or the new one and a killed writer leaves nothing that counts.
Credentials of a store are those of its own environment variables, profiles and roles, never of a URI.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import pyarrow
from pyarrow import fs

from ray_retrieval.errors import ArtefactError

LOCK = ".lock"
"""Name of the file that says who works in a folder, see `lock`."""
_TEMPORARY = re.compile(r"(.+)\.tmp-[0-9a-f]{12}")
"""Names that files are written under, see `temporary_name`."""
_VARIABLE = re.compile(r"(?<![^/])\$\{?(?P<name>[A-Za-z_]\w*)[^/]*", re.ASCII)
"""What a folder is called if `os.path.expandvars` does not know the variable that its name begins with."""
_STORES = ("s3", "gs", "gcs", "abfs", "abfss")
"""Schemes of stores that are asked over the network."""
_WITHOUT_FOLDERS = ("s3", "gcs")
"""Stores that need no folder to be made before a file: pyarrow would ask for each one on the way."""
_CHUNK = 1 << 24
_DAY_NS = 24 * 3600 * 10**9
_COPIED_AT_ONCE = 5 << 30
"""Bytes of the largest object that S3 copies in one request, and so can rename."""


class Folder:
    """A directory of artefact files.

    Args:
        uri: a local path (`~` and environment variables are expanded) or a `scheme://` URI of pyarrow.fs. A
            store is not asked before something of it is wanted, and whatever asks it raises as `store_at`.

    Raises:
        ArtefactError: if it is empty, the URI's scheme is unknown, or it holds a password, or the first word
            of a folder in it is an environment variable that is not set.
    """

    def __init__(self, uri: "str | Path | Folder") -> None:
        self.uri: str
        text = uri.uri if isinstance(uri, Folder) else os.path.expandvars(os.path.expanduser(str(uri)))
        if not text:  # as a shell makes of a variable that is not set
            raise ArtefactError("a path of no letters names no folder", mend="give one; '.' is this folder")
        if is_uri(text):
            refuse_password(text)
            self.uri = plain_uri(text)
            if text.partition("://")[0] not in _STORES:
                store_at(text)
        else:
            self.uri = os.path.abspath(text)
        if not isinstance(uri, Folder):
            _refuse_unset(text)

    @functools.cached_property
    def _store(self) -> tuple[fs.FileSystem, str]:
        return store_at(self.uri) if is_uri(self.uri) else (fs.LocalFileSystem(), self.uri)

    @property
    def filesystem(self) -> fs.FileSystem:
        """What it lies on."""
        return self._store[0]

    @property
    def path(self) -> str:
        """Where it lies there."""
        return self._store[1].rstrip("/")

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.uri_of(name))

    @property
    def parent(self) -> "Folder":
        """The folder that this one lies in."""
        base, query = split_query(self.uri)
        return Folder(f"{base.rpartition('/')[0] or '/'}{query}")

    def uri_of(self, name: str) -> str:
        """Path or URI of a file or folder inside; of this one without a name."""
        base, query = split_query(self.uri)
        return f"{base}/{name}{query}" if name else self.uri

    def path_inside(self, location: str) -> str | None:
        """Where a path or URI leads to from here: "" for the folder itself, None outside of it."""
        base, found = split_query(self.uri)[0].rstrip("/"), split_query(location)[0].rstrip("/")
        return found[len(base) + 1 :] if f"{found}/".startswith(f"{base}/") else None

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def exists(self, name: str = "") -> bool:
        """Whether the file (or, without a name, the folder) is there."""
        with self._guarded(name):
            info = self.filesystem.get_file_info(self._at(name))
            return bool(info.type != fs.FileType.NotFound)

    def is_file(self) -> bool:
        """Whether a file is at the place of the folder."""
        with self._guarded():
            return bool(self.filesystem.get_file_info(self.path).type == fs.FileType.File)

    def names(self) -> list[str]:
        """Names of the files and folders directly inside, sorted; temporary ones and a lock are left out."""
        found = (entry.base_name for entry in self.entries())
        return sorted(name for name in found if meant_by(name) is None and name != LOCK)

    def entries(self) -> list[fs.FileInfo]:
        """Every file and folder directly inside, in no order; temporary ones too. None without the folder."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        with self._guarded():
            return list(self.filesystem.get_file_info(selector))

    def files(self) -> dict[str, fs.FileInfo]:
        """Every file inside, however deep, by its path from here, sorted; temporary ones too."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        with self._guarded():
            found = self.filesystem.get_file_info(selector)
        inside = {info.path[len(self.path) + 1 :]: info for info in found if info.type == fs.FileType.File}
        return dict(sorted(inside.items()))

    def size(self, name: str) -> int:
        """Bytes of a file. Raises ArtefactError where it is missing."""
        with self._guarded(name):
            info = self.filesystem.get_file_info(self._at(name))
        if info.type == fs.FileType.NotFound:
            raise ArtefactError("the file is missing", where=self.uri_of(name))
        return int(info.size)

    @contextmanager
    def reading(self, name: str) -> Iterator[pyarrow.NativeFile]:
        """A random-access file for reading. Raises ArtefactError where it is missing or may not be read."""
        with self._guarded(name):
            try:
                source = self.filesystem.open_input_file(self._at(name))
            except FileNotFoundError:
                raise ArtefactError("the file is missing", where=self.uri_of(name)) from None
        with source:
            yield source

    def read_bytes(self, name: str) -> bytes:
        with self._guarded(name), self.reading(name) as source:
            return bytes(source.read())

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file in pieces. Raises ArtefactError where it is missing or cannot be read."""
        with self._guarded(name), self.reading(name) as source:
            while chunk := source.read(_CHUNK):
                yield chunk

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A stream whose bytes become the file `name` when the block ends without an error."""
        target = self._at(name)
        temporary = temporary_name(target)
        with self._guarded(name):
            if self.filesystem.type_name not in _WITHOUT_FOLDERS:
                self.filesystem.create_dir(os.path.dirname(target), recursive=True)
            try:
                if self.is_local:
                    with open(temporary, "wb") as local:
                        yield local
                        local.flush()
                        os.fsync(local.fileno())
                    os.replace(temporary, target)
                else:
                    with self.filesystem.open_output_stream(temporary) as remote:
                        yield remote
                        size = remote.tell()
                    self._rename(temporary, target, size)
            except BaseException:
                with suppress(OSError):
                    self.filesystem.delete_file(temporary)
                raise

    def _rename(self, temporary: str, target: str, size: int) -> None:
        """Rename a file of a store; one that is too large for the store to copy goes through this process."""
        if size <= _COPIED_AT_ONCE:
            self.filesystem.move(temporary, target)
            return
        try:
            with (
                self.filesystem.open_input_stream(temporary) as source,
                self.filesystem.open_output_stream(target) as copy,
            ):
                while chunk := source.read(_CHUNK):
                    copy.write(chunk)
        except BaseException:
            # What was copied until then became the file when it was closed.
            with suppress(OSError):
                self.filesystem.delete_file(target)
            raise
        self.filesystem.delete_file(temporary)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writing(name) as stream:
            stream.write(data)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def read_json(self, name: str) -> Any:
        """The parsed file. Raises ArtefactError where it is missing or no JSON."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise ArtefactError(f"not valid JSON: {error}", where=self.uri_of(name)) from None

    def read_json_lines(self, name: str) -> dict[int, dict[str, Any]]:
        """The objects of a file of one a line, by their lines' numbers; none where the file is missing.

        Raises:
            ArtefactError: naming the line that is no object of JSON.
        """
        if not self.exists(name):
            return {}
        found = {}
        for number, line in enumerate(self.read_bytes(name).splitlines(), start=1):
            if line.strip():
                try:
                    found[number] = dict(json.loads(line))
                except (ValueError, TypeError) as error:
                    raise ArtefactError(
                        f"line {number} is not valid JSON: {error}",
                        where=self.uri_of(name),
                        mend="remove the line",
                    ) from None
        return found

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, _as_json(value))

    def remove(self, name: str = "") -> None:
        """Delete a file, or a folder with everything in it; nothing happens where it is missing."""
        # Another process may delete it between the look and the deed.
        with self._guarded(name), suppress(FileNotFoundError):
            info = self.filesystem.get_file_info(self._at(name))
            if info.type == fs.FileType.Directory:
                self.filesystem.delete_dir(info.path)
            elif info.type == fs.FileType.File:
                self.filesystem.delete_file(info.path)

    def sweep(self) -> None:
        """Delete the files that killed writers left behind directly inside, by their names; no folders.

        On a store somebody else may be writing, whom no lock keeps away: there it must be a day old.
        """
        for info in self.entries():
            name = info.base_name
            left_behind = self.is_local or time.time_ns() - (info.mtime_ns or 0) > _DAY_NS
            if info.type == fs.FileType.File and meant_by(name) and left_behind:
                self.remove(name)

    def local_path(self, name: str = "") -> Path:
        """A local path of the file, for memory mapping; a remote file is fetched once into a cache.

        The cache is a folder of the user's own where temporary files go, see `tempfile.gettempdir`. A file
        there is found again while the remote one has the same size and time; nothing is ever deleted.

        Args:
            name: of the file; without one, it is the one at the place of the folder.

        Raises:
            ArtefactError: if the file is missing or cannot be fetched.
        """
        if self.is_local:
            if not self.exists(name):
                raise ArtefactError("the file is missing", where=self.uri_of(name))
            return Path(self._at(name))
        with self._guarded(name):
            info = self.filesystem.get_file_info(self._at(name))
        key = digest(f"{self.uri_of(name)}|{info.size}|{info.mtime_ns}".encode())[:24]
        cache = _cache()
        if not cache.exists(key):
            with cache.writing(key) as target:
                for chunk in self.chunks(name):
                    target.write(chunk)
        return Path(cache.path) / key

    def checksum(self, name: str = "") -> str:
        """sha256 of the file's bytes, in hexadecimal.

        Args:
            name: as for `local_path`.

        Raises:
            ArtefactError: if the file is missing or cannot be read.
        """
        state = hashlib.sha256()
        for chunk in self.chunks(name):
            state.update(chunk)
        return state.hexdigest()

    @contextmanager
    def _guarded(self, name: str = "") -> Iterator[None]:
        """Say where and why a store refuses: no rights, no space, a file where a folder should be."""
        try:
            yield
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise refusal(error, self.uri_of(name)) from error

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path


def temporary_name(name: str) -> str:
    """A name beside `name`, to write under until all of it is there; no two are the same."""
    return f"{name}.tmp-{uuid.uuid4().hex[:12]}"


def meant_by(name: str) -> str | None:
    """The name that a file of a temporary name was to get; None if `name` is none of `temporary_name`'s."""
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found else None


def refusal(error: OSError | pyarrow.ArrowInvalid, where: object) -> ArtefactError:
    """What to say of a store that refuses: no rights, no space, no such name, a file instead of a folder."""
    said = error.strerror if isinstance(error, OSError) else None
    reason = said or (str(error).splitlines() or [type(error).__name__])[0]
    return ArtefactError(
        f"the store refuses: {reason}", where=where, mend="check the path, the rights and the space left"
    )


def is_remote(location: str) -> bool:
    """Whether the location is in a store that is asked over the network."""
    return location.partition("://")[0] in _STORES and is_uri(location)


def is_uri(location: str) -> bool:
    """Whether the location names a store by a scheme (`s3://…`) rather than a local path."""
    return "://" in location


def split_query(location: str) -> tuple[str, str]:
    """Address and query (`?endpoint_override=…`, its mark included) of a URI; a local path is all address."""
    if not is_uri(location):
        return location, ""
    address, mark, query = location.partition("?")
    return address, mark + query


def plain_uri(uri: str) -> str:
    """The URI of the same place without slashes that say nothing: at its end, and after one another."""
    base, query = split_query(uri)
    scheme, _, rest = base.partition("://")
    return f"{scheme}://{re.sub('/+', '/', rest).rstrip('/')}{query}"


def _refuse_unset(location: str) -> None:
    """Raise ArtefactError if a variable is left in a path or URI, unless a local folder is called so."""
    for found in _VARIABLE.finditer(location):
        if not os.path.lexists(location[: found.end()]):
            raise ArtefactError(
                f"the environment variable {found['name']} is not set", where=location, mend="set it"
            )


def store_at(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem that a `scheme://` URI lies on, and its path there; one client for each bucket.

    The path is taken as it stands, a key of a store may hold `%`; but that of `file://` is percent-decoded.

    Raises:
        ArtefactError: if the scheme is unknown, the store cannot be reached, or the URI holds a password.
    """
    refuse_password(uri)
    base, query = split_query(uri)
    scheme, _, rest = base.partition("://")
    authority, _, inside = rest.partition("/")
    try:
        filesystem, root = _client(f"{scheme}://{authority}{query}")
    except (pyarrow.ArrowException, OSError, ImportError) as error:
        raise ArtefactError(
            f"cannot be opened: {error}", where=uri, mend="use a local path, s3:// or gs://"
        ) from None
    inside = unquote(inside) if scheme == "file" else inside
    return filesystem, f"{root.rstrip('/')}/{inside.strip('/')}"


def refuse_password(uri: str) -> None:
    """Raise ArtefactError if a URI holds a password: URIs are written into logs, recipes and artefacts."""
    scheme, _, rest = uri.partition("://")
    who, _, host = re.split(r"[/?]", rest, maxsplit=1)[0].rpartition("@")
    if ":" in who:
        raise ArtefactError(
            "a key or password does not belong into a URI, which is written into logs and recipes",
            where=f"{scheme}://…@{host}",
            mend="give it by environment variables, such as AWS_SECRET_ACCESS_KEY, or by a profile",
        )


# Making a client costs round trips: for the region of the bucket, and for credentials of a role.
@functools.lru_cache(maxsize=64)
def _client(address: str) -> tuple[fs.FileSystem, str]:
    filesystem, path = fs.FileSystem.from_uri(address + "/" if address == "file://" else address)
    return filesystem, str(path)


def _cache() -> Folder:
    """The folder of fetched files, which nobody else may write."""
    user = os.getuid()
    cache = Folder(Path(tempfile.gettempdir()) / f"ray_retrieval-cache-{user}")
    with cache._guarded():
        os.makedirs(cache.path, mode=0o700, exist_ok=True)
        owner = os.stat(cache.path).st_uid
    if owner != user:
        raise ArtefactError(
            "the cache belongs to somebody else", where=cache, mend="set TMPDIR to a folder of your own"
        )
    return cache


_PART = re.compile(r"#bytes=([0-9]+)-([0-9]+)(?=$|\?)")


def byte_range(location: str) -> tuple[str, int, int | None]:
    """The file of a location, the first byte of it that is meant, and how many; None for all of them.

    A location may end in `#bytes=FIRST-LAST` (before the query of a URI), both counted from 0 and both
    included, as in HTTP: that part of the file is then meant, such as an image in a file of many.
    """
    found = _PART.search(location) if "#bytes=" in location else None
    if found is None:
        return location, 0, None
    first, last = int(found[1]), int(found[2])
    return location[: found.start()] + location[found.end() :], first, last + 1 - first


def digest(data: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON-able value; the order of keys does not matter."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())[:16]


def _as_json(value: Any) -> bytes:
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()


def described(*, kind: str, version: int, body: dict[str, Any]) -> bytes:
    """The bytes of the JSON file that `write_description` writes."""
    return _as_json({"format": f"ray_retrieval/{kind}", "version": version, **body})


def write_description(folder: Folder, name: str, *, kind: str, version: int, body: dict[str, Any]) -> None:
    """Write the JSON file that makes `folder` an artefact: last, as it says that the rest is complete."""
    folder.write_bytes(name, described(kind=kind, version=version, body=body))


def missing(folder: Folder, name: str, kind: str, *, mend: str) -> ArtefactError:
    """Why a folder is no artefact, as an error to raise.

    Args:
        folder: where one was expected.
        name: of the file that makes it one, which is not there.
        kind: of artefact.
        mend: what to do where there is such a folder, without an artefact.
    """
    reason = f"{name} is missing"
    if not folder.exists():
        reason, mend = "no such folder", "check the path"
    elif folder.is_file():
        reason = "a folder is expected, this is a file"
    return ArtefactError(f"no {kind} here: {reason}", where=folder, mend=mend)


def read_description(folder: Folder, name: str, *, kind: str, version: int) -> dict[str, Any]:
    """The description of an artefact.

    Raises:
        ArtefactError: if the folder is not a complete artefact of that kind, or of a later version.
    """
    if not folder.exists(name):
        raise missing(folder, name, kind, mend=f"give the folder that holds {name}")
    body: dict[str, Any] = folder.read_json(name)
    if not _describes(body, kind):
        raise ArtefactError(f"{name} does not describe a {kind} of ray_retrieval", where=folder)
    if body.get("version") != version:
        raise ArtefactError(
            f"{kind} has format version {body.get('version')}, this program reads version {version}",
            where=folder,
            mend="use the release that wrote it, or make it anew",
        )
    return body


def is_described(folder: Folder, name: str, *, kind: str) -> bool:
    """Whether a file describes an artefact of that kind, of whatever version."""
    try:
        return _describes(folder.read_json(name), kind)
    except ArtefactError:
        return False


def _describes(body: Any, kind: str) -> bool:
    return isinstance(body, dict) and body.get("format") == f"ray_retrieval/{kind}"


def check_file(folder: Folder, entry: dict[str, Any], *, content: bool) -> None:
    """Compare a file with its entry {"file", "bytes", "sha256"} in a description.

    Args:
        folder: where the file lies.
        entry: what was recorded of it.
        content: compare the checksum too, which reads the whole file; else only the size.

    Raises:
        ArtefactError: naming the file, if it is missing, truncated or changed.
    """
    where, mend = folder.uri_of(entry["file"]), "restore the file or make the artefact anew"
    size = folder.size(entry["file"])
    if size != entry["bytes"]:
        raise ArtefactError(f"damaged: {size} bytes, {entry['bytes']} were written", where=where, mend=mend)
    if content and folder.checksum(entry["file"]) != entry["sha256"]:
        raise ArtefactError("damaged: its checksum is not the one recorded", where=where, mend=mend)


def file_entry(folder: Folder, name: str) -> dict[str, Any]:
    """{"file", "bytes", "sha256"} of a file, for a description."""
    return {"file": name, "bytes": folder.size(name), "sha256": folder.checksum(name)}
