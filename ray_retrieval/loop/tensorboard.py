"""Events for TensorBoard: scalars, histograms of parameters and gradients, and a method's pictures."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_retrieval.errors import RecipeError
from ray_retrieval.methods.base import Method
from ray_retrieval.storage import Folder

EVENTS = "tensorboard"
_BUCKETS = 64
_TIMES = ("seconds", "waiting_seconds", "computing_seconds", "images_per_second")


def refuse_remote(run: Folder) -> None:
    """Raise RecipeError where events cannot be written: TensorBoard's files grow, those of a store do not."""
    if not run.is_local:
        raise RecipeError(
            f"TensorBoard's events are written to a local folder, and the run's is {run}",
            where="train.tensorboard",
            mend="set it to false, or choose a local output",
        )


class Board:
    """Writes events into `tensorboard/` in the run's folder.

    Args:
        run: the run's folder, a local one.
        step: optimiser steps finished: TensorBoard hides what a killed training wrote of later ones.

    Raises:
        RecipeError: if the folder is not local.
    """

    def __init__(self, run: Folder, step: int) -> None:
        refuse_remote(run)
        from tensorboardX import SummaryWriter  # takes seconds to import

        self._writer = SummaryWriter(str(Path(run.path) / EVENTS), purge_step=step + 1, write_to_disk=True)

    def line(self, record: dict[str, Any]) -> None:
        """The numbers of a line of the log of steps."""
        step = record["step"]
        self._scalars("loss", {"total": record["loss"], **record["terms"]}, step)
        self._scalars("time", {name: record[name] for name in _TIMES}, step)
        known = [name for name in ("lr", "gradient_norm") if name in record]
        self._scalars("optimizer", {name: record[name] for name in known}, step)
        self._scalars("validation", record.get("validation", {}), step)

    def histograms(self, method: Method, step: int) -> None:
        """The distributions of all trained parameters and of their gradients, as the last step left them."""
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                self._histogram(f"parameters/{name}", parameter.detach(), step)
            if parameter.grad is not None:
                self._histogram(f"gradients/{name}", parameter.grad, step)

    def pictures(self, pictures: dict[str, Tensor], step: int, numbers: list[int]) -> None:
        """Pictures of images.

        Args:
            pictures: uint8 [n, 3, h, w] each, by name.
            step: optimiser steps finished.
            numbers: of the n images; each has a series of its own.
        """
        for name, several in pictures.items():
            for number, picture in zip(numbers, several.cpu().numpy(), strict=True):
                self._writer.add_image(f"{name}/{number}", picture, step)

    def flush(self) -> None:
        """Hand all events to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def _histogram(self, name: str, values: Tensor, step: int) -> None:
        """Counted on the values' own device, so that only counts travel; skipped unless all are finite."""
        numbers = values.flatten().float()
        if not len(numbers):
            return
        low, high = float(numbers.min()), float(numbers.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return
        if low == high:  # a histogram has a width
            low, high = low - 0.5, high + 0.5
        counts = torch.histc(numbers, _BUCKETS, low, high)
        wide = numbers.double()
        self._writer.add_histogram_raw(
            name,
            min=low,
            max=high,
            num=len(numbers),
            sum=float(wide.sum()),
            sum_squares=float(wide.square().sum()),
            bucket_limits=torch.linspace(low, high, _BUCKETS + 1, dtype=torch.float64)[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
