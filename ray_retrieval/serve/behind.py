"""What stands behind a gateway, as functions: with Ray they ask other processes, in tests this one."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import QueryError
from ray_retrieval.search.filters import Filter
from ray_retrieval.serve.wire import Encoded, EncodeJob, GroupAnswer, GroupQuery, ModelKey, VersionKey

Why = Literal["busy", "dead", "late"]

Places = npt.NDArray[np.float32]


class PartError(Exception):
    """A part of the server did not answer.

    Args:
        part: `encoder` or `group`.
        why: it has too much to do, is dead, or takes too long.
    """

    def __init__(self, part: str, why: Why) -> None:
        super().__init__(f"{part}: {why}")
        self.part, self.why = part, why

    def as_query_error(self) -> QueryError:
        """What clients are told."""
        name = {
            "encoder": "the encoder",
            "group": "a group of shards",
            "writer": "what changes the index",
            "map": "what lays out the map",
        }.get(self.part, self.part)
        said = {
            "busy": "the server is busy",
            "dead": f"{name} does not answer",
            "late": f"{name} takes too long",
        }
        return QueryError(said[self.why], mend="try again in a moment", status=503)


@dataclass(frozen=True)
class Addition:
    """Rows to add: their table (id · image · label · further columns), descriptors and class names.

    It is not begun after the moment `expires` (`time.time`), when nobody waits for it any more.
    """

    uri: str
    model: str
    table: Any
    descriptors: Any
    class_names: list[str] | None
    replace: bool
    expires: float


@dataclass(frozen=True)
class Removal:
    """Rows to remove, by ids or by a filter; `expires` is as that of an addition."""

    uri: str
    ids: tuple[str, ...]
    where: Filter | None
    expires: float


@dataclass(frozen=True)
class Written:
    """A change that was published, or that changed nothing."""

    number: int
    operation: str
    rows: int
    added: int
    removed: int


Write = Callable[[Addition | Removal, float], Awaitable[Written]]


async def _no_preparation(_key: VersionKey, _models: Sequence[ModelKey]) -> list[float | str]:
    return []


@dataclass(frozen=True)
class Parts:
    """What stands behind one index. Functions that take seconds wait no longer, and raise PartError.

    Attributes:
        encode: encodes an image by the model that the job names.
        groups: ask one group of shards each; together they cover the index.
        prepare: every process that is there opens a version and its models, the one that made it first,
            before they are asked for it; the private bytes of each group of shards, or why one cannot.
        write: changes the index; None where it may not be changed.
        lay_out: the map of descriptors: bits as uint8 [n, bits] or vectors, to float32 [n, 2] within 0…1.
        pings: a sign of life of each part, by its name.
    """

    encode: Callable[[EncodeJob, float], Awaitable[Encoded]]
    groups: Sequence[Callable[[GroupQuery, float], Awaitable[GroupAnswer]]]
    prepare: Callable[[VersionKey, Sequence[ModelKey]], Awaitable[list[float | str]]] = _no_preparation
    write: Write | None = None
    lay_out: Callable[[npt.NDArray[Any]], Awaitable[Places]] | None = None
    pings: Mapping[str, Callable[[float], Awaitable[Any]]] = field(default_factory=dict)


class Watched:
    """A group of shards with a memory of whether it answers.

    Who may leave it out does not wait for a group that is known to be down; it is pinged until it is back.

    Args:
        ask: asks the group.
        ping: a sign of life of it; None: it is taken to be back at once.
        enough_s: who has not answered for so long is down; a question that had less time says nothing.
    """

    _EVERY_S = 0.5

    def __init__(
        self,
        ask: Callable[[GroupQuery, float], Awaitable[GroupAnswer]],
        ping: Callable[[float], Awaitable[Any]] | None,
        enough_s: float,
    ) -> None:
        self._ask, self._ping, self._enough_s = ask, ping, enough_s
        self._reviving: asyncio.Task[None] | None = None

    @property
    def is_down(self) -> bool:
        """Whether it did not answer lately."""
        return self._reviving is not None

    async def ask(self, query: GroupQuery, timeout_s: float, *, may_leave_out: bool) -> GroupAnswer:
        """Its answer.

        Raises:
            PartError: if there is none within `timeout_s`, or at once where it is down and may be left out.
        """
        if self.is_down and may_leave_out:
            raise PartError("group", "dead")
        try:
            return await self._ask(query, timeout_s)
        except PartError as error:
            is_down = error.why == "dead" or (error.why == "late" and timeout_s >= self._enough_s)
            if is_down and self._ping is not None and self._reviving is None:
                self._reviving = asyncio.create_task(self._revive())
            raise

    async def _revive(self) -> None:
        assert self._ping is not None
        while True:
            await asyncio.sleep(self._EVERY_S)
            try:
                await self._ping(self._EVERY_S)
            except (PartError, QueryError):
                continue
            self._reviving = None
            return
