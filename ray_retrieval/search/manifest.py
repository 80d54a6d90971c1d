"""What an index version consists of, and which version is current.

    CURRENT                         one line: the manifest's name and its sha256; replaced last, in one step
    manifest-000001-<digits>.json   a version: the shards with their checksums, the model, the self-test

Manifests and shards never change once written. A new version is a new manifest, which may name shards of
earlier ones; a reader that has opened a version keeps it. A manifest's name has its number and the first
digits of its sha256, so two writers of the same number write two files. Each manifest names the one before
it with its sha256, so `CURRENT` vouches for the whole history, which is a line: also a rollback is a new
version. The types below say what this release can search: a manifest with anything else is refused rather
than searched wrongly.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from ray_retrieval.commands import command
from ray_retrieval.config import Config
from ray_retrieval.descriptors import Form
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.votes import LocalSearchConfig
from ray_retrieval.storage import Folder, described, digest, missing, read_description

CURRENT, DESCRIPTION = "CURRENT", "shard.json"
_KIND, _VERSION = "index", 3
_MEND = "restore the file, or delete the folder and build the index anew"
_ANEW = "use the release that wrote it; or delete the folder and build the index anew, or build it elsewhere"
_DIGITS = 12
"""Of a manifest's checksum, in its name."""
_NAME = re.compile(rf"manifest-(\d{{6,}})-[0-9a-f]{{{_DIGITS}}}\.json")
_POINTER = re.compile(rf"({_NAME.pattern}) ([0-9a-f]{{64}})\n")


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
    first_id: int | None = Field(default=None, ge=0)
    """Id of its first row, where ids are numbers that count on from there; None where they are stored."""
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
    rows: int | None = None
    """Of the index when it was measured; None of a shortlist of local features."""


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
    asked: ApproximateConfig
    """What was asked for."""
    target: float | None = None
    """Recall that the search is to have."""
    trained: FileEntry
    """What the files are filled from."""

    @property
    def missed(self) -> str | None:
        """In words, that it finds less than it is to find; None where it does not."""
        if self.target is None or self.recall.value >= self.target:
            return None
        return (
            f"it finds {self.recall.value:.4f} of the {self.recall.k} nearest, {self.target:g} is asked for: "
            "the rows have changed since it was trained; build the index again"
        )

    def info(self) -> dict[str, Any]:
        """What users should know of it, as plain values."""
        recall = self.recall
        return {
            "factory": self.factory,
            "why": self.why,
            f"recall@{recall.k}": recall.value,
            **({} if self.target is None else {"recall_target": self.target}),
            **({} if self.missed is None else {"recall_missed": self.missed}),
            "recall_queries": recall.queries,
            **self.effort.model_dump(),
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
    trained: FileEntry | None = None
    """What the files of `votes` are filled from; None of the others."""
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
    """Of that one's manifest; None of the first version, like `parent`."""
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
    next_id: int | None = Field(default=None, ge=0)
    """The id that the next row added will get, of an index whose rows came without ids: these count up, and
    no number is given twice. None where rows have ids of their own."""
    model: str
    """Fingerprint of the model that made the descriptors, or what stands for one: `importing.elsewhere`."""
    embeddings: str
    """Fingerprint of the embeddings that the index was built from; of another one that stands for all that
    happened, once rows were added, removed or compacted."""
    engines: tuple[str, ...] = ()
    """What computed descriptors in the model's place, where something did, such as `onnx-int8`, in order."""
    class_names: tuple[str, ...] | None
    shards: tuple[ShardEntry, ...]
    """In ascending order of rows."""
    approximate: Approximate | None = None
    """Of an index of codes or vectors that is not searched exactly."""
    why: str | None = None
    """What chose the exact search of codes or vectors; of other searches it is said there."""
    local: LocalSearch | None = None
    """Of an index of local features."""
    deletes: FileEntry | None = None
    """The file that names the deleted rows, see `deletes.py`; None where there are none."""
    self_test: tuple[SelfTest, ...]
    pointer: str = Field(default="", exclude=True)
    """The line of `CURRENT` for its file, which does not hold it; empty of one that was not published."""

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
        structure = self.approximate or self.local
        trained = None if structure is None else structure.trained
        return tuple(file for file in (trained, *self.beside) if file is not None)

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
        """Of the published manifest's file."""
        return self.pointer.partition(" ")[0]

    @property
    def sha256(self) -> str:
        """Of the published manifest's file."""
        return self.pointer.partition(" ")[2].strip()

    def otherwise_encoded(self, engine: str) -> str | None:
        """In words, that rows were encoded in 8 bits and queries are not; None where it is not so.

        Args:
            engine: what computes the queries' descriptors, as for `model.Encoder`.
        """
        others = [own for own in self.engines if own != engine and own.endswith("int8")]
        if not others:
            return None
        return (
            f"rows were encoded by {', '.join(others)}, the queries by {engine}: what that costs was not "
            f"measured; search with `engine` {others[0]}, or encode the images by {engine}"
        )

    def needed(self) -> Iterator[tuple[str, int | None]]:
        """Every file that it needs, from the index's folder, with its bytes where they are known."""
        yield self.name, None
        for shard in self.shards:
            yield from ((f"{shard.folder}/{file.file}", file.bytes) for file in shard.files)
            yield f"{shard.folder}/{DESCRIPTION}", None
        for file in self.files:
            yield file.file, file.bytes
            yield f"{file.file.rpartition('.')[0]}.json", None
        if self.deletes is not None:
            yield self.deletes.file, self.deletes.bytes


def read_current(index: Folder) -> Manifest:
    """The current version of an index.

    Raises:
        ArtefactError: if there is no index, or its pointer or manifest is damaged or of another release.
    """
    while True:
        pointer = read_pointer(index)
        try:
            return _read(index, pointer, _MEND)
        except ArtefactError:
            # Between the two looks it may have been replaced, and its manifest pruned.
            if read_pointer(index) == pointer:
                raise


def backwards(index: Folder, current: Manifest | None = None) -> Iterator[Manifest]:
    """The versions that are still there, the current one first; each is read when it is its turn.

    Args:
        index: its folder.
        current: the version to begin with; by default the one that is current.

    Raises:
        ArtefactError: if there is no index, or a manifest is damaged or of another release.
    """
    found, count = current or read_current(index), 1
    yield found
    while (pointer := _parent_of(index, found)) is not None:
        prune = command("index", "prune", str(index), "--keep", str(count))
        mend = f"restore the file, or give it up: {prune}"
        found, count = _read(index, pointer, mend), count + 1
        yield found


def _parent_of(index: Folder, manifest: Manifest) -> str | None:
    """The pointer of the version before, if it is still there."""
    if manifest.parent is None or manifest.parent_sha256 is None:
        return None
    name = _name(manifest.parent, manifest.parent_sha256)
    return _line(name, manifest.parent_sha256) if index.exists(name) else None


def read_version(index: Folder, number: int) -> Manifest:
    """A version of an index that is still there.

    Raises:
        ArtefactError: if there is no such version (any more), or as `backwards`.
    """
    known = []
    for manifest in backwards(index):
        if manifest.number == number:
            return manifest
        known.append(str(manifest.number))
    listed = ", ".join(reversed(known))
    raise ArtefactError(f"there is no version {number}; there are: {listed}", where=index)


def as_file(manifest: Manifest) -> tuple[bytes, Manifest]:
    """The bytes of a version's file, and the version with the pointer to it."""
    data = described(kind=_KIND, version=_VERSION, body=manifest.model_dump(mode="json"))
    checksum = digest(data)
    pointer = _line(_name(manifest.number, checksum), checksum)
    return data, manifest.model_copy(update={"pointer": pointer})


def _name(number: int, checksum: str) -> str:
    """Of a version's manifest."""
    return f"manifest-{number:06d}-{checksum[:_DIGITS]}.json"


def _line(name: str, checksum: str) -> str:
    return f"{name} {checksum}\n"


def number_of(name: str) -> int | None:
    """Of the version whose manifest a file's name is; None of other files."""
    found = _NAME.fullmatch(name)
    return None if found is None else int(found[1])


def read_pointer(index: Folder) -> str:
    """The line of `CURRENT`: name and checksum of the current manifest.

    Raises:
        ArtefactError: if there is no index, or the file is damaged.
    """
    if not index.exists(CURRENT):
        raise missing(index, CURRENT, "index", mend="build one: ray-retrieval index build")
    pointer = index.read_bytes(CURRENT).decode(errors="replace")
    if _POINTER.fullmatch(pointer) is None:
        raise ArtefactError(
            "damaged: it should hold a manifest's name and checksum",
            where=f"{index}/{CURRENT}",
            mend=_MEND,
        )
    return pointer


def _read(index: Folder, pointer: str, mend: str) -> Manifest:
    """A manifest, which whoever names it vouches for by its checksum."""
    name, checksum = pointer.split()
    where = f"{index}/{name}"
    if not index.exists(name):
        raise ArtefactError(f"{CURRENT} names it, but it is missing", where=where, mend=mend)
    if digest(index.read_bytes(name)) != checksum:
        raise ArtefactError(
            f"damaged: its checksum is not the one in {CURRENT} or in the version after it",
            where=where,
            mend=mend,
        )
    try:
        body = read_description(index, name, kind=_KIND, version=_VERSION)
    except ArtefactError as error:
        raise ArtefactError(error.problem, where=where, mend=_ANEW) from None
    content = {key: value for key, value in body.items() if key not in ("format", "version")}
    try:
        return Manifest.model_validate({**content, "pointer": pointer})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(
            f"this release cannot search it: '{key}': {first['msg']}",
            where=where,
            mend=_ANEW,
        ) from None
