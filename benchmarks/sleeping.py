"""A network that takes its time without computing, in the place of the backbone called `small`.

A process that imports this module builds it instead of that network. It sleeps 20 ms for each image of a
training step, and as long for each image that it describes, as a GPU of that pace would have it; decoding,
the method's head and loss, gradients, reports and files are real. So several processes on few cores take as
long as on cores of their own. All of the sleep is in the forward pass: no gradient travels meanwhile.

Each process writes down when its passes began and what it had computed by then, into the folder that
SLEEPING_LOG names: what lies between two of them is the pass and all that the process did beside it. The
classes below only have names of this module: who unpickles one imports it.
"""

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ray_retrieval.encode import EncodeConfig
from ray_retrieval.layers import backbones
from ray_retrieval.methods.greedyhash import GreedyHashConfig
from ray_retrieval.methods.xbm import XbmConfig

SECONDS = 0.02
"""Of an image."""
PARAMETERS = 1_000_000
"""Whose gradients travel between the workers: 4 MB."""
LOG = "SLEEPING_LOG"
Passes = npt.NDArray[np.float64]


class Sleep(nn.Module):
    """Gives back its images after a while."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(PARAMETERS))

    def forward(self, images: Tensor) -> Tensor:
        if LOG in os.environ:
            with (Path(os.environ[LOG]) / str(os.getpid())).open("a") as log:
                log.write(f"{time.monotonic()} {time.process_time()}\n")
        time.sleep(SECONDS * len(images))
        return images + 0 * self.weight.sum()  # or it would have no gradient to send


class SleepingNet(nn.Sequential):
    """From float [n, 3, h, w] to [n, 128], layered as `SmallNet`."""

    width = 128

    def __init__(self) -> None:
        super().__init__(
            Sleep(), nn.Conv2d(3, self.width, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


backbones.SmallNet = SleepingNet


def passes(since: float) -> list[Passes]:
    """The passes of each process from a time on: float64 [n, 2], `time.monotonic` and `time.process_time`."""
    logs = [np.loadtxt(log, ndmin=2) for log in Path(os.environ[LOG]).iterdir()]
    return [log[log[:, 0] >= since] for log in logs if log[-1, 0] >= since]


class Encoding(EncodeConfig):
    pass


class Hashing(GreedyHashConfig):
    pass


class Memory(XbmConfig):
    pass


METHODS = {
    "greedyhash": Hashing(backbone={"name": "small", "weights": "none"}, image={"size": 64}),
    "xbm": Memory(
        backbone={"name": "small", "weights": "none"},
        image={"size": 64},
        memory_size=4096,
        warmup_steps=0,
    ),
}
"""`greedyhash` gathers nothing, `xbm` its embeddings, and keeps a memory of them."""
