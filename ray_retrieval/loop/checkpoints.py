"""What a checkpoint says beside the tensors, and what the last one of a training leaves."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ray_retrieval.loop.steplog import Window
from ray_retrieval.loop.sums import Collected
from ray_retrieval.methods.base import Method
from ray_retrieval.storage import refusal

Weights = dict[str, Tensor]
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
        window: what has happened since the last line of the log of steps.
        best_value: the highest of the validation's metric; None before the first measurement.
        best_epoch: the epoch that it was measured in or after; 0 before.
        best_step: the step that it was measured after.
        precision: the arithmetic of the training.
        history: one record for each epoch.
        validations: what was measured, the oldest first: {"step", "measured"}.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    observed: dict[str, list[float]] = field(default_factory=dict)
    window: Window = field(default_factory=Window)
    best_value: float | None = None
    best_epoch: int = 0
    best_step: int = 0
    precision: Literal["bf16", "float32"] = "float32"
    history: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def read(folder: Path) -> "Progress":
        """That of the checkpoint in `folder`."""
        values = json.loads((folder / STATE).read_text())
        return Progress(**{**values, "window": Window(**values["window"])})

    @property
    def last_is_best(self) -> bool:
        """Whether the model as it stands is the best one."""
        return self.best_value is not None and self.best_step == self.step

    @property
    def current_epoch(self) -> int:
        """The epoch under way, or else the one that has just ended; the first is 1."""
        return self.epoch + (self.batch > 0)

    def end_epoch(self, *, rate: float, planned: int, images: int, seconds: float) -> dict[str, Any]:
        """The record of the epoch under way, which ends with it.

        Args:
            rate: learning rate of the last step.
            planned: images of the epoch.
            images: those of them that were seen since the training began, or went on.
            seconds: in which they were seen.
        """
        self.epoch, self.batch = self.epoch + 1, 0
        terms = {name: total / planned for name, total in self.sums.items()}
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": rate,
            "loss": sum(terms.values()),
            "terms": terms,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / max(seconds, 1e-9), 1),
        }
        observed = {name: total / count for name, (total, count) in self.observed.items() if count}
        if observed:
            record["observed"] = observed
        self.sums, self.observed = {}, {}
        self.history.append(record)
        return record

    def add_sums(self, collected: Collected) -> None:
        """Add to the epoch's sums, and to those of the log, what all processes have summed."""
        for name, total in collected.terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
        for name, both in collected.observed.items():
            before = self.observed.get(name, [0.0, 0.0])
            self.observed[name] = [old + new for old, new in zip(before, both, strict=True)]
        self.window.add(collected)

    def add_validation(self, measured: dict[str, float], *, epoch: int, metric: str) -> bool:
        """Record what was measured in or after an epoch; whether it is the best so far by a metric."""
        self.validations.append({"step": self.step, "measured": measured})
        value = measured[metric]
        if self.best_value is not None and value <= self.best_value:
            return False
        self.best_value, self.best_epoch, self.best_step = value, epoch, self.step
        return True

    def measured(self, metric: str) -> tuple[float, ...]:
        """All measurements of a metric on the validation queries, the oldest first."""
        return tuple(one["measured"][metric] for one in self.validations)

    def validation(self, step: int) -> dict[str, float | None]:
        """What was measured after a step; MAP is None where nothing was."""
        for one in self.validations:
            if one["step"] == step:
                found: dict[str, float | None] = one["measured"]
                return found
        return {"map": None}


def write_checkpoint(
    folder: Path,
    method: Method,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: Weights | None,
) -> None:
    """Fill a folder with all that a training needs to go on.

    Args:
        folder: exists.
        method: as it stands.
        optimizer: as it stands.
        progress: where the training stands.
        best: weights of the best model so far; None before the first measurement.

    Raises:
        ArtefactError: if there is no space left.
    """
    with _written(folder):
        safetensors.torch.save_file(weights_of(method), folder / LAST)
        if best is not None and not progress.last_is_best:
            safetensors.torch.save_file(best, folder / BEST)
        tensors = {"optimizer": optimizer.state_dict(), "method": method.training_state()}
        with (folder / OPTIMIZER).open("wb") as stream:
            torch.save(tensors, stream)
        (folder / STATE).write_text(json.dumps(asdict(progress)))


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Say where there is no space, which each library says in its own way."""
    try:
        yield
    except OSError as error:
        raise refusal(error, folder) from error
    except safetensors.SafetensorError as error:
        raise refusal(OSError(str(error)), folder) from error
    except RuntimeError as error:  # of torch, which comes upon what it has not written
        if not isinstance(error.__context__, OSError):
            raise
        raise refusal(error.__context__, folder) from error


def read_checkpoint(
    folder: Path, method: Method, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[Progress, Weights | None]:
    """Put a method and its optimiser back to where a checkpoint was written.

    Args:
        folder: what `write_checkpoint` filled.
        method: gets its weights and its state.
        optimizer: gets its state.
        device: of the method.

    Returns:
        Where the training stood, and the weights of the best model until then.
    """
    progress = Progress.read(folder)
    last = safetensors.torch.load_file(folder / LAST)
    method.load_state_dict(last)
    tensors = torch.load(folder / OPTIMIZER, map_location=device, weights_only=True)
    optimizer.load_state_dict(tensors["optimizer"])
    method.load_training_state(tensors["method"])
    if progress.best_value is None:
        return progress, None
    return progress, last if progress.last_is_best else safetensors.torch.load_file(folder / BEST)


def weights_of(method: Method) -> Weights:
    """A copy of parameters and buffers in main memory."""
    state = method.state_dict().items()
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state}


@dataclass(frozen=True)
class Outcome:
    """What a finished training leaves, read from its last checkpoint.

    Attributes:
        weights: of the `best` and the `last` model; one object where they are the same.
        epochs: in or after which each was taken.
        steps: after which each was taken.
        validation: what was measured of each on the validation queries, by name; {"map": None} where there
            are none.
        precision: the arithmetic of the training.
    """

    weights: dict[str, Weights]
    epochs: dict[str, int]
    steps: dict[str, int]
    validation: dict[str, dict[str, float | None]]
    precision: Literal["bf16", "float32"]


def read_outcome(folder: Path) -> Outcome:
    """The outcome of the training whose last checkpoint lies in `folder`."""
    progress = Progress.read(folder)
    last = safetensors.torch.load_file(folder / LAST)
    measured = progress.best_value is not None
    # Not where it is there: a folder may have what another attempt left of the same step.
    apart = measured and not progress.last_is_best
    best = safetensors.torch.load_file(folder / BEST) if apart else last
    epochs = {"best": progress.best_epoch if measured else progress.epoch, "last": progress.epoch}
    steps = {"best": progress.best_step if measured else progress.step, "last": progress.step}
    return Outcome(
        weights={"best": best, "last": last},
        epochs=epochs,
        steps=steps,
        validation={which: progress.validation(step) for which, step in steps.items()},
        precision=progress.precision,
    )
