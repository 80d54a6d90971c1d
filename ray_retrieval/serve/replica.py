"""What the server's processes on Ray have in common that answer by what they hold open: models, or versions.

This module stands alone so that these processes load neither the network nor the HTTP layer for it.
"""

import asyncio
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic

import pyarrow

from ray_retrieval.errors import RetrievalError
from ray_retrieval.serve.versions import Kept, Key, Value
from ray_retrieval.serve.wire import GoneError

_log = logging.getLogger(__name__)


class Replica(Generic[Key, Value]):
    """A process that opens what it is asked for, beside its answers by what is open.

    Args:
        kept: what is open.
    """

    def __init__(self, kept: Kept[Key, Value]) -> None:
        self._kept = kept
        self._opening = ThreadPoolExecutor(1, thread_name_prefix="open")

    async def prepare(self, key: Key) -> float | str:
        """Open something before it is asked for; private bytes of this process, or why it cannot be."""
        try:
            await self._open_beside(key)
        except (GoneError, RetrievalError) as error:
            return str(error)
        except Exception as error:  # Too little memory beside what is open, say. Unsaid, it would be served.
            _log.exception("%s cannot be opened", key)
            return f"{type(error).__name__}: {error}"
        return private_bytes()

    async def ping(self) -> int:
        """A sign of life: the number of the process."""
        return os.getpid()

    async def _await_open(self, key: Key) -> None:
        """Return once it is open, raising whatever opening raises; those that ask for what is do not wait."""
        if not self._kept.is_open(key):
            await self._open_beside(key)

    async def _open_beside(self, key: Key) -> None:
        await asyncio.get_running_loop().run_in_executor(self._opening, self._kept.get, key)


def limit_threads(threads: int) -> None:
    """Bound the pools of this process. Those of torch and numba are bound by who uses them."""
    pyarrow.set_cpu_count(threads)
    pyarrow.set_io_thread_count(max(2, threads))


def private_bytes() -> float:
    """Memory of this process that no other shares, as far as the system tells; 0 where it does not."""
    try:
        said = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return 1024.0 * sum(int(number) for number in re.findall(r"Private_Dirty: +(\d+) kB", said))
