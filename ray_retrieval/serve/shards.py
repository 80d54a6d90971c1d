"""The server's processes on Ray that search: each holds some shards of an index.

This module stands alone so that these processes load neither the network nor the HTTP layer.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from ray_retrieval.descriptors import Descriptors, Local, concatenate
from ray_retrieval.errors import RetrievalError
from ray_retrieval.search import Hits, Index
from ray_retrieval.search.checking import check_hits
from ray_retrieval.search.filters import Filter
from ray_retrieval.search.hits import no_hits
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.gathering import Gathering
from ray_retrieval.serve.replica import Replica
from ray_retrieval.serve.versions import Kept, open_version
from ray_retrieval.serve.wire import (
    Gone,
    GoneError,
    GroupAnswer,
    GroupQuery,
    Late,
    VersionKey,
    Wrong,
    late,
    wrong,
)

_SEARCH_BATCH = 64
"""Most queries that a group of shards scans in one pass; those that come meanwhile share the next one."""
_IDLE = 2.0
"""Times as long as a request may take: then nobody can still ask for an old version."""

AnyAnswer = GroupAnswer | Late | Gone | Wrong
Division = tuple[VersionKey, int]
"""A version, and among how many groups its shards are divided."""


class ShardGroup(Replica[Division, Index | None]):
    """Searches some of the shards of an index, in whatever version it is asked for.

    While a server takes the place of another one that divides its indices otherwise, the groups of each are
    asked by gateways of the other, too: then they search their share of that division.

    Args:
        group: its number.
        groups: how many there are, as far as its own server goes.
        config: threads and checks.
        key: a version to open at once; None: when it is asked for.
    """

    def __init__(self, group: int, groups: int, config: ServeConfig, key: VersionKey | None = None) -> None:
        self._group, self._groups, self._config = group, groups, config
        super().__init__(Kept(self._open, idle_s=_IDLE * config.request_timeout_s))
        # One scan at a time: it uses all the threads that this process may have.
        thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._gathering = Gathering(self.search_batch, thread, most=_SEARCH_BATCH)
        if key is not None:
            with suppress(GoneError):  # Pruned since: the gateways ask for what is there.
                self._kept.get((key, groups))

    async def search(self, query: GroupQuery) -> AnyAnswer:
        """As `search_batch`, which gets the queries that have come meanwhile."""
        if self._group >= query.groups:
            return Gone(f"of {query.groups} groups of shards none has the number {self._group}")
        try:
            await self._await_open((query.version, query.groups))
        except GoneError as error:
            return Gone(str(error))
        except RetrievalError as error:
            return wrong(error)
        return await self._gathering.ask(query)

    def search_batch(self, queries: list[GroupQuery]) -> list[AnyAnswer]:
        """An answer to each query, in their order; those of one version and filter are searched together."""
        answers: dict[int, AnyAnswer] = {}
        together: dict[tuple[Division, Filter | None], list[int]] = {}
        for number, query in enumerate(queries):
            together.setdefault(((query.version, query.groups), query.where), []).append(number)
        for (division, where), every in together.items():
            # The others may have taken long.
            answers.update((number, Late()) for number in every if late(queries[number].expires))
            numbers = [number for number in every if number not in answers]
            if not numbers:
                continue
            some = [queries[number] for number in numbers]
            try:
                found = self._search(division, where, some)
            except GoneError as error:
                found = [Gone(str(error))] * len(some)
            except RetrievalError as error:
                found = [wrong(error)] * len(some)
            answers.update(zip(numbers, found, strict=True))
        return [answers[number] for number in range(len(queries))]

    def _search(
        self, division: Division, where: Filter | None, queries: list[GroupQuery]
    ) -> Sequence[AnyAnswer]:
        version, index = division[0], self._kept.get(division)
        if index is None:
            return [_nothing(query) for query in queries]
        selected = 0
        if index.votes:
            selected = index.count(where)
            known = index.few_features(where)
            answers = []
            for query in queries:
                few = known if query.compare_few else None
                found = index.nearest_features(_local(query), where=where, compare_few=few is not None)
                answers.append(GroupAnswer(version, found, selected, len(queries), few))
            return answers
        answers_of: dict[int, GroupAnswer] = {}
        for k, numbers in _by_hits(queries, index).items():
            some = [queries[number] for number in numbers]
            hits = index.search(concatenate([query.queries for query in some]), k, where=where)
            ends = np.cumsum([0, *(len(query.queries) for query in some)]).tolist()
            for number, start, stop in zip(numbers, ends, ends[1:], strict=False):
                own = slice(start, stop), slice(queries[number].k)
                answers_of[number] = GroupAnswer(
                    version, Hits(hits.distances[own], hits.rows[own]), selected, len(some)
                )
        return [answers_of[number] for number in range(len(queries))]

    def _open(self, division: Division, known: "list[Index | None]") -> Index | None:
        key, groups = division
        index = open_version(
            key,
            group=self._group,
            groups=groups,
            threads=self._config.shard_threads,
            check=self._config.check,
            known=[other for other in known if other is not None],
        )
        if index is not None:
            check_hits(index)  # It compiles the kernels, too.
        return index


def _by_hits(queries: Sequence[GroupQuery], index: Index) -> dict[int, list[int]]:
    """The numbers of queries that are searched together, by how many hits are asked for.

    An approximate search looks at the more rows the more hits it is asked for: there, what one finds is not
    to depend on the others.
    """
    most, together = max(query.k for query in queries), dict[int, list[int]]()
    for number, query in enumerate(queries):
        together.setdefault(most if index.manifest.approximate is None else query.k, []).append(number)
    return together


def _nothing(query: GroupQuery) -> GroupAnswer:
    """What a group without shards finds."""
    dtype = np.int32 if query.queries.data.dtype == np.uint8 else np.float32
    return GroupAnswer(query.version, no_hits(len(query.queries), 0, dtype), 0, 1)


def _local(query: GroupQuery) -> Local:
    found: Descriptors = query.queries
    assert isinstance(found, Local)
    return found
