"""What a checkpoint says beside the tensors, and what the last one of a training leaves."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors.torch
from torch import Tensor

LAST, BEST, OPTIMIZER, STATE = "last.safetensors", "best.safetensors", "optimizer.pt", "state.json"


class Reporter(Protocol):
    """Where checkpoints come from and go to; the loop knows nothing else of what runs it."""

    def latest(self) -> Path | None:
        """The folder of the newest checkpoint, or None in a fresh run."""

    def epoch_done(self, record: dict[str, Any]) -> None:
        """Called on the leading process after every epoch."""

    def checkpoint(self, name: str, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        """Called on every process at the same steps; `write` fills a folder and is None but on the leader."""


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        epoch: epochs finished.
        batch: batches finished of the epoch under way.
        step: optimiser steps finished.
        samples: training images seen.
        sums: of the loss's terms over the images of the epoch so far.
        observed: of what the method observes in the epoch so far, the sum and the number it is of.
        best_value: the highest of the validation's metric; None before the first measurement.
        best_epoch: the epoch that it was measured after; 0 before.
        precision: the arithmetic of the training.
        history: one record for each epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    observed: dict[str, list[float]] = field(default_factory=dict)
    best_value: float | None = None
    best_epoch: int = 0
    precision: Literal["bf16", "float32"] = "float32"
    history: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def read(folder: Path) -> "Progress":
        """That of the checkpoint in `folder`."""
        return Progress(**json.loads((folder / STATE).read_text()))

    @property
    def last_is_best(self) -> bool:
        """Whether the model as it stands is the best one."""
        return self.batch == 0 and self.best_epoch == self.epoch

    def measured(self, metric: str) -> tuple[float, ...]:
        """All measurements of a metric on the validation queries, the oldest first."""
        return tuple(record["validation"][metric] for record in self.history if "validation" in record)

    def validation(self, epoch: int) -> dict[str, float | None]:
        """What was measured after an epoch; MAP is None where nothing was."""
        if not epoch:
            return {"map": None}
        found: dict[str, float | None] = self.history[epoch - 1].get("validation", {"map": None})
        return found


@dataclass(frozen=True)
class Outcome:
    """What a finished training leaves, read from its last checkpoint.

    Attributes:
        weights: of the `best` and the `last` model; one object where they are the same.
        epochs: after which each was taken.
        validation: what was measured of each on the validation queries, by name; {"map": None} where there
            are none.
        precision: the arithmetic of the training.
    """

    weights: dict[str, dict[str, Tensor]]
    epochs: dict[str, int]
    validation: dict[str, dict[str, float | None]]
    precision: Literal["bf16", "float32"]


def read_outcome(folder: Path) -> Outcome:
    """The outcome of the training whose last checkpoint lies in `folder`."""
    progress = Progress.read(folder)
    last = safetensors.torch.load_file(folder / LAST)
    best = safetensors.torch.load_file(folder / BEST) if (folder / BEST).exists() else last
    epochs = {"best": progress.best_epoch or progress.epoch, "last": progress.epoch}
    return Outcome(
        weights={"best": best, "last": last},
        epochs=epochs,
        validation={which: progress.validation(epoch) for which, epoch in epochs.items()},
        precision=progress.precision,
    )
