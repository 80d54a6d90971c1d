"""How a method is trained."""

from typing import Any, Literal

from pydantic import ByteSize, Field, model_validator

from ray_retrieval.compute import Precision
from ray_retrieval.config import Config
from ray_retrieval.data.transforms import Augmentation
from ray_retrieval.loop.optim import OptimizerConfig, ScheduleConfig, StepSchedule
from ray_retrieval.loop.validation import ValidationConfig


class CheckpointConfig(Config):
    """What a killed run can fall back on."""

    every_epochs: int = Field(default=1, ge=1)
    """Epochs between two checkpoints."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints inside an epoch, for long epochs."""
    min_seconds: float = Field(default=10.0, ge=0)
    """At least so long between two checkpoints, but for the last one."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest to keep; each holds the best model so far as well."""


class LogConfig(Config):
    """What is written down while a model trains."""

    every: int = Field(default=100, ge=1)
    """Steps between two lines of `steps.jsonl`; the last step has one too."""
    histograms_every: int = Field(default=1000, ge=1)
    """Steps between two sets of histograms of parameters and gradients in TensorBoard."""


class ProfileConfig(Config):
    """Steps that are recorded operator by operator, into `profile/` in the run's folder."""

    steps: int = Field(default=10, ge=1)
    """Steps that are recorded."""
    wait: int = Field(default=5, ge=1)
    """Steps that pass before: the first ones are slower than the others."""


class TrainConfig(Config):
    """How a method is trained."""

    start: str | None = None
    """A model directory to go on from: its weights take the place of the backbone's, but for layers that it
    lacks or has in another shape."""
    epochs: int | None = Field(default=50, ge=0)
    """Passes over the training images; 0 keeps the weights of the start, and only what is learned of trained
    networks, such as whitening, is still learned. Unset where `steps` says how long."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps after which training ends, within an epoch if need be; in place of `epochs`."""
    batch_size: int = Field(default=32, ge=2)
    """Images an optimiser step, over all workers."""
    accumulate: int = Field(default=1, ge=1)
    """Parts in which a worker computes its share of a batch, to save memory; the gradient stays the same
    but for batch normalisation, which sees one part at a time."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = StepSchedule(every=30)
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient; unset: not clipped."""
    augmentation: Augmentation = Augmentation()
    """Random changes to training images, applied to batches."""
    precision: Precision = "auto"
    """`bf16`, `float32`, or `auto`: bfloat16 where the hardware of all workers has instructions for it."""
    select: Literal["best", "last"] = "best"
    """Which model the run goes on with: the best on validation queries, or that of the last epoch."""
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    tensorboard: bool = False
    """Whether to write losses, rates, times, validation values, histograms and the method's pictures for
    TensorBoard, into `tensorboard/` in the run's folder, which has to be a local one."""
    profile: ProfileConfig | None = None
    """Record some steps, and write a trace and a table of operators; unset: none."""
    cache_memory: ByteSize = Field(default=ByteSize(2 << 30), validate_default=True)
    """Memory for decoded images, for each worker (`2GiB`); what does not fit is decoded in every epoch."""
    workers: int = Field(default=1, ge=1)
    """Processes that train together; with GPUs one each."""
    threads: int | None = Field(default=None, ge=1)
    """Processor threads of each at the most, such as 1 on a machine that others use too; unset: the cores of
    its node, shared out among the workers there."""
    max_failures: int = Field(default=3, ge=0)
    """How often lost workers are replaced before the run gives up."""

    def threads_of(self, share: int) -> int:
        """Threads of a process whose share of the processor's are so many."""
        return share if self.threads is None else min(share, self.threads)

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps") is not None:
            return {"epochs": None, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.steps is None else "both"
            mend = ": set one" if self.steps is None else ": set one of them to null"
            raise ValueError(f"either 'epochs' or 'steps' says how long to train, got {found}{mend}")
        if self.batch_size < 2 * self.workers:
            raise ValueError(
                f"'batch_size' is 2 or more for each of {self.workers} workers, got {self.batch_size}"
            )
        return self

    @property
    def length(self) -> tuple[int, Literal["epochs", "steps"]]:
        """How long to train, and in what it is counted."""
        return (self.epochs or 0, "epochs") if self.steps is None else (self.steps, "steps")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole training."""
        count, unit = self.length
        return count if unit == "steps" else count * steps_per_epoch
