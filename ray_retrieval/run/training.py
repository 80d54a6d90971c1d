"""The trainings of a run: what each begins with, whether it is complete, and when it is refused."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.history import read_history
from ray_retrieval.loop import Outcome
from ray_retrieval.loop.checks import planned_steps, refuse_misfits
from ray_retrieval.loop.validation import notes_on_accuracy
from ray_retrieval.methods import build
from ray_retrieval.model_folder import DESCRIPTION, read_model_description
from ray_retrieval.progress import Display
from ray_retrieval.recipe import Recipe
from ray_retrieval.run.checks import refuse_another_run
from ray_retrieval.run.images import TRAINED_ON
from ray_retrieval.run.reuse import reuse
from ray_retrieval.run.timings import timed
from ray_retrieval.run_folder import checksum_of_weights, weights_file
from ray_retrieval.storage import Folder, fingerprint
from ray_retrieval.train import starting


class Training:
    """One training, in the folder of its recipe: the run's own, or one of the stages before it.

    Args:
        recipe: how to train, and where.
        work: trains a model as `train.train` does, perhaps in another place.
        display: where progress is shown.
        start: the model to start from, in place of the recipe's.
        fresh: what is in the folder is going to be deleted.

    Raises:
        RecipeError: if the folder holds a training of a recipe that gives another model, or something that
            is none.
    """

    def __init__(
        self,
        recipe: Recipe,
        work: Callable[..., Outcome],
        display: Display,
        *,
        start: str | None = None,
        fresh: bool = False,
    ) -> None:
        self.recipe, self.folder = recipe, Folder(recipe.output)
        if not fresh:
            refuse_another_run(recipe, self.folder)
        self.config = recipe.train if start is None else recipe.train.model_copy(update={"start": start})
        self._work, self._display = work, display
        self._notes: list[str] = []

    def exists(self) -> bool:
        """Whether there is a model, be it the one that the training would give or not."""
        return self.folder.exists(f"model/{DESCRIPTION}")

    def begun(self) -> bool:
        """Whether something was trained here."""
        return self.exists() or self.folder.exists("training.json")

    def noted(self) -> list[str]:
        """What `foresee` said before the training that gave the model."""
        return [*self._begun().get("notes", [])]

    def foresee(self, benchmark: Benchmark, *, follows: bool) -> list[str]:
        """Find what does not fit a training here, not after Ray has started.

        Args:
            benchmark: its images.
            follows: whether it starts from a model that does not exist yet.

        Returns:
            What whoever reads its numbers should know.

        Raises:
            RetrievalError: if weights are missing or do not fit, the method cannot be trained like that on
                such images, or batches cannot be made.
        """
        if self.exists():
            return self.noted()
        notes = []
        recipe, config = self.recipe, self.recipe.train
        if follows:
            method = build(recipe.method, classes=benchmark.train.classes, pretrained=False)
        else:
            method, lacking = starting(recipe.method, config, benchmark)
            if lacking:
                notes.append(
                    f"{len(lacking)} tensors are not in the model of train.start and start anew: "
                    f"{', '.join(lacking[:4])}{', …' if len(lacking) > 4 else ''}"
                )
        refuse_misfits(method, benchmark, config)
        method.start_training(benchmark.train, torch.device("cpu"))
        steps = planned_steps(method, benchmark, config, seed=recipe.seed, workers=config.workers)
        notes += [*method.warnings(benchmark.train, steps), *notes_on_accuracy(method, benchmark)]
        self._notes = notes
        return notes

    def take_model(self, benchmark: Benchmark) -> None:
        """Take the model that the recipe starts from for the trained one, where nothing can be trained.

        Raises:
            DataError: if training is asked for.
            RetrievalError: if the model is none, or does not fit the recipe's method.
        """
        config, folder = self.recipe.train, self.folder / "model"
        if folder.exists(DESCRIPTION):
            start = read_model_description(folder)[0]["training"].get("start")
            if config.start is not None and start != read_model_description(Folder(config.start))[1]:
                raise RecipeError(
                    f"this run was begun with another model than {config.start} now is",
                    where=self.folder,
                    mend="choose another output=… or delete the run with `fresh`",
                )
            return
        if config.start is None or config.length[0]:
            raise DataError(
                f"nothing can be trained: {benchmark.untrainable}",
                where=benchmark.name,
                mend="get the images, or measure a trained model: train.start=MODEL train.epochs=0",
            )
        reuse(config.start, self.recipe.method, folder)

    def train(self, benchmark: Benchmark) -> None:
        """Train, or go on from the newest checkpoint.

        Raises:
            RecipeError: if it was begun here with other images, or from another model or other weights.
        """
        self._refuse_another_beginning(benchmark)
        key = self.key(benchmark)
        begun = {"key": key, "start": self.start_fingerprint(), "notes": self._notes or self.noted()}
        self.folder.write_json("training.json", begun)
        length, unit = self.recipe.train.length
        metric = self.recipe.train.validation.metric
        earlier = read_history(self.folder)
        with timed(self.folder, "train") as stage, self._display.task("train", length, unit) as advance:
            self._work(
                self.recipe.method,
                self.config,
                benchmark,
                seed=self.recipe.seed,
                run=self.folder,
                provenance={
                    "key": key,
                    "data": benchmark.name,
                    "images": benchmark.train.name,
                    "seed": self.recipe.seed,
                },
                progress=lambda done, record: advance(done, _remark(record, metric)),
            )
            # The epochs of an earlier start that this one went on from.
            pairs = zip(earlier, read_history(self.folder), strict=False)
            stage.earlier_s = sum(old["seconds"] for old, new in pairs if old == new)

    def key(self, benchmark: Benchmark) -> str:
        """A fingerprint of what determines the model: the recipe, the images, and the model before it."""
        tables = (getattr(benchmark, role) for role in TRAINED_ON)
        before = [] if self.config.start is None else [self.start_fingerprint()]
        return fingerprint([self.recipe.of_the_model(), *(table.fingerprint for table in tables), *before])

    def start_fingerprint(self) -> str | None:
        """Of the model that the training starts from, or the file of weights; None where there is neither.

        If it is gone, as when the training was begun.

        Raises:
            ArtefactError: if the model is not there, and the training has not been begun from it.
        """
        start = self.config.start
        if start is None:
            return self._weights or self._begun().get("start")
        known: str | None = None if Folder(start).exists(DESCRIPTION) else self._begun().get("start")
        return known or read_model_description(Folder(start))[1]

    @functools.cached_property
    def _weights(self) -> str | None:
        return checksum_of_weights(self.recipe.method)

    def is_complete(self, benchmark: Benchmark) -> bool:
        """Whether `model/` is what the training would give.

        Raises:
            RecipeError: if it was begun here with other images, or from another model or other weights.
        """
        start = self.config.start
        known = start is None or "start" in self._begun() or Folder(start).exists(DESCRIPTION)
        if not known:
            return False  # it follows a stage that has not been trained yet
        self._refuse_another_beginning(benchmark)
        if not self.exists():
            return False
        found: str = read_model_description(self.folder / "model")[0]["training"]["key"]
        return found == self.key(benchmark)

    def _refuse_another_beginning(self, benchmark: Benchmark) -> None:
        """Raise RecipeError if it was begun with other images, or from another model or other weights."""
        begun, start = self._begun(), self.start_fingerprint()
        if begun.get("start") not in (None, start):
            model, weights = self.config.start, weights_file(self.recipe.method)
            now = (
                f"other weights than {weights} now are"
                if model is None
                else f"another model than {model} now is"
            )
            raise RecipeError(
                f"this run was begun from {now}",
                where=self.folder,
                mend="bring it back, choose another output=… or delete the run with `fresh`",
            )
        key = self.key(benchmark)
        if begun.get("key", key) != key:
            raise RecipeError(
                "the training or validation images are not those that this run was begun with",
                where=self.folder,
                mend="bring them back, choose another output=… or delete the run with `fresh`",
            )

    def _begun(self) -> dict[str, Any]:
        """`key`, `start` and `notes` of the training that was begun here; empty before."""
        return self.folder.read_json("training.json") if self.folder.exists("training.json") else {}


def _remark(record: dict[str, Any], metric: str) -> str:
    validation = record.get("validation")
    measured = f" · validation {metric} {validation[metric]:.4f}" if validation else ""
    rate = f"{record['images_per_second']:.0f} images/s"
    return f"epoch {record['epoch']} · loss {record['loss']:.4f}{measured} · {rate}"
