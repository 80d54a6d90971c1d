"""Versions of indices that are open side by side, so that each request is answered from one of them."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from ray_retrieval.errors import ArtefactError
from ray_retrieval.search import Index
from ray_retrieval.search.manifest import Manifest, read_current, read_version
from ray_retrieval.search.shard import Shard
from ray_retrieval.serve.wire import GoneError, VersionKey
from ray_retrieval.storage import Folder

Key = TypeVar("Key")
Value = TypeVar("Value")


def current_key(uri: str) -> VersionKey:
    """The version that an index's pointer names.

    Raises:
        ArtefactError: if there is no index, or it is damaged.
    """
    return key_of(uri, read_current(Folder(uri)))


def key_of(uri: str, manifest: Manifest) -> VersionKey:
    """The key of a published version."""
    return VersionKey(uri, manifest.number, manifest.sha256, manifest.model)


def share(shards: int, group: int, groups: int) -> list[int]:
    """The shards of one group: numbers 0 … shards - 1 are cut into `groups` runs of nearly equal length.

    With more groups than shards, some have none.
    """
    return list(range(round(group * shards / groups), round((group + 1) * shards / groups)))


def open_version(
    key: VersionKey,
    *,
    group: int = 0,
    groups: int = 1,
    threads: int = 1,
    check: Literal["size", "content"] = "size",
    known: Sequence[Index] = (),
) -> Index | None:
    """A version of an index, or one group's share of it; None where that is no shard.

    Args:
        key: of the version.
        group: number of the group.
        groups: how many there are.
        threads: that a search may use.
        check: of files that are opened anew.
        known: opened versions, whose shards are taken over where they are the same.

    Raises:
        GoneError: if it is no longer there.
        ArtefactError: if it is damaged.
    """
    folder = Folder(key.uri)
    manifest = _manifest(folder, key)
    numbers = share(len(manifest.shards), group, groups)
    if not numbers:
        return None
    opened = {shard.entry: shard for index in known for shard in index.shards.values()}
    content = check == "content"

    def shard(number: int) -> Shard:
        entry = manifest.shards[number]
        return opened.get(entry) or Shard(folder, entry, manifest.form, content=content)

    try:
        shards = {number: shard(number) for number in numbers}
        return Index.of(folder, manifest, shards, threads=threads, content=content)
    except ArtefactError as error:
        if current_key(key.uri) == key:
            raise
        raise GoneError(f"version {key.number} was pruned: {error.problem}") from None


def _manifest(folder: Folder, key: VersionKey) -> Manifest:
    """The manifest of a version that is current, or still there."""
    try:
        manifest = read_current(folder)
        if manifest.sha256 != key.sha256:
            manifest = read_version(folder, key.number)
    except ArtefactError as error:
        raise GoneError(f"version {key.number} cannot be read: {error.problem}") from None
    if manifest.sha256 != key.sha256:
        raise GoneError(f"version {key.number} is not what it was")
    return manifest


@dataclass
class _Entry(Generic[Value]):
    opened: "Future[Value]"
    used: float


class Kept(Generic[Key, Value]):
    """Things that are opened when they are first asked for, and closed when nobody has asked for long.

    Safe to share among threads; what takes long to open is opened once, and does not hold up those that ask
    for what is open.

    Args:
        make: opens one, given its key and those that are open.
        idle_s: how long one stays that nobody asks for; the one asked for last always stays.
        close: called with each that is dropped.
    """

    def __init__(
        self,
        make: Callable[[Key, list[Value]], Value],
        *,
        idle_s: float,
        close: Callable[[Value], None] | None = None,
    ) -> None:
        self._make, self._idle, self._close = make, idle_s, close
        self._entries: dict[Key, _Entry[Value]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def is_open(self, key: Key) -> bool:
        """Whether `get` has nothing to wait for."""
        with self._lock:
            entry = self._entries.get(key)
            return entry is not None and entry.opened.done()

    def get(self, key: Key) -> Value:
        """The one of that key; raises whatever `make` raises."""
        with self._lock:
            entry = self._entries.get(key)
            is_new = entry is None
            open_ones: list[Value] = []
            if entry is None:
                open_ones = [one.opened.result() for one in self._entries.values() if one.opened.done()]
                entry = self._entries[key] = _Entry(Future(), 0.0)
            entry.used = time.monotonic()
        if is_new:
            self._open(key, entry, open_ones)
        found = entry.opened.result()
        for dropped in self._drop(key):
            if self._close is not None:
                self._close(dropped)
        return found

    def _open(self, key: Key, entry: _Entry[Value], open_ones: list[Value]) -> None:
        try:
            value = self._make(key, open_ones)
        except BaseException as error:
            with self._lock:  # Whoever comes next tries anew.
                del self._entries[key]
            entry.opened.set_exception(error)
            return
        with self._lock:
            entry.used = time.monotonic()
            entry.opened.set_result(value)

    def _drop(self, asked: Key) -> list[Value]:
        """Forget, and return, what nobody has asked for long, unless there is nothing else."""
        oldest = time.monotonic() - self._idle
        with self._lock:
            idle = [
                key
                for key, entry in self._entries.items()
                if key != asked and entry.used < oldest and entry.opened.done()
            ]
            return [self._entries.pop(key).opened.result() for key in idle]
