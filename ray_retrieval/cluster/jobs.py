"""The jobs of a cluster, by Ray's HTTP interface: submit, follow, stop."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray.exceptions

from ray_retrieval.cluster import GIVE_TOKEN, SETTINGS
from ray_retrieval.cluster.meanwhile import environment, quiet
from ray_retrieval.errors import ClusterError

# What jobs are submitted to when nothing else is said: the dashboard, here or forwarded to here.
_DASHBOARD = "http://127.0.0.1:8265"
_ANSWER_S = 10.0  # for a connection
_STOP_S = "60"  # from asking a job to end until it is killed; a server has to take its processes down
_NOISY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that tell each step on the terminal."""
_NO_AGENT = "No available agent"
_START_S = 60.0  # for a head that has just started, until it takes jobs


@dataclass(frozen=True)
class Job:
    """A job of a cluster, as it stands."""

    name: str
    """What it is called, unlike any other of the cluster."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    command: str
    """What was submitted."""
    exit_code: int | None
    """Of its process, where that ended by itself."""
    message: str
    """What Ray says of it, without what it has written."""
    started_ms: int | None
    """When, in milliseconds since 1970."""
    ended_ms: int | None

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer:
    """The jobs of a cluster, by the HTTP address of its dashboard.

    Args:
        address: `http://HOST:8265`; unset, RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine's.

    Raises:
        ClusterError: if nothing answers there, or not to us.
    """

    def __init__(self, address: str | None = None) -> None:
        if address not in (None, "auto") and "://" not in address:
            address = f"http://{address}"
        named = (os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
        self.address = (address or next(filter(None, named), _DASHBOARD)).rstrip("/")
        with self._answering():
            _knock(self.address)
        from ray.job_submission import JobSubmissionClient  # it sets the levels of its loggers

        # Ray asks the environment first, whatever it is told.
        with self._answering(), environment({"RAY_API_SERVER_ADDRESS": self.address}):
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        entrypoint: str,
        *,
        name: str,
        command: str,
        folder: Path,
        variables: Mapping[str, str],
        pip: Sequence[str] = (),
    ) -> None:
        """Upload a folder and start a job in it.

        Args:
            entrypoint: a shell command, run on the head node.
            name: what the job is called.
            command: what is shown as submitted.
            folder: the job's working directory.
            variables: of its environment and that of every process it starts.
            pip: requirements to install for it on every node.

        Raises:
            ClusterError: if the cluster does not take it.
        """
        runtime: dict[str, Any] = {
            "working_dir": str(folder),
            "env_vars": {**SETTINGS, "RAY_JOB_STOP_WAIT_TIME_S": _STOP_S, **variables},
        }
        if pip:
            runtime["pip"] = list(pip)
        deadline = time.monotonic() + _START_S
        while True:
            try:
                with self._answering():
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=name,
                        runtime_env=runtime,
                        metadata={"job_name": name, "command": command},
                    )
                return
            except ClusterError as error:
                # So a head answers that has just started.
                if _NO_AGENT not in error.problem or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def job(self, name: str) -> Job:
        """A job as it stands. Raises ClusterError where there is none of that name."""
        with self._answering(name):
            return _job(self._client.get_job_info(name))

    def jobs(self) -> list[Job]:
        """All that were submitted and are remembered, the newest first."""
        with self._answering():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started_ms or 0, reverse=True)

    def stop(self, name: str) -> bool:
        """Ask a job to end, and kill it if it does not. False if it had ended."""
        with self._answering(name):
            return bool(self._client.stop_job(name))

    def logs(self, name: str) -> str:
        """All that a job has written."""
        with self._answering(name):
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, show: Callable[[str], None], *, seen: int = 0) -> int:
        """Show what a job writes until it ends or the connection does.

        Args:
            name: of the job.
            show: called with each further piece of text.
            seen: characters that were shown before.

        Returns:
            Characters shown by now. A lost connection is no error here: ask for the job's state.
        """
        import aiohttp

        shown = seen

        async def read() -> None:
            nonlocal shown
            position = 0  # the server begins anew with every connection
            async for text in self._client.tail_job_logs(name):
                further = text[max(0, shown - position) :]
                position += len(text)
                if further:
                    shown = position
                    show(further)

        with quiet(*_NOISY, below=logging.ERROR), suppress(OSError, RuntimeError, aiohttp.ClientError):
            asyncio.run(read())
        return shown

    @contextmanager
    def _answering(self, name: str | None = None) -> Iterator[None]:
        try:
            with quiet(*_NOISY, below=logging.ERROR):
                yield
        except ray.exceptions.AuthenticationError as error:
            said = "asks for a token" if "required" in str(error) else "does not accept the token"
            raise ClusterError(
                f"the cluster {said}",
                where=self.address,
                mend=GIVE_TOKEN,
            ) from None
        except OSError as error:
            raise ClusterError(
                f"no cluster answers: {error.strerror or _first_line(error)}",
                where=self.address,
                mend="forward its port (`ray dashboard cluster.yaml`), or give its `address`",
            ) from None
        except (RuntimeError, ValueError) as error:
            if name is not None and "does not exist" in str(error):
                raise ClusterError(
                    "no such job", where=name, mend="`ray-retrieval submit list` names them"
                ) from None
            mend = "is the port 52365 of its head free for Ray?" if _NO_AGENT in str(error) else None
            raise ClusterError(
                f"the cluster refuses: {_first_line(error)}", where=self.address, mend=mend
            ) from None


def _job(details: Any) -> Job:
    return Job(
        name=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        command=(details.metadata or {}).get("command", details.entrypoint),
        exit_code=details.driver_exit_code,
        message=(details.message or "").partition(", last available logs")[0].strip(),
        started_ms=details.start_time,
        ended_ms=details.end_time,
    )


def _knock(address: str) -> None:
    """Find out within seconds that nobody is there: Ray would wait for minutes."""
    url = urlsplit(address)
    if url.scheme in ("http", "https") and url.hostname:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        socket.create_connection((url.hostname, port), timeout=_ANSWER_S).close()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
