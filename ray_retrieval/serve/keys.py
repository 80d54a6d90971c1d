"""Keys that open the server, kept as hashes in a file, and when a server may do without.

    # name scope hash
    anna read sha256:7d1c…:b2f0…

A key is 256 random bits, so that a salted SHA-256 keeps it: there is nothing to guess, and what is slow on
purpose would only help who floods the server with wrong keys.
"""

import hashlib
import ipaddress
import logging
import math
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ray_retrieval.errors import RecipeError
from ray_retrieval.serve.config import ANY_ORIGIN, ServeConfig

Scope = Literal["read", "write"]
"""`read`: all but changes of an index; `write`: these too."""

_PREFIX = "rr_"
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{32}):([0-9a-f]{64})")
_RECHECK_S = 1.0
_MAKE_ONE = "make one: ray-retrieval serve --new-key NAME --set api_keys=FILE"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """Who may ask, and what."""

    name: str
    scope: Scope
    salt: bytes
    digest: bytes


class Keys:
    """The keys of a file, which is read again when it changes: a key is taken back by deleting its line.

    Only what stands there opens: a line that cannot be read opens nothing, and neither does a file that is
    empty or gone; both are logged. Where it is there and cannot be read, the former keys stay in use. So it
    is from the start: a process that takes the place of one that was lost answers like those that are left.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._keys: list[Key] = []
        self._stamp: tuple[int, ...] | None = None
        self._checked = -math.inf
        self._refresh()

    @property
    def none(self) -> bool:
        """Whether no key opens the server."""
        self._refresh()
        return not self._keys

    def find(self, secret: str) -> Key | None:
        """The key that `secret` is. It takes as long for each that is none."""
        self._refresh()
        found = None
        for key in self._keys:
            if secrets.compare_digest(_digest(key.salt, secret), key.digest):
                found = key
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < _RECHECK_S:
            return
        self._checked = now
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        try:
            self._keys = _keys_left(self._path)
            self._stamp = stamp
        except OSError as error:
            so = "the former keys stay in use" if self._keys else "nobody may ask"
            _log.error("%s: %s cannot be read: %s", so, self._path, error.strerror)

    def _stamp_now(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_size, status.st_ino


def read_keys(path: str | Path) -> list[Key]:
    """The keys of a file.

    Raises:
        RecipeError: if it cannot be read, holds none, or a line says something else.
    """
    keys = _parsed(_lines(path), path)
    if not keys:
        raise RecipeError("the file holds no key, so nobody could ask", where=path, mend=_MAKE_ONE)
    return keys


def _lines(path: str | Path) -> list[str]:
    """The lines of a file of keys, with their ends.

    Raises:
        RecipeError: if it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise RecipeError(f"the keys cannot be read: {reason}", where=path, mend=_MAKE_ONE) from None


def _parsed(lines: list[str], path: str | Path) -> list[Key]:
    """The keys of lines; RecipeError if one says something else."""
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if _says(line)]


def _keys_left(path: Path) -> list[Key]:
    """The keys of the lines of a file that can be read; what is wrong with others is logged.

    Raises:
        OSError: if it is there and cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    keys = []
    for number, line in enumerate(lines, 1):
        try:
            keys += [_parse(line, f"{path}:{number}")] if _says(line) else []
        except RecipeError as error:
            _log.error("a key is left out: %s", error)
    if not keys:
        _log.error("%s holds no key: nobody may ask", path)
    return keys


def new_key(path: str | Path, name: str, scope: Scope) -> str:
    """Add a key to a file, which is made if it is missing; the key itself, which is kept nowhere.

    Raises:
        RecipeError: if the name is taken or cannot be one, or the file cannot be read or written.
    """
    if not _NAME.fullmatch(name):
        raise RecipeError(
            f"'{name}' cannot be the name of a key", mend="take letters, digits and the signs . _ @ -"
        )
    if scope not in get_args(Scope):
        raise RecipeError(f"'{scope}' is no scope", mend="take read or write")
    path = Path(path)
    lines = _lines(path) if path.exists() else []
    if any(key.name == name for key in _parsed(lines, path)):
        raise RecipeError(f"there is a key '{name}'", where=path, mend="delete its line, or name another")
    secret = _PREFIX + secrets.token_urlsafe(32)
    salt = secrets.token_bytes(16)
    line = f"{name} {scope} sha256:{salt.hex()}:{_digest(salt, secret).hex()}\n"
    if lines and not lines[-1].endswith("\n"):
        line = f"\n{line}"  # An editor may leave the last line without an end.
    try:
        # For its owner alone from the first moment; one write, so that a reader never sees half a line.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RecipeError(f"the key cannot be kept: {error.strerror}", where=path) from None
    return secret


def check_exposure(config: ServeConfig) -> None:
    """See that a server that others can reach asks for keys.

    Raises:
        RecipeError: if it would answer strangers or any page, and nobody has allowed that.
    """
    if config.api_keys is not None:
        return
    if not is_loopback(config.host) and not config.allow_anonymous:
        raise RecipeError(
            f"'{config.host}' answers other machines, and no keys are asked for",
            where="host",
            mend="set api_keys to a file of keys (ray-retrieval serve --new-key NAME --set api_keys=FILE "
            "makes one), or allow_anonymous=true",
        )
    if ANY_ORIGIN in config.cors_origins and not config.allow_anonymous:
        raise RecipeError(
            "without keys, any page that somebody looks at on this machine could ask in their name",
            where="cors_origins",
            mend="name the origins that may ask, or set api_keys or allow_anonymous=true",
        )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    # A socket of IPv6 that takes IPv4 as well tells its addresses so.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _says(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _parse(line: str, where: str) -> Key:
    fields = line.split()
    hashed = _HASH.fullmatch(fields[2]) if len(fields) == 3 else None
    if hashed is None or not _NAME.fullmatch(fields[0]):
        # What stands there is not repeated: it may be a key that somebody pasted.
        raise RecipeError(
            "the line is not 'NAME SCOPE sha256:SALT:HASH'",
            where=where,
            mend="let ray-retrieval serve --new-key write it",
        )
    if fields[1] == "read" or fields[1] == "write":
        scope: Scope = "read" if fields[1] == "read" else "write"
        return Key(fields[0], scope, bytes.fromhex(hashed[1]), bytes.fromhex(hashed[2]))
    raise RecipeError(f"'{fields[1]}' is no scope", where=where, mend="take read or write")


def _digest(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode("utf-8", "surrogateescape")).digest()
