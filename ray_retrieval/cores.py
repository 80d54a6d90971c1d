"""How many processor cores there are to use. It stands alone: not every process needs PyTorch."""

import os
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """Processor cores that this process may use, by its affinity and by the limit of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed
