"""The main job: train, encode, index, evaluate, report.

Every stage leaves an artefact, and a stage whose artefact is complete is not run again, so a run that was
killed goes on where it stood.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from ray_retrieval import examples, report, search
from ray_retrieval.cluster import connect
from ray_retrieval.cluster.pool import pool_of
from ray_retrieval.cores import cores
from ray_retrieval.data import datasets
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.encode import encode
from ray_retrieval.errors import RecipeError, RetrievalError
from ray_retrieval.evaluation import as_text
from ray_retrieval.lock import clear, writing_alone
from ray_retrieval.loop import Outcome
from ray_retrieval.loop.tensorboard import refuse_remote
from ray_retrieval.model_folder import read_model_description
from ray_retrieval.progress import Display
from ray_retrieval.recipe import Recipe
from ray_retrieval.run.checks import (
    refuse_another_run,
    refuse_codes,
    refuse_deleted,
    refuse_engine,
    refuse_unmeasurable,
)
from ray_retrieval.run.images import checked, without_broken
from ray_retrieval.run.measuring import embeddings, encode_jobs, measure, queries_of
from ray_retrieval.run.timings import timed
from ray_retrieval.run.training import Training
from ray_retrieval.run_folder import PREPARED, RECIPE, RUN, WRITTEN, begin, mark, refuse_foreign
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.manifest import CURRENT, read_current
from ray_retrieval.storage import Folder
from ray_retrieval.train import train, worker_resources
from ray_retrieval.words import counted


@dataclass(frozen=True)
class Finished:
    """What a run left.

    Attributes:
        folder: where.
        metrics: what `metrics.json` says.
        report: path or URI of the report.
    """

    folder: Folder
    metrics: dict[str, Any]
    report: str


class Run:
    """One recipe's run in its output folder.

    Args:
        recipe: what to do.
        fresh: delete what an earlier run left there, once it is clear that this one can begin.
        display: where progress is shown.
        training: trains a model as `train` does, perhaps in another place.

    Raises:
        RecipeError: if the folder holds something that is no run or, without `fresh`, a run of a recipe that
            gives another model.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        fresh: bool = False,
        display: Display | None = None,
        training: Callable[..., Outcome] = train,
    ) -> None:
        self.recipe, self.folder = recipe, Folder(recipe.output)
        self.display = display or Display(quiet=True)
        self.fresh = fresh
        if fresh:
            refuse_foreign(self.folder, fresh=True)
        stages = recipe.stage_recipes()
        start = (Folder(stages[-1].output) / "model").uri if stages else None
        self._own = Training(recipe, training, self.display, start=start, fresh=fresh)
        self._stages = [Training(stage, training, self.display, fresh=fresh) for stage in stages]

    def all(self) -> Finished:
        """Every stage, on the cluster that RAY_ADDRESS names or on a local Ray.

        Raises:
            ConflictError: if another process works in the folder.
            RetrievalError: as the stages do.
        """
        with self._alone("run", measured=True):
            benchmark = self.prepare(measured=True)
            with connect():
                self.train(benchmark)
                self.encode(benchmark)
                self.index()
            metrics = self.evaluate(benchmark)
            return Finished(self.folder, metrics, self.report(benchmark))

    def only_train(self) -> dict[str, Any]:
        """Prepare and train, as `all`.

        Returns:
            What `model.json` says, with the model's `fingerprint` and `folder`.

        Raises:
            ConflictError: if another process works in the folder.
            RetrievalError: as the stages do.
        """
        with self._alone("train"):
            benchmark = self.prepare()
            with connect():
                self.train(benchmark)
        description, fingerprint = read_model_description(self.folder / "model")
        return {**description, "fingerprint": fingerprint, "folder": self.folder.uri_of("model")}

    def only_measure(self) -> dict[str, Any]:
        """Encode with the trained model and measure it, as `all`; a report that is there is written anew.

        Returns:
            What `metrics.json` says.

        Raises:
            ConflictError: if another process works in the folder.
            RecipeError: if the recipe has not been trained.
            RetrievalError: as the stages do.
        """
        self.require_model()
        with self._alone("evaluate"):
            benchmark = self.prepare()
            with connect():
                self.encode(benchmark)
            metrics = self.evaluate(benchmark)
            if self.folder.exists("report.html") and self.folder.exists("index/CURRENT"):
                self.report(benchmark)  # or it would have other numbers than `metrics.json`
            return metrics

    @contextmanager
    def _alone(self, operation: str, *, measured: bool = False) -> Iterator[None]:
        """Hold the folder's lock, with nothing of an earlier run where that is to be deleted."""
        with writing_alone(self.folder, operation), anew([self] if self.fresh else [], measured=measured):
            yield

    def prepare(self, *, measured: bool = False, settled: bool = False) -> Benchmark:
        """Find everything that the run needs before anything is started.

        Args:
            measured: whether the model is going to be measured too, so that what this needs is looked for.
            settled: whether something was trained elsewhere on what was found here; see `without_broken`.

        Returns:
            The benchmark without the training images that cannot be decoded, which `errors/` lists.

        Raises:
            RecipeError: if the folder holds something that is no run, or a run of a recipe that gives another
                model: it may have become so since it was looked at.
            RetrievalError: if images, labels or weights are missing or do not fit; then nothing is left.
        """
        refuse_another_run(self.recipe, self.folder)
        if measured:
            refuse_engine(self.recipe, self.folder)
        existed, begun = self.folder.exists(), self.folder.exists(RUN)
        try:
            benchmark = self._load_data(measured=measured, settled=settled)
            if benchmark.untrainable:
                self._own.take_model(benchmark)
            else:
                done = self._own.exists()
                for number, training in enumerate([*self._stages, self._own]):
                    said = training.noted() if done else training.foresee(benchmark, follows=number > 0)
                    benchmark.notes.extend(note for note in said if note not in benchmark.notes)
        except RetrievalError:
            if not begun:  # then all of these are of this start
                for name in (*PREPARED, RECIPE, RUN):
                    self.folder.remove(name)
            if not existed and not self.folder.names():
                self.folder.remove()
            raise
        for note in benchmark.notes:
            self.display.say(f"note: {note}")
        return benchmark

    def _load_data(self, *, measured: bool, settled: bool) -> Benchmark:
        before = checked(self.folder)
        settled = settled or any(training.begun() for training in [*self._stages, self._own])
        with timed(self.folder, "data") as stage:
            mark(self.folder)
            benchmark = datasets.load(self.recipe.data, seed=self.recipe.seed, splits=self.folder / "split")
            begin(self.folder, self.recipe)
            refuse_codes(self.recipe, benchmark)
            if measured:
                refuse_unmeasurable(self.recipe, benchmark)
            kept = without_broken(benchmark, self.folder, self.display, settled=settled)
            stage.worked = not stage.known_s or checked(self.folder) != before
            return kept

    def train(self, benchmark: Benchmark) -> None:
        """Train, unless `model/` is complete: then the trainings before it need not be there any more.

        Raises:
            RecipeError: if it was begun with other images, or from another model or other weights.
        """
        if benchmark.untrainable:
            self._own.take_model(benchmark)
            self.display.say(f"train: the model is taken as it is, {benchmark.untrainable}")
            return
        if self._own.is_complete(benchmark):
            self.display.say("train: the model is complete")
            return
        for stage in self._stages_to_train(benchmark):
            self.display.say(f"stage {stage.recipe.name}")
            begin(stage.folder, stage.recipe)
            stage.train(benchmark)
        self._own.train(benchmark)

    def _stages_to_train(self, benchmark: Benchmark) -> list[Training]:
        """The trainings before that are not complete, and of which no later one is."""
        for number in reversed(range(len(self._stages))):
            if self._stages[number].is_complete(benchmark):
                return self._stages[number + 1 :]
        return self._stages

    def require_model(self) -> None:
        """Raise RecipeError if the recipe has not been trained."""
        if not self._own.exists():
            raise RecipeError("no trained model here", where=self.folder, mend="run `train` or `run` first")

    def encode(self, benchmark: Benchmark) -> None:
        """Encode queries and database with every model that is measured; finished parts are kept.

        Raises:
            RecipeError: if the model could not be measured afterwards.
        """
        refuse_unmeasurable(self.recipe, benchmark)
        with timed(self.folder, "encode") as stage:
            jobs = encode_jobs(self.recipe, self.folder, benchmark)
            if any(job.out.names() for job in jobs):
                stage.earlier_s = stage.known_s
            with self.display.task("encode", sum(len(job.table) for job in jobs), "images") as advance:

                def advanced(count: int, remark: str) -> None:
                    advance(count, remark)
                    stage.keep_now_and_then()

                stage.worked = encode(jobs, self.recipe.encode, advance=advanced) > 0

    def index(self) -> None:
        """Build the index of the selected model's database."""
        with timed(self.folder, "index") as stage:
            index = self.folder / "index"
            before = read_current(index).number if index.exists(CURRENT) else None
            local = self.recipe.method.form.kind is DescriptorKind.LOCAL
            with pool_of(self.recipe.index.workers, cores()) as pool:
                built = search.build(
                    embeddings(self.folder, "database"),
                    index,
                    shards=self.recipe.index.shards,
                    keep_images=self.recipe.index.keep_images,
                    approximate=None if local else self.recipe.index,
                    local=self.recipe.index.local if local else None,
                    pool=pool,
                )
            stage.worked = built.number != before
        if built.approximate is not None:
            found = built.approximate.recall
            self.display.say(
                f"index: {built.approximate.factory} finds {found.value:.4f} of the {found.k} nearest "
                f"({counted(found.queries, 'query')})"
            )

    def evaluate(self, benchmark: Benchmark) -> dict[str, Any]:
        """Measure every model on the test queries and write `metrics.json`.

        Returns:
            What that file says.
        """
        if self.recipe.method.form.kind is DescriptorKind.LOCAL:
            self.index()
        with timed(self.folder, "evaluate"):
            metrics = measure(self.recipe, self.folder, benchmark, self.display)
        self.folder.write_json("metrics.json", metrics)
        if benchmark.ground_truth is not None:
            self.folder.write_text("mAP.txt", as_text(metrics["models"][metrics["selected"]]["test"]))
        return metrics

    def report(self, benchmark: Benchmark) -> str:
        """Write `report.html`; returns where."""
        shown = self.recipe.report
        queries = Embeddings.open(embeddings(self.folder, queries_of(benchmark)))
        index = search.Index.open(self.folder / "index", threads=cores(), model=queries.model)
        found = examples.of_benchmark(benchmark, queries, index, count=shown.examples, hits=shown.hits)
        return report.write(self.folder, found)

    def rehearse(self, place: Folder, *, measured: bool) -> Benchmark:
        """Prepare the run in another, empty folder: nothing of an earlier one is looked at.

        Raises:
            RetrievalError: as `prepare`.
        """
        recipe = self.recipe.model_copy(update={"output": place.uri})
        return Run(recipe, display=_Beforehand(self.display)).prepare(measured=measured)

    def begin_anew(self, prepared: Folder) -> None:
        """Delete what an earlier run left, with the folder's lock held, and take over what a rehearsal found.

        Raises:
            ConflictError: if another process works within; then nothing has been deleted.
        """
        clear(self.folder, "run", last=RECIPE, only=WRITTEN - {RUN})
        self.take_over(prepared)

    def take_over(self, prepared: Folder) -> None:
        """Begin with what a rehearsal found."""
        begin(self.folder, self.recipe)
        for name in prepared.files():
            if name.split("/")[0] in PREPARED:
                self.folder.write_bytes(name, prepared.read_bytes(name))


class _Beforehand(Display):
    """Shows progress; the notes are said when the run itself begins."""

    def __init__(self, display: Display) -> None:
        self.console = display.console

    def say(self, line: str) -> None:
        if not line.startswith("note: "):
            super().say(line)


@contextmanager
def anew(runs: Sequence[Run], *, measured: bool) -> Iterator[None]:
    """Delete what earlier runs left in the folders of these, once it is clear that each of them can begin.

    Args:
        runs: the locks of whose folders are held.
        measured: whether models are going to be measured too.

    Raises:
        RetrievalError: if one of them could not begin, or Ray does not answer; then nothing has been deleted.
    """
    with ExitStack() as held:
        if any(run.folder.names() for run in runs):
            for run in runs:
                refuse_foreign(run.folder, fresh=True)
                refuse_deleted(run.recipe, [other.folder for other in runs])
                if run.recipe.train.tensorboard:
                    refuse_remote(run.folder)
            places = [Folder(held.enter_context(TemporaryDirectory(prefix="run-"))) for _ in runs]
            for run, place in zip(runs, places, strict=True):
                run.rehearse(place, measured=measured)
            held.enter_context(connect())
            for run in runs:
                if run.recipe.train.length[0]:
                    worker_resources(run.recipe.train.workers)
            for run, place in zip(runs, places, strict=True):
                run.begin_anew(place)
        for run in runs:
            run.fresh = False
        yield
