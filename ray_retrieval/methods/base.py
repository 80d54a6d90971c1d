"""What every method is: a network, an objective, descriptors, and a plan of batches."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ray_retrieval.config import Config
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing, normalise
from ray_retrieval.descriptors import Codes, DescriptorKind

Outputs = dict[str, Tensor]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Clock:
    """Where training stands. Everything that changes over time is a pure function of it.

    Attributes:
        seed: of the whole training; with `epoch` and `step` it determines every random draw.
        epoch: epochs finished.
        step: optimiser steps finished.
        samples: training images seen.
        total_steps: optimiser steps of the whole training.
    """

    seed: int
    epoch: int = 0
    step: int = 0
    samples: int = 0
    total_steps: int = 1


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch, or a part of the share when gradients are accumulated.

    Attributes:
        rows: int64 [n], row numbers in the training table.
        labels: int64 [n], or float [n, classes] multi-hot.
        global_size: images in the global batch over all workers.
        world: number of workers.
    """

    rows: Tensor
    labels: Tensor
    global_size: int
    world: int

    def mean(self, values: Tensor) -> Tensor:
        """This share's part of the mean over the global batch.

        Data parallelism averages gradients over workers. Scaled so, the average (and the sum over
        accumulated parts) is exactly the gradient of the global mean, whatever the sizes of the shares.

        Args:
            values: float [n], one value an image.
        """
        return values.sum() * (self.world / self.global_size)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters trained at `lr_factor` times the learning rate."""

    parameters: list[nn.Parameter]
    lr_factor: float = 1.0


class MethodConfig(Config):
    """What every method's configuration has."""

    name: str
    """The method."""
    image: Preprocessing = Preprocessing()
    """How an image becomes the network's input; travels with the model."""


class Method(nn.Module, ABC):
    """A published method.

    Args:
        config: of the method.
        classes: number of classes of the training data.
        pretrained: whether the backbone starts from the configured weights.

    Every trained parameter lives under the module itself, so that data parallelism, the optimiser and the
    saved model all see it.
    """

    kind: ClassVar[DescriptorKind]

    def __init__(self, config: MethodConfig, *, classes: int, pretrained: bool = True) -> None:  # noqa: ARG002
        super().__init__()
        self.config = config
        self.preprocessing = config.image

    @abstractmethod
    def forward(self, images: Tensor) -> Outputs:
        """Differentiable outputs.

        Args:
            images: uint8 [n, 3, size, size] as `preprocessing` makes them; they are normalised inside.
        """

    @abstractmethod
    def objective(self, outputs: Outputs, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Named scalar terms whose sum is minimised; averaged over workers they are the global batch's."""

    @abstractmethod
    def describe(self, images: Tensor) -> Codes:
        """Descriptors of uint8 images [n, 3, size, size]; call it in evaluation mode."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Trained parameters by learning rate."""
        return [ParameterGroup([parameter for parameter in self.parameters() if parameter.requires_grad])]

    def plan(self, table: ImageTable, batch_size: int, clock: Clock) -> list[Rows]:
        """Global batches of one epoch: all rows once, shuffled by (seed, epoch), in nearly equal batches.

        The table is cut into round(rows / batch_size) batches whose sizes differ by one at the most: no
        short tail with a noisy gradient of its own, and none too small to share among workers.
        """
        order = np.random.default_rng([clock.seed, clock.epoch]).permutation(len(table))
        return np.array_split(order, max(1, round(len(table) / batch_size)))

    def training_state(self) -> dict[str, Any]:
        """What must survive a restart beside parameters and buffers, such as a memory; never exported."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take back what `training_state` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} has no training state, got {sorted(state)}")

    def normalised(self, images: Tensor) -> Tensor:
        """Normalised float images in the memory format of the first convolution."""
        parameter = next(self.parameters())
        images = normalise(images, self.preprocessing).to(parameter.dtype)
        return images.contiguous(memory_format=torch.channels_last)
