"""A study: the runs of one recipe for several numbers of bits or seeds, and their comparison."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from ray_retrieval import compare_page
from ray_retrieval.compare import compare
from ray_retrieval.lock import writing_alone
from ray_retrieval.progress import Display
from ray_retrieval.recipe import Recipe
from ray_retrieval.results import common_folder
from ray_retrieval.run import Run, anew
from ray_retrieval.storage import Folder


class Study:
    """Several recipes, run one after another: `Study(load_study("jobs/hashnet_coco_official.yaml")).all()`.

    Each is an ordinary run in its own output folder, so a study that was killed goes on where it stood. The
    study's own folder is the innermost one that contains them all.

    Args:
        recipes: what to do, as `load_study` gives them.
        fresh: delete what earlier runs left there, once it is clear that all members can begin.
        display: where progress is shown.

    Raises:
        RecipeError: as `Run`, before any member has started.
        ArtefactError: if no folder contains all outputs.
    """

    def __init__(self, recipes: list[Recipe], *, fresh: bool = False, display: Display | None = None) -> None:
        self.display = display or Display(quiet=True)
        self.folder = common_folder([Folder(recipe.output) for recipe in recipes])
        self.runs = [Run(recipe, fresh=fresh, display=self.display) for recipe in recipes]

    def all(self) -> dict[str, Any]:
        """Every stage of every member, then the comparison.

        Raises:
            RetrievalError: as `Run.all`; with `fresh`, what can be found before a member has started is found
                of all of them before anything has been deleted.
        """
        self._begin_anew(measured=True)
        for run in self._one_after_another():
            run.all()
        return self.compare()

    def train(self) -> list[dict[str, Any]]:
        """Train every member.

        Returns:
            What each member's `model.json` says, with its `folder` and `fingerprint`.

        Raises:
            RetrievalError: as `all`.
        """
        self._begin_anew(measured=False)
        return [run.only_train() for run in self._one_after_another()]

    def evaluate(self) -> dict[str, Any]:
        """Measure every member, all of them trained, on its test queries, then compare them.

        Raises:
            RecipeError: if a member has not been trained; then none is measured.
        """
        for run in self.runs:
            run.require_model()
        for run in self._one_after_another():
            run.only_measure()
        return self.compare()

    def compare(self) -> dict[str, Any]:
        """Compare the finished members; writes `comparison.json` and `comparison.html`."""
        comparison = compare([run.folder for run in self.runs])
        compare_page.write(comparison, self.folder)
        return comparison

    def _begin_anew(self, *, measured: bool) -> None:
        """Delete what earlier runs left, of all members or of none."""
        runs = [run for run in self.runs if run.fresh]
        with ExitStack() as alone:
            for run in runs:
                alone.enter_context(writing_alone(run.folder, "run"))
            alone.enter_context(anew(runs, measured=measured))

    def _one_after_another(self) -> Iterator[Run]:
        for number, run in enumerate(self.runs, start=1):
            self.display.say(f"run {number} of {len(self.runs)}: {run.recipe.name} in {run.folder}")
            yield run
