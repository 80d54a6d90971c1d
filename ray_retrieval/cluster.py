"""Joining a Ray cluster, or starting a local one and closing it again."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

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
        logging.getLogger(noisy).setLevel(logging.ERROR)
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
    sys.stderr.flush()
    python_stderr, terminal = sys.stderr, os.dup(2)
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
        os.close(terminal)


def root_cause(error: BaseException, what: str) -> RetrievalError:
    """The mendable error that a remote process died of, or else a ClusterError with what is known.

    Args:
        error: what Ray raised.
        what: the work that failed, for the message.
    """
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    for failure in failures:
        inner: BaseException | None = failure
        while inner is not None:
            if isinstance(inner, RetrievalError):
                return inner
            inner = getattr(inner, "cause", None) or inner.__cause__
    lines = [line for line in str(failures[0]).splitlines() if line.strip()]
    return ClusterError(f"{what} failed: {lines[-1].strip() if lines else type(failures[0]).__name__}")
