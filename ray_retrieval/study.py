"""A study: the runs of one recipe for several numbers of bits or seeds, and their comparison."""

from collections.abc import Iterator
from typing import Any

from ray_retrieval import compare_page
from ray_retrieval.compare import compare
from ray_retrieval.progress import Display
from ray_retrieval.recipe import Recipe
from ray_retrieval.results import common_folder
from ray_retrieval.run import Run
from ray_retrieval.run.checks import delete_runs
from ray_retrieval.storage import Folder


class Study:
    """Several recipes, run one after another: `Study(load_study("jobs/hashnet_coco_official.yaml")).all()`.

    Each is an ordinary run in its own output folder, so a study that was killed goes on where it stood. The
    study's own folder is the innermost one that contains them all.

    Args:
        recipes: what to do, as `load_study` gives them.
        fresh: delete what earlier runs left there.
        display: where progress is shown.

    Raises:
        ConflictError, RecipeError: as `Run`, before any member has started or anything has been deleted.
        ArtefactError: if no folder contains all outputs.
    """

    def __init__(self, recipes: list[Recipe], *, fresh: bool = False, display: Display | None = None) -> None:
        self.display = display or Display(quiet=True)
        outputs = [Folder(recipe.output) for recipe in recipes]
        self.folder = common_folder(outputs)
        if fresh:
            delete_runs(outputs)
        self.runs = [Run(recipe, display=self.display) for recipe in recipes]

    def all(self) -> dict[str, Any]:
        """Every stage of every member, then the comparison."""
        for run in self._one_after_another():
            run.all()
        return self.compare()

    def train(self) -> list[dict[str, Any]]:
        """Train every member.

        Returns:
            What each member's `model.json` says, with its `folder` and `fingerprint`.
        """
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

    def _one_after_another(self) -> Iterator[Run]:
        for number, run in enumerate(self.runs, start=1):
            self.display.say(f"run {number} of {len(self.runs)}: {run.recipe.name} in {run.folder}")
            yield run
