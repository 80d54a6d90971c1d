"""How many processor cores there are, and threads to read with. It stands alone, without PyTorch."""

import os
from contextlib import suppress
from pathlib import Path

_FROM_A_STORE = 24
"""One less than the connections that pyarrow opens to S3 at once (`s3fs.cc`)."""


def cores() -> int:
    """Processor cores that this process may use, by its affinity and by the limit of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed


def readers(*, from_a_store: bool = False) -> int:
    """Threads to read many small files with: they wait for a disk mostly or, longer, for a store."""
    return max(4 * cores(), _FROM_A_STORE if from_a_store else 1)
