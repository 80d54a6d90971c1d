"""What every method is: a network, an objective, descriptors, and a plan of batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ray_retrieval.config import Config
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing, normalise
from ray_retrieval.descriptors import Descriptors, Form, Local
from ray_retrieval.workers import gather_rows

Outputs = dict[str, Tensor]
Rows = npt.NDArray[np.int64]
Work = Callable[[Tensor], Outputs]
"""What is made of uint8 images [n, 3, h, w] of one size, [n, …] each, such as `Method.forward`."""


class Encode(Protocol):
    """What the model makes of training images."""

    def __call__(self, rows: Rows, work: Work | None = None) -> Outputs:
        """The outputs of `work` for rows of the training table, in their order.

        In evaluation mode, without gradients, of images that are not augmented. The workers share the images
        out and gather the outputs: all call it together, and get the same.

        Args:
            rows: int64 [n] with n ≥ 1.
            work: default the method's `forward`.
        """

    def totals(self, rows: Rows, work: Work) -> Outputs:
        """The sums over rows of the training table of what `work` returns, which are sums already.

        As for a call, but each worker sums over its share, and only the sums travel: for statistics of more
        images than fit in memory.

        Args:
            rows: int64 [n] with n ≥ 1.
            work: gives float64 tensors that are sums over its images, of shapes that do not depend on them.

        Returns:
            float64 of the same shapes, the same on all workers.
        """


@dataclass(frozen=True)
class Clock:
    """Where training stands. Everything that changes over time is a pure function of it.

    Attributes:
        seed: of the whole training; with `epoch` and `step` it determines every random draw.
        epoch: epochs finished.
        round: rounds of the epoch finished; see `Method.rounds`.
        step: optimiser steps finished.
        samples: training images seen.
        total_steps: optimiser steps of the whole training.
        measured: what the validation has measured so far, the oldest first, of the metric that the best
            model has most of.
    """

    seed: int
    epoch: int = 0
    round: int = 0
    step: int = 0
    samples: int = 0
    total_steps: int = 1
    measured: tuple[float, ...] = ()


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch, or a part of the share when gradients are accumulated.

    Attributes:
        rows: int64 [n], row numbers in the training table.
        labels: int64 [n], or float [n, classes] multi-hot.
        global_rows: int64 [m], the rows of all workers; `rows` are a run of them.
        global_labels: like `labels`, of the global rows.
        start: position of the first of `rows` among the global rows.
        world: number of workers.
    """

    rows: Tensor
    labels: Tensor
    global_rows: Tensor
    global_labels: Tensor
    start: int = 0
    world: int = 1

    @staticmethod
    def whole(rows: Tensor, labels: Tensor) -> "Batch":
        """A global batch on a single worker, of rows, int64 [n], and labels as above."""
        return Batch(rows, labels, rows, labels)

    def part(self, positions: Rows) -> "Batch":
        """Some of this share, a run of positions, int64 [m] and counted from its first row."""
        first, last = int(positions[0]), int(positions[-1]) + 1
        rows, labels = self.rows[first:last], self.labels[first:last]
        return replace(self, rows=rows, labels=labels, start=self.start + first)

    @property
    def global_size(self) -> int:
        """Images in the global batch over all workers."""
        return len(self.global_rows)

    @property
    def positions(self) -> Tensor:
        """int64 [n]: where this share's rows stand in the global batch."""
        return torch.arange(self.start, self.start + len(self.rows), device=self.rows.device)

    def total(self, part: Tensor) -> Tensor:
        """This share's part of a sum over the global batch, scaled for data parallelism.

        Over workers, data parallelism averages gradients and the loop averages the terms that it logs. Scaled
        so, both averages (and sums over accumulated parts) are exactly those of the global sum, whatever the
        sizes of the shares.

        Args:
            part: float [...], summed over the images of this share.
        """
        return part * self.world

    def mean(self, values: Tensor) -> Tensor:
        """This share's part of the mean over the global batch: `total` of float [n], one value an image."""
        return self.total(values.sum() / self.global_size)

    def gather(self, values: Tensor) -> Tensor:
        """The values of the global batch, [n, …] to [m, …]; gradients go back to the worker that made them.

        It takes the whole share, so a method that gathers has `whole_batches` set.
        """
        sizes = [len(part) for part in np.array_split(np.arange(self.global_size), self.world)]
        return gather_rows(values, sizes)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters trained at `lr_factor` times the learning rate, with or without weight decay."""

    parameters: list[nn.Parameter]
    lr_factor: float = 1.0
    decays: bool = True


class MethodConfig(Config):
    """What every method's configuration has."""

    name: str
    """The method."""
    image: Preprocessing = Preprocessing()
    """How an image becomes the network's input; travels with the model."""

    vectors_by: ClassVar[Literal["recall@1", "map"]] = "recall@1"
    """What its paper measures vectors by; of codes and local features it is not looked at."""

    @property
    def form(self) -> Form:
        """What the method makes of an image."""
        raise NotImplementedError

    @property
    def needs_start(self) -> bool:
        """Whether something that is not trained is of no use unless it comes from another model."""
        return False

    @property
    def training_image(self) -> Preprocessing:
        """How an image is prepared for training, and for the validation in between."""
        return self.image

    def check_described(self) -> None:
        """Raise RecipeError if a model that is trained like that describes no image."""


class Method(nn.Module, ABC):
    """A published method.

    Args:
        config: of the method.
        classes: number of classes of the training data.
        pretrained: whether the backbone starts from the configured weights.

    Every trained parameter lives under the module itself, so that data parallelism, the optimiser and the
    saved model all see it.
    """

    whole_batches: ClassVar[bool] = False
    """Whether the loss pairs images across the whole batch, which then cannot be computed in parts."""
    repeatable: ClassVar[bool] = False
    """Whether in training, too, a pass gives each image the same whatever other images there are, and gives
    it again: neither dropout nor the statistics of a batch. A batch can then be of several sizes and go
    through the network in parts, whatever the loss pairs, by computing every part twice."""
    backbones: ClassVar[tuple[str, ...]] = ("backbone",)
    """Modules in which an export computes in 8 bits: the backbone, or its parts, by their attributes."""

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
        """Named terms, float [], whose sum is minimised; averaged over workers they are the global batch's.

        Args:
            outputs: of `forward`, of this share of the batch.
            batch: its rows and labels.
            clock: stage, epoch and step, on which schedules depend.
        """

    @abstractmethod
    def describe(self, images: Tensor) -> Descriptors:
        """Descriptors of uint8 images [n, 3, size, size]; call it in evaluation mode.

        Locations and sizes of local features are in pixels of these images. A method of vectors that can be
        exported has `vectors` besides: the same rows as a tensor, float32 [n, dimension], of the same images.
        """

    def compared(self, images: Tensor) -> Tensor:
        """What validation compares of uint8 images [n, 3, size, size]: descriptors of one row an image.

        By default those of `describe`. A method whose descriptors are sets of local features gives unit
        vectors of float [n, d] instead.
        """
        found = self.describe(images)
        assert not isinstance(found, Local)
        return torch.from_numpy(found.data)

    def pictures(self, images: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """What is worth seeing of uint8 images [n, 3, h, w]: uint8 [n, 3, h, w] by name.

        Called in evaluation mode; TensorBoard shows it.
        """
        return {}

    def class_probabilities(self, images: Tensor) -> Tensor | None:  # noqa: ARG002
        """Float [n, classes] of uint8 images [n, 3, size, size]; None for a method without a class head."""
        return None

    def start_training(self, table: ImageTable, device: torch.device) -> None:
        """Called once before training, on every worker, with the training images.

        For what depends on the data and is no parameter: statistics of the labels, an empty memory. What a
        checkpoint holds of it is put back afterwards by `load_training_state`.
        """

    def started_from(self, lacking: list[str]) -> None:
        """Called where the weights are another model's, with the names of those that it did not give."""

    def before_training(self, encode: Encode) -> None:
        """Called once before a training that does not go on from a checkpoint, on every worker.

        For parameters that start from what the network makes of the training images.

        Args:
            encode: computes something of training images.
        """

    def before_step(self, clock: Clock, encode: Encode) -> None:
        """Called before every step, on every worker.

        What is done here depends on the clock and the method's state alone, so that every worker does the
        same, and a run that was killed does it again.

        Args:
            clock: of the coming step.
            encode: computes something of training images.
        """

    @property
    def rounds(self) -> int:
        """Equal parts of an epoch, each with a plan of its own that is made when its turn comes."""
        return 1

    def before_round(self, clock: Clock, encode: Encode) -> None:
        """Called before the plan of a round is asked for, on every worker; what the plan needs is made here.

        When a killed training goes on within a round, it is called again, with the weights of that moment:
        what it made at first is to be kept in `training_state`.

        Args:
            clock: of the round's first step, or of the step where the training goes on.
            encode: computes something of training images.
        """

    def after_training(self, encode: Encode) -> None:
        """Called at the end, on every worker, with each set of weights that is kept in turn.

        For what is computed of a trained network, such as whitening; it goes into buffers.
        """

    def observations(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What is worth watching beside the loss: of the last objective, name → (sum, what it is a sum of).

        Both are float [], this worker's parts; the record of an epoch has the quotients of what all workers
        and steps add up to. Every worker returns the same names.
        """
        return {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Trained parameters by learning rate."""
        return [ParameterGroup([parameter for parameter in self.parameters() if parameter.requires_grad])]

    def plan_sizes(self, table: ImageTable, batch_size: int, clock: Clock) -> list[int]:
        """Images of each batch of a round; known before anything is made for it."""
        return [len(batch) for batch in self.plan(table, batch_size, clock)]

    def plan(self, table: ImageTable, batch_size: int, clock: Clock) -> list[Rows]:
        """Global batches of one round: by default all rows once, shuffled by (seed, epoch).

        The table is cut into round(rows / batch_size) batches whose sizes differ by one at the most: no
        short tail with a noisy gradient of its own, and none too small to share among workers.
        """
        order = np.random.default_rng([clock.seed, clock.epoch]).permutation(len(table))
        return np.array_split(order, max(1, round(len(table) / batch_size)))

    def warnings(self, table: ImageTable, steps: int) -> list[str]:  # noqa: ARG002
        """What a user should know before so many steps on a table, such as a setting without effect."""
        return []

    def training_state(self) -> dict[str, Any]:
        """What must survive a restart beside parameters and buffers, such as a memory; never exported."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take back what `training_state` gave.

        Raises:
            ValueError: if there is some, and the method has none.
        """
        if state:
            raise ValueError(f"{type(self).__name__} has no training state, got {sorted(state)}")

    @property
    def least_side(self) -> int:
        """Pixels of a side from which images of all sizes are described by the same computation.

        Smaller ones may be padded first, say, or have maps of a single cell, which torch computes with in
        ways of its own. An export for images of several sizes begins there; called in evaluation mode.
        """
        return 64

    def fix_for_export(self) -> None:
        """Called on a copy before it is traced: flags in tensors, which have no values then, become plain."""

    def normalised(self, images: Tensor) -> Tensor:
        """Images uint8 [n, 3, h, w] normalised, in the type and memory format of the first convolution."""
        parameter = next(self.parameters())
        images = normalise(images, self.preprocessing).to(parameter.dtype)
        return images.contiguous(memory_format=torch.channels_last)
