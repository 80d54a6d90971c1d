"""Joining a Ray cluster, or starting a local one and closing it again."""

import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import NoReturn

import ray
import ray.exceptions
from ray.exceptions import AuthenticationError
from ray.util.placement_group import placement_group, remove_placement_group

from ray_retrieval.cluster.meanwhile import environment, quiet
from ray_retrieval.cores import cores
from ray_retrieval.errors import ClusterError, RecipeError, RetrievalError
from ray_retrieval.progress import Display
from ray_retrieval.storage import refusal

SETTINGS = {
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
"""Environment variables of Ray that everything here counts on, unless they are set otherwise."""

_ALONE = "RAY_RETRIEVAL_ALONE"
ALONE = {_ALONE: "1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Those of a local Ray besides: nobody takes its one node away, and each watcher is a process to start."""

GIVE_TOKEN = "set RAY_AUTH_MODE=token, and have the cluster's token in ~/.ray/auth_token"
"""How to mend that a cluster does not let one in."""


@contextmanager
def connect() -> Iterator[None]:
    """Work on the cluster that RAY_ADDRESS names, else on a local Ray that ends with the block.

    A Ray that is already connected is used as it is and left running. What is printed meanwhile goes to
    stderr: Ray prints lines about lost processes on stdout, which is for results.

    Raises:
        ClusterError: if the cluster cannot be reached.
    """
    if ray.is_initialized():
        with redirect_stdout(sys.stderr):
            yield
        return
    address = os.environ.get("RAY_ADDRESS")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    alone = {} if address else {name: value for name, value in ALONE.items() if name not in os.environ}
    # What they log as errors is raised as well.
    with environment(alone), quiet("ray.data", "ray.train", "ray.tune", below=logging.CRITICAL):
        _start(address)
        try:
            if wanted := os.environ.get(AWAIT):
                await_nodes(Needs.read(wanted))
            with redirect_stdout(sys.stderr):
                yield
        finally:
            ray.shutdown()


def _start(address: str | None) -> None:
    """Join a cluster, or start a local Ray; raises ClusterError if it does not start."""
    # By http:// it takes jobs alone, and Ray Data does not run over Ray Client.
    if address and address.startswith(("ray://", "http://", "https://")):
        raise ClusterError(
            "a command joins a cluster by HOST:PORT, on a node of it",
            where=f"RAY_ADDRESS={address}",
            mend="from elsewhere submit a job: ray-retrieval submit --address http://HOST:8265 -- VERB …",
        )
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # Two logical processors at least: a stage of a pipeline must never wait for another's.
            ray.init(
                address="local",
                num_cpus=max(2, cores()),
                include_dashboard=False,  # it takes as long to start as the rest
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except AuthenticationError:
        raise ClusterError(
            "no token for the cluster is here", where=f"RAY_ADDRESS={address}", mend=GIVE_TOKEN
        ) from None
    except Exception as error:  # of a start that takes too long, Ray raises no narrower one
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ClusterError(
            f"Ray did not start: {said.rstrip('.')}",
            where=f"RAY_ADDRESS={address}" if address else "local Ray",
            mend="see that the cluster runs and can be reached from here; if it asks for a token, "
            f"{GIVE_TOKEN}"
            if address
            else "try again when the machine has less to do, or start Ray beforehand: `ray start --head` and "
            "RAY_ADDRESS=auto",
        ) from error


def is_alone() -> bool:
    """Whether the Ray in use is a local one that ends with this process.

    Not in a process that was told the address: a search for hyperparameters ends such ones before Ray.
    """
    return os.environ.get(_ALONE) == "1" and "RAY_ADDRESS" not in os.environ


def resources() -> dict[str, float]:
    """What the connected cluster has in all: `CPU` (logical processors), `GPU` and others."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def fewer_or_more(most: int) -> str:
    """How to mend that more was asked for than a cluster has, which is enough for `most`."""
    grow = "let the cluster grow first: submit with `cpus` or `gpus`"
    return f"set it to {most} or fewer, or {grow}" if most else grow


AWAIT = "RAY_RETRIEVAL_AWAIT"
"""The environment variable that says what to wait for before work begins: `CPU=8,GPU=8,seconds=1800`."""


@dataclass(frozen=True)
class Needs:
    """What a cluster that grows by demand has to have before work begins, and how long it may take."""

    cpus: int = 0
    gpus: int = 0
    seconds: float = 1800

    @classmethod
    def read(cls, text: str) -> "Needs":
        """From the value of RAY_RETRIEVAL_AWAIT.

        Raises:
            RecipeError: if it has another form.
        """
        found = dict(re.findall(r"(CPU|GPU|seconds)=([0-9]+)(?:,|$)", text))
        if ",".join(f"{key}={value}" for key, value in found.items()) != text:
            raise RecipeError("not of the form CPU=8,GPU=8,seconds=1800", where=f"{AWAIT}={text}")
        return cls(
            cpus=int(found.get("CPU", 0)),
            gpus=int(found.get("GPU", 0)),
            seconds=float(found.get("seconds", cls.seconds)),
        )

    def __str__(self) -> str:
        return f"CPU={self.cpus},GPU={self.gpus},seconds={self.seconds:.0f}"


def await_nodes(needs: Needs) -> None:
    """Wait until the connected cluster has those processors and GPUs free, one processor beside each GPU.

    A cluster that grows by demand starts nodes for them. They are asked for by a placement group, which goes
    with this process however it ends: nothing is left that would keep the nodes.

    Raises:
        ClusterError: if they are not there in time.
    """
    bundles = [{"GPU": 1.0, "CPU": 1.0}] * needs.gpus + [{"CPU": 1.0}] * max(0, needs.cpus - needs.gpus)
    if not bundles:
        return
    group = placement_group(bundles)
    try:
        if group.wait(1):
            return
        words = f"{max(needs.cpus, needs.gpus)} CPUs and {needs.gpus} GPUs"
        Display().say(f"waiting up to {needs.seconds:.0f} s until {words} are free …")
        if not group.wait(max(0, needs.seconds - 1)):
            there = resources()
            raise ClusterError(
                f"{words} were not free within {needs.seconds:.0f} s; the cluster has "
                f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs",
                mend="ask for less, wait longer, or raise max_workers of the cluster",
            )
    finally:
        remove_placement_group(group)


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


def reraise(error: BaseException, what: str, *, store: object = None) -> NoReturn:
    """Raise what a remote process died of.

    Args:
        error: what Ray raised.
        what: the work that failed, for the message.
        store: where Ray itself writes for the work, if it does.

    Raises:
        RetrievalError: the mendable error in the process, where there was one.
        ArtefactError: if the store was full, or may not be written.
        ClusterError: if the process itself was lost.
        BaseException: `error` as it is, if it was anything else: a bug.
    """
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = [cause for failure in failures for cause in _chain(failure)]
    for cause in causes:
        # Ray's error of a task is made to look like its cause, with the text of the whole traceback.
        if isinstance(cause, RetrievalError) and not isinstance(cause, ray.exceptions.RayError):
            raise cause from None
    for cause in causes:
        if store is not None and isinstance(cause, OSError) and cause.errno in _REFUSED:
            raise refusal(cause, store) from error
    lost = [cause for cause in causes if isinstance(cause, _LOST)]
    if not lost:
        raise error
    line = next((line for line in str(lost[-1]).splitlines() if line.strip()), type(lost[-1]).__name__)
    raise ClusterError(f"{what} failed: {line.strip()}") from error


_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
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
        # As Ray has it in errors of tasks, and of Ray Train's controller.
        wrapped = getattr(inner, "cause", None) or getattr(inner, "controller_failure", None)
        inner = wrapped or inner.__cause__
