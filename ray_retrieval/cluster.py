"""Joining a Ray cluster, or starting a local one and closing it again."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import ray
import ray.exceptions

from ray_retrieval.compute import cores
from ray_retrieval.errors import ClusterError, RetrievalError

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A worker's own folder would make every relative path of a recipe mean something else.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # The controller takes one report a poll: at the default of 2 s, short epochs would wait for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def connect() -> Iterator[None]:
    """Work on the cluster that RAY_ADDRESS names, else on a local Ray that ends with the block.

    A Ray that is already connected is used as it is and left running.

    Raises:
        ClusterError: if the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for noisy in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what they log as errors is raised as well
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # Two logical processors at least: a stage of a pipeline must never wait for another's.
            ray.init(num_cpus=max(2, cores()), log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"RAY_ADDRESS={address}" if address else "local Ray"
        raise ClusterError(f"Ray did not start: {str(error).splitlines()[0]}", where=where) from error
    try:
        yield
    finally:
        ray.shutdown()


def resources() -> dict[str, float]:
    """What the connected cluster has in all: `CPU` (logical processors), `GPU` and others."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


# Ray's core warns of how Ray Data itself makes its actors: https://github.com/ray-project/ray/issues/53727
_NOISE = b"has constructor arguments in the object store"


@contextmanager
def hushed() -> Iterator[None]:
    """Leave lines of native code that nobody can act on out of stderr while the block runs.

    Native code writes to the file descriptor itself, so that is what is filtered; Python's `sys.stderr` goes
    to the terminal directly.
    """
    python_stderr = sys.__stderr__
    if python_stderr is None or sys.stderr is not python_stderr:
        yield  # a notebook, or a test: stderr is no file of this process
        return
    python_stderr.flush()
    terminal = os.dup(2)
    reader, writer = os.pipe()

    def forward() -> None:
        with os.fdopen(reader, "rb") as lines:
            for line in lines:
                if _NOISE not in line:
                    os.write(terminal, line)

    filtering = threading.Thread(target=forward, name="stderr", daemon=True)
    filtering.start()
    os.dup2(writer, 2)
    os.close(writer)
    sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1)
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = python_stderr
        os.dup2(terminal, 2)
        filtering.join(timeout=1)
        if not filtering.is_alive():
            os.close(terminal)


def reraise(error: BaseException, what: str) -> NoReturn:
    """Raise what a remote process died of.

    Args:
        error: what Ray raised.
        what: the work that failed, for the message.

    Raises:
        RetrievalError: the mendable error in the process, where there was one.
        ClusterError: if the process itself was lost.
        BaseException: `error` as it is, if it was anything else: a bug.
    """
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = [cause for failure in failures for cause in _chain(failure)]
    for cause in causes:
        if isinstance(cause, RetrievalError):
            raise cause from None
    lost = [cause for cause in causes if isinstance(cause, _LOST)]
    if not lost:
        raise error
    line = next((line for line in str(lost[-1]).splitlines() if line.strip()), type(lost[-1]).__name__)
    raise ClusterError(f"{what} failed: {line.strip()}") from error


_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.GetTimeoutError,
)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        inner = getattr(inner, "cause", None) or inner.__cause__
