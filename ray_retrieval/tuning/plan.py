"""How many trials train at the same time, and what each asks of the cluster."""

from collections.abc import Callable
from dataclasses import dataclass

from ray_retrieval.errors import ClusterError
from ray_retrieval.tuning.config import TuneConfig

DRIVER_CPUS = 0.01
"""What the process that looks after a trial's workers asks for: 0 is refused, and 1 would take their room."""
_PROCESS_MEMORY = 1 << 30
"""Bytes of a trial's own process with a small network, beside the images that it keeps."""

Resources = dict[str, float]
"""Of one node: `CPU` (logical processors), `GPU`, `memory` (bytes) and others."""


@dataclass(frozen=True)
class Plan:
    """What the trials of a search ask for.

    Attributes:
        concurrent: trials at the same time.
        here: whether each trains in its own process; else it looks after Ray Train's workers.
    """

    concurrent: int
    here: bool

    @property
    def cpus(self) -> float:
        """Logical processors that a trial's own process asks for."""
        return 1.0 if self.here else DRIVER_CPUS

    def threads(self, cpus: float, cores: int) -> int:
        """Threads of a trial's own process on a node, none too many should all trials that fit be on it.

        Args:
            cpus: logical processors of the node.
            cores: those that it really has.
        """
        return max(1, cores // min(self.concurrent, max(1, int(cpus))))


def plan(
    config: TuneConfig,
    nodes: list[Resources],
    *,
    left: int,
    images: int = 0,
    mend: Callable[[int], str] = "set it to {} or fewer".format,
) -> Plan:
    """A plan that the cluster has room for, so that no trial waits for another's processors for ever.

    Args:
        config: says how many workers a trial has, and how many trials there are at the same time.
        nodes: of the cluster.
        left: trials that are to be trained.
        images: bytes of decoded images that a trial keeps.
        mend: what to do where there is room for so many only.

    Raises:
        ClusterError: with the sum, if it has not.
    """
    here = config.workers == 1 and not _total(nodes, "GPU")
    found = room(config, nodes, here=here)
    asked = 1 if config.concurrent == "auto" else config.concurrent
    if found < asked:
        most = found or int(min(_total(nodes, "CPU") - DRIVER_CPUS, _total(nodes, "GPU") or float("inf")))
        raise ClusterError(
            _sum(config, nodes, asked, here=here),
            where="tune.concurrent" if found else "tune.workers",
            mend=mend(max(0, most)),
        )
    if config.concurrent != "auto":
        return Plan(min(asked, max(1, left)), here)
    return Plan(min(room(config, nodes, here=here, images=images), max(1, left)), here)


def room(config: TuneConfig, nodes: list[Resources], *, here: bool, images: int | None = None) -> int:
    """Trials that the nodes have room for.

    Args:
        config: says how many workers a trial has.
        nodes: of the cluster; those without processors for work do not count.
        here: whether a trial trains in its own process.
        images: bytes of decoded images that a trial keeps in its own process; None: memory does not count.
    """
    if not here:
        found = int(_total(nodes, "CPU") / (config.workers + DRIVER_CPUS) + 1e-9)
        gpus = _total(nodes, "GPU")
        return min(found, int(gpus) // config.workers) if gpus else found
    each = None if images is None else images + _PROCESS_MEMORY
    # One at least, whatever it takes: what a network needs is not known.
    found = sum(_processes(node, each) for node in nodes)
    return found or min(1, sum(_processes(node, None) for node in nodes))


def _processes(node: Resources, each: int | None) -> int:
    """Trials of one processor, and of so many bytes, that a node has room for."""
    cpus = int(node.get("CPU", 0))
    return cpus if each is None or "memory" not in node else min(cpus, int(node["memory"]) // each)


def _total(nodes: list[Resources], kind: str) -> float:
    """Of the nodes that have processors for work."""
    return sum(node.get(kind, 0) for node in nodes if node.get("CPU", 0))


def _sum(config: TuneConfig, nodes: list[Resources], asked: int, *, here: bool) -> str:
    """What so many trials ask for, and what there is."""
    cpus, gpus = _total(nodes, "CPU"), _total(nodes, "GPU")
    each = 1.0 if here else config.workers + DRIVER_CPUS
    trials = "1 trial" if asked == 1 else f"{asked} trials"
    workers = "1 worker" if config.workers == 1 else f"{config.workers} workers"
    driver = "" if here else f" + {DRIVER_CPUS} for its driver"
    accelerators = f" and {asked * config.workers} GPUs" if gpus else ""
    has = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    return (
        f"{trials} × ({workers} × 1 CPU{driver}) = {asked * each:g} CPUs{accelerators}, "
        f"but the cluster has {has}"
    )
