"""Files fetched over HTTP: resumed where they broke off, checked, and complete or not there.

    download("https://example.org/images.tgz", Path("data/images.tgz"), sha256="…")

The bytes go to `images.tgz.part`, which is renamed when all is right, so what has its name is whole. Killed
or cut off, the next call asks the server for the rest (`Range`, RFC 9110 §14), if the file there is still the
same by its `ETag` or date, which `images.tgz.part.tag` remembers; without either it starts again. A second
process that wants the same file waits for it.
"""

import hashlib
import http.client
import math
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ray_retrieval.errors import ArtefactError, ConflictError, DataError, StoreError
from ray_retrieval.lock import writing_alone
from ray_retrieval.storage import Folder

_BLOCK = 1 << 20
_TIMEOUT_S = 60.0
_ATTEMPTS = 5
"""Attempts in a row that bring no byte, before it is given up."""
_TEMPORARY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

_WAIT_S = 1.0
"""Between two looks whether another process is done with a file."""

_TELL_S = 10.0
"""Between two lines about a file that comes."""

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there, and those that there will be, None where the server does not say."""


@dataclass(frozen=True)
class Source:
    """A published file.

    Attributes:
        url: where it is.
        file: where it belongs, below the folder of all data.
        unpack: the folder, below that of all data, that an archive is unpacked into; None for other files.
        flat: whether the archive's own folders are left out.
        sha256: of its bytes, in hexadecimal; None where none is published.
    """

    url: str
    file: str
    unpack: str | None = None
    flat: bool = False
    sha256: str | None = None


_PRAGUE = "http://cmp.felk.cvut.cz/cnnimageretrieval/data"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"


def _ground_truth(name: str) -> Source:
    return Source(f"{_PRAGUE}/test/{name}/gnd_{name}.pkl", f"test/{name}/gnd_{name}.pkl")


def _buildings(folder: str, archive: str, name: str) -> Source:
    return Source(
        f"{_OXFORD}/{folder}/{archive}", f"test/{name}/{archive}", unpack=f"test/{name}/jpg", flat=True
    )


_SFM = "retrieval-SfM-120k"
_SFM_IMAGES = Source(
    f"{_PRAGUE}/train/ims/ims.tar.gz", f"train/{_SFM}/ims.tar.gz", unpack=f"train/{_SFM}/ims"
)
_OXFORD_IMAGES = (_buildings("oxbuildings", "oxbuild_images-v1.tgz", "oxford5k"),)
_PARIS_IMAGES = tuple(_buildings("parisbuildings", f"paris_{part}-v1.tgz", "paris6k") for part in (1, 2))
SOURCES: dict[str, tuple[Source, ...]] = {
    _SFM: (Source(f"{_PRAGUE}/train/dbs/{_SFM}.pkl", f"train/{_SFM}/{_SFM}.pkl"), _SFM_IMAGES),
    "oxford5k": (_ground_truth("oxford5k"), *_OXFORD_IMAGES),
    "paris6k": (_ground_truth("paris6k"), *_PARIS_IMAGES),
    "roxford5k": (_ground_truth("roxford5k"), *_OXFORD_IMAGES),
    "rparis6k": (_ground_truth("rparis6k"), *_PARIS_IMAGES),
}
"""What benchmarks need, from the projects' own pages and laid out as cirtorch v1.2 does: the ground truth and
pairs from the Visual Recognition Group in Prague, the photographs of buildings from the Visual Geometry Group
in Oxford, with faces blurred. No checksum is known for certain of any of them. The revisited test sets have
the images of the older ones. The pairs of retrieval-SfM-30k are not offered there."""


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    pause_s: float = 1.0,
) -> Path:
    """The file at `target`, fetched where it is not there yet.

    Args:
        url: an HTTP or HTTPS address.
        target: where the file goes; its folder is made.
        sha256: of the whole file, in hexadecimal, where it is known.
        md5: the same, for files whose publishers give no better one.
        progress: called after every block.
        say: called with a line where another process is at it.
        pause_s: before the second attempt after nothing came; doubled for each further one.

    Raises:
        DataError: if the address is none of HTTP, the server has no such file, the file (also one that was
            there before) has another checksum, or it cannot be written. What is wrong is not kept.
        StoreError: if the server does not answer, or breaks off again and again without a further byte; what
            has come so far is kept for the next call.
    """
    sums = {"sha256": sha256, "md5": md5}
    if not url.startswith(("http://", "https://")):
        raise DataError("only http:// and https:// are fetched", where=url)
    part = _Part(target.with_name(target.name + ".part"), url)
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with alone(part.path, say):
                if not target.exists():
                    part.complete(progress, pause_s)
                    if not _fits(part.path, sums):
                        part.remove()
                        raise DataError(
                            "what came has another checksum than the published file",
                            where=url,
                            mend="try again; if it stays so, the file has changed there",
                        )
                    os.replace(part.path, target)
                    part.remove()
                    return target
    except OSError as error:
        raise DataError(
            f"cannot be written: {error.strerror or error}", where=target, mend="check rights and space left"
        ) from None
    if not _fits(target, sums):
        raise DataError(
            "the file is not the published one: its checksum differs",
            where=target,
            mend="remove it to fetch it anew",
        )
    return target


@contextmanager
def alone(place: Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Wait until no other process makes what is to lie at a place; then others wait until the block ends.

    Args:
        place: a file or a folder; what is above it is there.
        say: called with a line where another process is at it.

    Raises:
        DataError: if nothing can be written there.
    """
    lock = place.with_name(f"{place.name}.lock")
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(writing_alone(Folder(lock), "download"))
                break
            except ConflictError:
                if say is not None:
                    say(f"{place.name}: another process is at it, which is waited for")
                    say = None
                time.sleep(_WAIT_S)
            except ArtefactError as error:
                raise DataError(
                    f"cannot be written: {error.problem}", where=place, mend="check rights and space left"
                ) from None
        yield
    with suppress(OSError):
        lock.rmdir()  # of a process that was killed


def fetch(sources: Iterable[Source], root: Path, say: Callable[[str], None] | None = None) -> None:
    """All files of a benchmark below a folder, archives unpacked and then removed.

    What is there already stays as it is: a file that has its name, a folder into which archives would go.

    Args:
        sources: the files.
        root: the folder.
        say: called with a line about each file at its start, every ten seconds and at its end.

    Raises:
        DataError: as `download` and `unpack`.
        StoreError: as `download`.
    """

    def had(source: Source) -> Path:
        progress = None if say is None else telling(Path(source.file).name, say)
        return download(source.url, root / source.file, sha256=source.sha256, progress=progress, say=say)

    archives: dict[str, list[Source]] = {}
    for source in sources:
        if source.unpack is not None:
            archives.setdefault(source.unpack, []).append(source)
        else:
            had(source)
    for folder, parts in archives.items():
        if (root / folder).exists():
            continue
        # A folder that has its name is whole, as a file is.
        unfinished = root / f"{folder}.part"
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with alone(unfinished, say):
            if (root / folder).exists():
                continue
            files = [had(part) for part in parts]
            shutil.rmtree(unfinished, ignore_errors=True)
            for part, file in zip(parts, files, strict=True):
                if say is not None:
                    say(f"{file.name}: unpacking into {root / folder}")
                unpack(file, unfinished, flat=part.flat)
            os.replace(unfinished, root / folder)
            for file in files:
                file.unlink()


def telling(name: str, say: Callable[[str], None]) -> Progress:
    """What says, now and then, how much of a file is there."""
    started, first, told = time.monotonic(), -1, -math.inf

    def progress(have: int, total: int | None) -> None:
        nonlocal first, told
        now = time.monotonic()
        first = have if first < 0 else first
        if now - told < _TELL_S and have != total:
            return
        told = now
        rate = (have - first) / max(now - started, 1e-9)
        size = f"{have / 1e6:,.0f} MB" if total is None else f"{have / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        left = (
            f" · {(total - have) / rate:,.0f} s left" if total is not None and have < total and rate else ""
        )
        say(f"{name}: {size}{f' · {rate / 1e6:,.1f} MB/s' if rate else ''}{left}")

    return progress


def unpack(archive: Path, folder: Path, *, flat: bool = False) -> None:
    """Unpack a tar archive; nothing is written outside of the folder, and no link leads out of it.

    Args:
        archive: the file.
        folder: where to; made where it is missing.
        flat: leave the archive's own folders out: all files go directly into `folder`.

    Raises:
        DataError: if the archive is damaged, a member would leave the folder, or there is no space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as opened:
            for member in opened:
                if flat and not member.isfile():
                    continue
                if flat:
                    member.name = member.name.rpartition("/")[2]
                opened.extract(member, folder, filter="data")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"cannot be unpacked: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=archive,
            mend="remove it to fetch it anew, and check the space left",
        ) from None


class _Part:
    """What has come of a file so far.

    Args:
        path: of the bytes.
        url: where the file is.
    """

    def __init__(self, path: Path, url: str) -> None:
        self.path = path
        self._url = url
        self._tag = path.with_name(path.name + ".tag")

    def remove(self) -> None:
        for path in (self.path, self._tag):
            path.unlink(missing_ok=True)

    def complete(self, progress: Progress | None, pause_s: float) -> None:
        """Ask for what is missing until all is there."""
        fruitless = 0
        while True:
            before = self._size()
            try:
                if self._receive(progress):
                    return
                reason = "the connection broke off"
            except urllib.error.HTTPError as error:
                if error.code not in _TEMPORARY_STATUS:
                    raise DataError(
                        f"the server answers {error.code} {error.reason}",
                        where=self._url,
                        mend="check the address, or fetch the file by hand",
                    ) from None
                reason = f"the server answers {error.code} {error.reason}"
            except urllib.error.URLError as error:
                reason = str(error.reason)
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
            fruitless = 0 if self._size() > before else fruitless + 1
            if fruitless >= _ATTEMPTS:
                raise StoreError(
                    f"nothing came in {_ATTEMPTS} attempts: {reason}",
                    where=self._url,
                    mend="run it again later: it goes on where it stopped",
                )
            if fruitless:
                time.sleep(pause_s * 2 ** (fruitless - 1))

    def _receive(self, progress: Progress | None) -> bool:
        """Append what one answer brings; whether the file is whole."""
        have, tag = self._resumable()
        request = urllib.request.Request(self._url, headers={"Accept-Encoding": "identity"})
        if have:
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", tag)
        try:
            answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
                raise
            return self._is_all(error, have)
        with answer:
            if answer.status == http.HTTPStatus.PARTIAL_CONTENT and _first_byte(answer) != have:
                raise http.client.HTTPException("the server sends another part than it was asked for")
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0  # All of it comes: the server knows no parts, or the file there has changed.
            length = answer.headers.get("Content-Length")
            total = None if length is None else have + int(length)
            if not have:
                # Never the bytes of one file beside the tag of another.
                self.remove()
            self._tag.write_text(_validator(answer))
            with open(self.path, "ab" if have else "wb") as stream:
                _copy(answer, stream, have, total, progress)
        return total is None or self._size() == total

    def _is_all(self, error: urllib.error.HTTPError, have: int) -> bool:
        """Whether nothing is missing, when the server has no byte behind those that are here."""
        _, _, total = error.headers.get("Content-Range", "").partition("/")
        if total == str(have):
            return True
        self.remove()
        return False

    def _resumable(self) -> tuple[int, str]:
        """Bytes that are here, and what tells that the file there is still the one that they are of."""
        tag = self._tag.read_text() if self._tag.exists() else ""
        return (self._size(), tag) if tag else (0, "")

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def _copy(
    answer: http.client.HTTPResponse,
    stream: IO[bytes],
    have: int,
    total: int | None,
    progress: Progress | None,
) -> None:
    while True:
        # read1 hands over what has come when a connection breaks; read would lose it.
        block = answer.read1(_BLOCK)
        if not block:
            return
        stream.write(block)
        have += len(block)
        if progress is not None:
            progress(have, total)


def _validator(answer: http.client.HTTPResponse) -> str:
    """A strong ETag or else the date of the file, for `If-Range`; empty where there is neither."""
    tag: str = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _first_byte(answer: http.client.HTTPResponse) -> int | None:
    """Where the part that comes starts, by its `Content-Range: bytes 5-9/10`."""
    given = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(given) if given.isdigit() else None


def _fits(path: Path, sums: dict[str, str | None]) -> bool:
    """Whether a file has the checksums that are known."""
    return all(known is None or known.lower() == _checksum(path, kind) for kind, known in sums.items())


def _checksum(path: Path, kind: str) -> str:
    state = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            state.update(block)
    return state.hexdigest()
