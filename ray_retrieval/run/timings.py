"""How long the stages of a run took: `timings.json`, with the machine and the releases they ran on."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ray_retrieval.compute import describe_machine
from ray_retrieval.storage import Folder

_PACKAGES = (
    "ray_retrieval",
    "torch",
    "torchvision",
    "ray",
    "numpy",
    "pyarrow",
    "faiss-gpu",
    "faiss-cpu",
    "numba",
)
_KEPT_EVERY_S = 10


class Stage:
    """One stage of a run, and its seconds in `timings.json`.

    Args:
        run: the run's folder.
        name: of the stage.

    Attributes:
        worked: whether it had anything to do; if not, what is known of it stays.
        known_s: seconds that `timings.json` says of it from an earlier start, 0 without one.
        earlier_s: seconds that were spent before on what it goes on with.
    """

    def __init__(self, run: Folder, name: str) -> None:
        self.worked = True
        self.known_s: float = _read(run)["stages"].get(name, 0.0)
        self.earlier_s = 0.0
        self._run, self._name = run, name
        self._started = self._kept = time.monotonic()

    def keep_now_and_then(self) -> None:
        """Keep the seconds so far, for a start that goes on after a kill."""
        if time.monotonic() - self._kept >= _KEPT_EVERY_S:
            self._keep()

    def end(self) -> None:
        """Keep the seconds if it worked, else those that were known."""
        if self.worked:
            self._keep()
        elif self._kept > self._started:
            self._write(self.known_s)

    def _keep(self) -> None:
        self._kept = time.monotonic()
        self._write(self._kept - self._started + self.earlier_s)

    def _write(self, seconds: float) -> None:
        timings = _read(self._run)
        timings["stages"][self._name] = round(seconds, 2)
        timings["versions"] = {"python": platform.python_version(), **_versions()}
        timings["machine"] = describe_machine()
        self._run.write_json("timings.json", timings)


@contextmanager
def timed(run: Folder, name: str) -> Iterator[Stage]:
    """Time a stage, and keep its seconds in `timings.json` if it had anything to do."""
    stage = Stage(run, name)
    yield stage
    stage.end()


def _read(run: Folder) -> dict[str, Any]:
    """What `timings.json` says; no stage before the first."""
    found: dict[str, Any] = run.read_json("timings.json") if run.exists("timings.json") else {"stages": {}}
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
