"""How long the stages of a run took: `timings.json`, with the machine and the releases they ran on."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

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


@dataclass
class Stage:
    """What a stage says of itself.

    Attributes:
        worked: whether it had anything to do.
        earlier_s: seconds that were spent on it before.
    """

    worked: bool = True
    earlier_s: float = 0.0


@contextmanager
def timed(run: Folder, name: str) -> Iterator[Stage]:
    """Time a stage, and keep its seconds in `timings.json` if it had anything to do."""
    started = time.monotonic()
    stage = Stage()
    yield stage
    if not stage.worked:
        return
    known = run.exists("timings.json")
    timings = run.read_json("timings.json") if known else {"stages": {}}
    timings["stages"][name] = round(time.monotonic() - started + stage.earlier_s, 2)
    timings["versions"] = {"python": platform.python_version(), **_versions()}
    timings["machine"] = describe_machine()
    run.write_json("timings.json", timings)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
