"""What a trial says while it trains."""

from dataclasses import dataclass
from typing import Any

from ray_retrieval.history import read_history
from ray_retrieval.recipe import Recipe
from ray_retrieval.storage import Folder


@dataclass(frozen=True)
class Report:
    """What a trial says while it trains.

    Attributes:
        epoch: epochs trained.
        validation: what was measured after it.
        last: whether the training has ended with it.
        kept: whether these are the values of the finished model, whatever was measured before.
    """

    epoch: int
    validation: dict[str, float]
    last: bool = False
    kept: bool = False


def reports(history: list[dict[str, Any]], recipe: Recipe) -> list[Report]:
    """What a training's history has to say, a report for each epoch after which something was measured."""
    length, unit = recipe.train.length
    key = "epoch" if unit == "epochs" else "step"
    return [
        Report(record["epoch"], record["validation"], last=record[key] >= length)
        for record in history
        if record.get("validation")
    ]


class Untold:
    """What the history of a trial says that has not been told yet.

    Args:
        recipe: of the trial, whose output is its folder.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._told = 0

    def take(self, upto: int | None = None) -> list[Report]:
        """The reports of epochs up to one, or of all, each once.

        The history may have come further than the epoch that is being told: it is written first.
        """
        found = [
            report
            for report in reports(read_history(Folder(self._recipe.output)), self._recipe)
            if report.epoch > self._told and (upto is None or report.epoch <= upto)
        ]
        self._told = max((report.epoch for report in found), default=self._told)
        return found
