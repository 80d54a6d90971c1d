"""What an index version consists of, and which version is current.

    CURRENT                 one line: the manifest's name and its sha256; replaced last, in one step
    manifest-000001.json    a version: the shards with their checksums, the model, the self-test

Manifests and shards never change once written. A new version is a new manifest, which may name shards of
earlier ones; a reader that has opened a version keeps it. Each manifest names the one before it with its
sha256, so `CURRENT` vouches for the whole history, which is a line: also a rollback is a new version. The
types below say what this release can search: a manifest with anything else is refused rather than searched
wrongly.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from ray_retrieval.config import Config
from ray_retrieval.descriptors import Form
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search.approximate import Effort
from ray_retrieval.search.votes import LocalSearchConfig
from ray_retrieval.storage import Folder, digest, read_description, write_description

CURRENT = "CURRENT"
_KIND, _VERSION = "index", 3
_BEFORE = 2
"""A version that is read as well: indices that nothing was added to or removed from."""
_MEND = "restore the file, or delete the folder and build the index anew"
_ANEW = "use the release that wrote it; or delete the folder and build the index anew, or build it elsewhere"
_POINTER = re.compile(r"(manifest-\d{6}\.json) ([0-9a-f]{64})\n")


def _inside(name: str) -> str:
    """A relative path that stays in its folder."""
    if "\\" in name or ":" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"'{name}' is no path inside the folder")
    return name


Inside = Annotated[str, AfterValidator(_inside)]


class FileEntry(Config):
    """A file and what it was when it was written."""

    file: Inside
    bytes: int = Field(ge=0)
    sha256: str


class ShardEntry(Config):
    """Consecutive rows of the index, in a folder of their own."""

    folder: Inside
    """Where it lies, from the index's folder."""
    first_row: int = Field(ge=0)
    """Number of its first row in the index."""
    rows: int = Field(ge=0)
    files: tuple[FileEntry, ...]
    norm_error: float = Field(ge=0, allow_inf_nan=False)
    """The largest difference of a vector's squared length from 1; 0 without vectors."""
    features: int = Field(default=0, ge=0)
    """Local features in all; 0 of other kinds."""

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


class Recall(Config):
    """How many of the exact hits another search found when the index was built."""

    k: int
    value: float
    queries: int
    """Rows of the index that were searched for; none of them counts as its own hit."""


class Approximate(Config):
    """What an approximate search needs beside the shards."""

    key: str
    """Stands for all that the files were made of; a search's effort is not of it."""
    factory: str
    """FAISS's string."""
    why: str
    """What chose it."""
    effort: Effort
    """How hard a search looks unless told."""
    files: tuple[FileEntry | None, ...]
    """One for each shard, named from the index's folder; None for small ones that were added since, which are
    searched exactly until they are filled in."""
    recall: Recall

    def info(self) -> dict[str, Any]:
        """What users should know of it, as plain values."""
        recall = self.recall
        return {
            "factory": self.factory,
            "why": self.why,
            f"recall@{recall.k}": recall.value,
            "recall_queries": recall.queries,
            **self.effort.model_dump(include=set(Effort.model_fields)),
        }


class LocalSearch(Config):
    """How an index of local features makes the shortlist of a query."""

    key: str
    """Stands for all that the files were made of."""
    kind: Literal["votes", "exact", "asmk", "global"]
    """See `shortlist.py`."""
    factory: str | None
    """FAISS's string of `votes`."""
    words: int
    """Visual words of `asmk`; 0 of the others."""
    why: str
    """What chose it."""
    config: LocalSearchConfig
    """What was asked for, and how hard a search looks."""
    files: tuple[FileEntry, ...]
    """One for each shard, named from the index's folder; none where the shards are all that it takes."""
    recall: Recall | None
    """Of the exact votes' images; None of the exact votes themselves, of databases without any, and of those
    too large to compare with."""

    def info(self) -> dict[str, Any]:
        """What users should know of it, as plain values."""
        recall = self.recall
        measured = {f"recall@{recall.k}": recall.value, "recall_queries": recall.queries} if recall else {}
        factory = {"factory": self.factory} if self.factory else {}
        words = {"words": self.words} if self.words else {}
        return {"shortlist": self.kind, **factory, **words, "why": self.why, **measured}


class SelfTest(Config):
    """A query and the hits that it had when the index was built."""

    query: str
    """The packed code, or the vector's little-endian float32 values, in hexadecimal; of local features the
    number of the row whose features are the query."""
    distances: tuple[float, ...]
    rows: tuple[int, ...]


class Manifest(Config):
    """A version of an index."""

    number: int
    """Of this version; the first is 1."""
    parent: int | None
    """The version before it."""
    parent_sha256: str | None = None
    """Of that one's manifest."""
    operation: str = "build"
    """What made it: `build`, `add 120 rows`, `remove 3 rows`, `compact`, `rollback to 4`."""
    kind: Literal["codes", "vectors", "local"]
    """What is stored: packed binary codes, compared by the Hamming distance, unit vectors, compared by the
    squared Euclidean distance, or sets of local features."""
    search: Literal["exact", "approximate", "shortlist"]
    """The last is that of local features."""
    ties: Literal["row"]
    """Among rows at the same distance the one with the lower number comes first."""
    bits: int | None = None
    """Of a code."""
    dimension: int | None = None
    """Of a vector, or of a local feature."""
    vectors: int | None = None
    """Dimension of the global vectors that come with local features, where they do."""
    rows: int = Field(ge=0)
    """Rows that a search can find: those of the shards, without the deleted ones."""
    next_row: int = Field(ge=0)
    """The number that the next row added will get: the rows of the shards. `compact` begins again at 0."""
    model: str
    """Fingerprint of the model that made the descriptors."""
    embeddings: str
    """Fingerprint of the embeddings that the index was built from; of another one that stands for all that
    happened, once rows were added, removed or compacted."""
    class_names: tuple[str, ...] | None
    shards: tuple[ShardEntry, ...]
    """In ascending order of rows."""
    approximate: Approximate | None = None
    """Of an index of vectors that is not searched exactly."""
    local: LocalSearch | None = None
    """Of an index of local features."""
    deletes: FileEntry | None = None
    """The file that names the deleted rows, see `deletes.py`; None where there are none."""
    self_test: tuple[SelfTest, ...]

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        if (self.bits is None, self.dimension is None) != (self.kind != "codes", self.kind == "codes"):
            raise ValueError("codes have 'bits', the others a 'dimension'")
        if not (self.kind == "local") == (self.search == "shortlist") == (self.local is not None):
            raise ValueError("local features, and no others, have a 'shortlist', described in 'local'")
        if self.local is not None and len(self.local.files) not in (0, len(self.shards)):
            raise ValueError("'local' has a file for each shard, or none")
        files = 0 if self.approximate is None else len(self.approximate.files)
        if files != (len(self.shards) if self.search == "approximate" else 0):
            raise ValueError("'approximate' has a file for each shard where the 'search' is approximate")
        if self.search == "approximate" and self.kind != "vectors":
            raise ValueError("an approximate search is for vectors")
        if (self.deletes is None) != (self.rows == self.next_row) or self.rows > self.next_row:
            raise ValueError("'deletes' names a file where, and only where, rows are deleted")
        return self

    @property
    def bytes(self) -> int:
        """Of all files but this one."""
        beside = (*self.files, *([self.deletes] if self.deletes else []))
        return sum(shard.bytes for shard in self.shards) + sum(file.bytes for file in beside)

    @property
    def beside(self) -> tuple[FileEntry | None, ...]:
        """What lies beside each shard, or nothing at all."""
        structure = self.approximate or self.local
        return () if structure is None else structure.files

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """What lies beside the shards."""
        return tuple(file for file in self.beside if file is not None)

    @property
    def deleted(self) -> int:
        """Rows of the shards that no search finds any more."""
        return self.next_row - self.rows

    @property
    def form(self) -> Form:
        """Of the descriptors."""
        return Form.from_json(self.model_dump(include={"kind", "bits", "dimension", "vectors"}))

    @property
    def name(self) -> str:
        """Of the manifest's file."""
        return _name(self.number)


def read_current(index: Folder) -> Manifest:
    """The current version of an index.

    Raises:
        ArtefactError: if there is no index, or its pointer or manifest is damaged or of another release.
    """
    return _read(index, *_pointer(index))


def history(index: Folder, current: Manifest | None = None) -> list[Manifest]:
    """The versions that are still there, the current one first.

    Args:
        index: its folder.
        current: the version to begin with; by default the one that is current.

    Raises:
        ArtefactError: if there is no index, or a manifest is damaged or of another release.
    """
    found = [current or read_current(index)]
    while found[-1].parent is not None and index.exists(_name(found[-1].parent)):
        found.append(_read(index, _name(found[-1].parent), found[-1].parent_sha256))
    return found


def read_version(index: Folder, number: int) -> Manifest:
    """A version of an index that is still there.

    Raises:
        ArtefactError: if there is no such version (any more), or as `history`.
    """
    known = history(index)
    for manifest in known:
        if manifest.number == number:
            return manifest
    listed = ", ".join(str(manifest.number) for manifest in reversed(known))
    raise ArtefactError(f"there is no version {number}; there are: {listed}", where=index)


def publish(index: Folder, manifest: Manifest, *, parent: int | None) -> Manifest:
    """Make a version current. Its shards must be complete; readers see the old version or this one.

    Args:
        index: its folder; on a local disk its lock is held (`lock.writing_alone`).
        manifest: what it consists of; its number and parent are set here.
        parent: the version that it was made from; None: there was no index.

    Returns:
        The manifest as it was published.

    Raises:
        ArtefactError: if another version was published since `parent` was read.
    """
    before = _check_parent(index, parent)
    place = {"number": (parent or 0) + 1, "parent": parent, "parent_sha256": before}
    manifest = Manifest.model_validate({**manifest.model_dump(), **place})
    write_description(
        index, manifest.name, kind=_KIND, version=_VERSION, body=manifest.model_dump(mode="json")
    )
    pointer = f"{manifest.name} {index.checksum(manifest.name)}\n"
    # Stores without locks cannot compare and replace in one step: what is left is this moment.
    _check_parent(index, parent)
    index.write_text(CURRENT, pointer)
    return manifest


def _check_parent(index: Folder, parent: int | None) -> str | None:
    """The checksum of the current manifest, which must be that of `parent`; None without an index."""
    name, checksum = _pointer(index) if index.exists(CURRENT) else (None, None)
    if name != (None if parent is None else _name(parent)):
        found = "it was deleted" if name is None else f"version {_number(name)} was published"
        raise ArtefactError(f"{found} meanwhile", where=index, mend="run it again")
    return checksum


def _name(number: int) -> str:
    """Of a version's manifest."""
    return f"manifest-{number:06d}.json"


def _number(name: str) -> int:
    return int(name.removeprefix("manifest-").removesuffix(".json"))


def _pointer(index: Folder) -> tuple[str, str]:
    """Name and checksum of the current manifest."""
    if not index.exists(CURRENT):
        raise ArtefactError(
            f"no index here ({CURRENT} is missing)", where=index, mend="build one: ray-retrieval index build"
        )
    pointer = _POINTER.fullmatch(index.read_bytes(CURRENT).decode(errors="replace"))
    if pointer is None:
        raise ArtefactError(
            "damaged: it should hold a manifest's name and checksum",
            where=f"{index}/{CURRENT}",
            mend=_MEND,
        )
    return pointer[1], pointer[2]


def _read(index: Folder, name: str, checksum: str | None) -> Manifest:
    """A manifest, which whoever names it vouches for by its checksum."""
    where = f"{index}/{name}"
    if not index.exists(name):
        raise ArtefactError(f"{CURRENT} names it, but it is missing", where=where, mend=_MEND)
    if checksum is not None and digest(index.read_bytes(name)) != checksum:
        raise ArtefactError(
            f"damaged: its checksum is not the one in {CURRENT} or in the version after it",
            where=where,
            mend=_MEND,
        )
    content = _content(index, name)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(
            f"this release cannot search it: '{key}': {first['msg']}",
            where=where,
            mend=_ANEW,
        ) from None


def _content(index: Folder, name: str) -> dict[str, Any]:
    """What a manifest says, as this version has it."""
    written = index.read_json(name)
    before = isinstance(written, dict) and written.get("version") == _BEFORE
    try:
        body = read_description(index, name, kind=_KIND, version=_BEFORE if before else _VERSION)
    except ArtefactError as error:
        raise ArtefactError(error.problem, where=f"{index}/{name}", mend=_ANEW) from None
    content = {key: value for key, value in body.items() if key not in ("format", "version")}
    # Then files of deleted rows were a list, which was empty.
    return {**content, "deletes": content.get("deletes") or None} if before else content
