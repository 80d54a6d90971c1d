"""One writer of a folder at a time, by a lock.

Runs, trainings, searches for hyperparameters, encodings and changes of an index hold it, each to its end. It
is the operating system's lock on the file `.lock` in the folder, so it is free at once when its holder
dies, however that happens; only processes that the holder forked meanwhile hold it on. Readers take no notice
of it. Stores that are no local disk have no such lock, nor have some shared file systems: there a second
writer of an index finds out when it wants to publish (`search.publishing.publish`).
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ray_retrieval.errors import ArtefactError, ConflictError
from ray_retrieval.storage import LOCK, Folder

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def writing_alone(folder: Folder, operation: str) -> Iterator[bool]:
    """Hold the lock of a folder for as long as the block lasts; False where there are none to hold.

    Args:
        folder: is made where it is missing, and itself goes again if the block leaves nothing in it.
        operation: what the block does, to tell others.

    Raises:
        ConflictError: if another process, or another thread of this one, holds it; the error says who.
    """
    existed = folder.is_local and folder.exists()
    file = _locked(folder)
    if file is None:
        yield False
        return
    try:
        said = {
            "operation": operation,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        with suppress(OSError):  # on a full disk it is locked all the same, without saying by whom
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(said).encode(), 0)
        yield True
    finally:
        # Deleted while it is held: whoever has opened it meanwhile sees that it is no longer the file there.
        with suppress(OSError):
            (Path(folder.path) / LOCK).unlink()
        os.close(file)
        if not existed:
            with suppress(OSError):
                Path(folder.path).rmdir()


def clear(folder: Folder, operation: str, *, last: str, only: Set[str]) -> None:
    """Delete what was written into a folder, if nobody works anywhere within.

    Args:
        folder: whose lock is held.
        operation: what does so, to tell others.
        last: name of the file that says what the folder is: after a kill in between it is still known.
        only: names of what is deleted.

    Raises:
        ConflictError: as `writing_alone`; then nothing has been deleted.
    """
    with ExitStack() as alone:
        if folder.is_local:
            for path in sorted(Path(folder.path).rglob(LOCK)):
                if path.parent != Path(folder.path):
                    alone.enter_context(writing_alone(Folder(path.parent), operation))
        names = set(os.listdir(folder.path)) - {LOCK} if folder.is_local else set(folder.names())
        for name in sorted(names & only, key=lambda name: name == last):
            path = Path(folder.path) / name
            if folder.is_local and path.is_symlink():
                path.unlink()  # what it leads to is not ours
            else:
                folder.remove(name)
        folder.sweep()


def seems_free(folder: Folder) -> bool:
    """Whether a folder has a lock that nobody seems to hold, as a reader sees it: it is not taken.

    The file of a writer that was killed counts as held until the next writer is done.
    """
    return fcntl is not None and folder.is_local and not folder.exists(LOCK)


def _locked(folder: Folder) -> int | None:
    """The lock's file, open and locked; None where there are no locks."""
    if fcntl is None or not folder.is_local:
        return None
    path = Path(folder.path) / LOCK
    try:
        return _take(path)
    except BlockingIOError:
        raise ConflictError(
            f"another writer is at work: {_holder(path)}",
            where=folder,
            mend="wait for it to end, and run it again",
        ) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise ArtefactError(
            f"the store refuses: {error.strerror}", where=folder, mend="check the path and the rights"
        ) from error


def _take(path: Path) -> int:
    """Open and lock a file; BlockingIOError if somebody else has locked it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = _opened(path)
        except FileNotFoundError:  # who made the file or the folder has just taken it away
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                # Whoever held it before may have deleted it in between.
                if os.path.samestat(os.fstat(file), path.stat()):
                    return file
        except OSError:
            os.close(file)
            raise
        os.close(file)


def _opened(path: Path) -> int:
    """The lock's file, made where it is missing; only to be read where another user has left it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY)


def _holder(path: Path) -> str:
    """Who holds a lock, as it says itself."""
    try:
        said = json.loads(path.read_text())
        return f"'{said['operation']}', process {said['pid']} on {said['host']} since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has only just begun, or has just ended"
