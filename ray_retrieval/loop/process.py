"""One of the processes that train together, and what they tell each other."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ray_retrieval.methods.base import Rows


@dataclass(frozen=True)
class Process:
    """One of the processes that train together."""

    rank: int = 0
    world: int = 1
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, rows: Rows) -> Rows:
        """This process's run of some rows; those of different processes differ by one in length at most."""
        return np.array_split(rows, self.world)[self.rank]

    def add_up(self, value: Tensor) -> None:
        """Make of a tensor [...], in place, the sum of those of all processes; all call it together."""
        if self.world > 1:
            dist.all_reduce(value)

    def all_say(self, value: bool) -> bool:
        """Whether it is so on every process; all call it together."""
        votes = torch.tensor(float(value), device=self.device)
        self.add_up(votes)
        return int(votes) == self.world

    def from_leader(self, value: float) -> float:
        """The leader's value, on every process."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def copy_from_leader(self, module: nn.Module) -> None:
        """Give a module the leader's parameters and buffers."""
        if self.world > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, src=0)
