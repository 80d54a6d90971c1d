"""A method that notes its steps. Importing it makes it one of the package's: only in processes apart."""

import time
from typing import Literal

import torch.distributed as dist
from watched import note

from ray_retrieval.methods import METHODS
from ray_retrieval.methods.xbm import Xbm, XbmConfig


class WatchedConfig(XbmConfig):
    """XBM that is watched."""

    name: Literal["watched"] = "watched"
    log: str
    """Where each step is noted before it is done."""
    seconds: float
    """That a step takes at least."""


class Watched(Xbm):
    """XBM whose steps are noted."""

    config: WatchedConfig

    def before_step(self, clock, encode):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        note(self.config.log, step=clock.step, rank=rank, world=world)
        time.sleep(self.config.seconds)
        super().before_step(clock, encode)


METHODS["watched"] = (WatchedConfig, Watched)
