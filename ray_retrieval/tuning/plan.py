"""How many trials train at the same time, and what each asks of the cluster."""

from dataclasses import dataclass

from ray_retrieval.errors import ClusterError
from ray_retrieval.tuning.config import TuneConfig

DRIVER_CPUS = 0.01
"""What the process that looks after a trial's workers asks for: 0 is refused, and 1 would take their room."""


@dataclass(frozen=True)
class Plan:
    """What the trials of a search ask for.

    Attributes:
        concurrent: trials at the same time.
        here: whether each trains in its own process; else it looks after Ray Train's workers.
        threads: of the processor for each, where it trains in its own process.
    """

    concurrent: int
    here: bool
    threads: int

    @property
    def cpus(self) -> float:
        """Logical processors that a trial's own process asks for."""
        return 1.0 if self.here else DRIVER_CPUS


def plan(config: TuneConfig, resources: dict[str, float], *, left: int, nodes: int, cores: int) -> Plan:
    """A plan that the cluster has room for, so that no trial waits for another's processors for ever.

    Args:
        config: says how many workers a trial has, and how many trials there are at the same time.
        resources: of the whole cluster.
        left: trials that are to be trained.
        nodes: machines of the cluster.
        cores: processor cores of one of them.

    Raises:
        ClusterError: with the sum, if it has not.
    """
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    here = config.workers == 1 and not gpus
    each = 1.0 if here else config.workers + DRIVER_CPUS
    room = int(cpus / each + 1e-9)
    if gpus:
        room = min(room, int(gpus) // config.workers)
    asked = 1 if config.concurrent == "auto" else config.concurrent
    if room < asked:
        trials = "1 trial" if asked == 1 else f"{asked} trials"
        workers = "1 worker" if config.workers == 1 else f"{config.workers} workers"
        driver = "" if here else f" + {DRIVER_CPUS} for its driver"
        accelerators = f" and {asked * config.workers} GPUs" if gpus else ""
        has = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ClusterError(
            f"{trials} × ({workers} × 1 CPU{driver}) = {asked * each:g} CPUs{accelerators}, "
            f"but the cluster has {has}",
            where="tune.concurrent" if room else "tune.workers",
            mend=f"set it to {room} or fewer" if room else "set it to fewer, or add nodes",
        )
    concurrent = min(room if config.concurrent == "auto" else config.concurrent, max(1, left))
    on_one = -(-concurrent // max(1, nodes))
    return Plan(concurrent, here, threads=max(1, cores // on_one))
