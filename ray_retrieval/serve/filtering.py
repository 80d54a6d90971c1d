"""The filters that clients send: read, and checked against a version of the index, once, aside."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Executor

from ray_retrieval.errors import QueryError
from ray_retrieval.search import Index
from ray_retrieval.search.filters import Condition, Either, Every, Filter, Not
from ray_retrieval.serve.wire import VersionKey

MOST_CHARACTERS = 4096
MOST_CONDITIONS = 64
"""Each condition is a pass over all rows; the values of one `in` share a pass."""
_PLACE = "path"
_KEPT = 1000


class Filters:
    """Filters of all versions that are served; those read last are kept.

    Args:
        threads: read and check them.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._kept: OrderedDict[tuple[VersionKey, str], Filter] = OrderedDict()

    async def read(self, key: VersionKey, index: Index, text: str) -> Filter:
        """The filter that a text says.

        Args:
            key: of the version.
            index: that version.
            text: as it was sent.

        Raises:
            QueryError: if it is too long, cannot be read, or is none for this index.
        """
        found = self._kept.get((key, text))
        if found is None:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._threads, read_filter, index, text)
            self._kept[key, text] = found
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found


def read_filter(index: Index, text: str) -> Filter:
    """As `Filters.read`, here and now."""
    if len(text) > MOST_CHARACTERS:
        raise _too_much(f"{len(text):,} characters", f"{MOST_CHARACTERS:,}")
    found = Filter.parse(text)
    columns = list(_columns(found.condition))
    if len(columns) > MOST_CONDITIONS:
        raise _too_much(
            f"{len(columns):,} conditions", f"{MOST_CONDITIONS}, and name values of a column by `in`"
        )
    if _PLACE in columns:
        # By < and > it could be found out letter by letter, and answers tell the names of files alone.
        raise QueryError(
            f"a server does not filter by '{_PLACE}', which says where its files lie",
            where="where",
            mend="filter by id, label or another column of the index",
            status=422,
        )
    index.check_filter(found)
    return found


def _columns(condition: Condition) -> Iterator[str]:
    """The column of each condition."""
    if isinstance(condition, Every | Either):
        for one in condition.conditions:
            yield from _columns(one)
    elif isinstance(condition, Not):
        yield from _columns(condition.condition)
    else:
        yield condition.column


def _too_much(what: str, most: str) -> QueryError:
    return QueryError(f"the filter has {what}", where="where", mend=f"send at most {most}", status=422)
