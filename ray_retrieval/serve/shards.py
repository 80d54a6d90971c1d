"""The server's processes on Ray that search: each holds some shards of the index.

This module stands alone so that these processes load neither the network nor the HTTP layer.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
from ray import serve

from ray_retrieval.search import Index
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.wire import GroupHits, Row, identity

_SEARCH_BATCH = 64
"""Most queries that a group of shards scans in one pass; those that come meanwhile share the next one."""


class ShardGroup:
    """Searches some of the shards of an index.

    Args:
        index_uri: the index.
        model: fingerprint of the model that must have made it.
        shards: numbers of the shards.
        config: threads and checks.
    """

    def __init__(self, index_uri: str, model: str, shards: list[int], config: ServeConfig) -> None:
        limit_threads(config.shard_threads)
        self._index = Index.open(
            index_uri, shards=shards, threads=config.shard_threads, check=config.check, model=model
        )
        self._identity = identity(self._index)
        # One scan at a time: it uses all the threads that this process may have.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self.search_batch([(self._index.form.zeros(1).data[0], 1)])  # The first scan compiles its kernel.

    @serve.batch(max_batch_size=_SEARCH_BATCH, batch_wait_timeout_s=0)
    async def search(self, queries: list[tuple[Row, int]]) -> list[GroupHits]:
        """As `search_batch`; called with one query at a time, it gathers them."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.search_batch, queries)

    async def ping(self) -> int:
        """A sign of life: the number of the process."""
        return os.getpid()

    def search_batch(self, queries: list[tuple[Row, int]]) -> list[GroupHits]:
        """The `k` nearest rows for each (descriptor, k)."""
        described = self._index.form.with_rows(np.stack([row for row, _ in queries]))
        hits = self._index.search(described, max(k for _, k in queries))
        return [
            GroupHits(self._identity, hits.distances[query, :k], hits.rows[query, :k])
            for query, (_, k) in enumerate(queries)
        ]


def limit_threads(threads: int) -> None:
    """Bound the pools of this process. Those of torch and numba are bound by who uses them."""
    pyarrow.set_cpu_count(threads)
    pyarrow.set_io_thread_count(max(2, threads))
