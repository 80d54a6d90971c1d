"""Measurements that are a process of their own: of its memory, or with limits that cannot be taken back."""

import json
import os
import subprocess
import sys
from typing import Any

_LIBRARIES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ProcessError(Exception):
    """A process failed; the text is the end of what it said."""


def in_its_own_process(script: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """Run a script with other arguments; what it prints last is JSON, and is returned.

    Args:
        script: its `__file__`.
        arguments: that let it measure one thing and print it.
        threads: of the libraries that compute.

    Raises:
        ProcessError: if it fails.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **dict.fromkeys(_LIBRARIES, str(threads))},
    )
    if done.returncode:
        raise ProcessError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
