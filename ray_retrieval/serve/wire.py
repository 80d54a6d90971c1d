"""What passes between the server's processes.

Every request names the version of the index, or the model, that it is for, with all that a process needs to
open it: so a process that has just started, or still serves an older configuration, answers for that version
and no other, or says that it cannot.

Until when somebody waits is said as a moment, so that the time that a question spends on its way counts. The
clocks of the machines of a cluster therefore have to agree to about a second, as NTP keeps them: one that is
ahead by more than `request_timeout_s` would answer nothing, one that is behind does work in vain.
"""

import time
from dataclasses import dataclass
from typing import Any

from ray_retrieval.descriptors import Descriptors
from ray_retrieval.errors import QueryError
from ray_retrieval.search import Hits
from ray_retrieval.search.filters import Filter
from ray_retrieval.search.neighbours import Neighbours
from ray_retrieval.serve.answers import Box


@dataclass(frozen=True)
class VersionKey:
    """A version of an index.

    Attributes:
        uri: of the index.
        number: of the version.
        sha256: of its manifest, which stands for all that it holds.
        model: fingerprint of the model that made it.
    """

    uri: str
    number: int
    sha256: str
    model: str


@dataclass(frozen=True)
class ModelKey:
    """A model: its folder and its fingerprint."""

    uri: str
    fingerprint: str


@dataclass(frozen=True)
class GroupQuery:
    """What a group of shards is asked.

    Attributes:
        version: of the index.
        queries: one descriptor or several.
        k: hits of each.
        where: which rows may be hits; None: all.
        expires: moment (`time.time`) after which nobody waits for the answer.
        groups: among how many the shards are divided, as the one that asks knows it.
        compare_few: whether a group with few features that count may compare them one by one.
    """

    version: VersionKey
    queries: Descriptors
    k: int
    where: Filter | None
    expires: float
    groups: int
    compare_few: bool = True


@dataclass(frozen=True)
class GroupAnswer:
    """What a group of shards found.

    Attributes:
        version: that it searched.
        found: the hits of each query; or, of votes of local features, the nearest features of all queries'
            features, one query after another, which have to be merged before anything is voted on.
        selected: rows of the group that may be hits, where votes are still to be cast; else 0.
        batch: queries that were searched together.
        few: features of the group that count, where they were compared one by one as they are few; else None.
    """

    version: VersionKey
    found: Hits | Neighbours
    selected: int
    batch: int
    few: int | None = None


@dataclass(frozen=True)
class EncodeJob:
    """An image to encode: by which model, what counts of it, and until when (`time.time`) somebody waits."""

    model: ModelKey
    image: bytes
    box: Box | None
    expires: float


@dataclass(frozen=True)
class Encoded:
    """A descriptor (one row), or why the image cannot be decoded.

    Attributes:
        model: fingerprint of the model that made it.
        batch: images that were encoded together.
    """

    found: Descriptors | str
    model: str
    batch: int


@dataclass(frozen=True)
class Late:
    """Nobody waits for the answer any more: the work was not done."""


@dataclass(frozen=True)
class Gone:
    """The version or the model asked for is no longer where it was."""

    why: str


@dataclass(frozen=True)
class Wrong:
    """The question itself is wrong."""

    error: QueryError


class GoneError(Exception):
    """A version, or a model, was asked for that is no longer there."""


def late(expires: float) -> bool:
    """Whether nobody waits any more."""
    return time.time() > expires


def wrong(error: Any) -> Wrong:
    """What is said of a mendable error: without where, which may be a place on this machine."""
    return Wrong(QueryError(error.problem, mend=error.mend, status=error.status))
