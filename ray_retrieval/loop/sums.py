"""What the steps of a training add up: on the device, and over the processes when it is asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_retrieval.loop.process import Process


@dataclass(frozen=True)
class Collected:
    """What all processes have added up since the last time.

    Attributes:
        terms: of the loss, each summed over the images.
        observed: of what the method observes, the sum and the number it is of.
        gradient_norm: of the whole gradient before it was clipped, summed over the steps.
    """

    terms: dict[str, float]
    observed: dict[str, list[float]]
    gradient_norm: float


class Sums:
    """Running sums that wait for nothing: only collecting them waits for the device."""

    def __init__(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._observed: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    def add_terms(self, terms: dict[str, Tensor], images: int) -> None:
        """Add a step's terms, float [] each, means over so many images of the global batch."""
        for name, term in terms.items():
            _add(self._terms, name, term.detach().double() * images)

    def add_observations(self, observations: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add what `Method.observations` gave: name → (sum, what it is a sum of), float [] each."""
        for name, (total, count) in observations.items():
            _add(self._observed, name, torch.stack([total.detach().double(), count.double()]))

    def add_gradient_norm(self, norm: Tensor) -> None:
        """Add the norm, float [], of the global gradient, which is the same on all processes."""
        _add(self._norms, "norm", norm.detach().double())

    def collect(self, process: Process) -> Collected:
        """The sums over all processes, the same on each, and start anew; all call it together."""
        for value in (*self._observed.values(), *self._terms.values()):
            process.add_up(value)
        found = Collected(
            terms={name: float(total) / process.world for name, total in self._terms.items()},
            observed={name: both.tolist() for name, both in self._observed.items()},
            gradient_norm=float(self._norms.get("norm", 0.0)),
        )
        self._terms, self._observed, self._norms = {}, {}, {}
        return found


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
