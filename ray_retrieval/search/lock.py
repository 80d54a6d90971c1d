"""One writer at a time: a lock on an index that is held for the whole of a change.

It is the operating system's lock on the file `.lock` in the index's folder, so it is free at once when its
holder dies, however that happens. Readers take no notice of it. Stores that are no local disk have no such
lock: there a second writer finds out when it wants to publish (`manifest.publish`).
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_retrieval.errors import ArtefactError
from ray_retrieval.storage import Folder

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def writing_alone(index: Folder, operation: str) -> Iterator[None]:
    """Hold the lock of an index for as long as the block lasts.

    Args:
        index: its folder, which is made where it is missing.
        operation: what the block does, to tell others.

    Raises:
        ArtefactError: if another process, or another thread of this one, holds it; the error says who.
    """
    if fcntl is None or not index.is_local:
        yield
        return
    try:
        Path(index.path).mkdir(parents=True, exist_ok=True)
        file = _take(Path(index.path) / LOCK)
    except OSError as error:
        raise ArtefactError(
            f"the store refuses: {error.strerror}", where=index, mend="check the path and the rights"
        ) from error
    if file is None:
        raise ArtefactError(
            f"another writer is at work: {_holder(Path(index.path) / LOCK)}",
            where=index,
            mend="wait for it to end, and run it again",
        )
    try:
        said = {
            "operation": operation,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(said).encode(), 0)
        yield
    finally:
        # Deleted while it is held: whoever has opened it meanwhile sees that it is no longer the file there.
        with suppress(OSError):
            (Path(index.path) / LOCK).unlink()
        os.close(file)


def _take(path: Path) -> int | None:
    """The locked file, open; None if somebody else holds it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:
            os.close(file)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)


def _holder(path: Path) -> str:
    """Who holds a lock, as it says itself."""
    try:
        said = json.loads(path.read_text())
        return f"'{said['operation']}', process {said['pid']} on {said['host']} since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has only just begun, or has just ended"
