"""The log of the steps: a line of JSON every so many, in the run's folder."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

from ray_retrieval.loop.sums import Collected
from ray_retrieval.storage import Folder

STEPS = "steps.jsonl"
_SECONDS = 10.0
"""Between two writings of the file, which is written whole: a reader sees all of a line or nothing."""


@dataclass
class Window:
    """What has happened since the last line of the log; a checkpoint holds it.

    Attributes:
        steps: optimiser steps.
        images: of all processes.
        terms: of the loss, summed over the images.
        gradient_norm: summed over the steps.
        waiting: seconds in which this process waited for images.
        computing: seconds in which it did not.
    """

    steps: int = 0
    images: int = 0
    terms: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0
    waiting: float = 0.0
    computing: float = 0.0

    def add(self, collected: Collected) -> None:
        """Add what all processes have summed."""
        for name, total in collected.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + total
        self.gradient_norm += collected.gradient_norm

    def record(self, *, epoch: int, step: int, rate: float, clipped: bool) -> dict[str, Any]:
        """A line of the log; of losses and times the means since the line before.

        Args:
            epoch: the one under way, the first is 1.
            step: optimiser steps finished.
            rate: learning rate of the last step.
            clipped: whether gradients are clipped, so that their norm is known.
        """
        terms = {name: total / self.images for name, total in self.terms.items()}
        seconds = self.waiting + self.computing
        return {
            "epoch": epoch,
            "step": step,
            "lr": rate,
            "loss": sum(terms.values()),
            "terms": terms,
            **({"gradient_norm": self.gradient_norm / self.steps} if clipped else {}),
            "seconds": round(seconds / self.steps, 6),
            "waiting_seconds": round(self.waiting / self.steps, 6),
            "computing_seconds": round(self.computing / self.steps, 6),
            "images_per_second": round(self.images / max(seconds, 1e-9), 1),
        }


class StepLog:
    """The lines of a training, in `steps.jsonl`.

    Args:
        run: the run's folder.
        step: optimiser steps finished: lines of later ones, from before the training was killed, are dropped.
    """

    def __init__(self, run: Folder, step: int) -> None:
        self._run = run
        found = read_steps(run)
        kept = [record for record in found if record["step"] <= step]
        self._lines = [json.dumps(record) for record in kept]
        self._written = time.monotonic()
        self._pending = len(kept) < len(found)
        self.write()

    def add(self, record: dict[str, Any]) -> None:
        """Add a line; it is in the file within some seconds, or with the next `write`."""
        self._lines.append(json.dumps(record))
        self._pending = True
        if time.monotonic() - self._written >= _SECONDS:
            self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        if self._pending:
            self._run.write_text(STEPS, "".join(f"{line}\n" for line in self._lines))
            self._written, self._pending = time.monotonic(), False


def read_steps(run: Folder) -> list[dict[str, Any]]:
    """The lines of a run's log of steps; none before the first.

    Raises:
        ArtefactError: if a line is damaged.
    """
    return [*run.read_json_lines(STEPS).values()]
