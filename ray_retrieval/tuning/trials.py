"""The course of a search: which trial is next, which is stopped, and how each ended. It knows no Ray."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ray_retrieval.config import validate
from ray_retrieval.errors import RecipeError
from ray_retrieval.loop.tensorboard import refuse_remote
from ray_retrieval.recipe import Recipe
from ray_retrieval.run_folder import begin, start_of
from ray_retrieval.storage import Folder
from ray_retrieval.tuning import space
from ray_retrieval.tuning.config import SIZES, TuneConfig
from ray_retrieval.tuning.ledger import Ledger, Trial
from ray_retrieval.tuning.proposals import propose
from ray_retrieval.tuning.reports import Report
from ray_retrieval.tuning.space import Parameters
from ray_retrieval.tuning.stopping import stops

_LOSSES = 5
"""So many lost nodes do not count as failures of a trial that was on them."""


class Trials:
    """Trials that are handed out, followed and concluded, each change of which is written to the ledger.

    Args:
        recipe: with its `tune` block.
        make: gives the recipe of parameters.
        ledger: of the search; trials in it that are running go on, and failed ones are tried again.
        retry: try also those again that failed too often, or would fail alike.
        said: called with a trial whose state has changed.
    """

    def __init__(
        self,
        recipe: Recipe,
        make: Callable[[Parameters], Recipe],
        ledger: Ledger,
        *,
        retry: bool = False,
        said: Callable[[Trial], None] = lambda _trial: None,
    ) -> None:
        assert recipe.tune is not None
        self.config: TuneConfig = recipe.tune
        self.objectives = self.config.objectives(recipe.train.validation.metric)
        self._selected_by = recipe.train.validation.metric
        self._make, self._ledger, self._said = make, ledger, said
        self._count = space.count(self.config)
        self._since: dict[int, float] = {}
        known = ledger.in_order()
        for trial in known if retry else ():
            if trial.state == "failed":
                trial.failures, trial.losses, trial.final = 0, 0, False
        self._waiting = deque(trial for trial in known if self._is_open(trial))
        self._recipes: dict[int, Recipe] = {}

    def _is_open(self, trial: Trial) -> bool:
        if trial.number >= self._count:
            return False
        if trial.state != "failed":
            return trial.state == "running"
        return not trial.final and trial.failures <= self.config.max_failures and trial.losses <= _LOSSES

    @property
    def running(self) -> int:
        """Trials that are handed out and have not ended."""
        return len(self._since)

    @property
    def left(self) -> int:
        """Trials that have not ended for good."""
        ended = sum(
            not self._is_open(trial) for trial in self._ledger.in_order() if trial.number < self._count
        )
        return self._count - ended

    def recipe(self, trial: Trial) -> Recipe:
        """The recipe of a trial, whose output is its folder.

        Raises:
            RecipeError: if its parameters make none.
        """
        if trial.number not in self._recipes:
            self._recipes[trial.number] = _recipe_of(trial, self._make, self._ledger.folder)
        return self._recipes[trial.number]

    def next(self) -> Trial | None:
        """A trial to train now: one that was interrupted, failed, or is new; None where there is none."""
        while self._waiting or len(self._ledger.trials) < self._count:
            trial = self._waiting.popleft() if self._waiting else self._new()
            self._since[trial.number] = time.monotonic()
            trial.state = "running"
            try:
                recipe = self.recipe(trial)
            except RecipeError as error:
                self.failed(trial.number, str(error), final=True)
                continue
            begin(Folder(recipe.output), recipe)
            _note_start(recipe)
            self._ledger.write()
            return trial
        return None

    def _new(self) -> Trial:
        trials = self._ledger.trials
        number = next(number for number in range(self._count) if number not in trials)
        trials[number] = Trial(number, propose(self.config, self.objectives, trials.values(), number))
        return trials[number]

    def reported(self, number: int, report: Report) -> bool:
        """Take in what a trial has measured; whether it is to stop."""
        trial = self._ledger.trials[number]
        new = report.epoch > trial.epochs
        if not (new or report.kept):
            return False  # done again after a loss
        trial.epochs = max(trial.epochs, report.epoch)
        chosen = report.validation[self._selected_by]
        recipe = self.recipe(trial)
        if report.kept or recipe.train.select == "last" or trial.selected is None or chosen > trial.selected:
            trial.selected = chosen
            trial.values = {
                name: float(recipe.method.form.size) if name in SIZES else report.validation[name]
                for name in self.objectives
            }
        if not report.kept:  # which may be of an earlier epoch
            trial.curve.append((report.epoch, report.validation[self._guide]))
        self._clock(trial)
        stop = new and not report.last and not report.kept and self._stops(number)
        if stop:
            trial.state = "stopped"
            trial.error = f"stopped by {self.config.scheduler} after epoch {trial.epochs}"
        self._ledger.write()
        if not report.kept and not stop:  # that it was stopped is said when it has ended
            self._said(trial)
        return stop

    @property
    def _guide(self) -> str:
        """The objective that trials are compared by while they train."""
        return next(name for name in self.objectives if name not in SIZES)

    def _stops(self, number: int) -> bool:
        sign = 1 if self.objectives[self._guide] == "max" else -1
        curves = {
            trial.number: [(epoch, sign * value) for epoch, value in trial.curve]
            for trial in self._ledger.in_order()
            if trial.curve
        }
        return stops(self.config, curves, number)

    def completed(self, number: int) -> Trial:
        """Note that a trial has ended without an error."""
        trial = self._ledger.trials[number]
        if trial.state != "stopped":
            trial.state, trial.error = "finished", None
        return self._ended(trial)

    def failed(self, number: int, error: str, *, final: bool = False, node_lost: bool = False) -> Trial:
        """Note that a trial has failed; it is tried again unless it was too often, or would fail alike.

        Args:
            number: of the trial.
            error: what it failed of.
            final: whether it would fail alike however often it is tried.
            node_lost: whether its node was lost, which is counted apart.
        """
        trial = self._ledger.trials[number]
        trial.state, trial.error, trial.final = "failed", error, final
        trial.losses += node_lost
        trial.failures += not node_lost
        if self._is_open(trial):
            self._waiting.append(trial)
        return self._ended(trial)

    def _ended(self, trial: Trial) -> Trial:
        self._clock(trial)
        del self._since[trial.number]
        self._ledger.write()
        self._said(trial)
        return trial

    def _clock(self, trial: Trial) -> None:
        now = time.monotonic()
        trial.seconds = round(trial.seconds + now - self._since[trial.number], 2)
        self._since[trial.number] = now


def _note_start(recipe: Recipe) -> None:
    """Write down, as a run does, what a trial starts from: it need not be there where it trains."""
    folder = Folder((recipe.stage_recipes() or [recipe])[0].output)
    if not folder.exists("training.json") and (start := start_of(recipe)) is not None:
        folder.write_json("training.json", {"start": start})


def identity(recipe: Recipe) -> dict[str, Any]:
    """What two starts of one search have in common: how it searches, and what all its trials share."""
    assert recipe.tune is not None
    shared = recipe.of_the_model()
    for key in recipe.tune.space:
        _drop(shared, key.split("."))
    return {"recipe": shared, "tune": recipe.tune.identity()}


def _drop(values: Any, path: list[str]) -> None:
    """Take a field out of nested mappings, where it is there."""
    *above, last = path
    for part in above:
        values = values.get(part) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values.pop(last, None)


def check(recipe: Recipe, make: Callable[[Parameters], Recipe]) -> None:
    """Find unknown fields and listed values that make no recipe, before anything is started.

    Raises:
        RecipeError: if the recipe states no search; naming the field, and the parameters that make no recipe.
    """
    if recipe.tune is None:
        raise RecipeError(
            "the recipe states no search",
            where="tune",
            mend="e.g. tune: {space: {train.optimizer.lr: {loguniform: [1.0e-4, 1.0e-1]}}}",
        )
    if recipe.train.tensorboard:
        refuse_remote(Folder(recipe.output))
    for parameters in space.to_check(recipe.tune):
        try:
            _recipe_of(Trial(0, parameters), make, Folder(recipe.output))
        except RecipeError as error:
            chosen = ", ".join(f"{key}={value}" for key, value in parameters.items())
            raise RecipeError(
                f"a trial of 'tune.space' makes no recipe ({chosen}): {error.problem}",
                where=error.where,
                mend=error.mend,
            ) from None


def _recipe_of(trial: Trial, make: Callable[[Parameters], Recipe], search: Folder) -> Recipe:
    """The recipe of a trial, whose output is its folder in the folder of the search.

    Raises:
        RecipeError: if its parameters make none.
    """
    made = make(trial.parameters)
    assert made.tune is not None
    if not made.train.length[0]:
        raise RecipeError(
            "nothing is trained, so nothing is measured that trials could be compared by",
            where="train.epochs",
            mend="set it to 1 or more",
        )
    # A trial that is stopped keeps its best model: there is a checkpoint of every epoch.
    often = {"every_epochs": 1, "min_seconds": 0.0}
    checkpoint = made.train.checkpoint.model_copy(update=often)
    train = made.train.model_copy(update={"workers": made.tune.workers, "checkpoint": checkpoint})
    changes = {
        "name": f"{made.name}-{trial.name}",
        "output": (search / trial.folder).uri,
        "train": train,
        "tune": None,
    }
    return validate(Recipe, made.model_copy(update=changes).model_dump(mode="json"))
