"""What an index version consists of, and which version is current.

    CURRENT                 one line: the manifest's name and its sha256; replaced last, in one step
    manifest-000001.json    a version: the shards with their checksums, the model, the self-test

Manifests and shards never change once written. A new version is a new manifest, which may name shards of
earlier ones; a reader that has opened a version keeps it. The types below say what this release can search:
a manifest with anything else is refused rather than searched wrongly.
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
_KIND, _VERSION = "index", 2
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
    files: tuple[FileEntry, ...]
    """One for each shard, named from the index's folder."""
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
    """The version that it was made from."""
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
    """Rows that a search can find."""
    next_row: int = Field(ge=0)
    """The number that the next row added will get; numbers are never given twice."""
    model: str
    """Fingerprint of the model that made the descriptors."""
    embeddings: str
    """Fingerprint of the embeddings that the index was built from."""
    class_names: tuple[str, ...] | None
    shards: tuple[ShardEntry, ...]
    """In ascending order of rows."""
    approximate: Approximate | None = None
    """Of an index of vectors that is not searched exactly."""
    local: LocalSearch | None = None
    """Of an index of local features."""
    deletes: tuple[()]
    """Files that name deleted rows."""
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
        return self

    @property
    def bytes(self) -> int:
        """Of all files but this one."""
        return sum(shard.bytes for shard in self.shards) + sum(file.bytes for file in self.files)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """What lies beside the shards: one file for each, or none."""
        beside = self.approximate or self.local
        return () if beside is None else beside.files

    @property
    def form(self) -> Form:
        """Of the descriptors."""
        return Form.from_json(self.model_dump(include={"kind", "bits", "dimension", "vectors"}))

    @property
    def name(self) -> str:
        """Of the manifest's file."""
        return f"manifest-{self.number:06d}.json"


def read_current(index: Folder) -> Manifest:
    """The current version of an index.

    Raises:
        ArtefactError: if there is no index, or its pointer or manifest is damaged or of another release.
    """
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
    name, checksum = pointer.groups()
    where = f"{index}/{name}"
    if not index.exists(name):
        raise ArtefactError(f"{CURRENT} names it, but it is missing", where=where, mend=_MEND)
    if digest(index.read_bytes(name)) != checksum:
        raise ArtefactError(f"damaged: its checksum is not the one in {CURRENT}", where=where, mend=_MEND)
    try:
        body = read_description(index, name, kind=_KIND, version=_VERSION)
    except ArtefactError as error:
        raise ArtefactError(error.problem, where=where, mend=_ANEW) from None
    content = {key: value for key, value in body.items() if key not in ("format", "version")}
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


def publish(index: Folder, manifest: Manifest) -> None:
    """Make a version current. Its shards must be complete; readers see the old version or this one."""
    write_description(
        index, manifest.name, kind=_KIND, version=_VERSION, body=manifest.model_dump(mode="json")
    )
    index.write_text(CURRENT, f"{manifest.name} {index.checksum(manifest.name)}\n")
