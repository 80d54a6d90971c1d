"""The server's process on Ray that changes indices.

This module stands alone so that this process loads neither the HTTP layer nor any network.
"""

import os
from concurrent.futures import Executor, ThreadPoolExecutor

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.behind import Addition, Removal, Written
from ray_retrieval.serve.replica import limit_threads
from ray_retrieval.serve.wire import Wrong
from ray_retrieval.serve.writing import tidy, written_by


class WriterReplica:
    """The one process that changes indices: changes wait for each other here, not at an index's lock."""

    def __init__(self) -> None:
        limit_threads(1)
        self._threads: dict[str, Executor] = {}

    async def write(self, request: Addition | Removal) -> Written | Wrong:
        """Write and publish a change; see `writing.written`."""
        thread = self._threads.setdefault(request.uri, ThreadPoolExecutor(1, thread_name_prefix="write"))
        try:
            done = await written_by(thread, request)
        except QueryError as error:
            return Wrong(error)
        if isinstance(request, Addition):
            thread.submit(tidy, request.uri)  # Nobody waits for it.
        return done

    async def ping(self) -> int:
        """A sign of life: the number of the process."""
        return os.getpid()
