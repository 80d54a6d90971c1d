"""The main job: train, encode, index, evaluate, report.

Every stage leaves an artefact, and a stage whose artefact is complete is not run again, so a run that was
killed goes on where it stood.
"""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import yaml

from ray_retrieval import examples, report, search
from ray_retrieval import recipe as recipes
from ray_retrieval.cluster import connect
from ray_retrieval.cluster.pool import pool_of
from ray_retrieval.compare import acceptance
from ray_retrieval.compute import describe_machine
from ray_retrieval.config import validate
from ray_retrieval.cores import cores
from ray_retrieval.data import datasets
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.source import check_images, read_errors, write_errors
from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.encode import EncodeJob, encode
from ray_retrieval.errors import DataError, RecipeError, RetrievalError
from ray_retrieval.evaluate import evaluate
from ray_retrieval.evaluation import as_text
from ray_retrieval.finder import local_index
from ray_retrieval.history import read_history
from ray_retrieval.loop import Outcome, TrainConfig
from ray_retrieval.methods import build
from ray_retrieval.methods.base import Clock
from ray_retrieval.model_folder import DESCRIPTION, model_of, read_model_description
from ray_retrieval.progress import Advance, Display
from ray_retrieval.recipe import Recipe
from ray_retrieval.reuse import reuse
from ray_retrieval.run_checks import refuse_codes, refuse_engine, refuse_unmeasurable
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.storage import Folder, fingerprint
from ray_retrieval.train import starting, train

_VERSIONS = (
    "ray_retrieval",
    "torch",
    "torchvision",
    "ray",
    "numpy",
    "pyarrow",
    "faiss-gpu",
    "faiss-cpu",
    "numba",
)


_TRAINED_ON = ("train", "validation_queries", "validation_database")


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
        fresh: delete what an earlier run left there.
        display: where progress is shown.
        training: trains a model as `train` does, perhaps in another place.

    Raises:
        RecipeError: if the folder holds a run of a recipe that gives another model, or, with `fresh`,
            something that is no run.
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
        self._train = training
        self.display = display or Display(quiet=True)
        if fresh:
            self._remove()
        self._refuse_another_recipe()
        # A recipe that states no stages is one training; else those before it are runs that only train.
        self._before = [
            Run(stage, display=self.display, training=training) for stage in recipe.stage_recipes()
        ]

    def all(self) -> Finished:
        """Every stage, on the cluster that RAY_ADDRESS names or on a local Ray."""
        benchmark = self.prepare(measured=True)
        with connect():
            self.train(benchmark)
            self.encode(benchmark)
            self.index()
        metrics = self.evaluate(benchmark)
        return Finished(self.folder, metrics, self.report(benchmark))

    def prepare(self, *, measured: bool = False) -> Benchmark:
        """Find everything that the run needs before anything is started.

        Args:
            measured: whether the model is going to be measured too, so that what this needs is looked for.

        Returns:
            The benchmark without the training images that cannot be decoded, which `errors/` lists.

        Raises:
            RetrievalError: if images, labels or weights are missing or do not fit; then nothing is left.
        """
        if measured:
            refuse_engine(self.recipe, self.folder)
        existed, begun = self.folder.exists(), self.folder.exists("recipe.yaml")
        try:
            benchmark = self._load_data(measured=measured)
            if benchmark.untrainable:
                self._take_model(benchmark)
            elif not self.folder.exists(f"model/{DESCRIPTION}"):
                for number, job in enumerate([*self._before, self]):
                    job._foresee(benchmark, follows=number > 0)
        except RetrievalError:
            for name in () if begun else ("recipe.yaml", "split", "errors", "data.json", "timings.json"):
                self.folder.remove(name)
            if not existed:
                self.folder.remove()
            raise
        for note in benchmark.notes:
            self.display.say(f"note: {note}")
        return benchmark

    def _foresee(self, benchmark: Benchmark, *, follows: bool) -> None:
        """Find what does not fit a training here, not after Ray has started.

        Args:
            benchmark: its images; notes are added.
            follows: whether it starts from a model that does not exist yet.
        """
        if self.folder.exists(f"model/{DESCRIPTION}"):
            return
        config = self.recipe.train
        if follows:
            method = build(self.recipe.method, classes=benchmark.train.classes, pretrained=False)
        else:
            method, lacking = starting(self.recipe.method, config, benchmark)
            if lacking:
                benchmark.notes.append(
                    f"{len(lacking)} tensors are not in the model of train.start and start anew: "
                    f"{', '.join(lacking[:4])}{', …' if len(lacking) > 4 else ''}"
                )
        sizes = method.plan_sizes(benchmark.train, config.batch_size, Clock(self.recipe.seed))
        benchmark.notes.extend(
            method.warnings(benchmark.train, config.total_steps(method.rounds * len(sizes)))
        )

    def _load_data(self, *, measured: bool) -> Benchmark:
        with self._stage("data"):
            benchmark = datasets.load(self.recipe.data, seed=self.recipe.seed, splits=self.folder / "split")
            self.folder.write_text("recipe.yaml", recipes.dump(self.recipe))
            refuse_codes(self.recipe, benchmark)
            if measured:
                refuse_unmeasurable(self.recipe, benchmark)
            return self._without_broken(benchmark)

    def _take_model(self, benchmark: Benchmark) -> None:
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
                    mend="choose another output=… or delete the run with --fresh",
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
        """Train, unless `model/` is complete: then the trainings before it need not be there any more."""
        if benchmark.untrainable:
            self._take_model(benchmark)
            self.display.say(f"train: the model is taken as it is, {benchmark.untrainable}")
            return
        if self._is_complete(benchmark):
            self.display.say("train: the model is complete")
            return
        for job in self._stages_to_train(benchmark):
            self.display.say(f"stage {job.recipe.name}")
            job.folder.write_text("recipe.yaml", recipes.dump(job.recipe))
            job.train(benchmark)
        self._refuse_another_beginning(benchmark)
        key = self.training_key(benchmark)
        self.folder.write_json("training.json", {"key": key, "start": self._start()})
        length, unit = self.recipe.train.length
        earlier = read_history(self.folder)
        with self._stage("train") as stage, self.display.task("train", length, unit) as advance:
            self._train(
                self.recipe.method,
                self._training,
                benchmark,
                seed=self.recipe.seed,
                run=self.folder,
                provenance={
                    "key": key,
                    "data": benchmark.name,
                    "images": benchmark.train.name,
                    "seed": self.recipe.seed,
                },
                progress=lambda done, record: advance(
                    done, _remark(record, self.recipe.train.validation.metric)
                ),
            )
            # The epochs of an earlier start that this one went on from.
            pairs = zip(earlier, read_history(self.folder), strict=False)
            stage.earlier = sum(old["seconds"] for old, new in pairs if old == new)

    def training_key(self, benchmark: Benchmark) -> str:
        """A fingerprint of what determines the model: the recipe, the training images, and the start."""
        tables = (getattr(benchmark, role) for role in _TRAINED_ON)
        start = self._start()
        before = [] if start is None else [start]
        return fingerprint([self.recipe.of_the_model(), *(table.fingerprint for table in tables), *before])

    def _start(self) -> str | None:
        """Fingerprint of the model that the training starts from; if that is gone, as it was when begun.

        Raises:
            ArtefactError: if it is not there, and the run has not been begun from it.
        """
        start = self._training.start
        if start is None:
            return None
        known: str | None = None if Folder(start).exists(DESCRIPTION) else self._begun().get("start")
        return known or read_model_description(Folder(start))[1]

    def _begun(self) -> dict[str, Any]:
        """`key` and `start` of the training that was begun here; empty before."""
        return self.folder.read_json("training.json") if self.folder.exists("training.json") else {}

    def _is_complete(self, benchmark: Benchmark) -> bool:
        """Whether `model/` is what the training would give.

        Raises:
            RecipeError: as `_refuse_another_beginning`.
        """
        start = self._training.start
        known = start is None or "start" in self._begun() or Folder(start).exists(DESCRIPTION)
        if not known:
            return False  # it follows a stage that has not been trained yet
        self._refuse_another_beginning(benchmark)
        folder = self.folder / "model"
        if not folder.exists(DESCRIPTION):
            return False
        found: str = read_model_description(folder)[0]["training"]["key"]
        return found == self.training_key(benchmark)

    def _stages_to_train(self, benchmark: Benchmark) -> list["Run"]:
        """The trainings before that are not complete, and of which no later one is."""
        for number in reversed(range(len(self._before))):
            if self._before[number]._is_complete(benchmark):
                return self._before[number + 1 :]
        return self._before

    def _refuse_another_beginning(self, benchmark: Benchmark) -> None:
        """Raise RecipeError if a training was begun here with other images, or from another model."""
        begun, start = self._begun(), self._start()
        if begun.get("start", start) != start:
            raise RecipeError(
                f"this run was begun from another model than {self._training.start} now is",
                where=self.folder,
                mend="bring it back, choose another output=… or delete the run with --fresh",
            )
        key = self.training_key(benchmark)
        if begun.get("key", key) != key:
            raise RecipeError(
                "the training or validation images are not those that this run was begun with",
                where=self.folder,
                mend="bring them back, choose another output=… or delete the run with --fresh",
            )

    @property
    def _training(self) -> TrainConfig:
        """How the recipe's own training goes: from the model of the stage before, where there is one."""
        config = self.recipe.train
        if not self._before:
            return config
        return config.model_copy(update={"start": (self._before[-1].folder / "model").uri})

    def require_model(self) -> None:
        """Raise RecipeError if the recipe has not been trained."""
        if not self.folder.exists(f"model/{DESCRIPTION}"):
            raise RecipeError("no trained model here", where=self.folder, mend="run `train` or `run` first")

    def encode(self, benchmark: Benchmark) -> None:
        """Encode queries and database with every model that is measured; finished parts are kept.

        Raises:
            RecipeError: if the model could not be measured afterwards.
        """
        refuse_unmeasurable(self.recipe, benchmark)
        with self._stage("encode") as stage:
            jobs = [
                EncodeJob(self.folder / model, getattr(benchmark, role), self._embeddings(model, role))
                for model in self._models()
                for role in dict.fromkeys((_queries(benchmark), "database"))
            ]
            if (local := self._local_queries()) is not None:
                jobs.append(EncodeJob(local[0], benchmark.queries, local[1]))
            with self.display.task("encode", sum(len(job.table) for job in jobs), "images") as advance:
                stage.worked = encode(jobs, self.recipe.encode, advance=advance) > 0

    def index(self) -> None:
        """Build the index of the selected model's database."""
        with self._stage("index") as stage:
            stage.worked = not self.folder.exists("index/CURRENT")
            local = self.recipe.method.form.kind is DescriptorKind.LOCAL
            with pool_of(self.recipe.index.workers, cores()) as pool:
                built = search.build(
                    self._embeddings("model", "database"),
                    self.folder / "index",
                    shards=self.recipe.index.shards,
                    keep_images=self.recipe.index.keep_images,
                    approximate=None if local else self.recipe.index,
                    local=self.recipe.index.local if local else None,
                    pool=pool,
                )
        if built.approximate is not None:
            found = built.approximate.recall
            self.display.say(
                f"index: {built.approximate.factory} finds {found.value:.4f} of the {found.k} nearest "
                f"({found.queries:,} queries)"
            )

    def evaluate(self, benchmark: Benchmark) -> dict[str, Any]:
        """Measure every model on the test queries and write `metrics.json`."""
        selected = self.recipe.train.select
        models: dict[str, Any] = {}
        errors, local = 0, self._local_queries()
        with self._stage("evaluate"):
            for name in self._models():
                queries = Embeddings.open(self._embeddings(name, _queries(benchmark)))
                database = Embeddings.open(self._embeddings(name, "database"))
                description, _ = read_model_description(self.folder / name)
                same = _queries(benchmark) == "database"
                errors = database.error_count + (0 if same else queries.error_count)
                # With re-ranking each query counts four times; see `evaluate`.
                times = (len(benchmark.gallery_draws) or 1) * (4 if self.recipe.evaluate.rerank else 1)
                index = None
                if queries.form.kind is DescriptorKind.LOCAL:
                    self.index()
                    index = search.Index.open(self.folder / "index", threads=cores(), model=queries.model)
                with self.display.task("evaluate", times * queries.rows, "queries") as advance:
                    measured = evaluate(
                        queries,
                        database,
                        self.recipe.evaluate,
                        benchmark,
                        threads=cores(),
                        progress=lambda count, tick=advance: tick(count, ""),  # type: ignore[misc]
                        index=index,
                        features=None if local is None else Embeddings.open(local[1]),
                    )
                which = selected if name == "model" else name.removeprefix("model-")
                models[which] = {
                    "epoch": description["training"]["epoch"],
                    "validation": description["metrics"]["validation"],
                    **measured,
                }
        metrics = {
            "selected": selected,
            "models": models,
            "dataset": _facts(benchmark, errors),
            "published": acceptance(
                self.recipe.published,
                self.recipe.method.form.size,
                models[selected]["test"],
                benchmark=benchmark.name,
            ),
        }
        self.folder.write_json("metrics.json", metrics)
        if benchmark.ground_truth is not None:
            self.folder.write_text("mAP.txt", as_text(models[selected]["test"]))
        return metrics

    def report(self, benchmark: Benchmark) -> str:
        """Write `report.html`; returns where."""
        shown = self.recipe.report
        queries = Embeddings.open(self._embeddings("model", _queries(benchmark)))
        index = search.Index.open(self.folder / "index", threads=cores(), model=queries.model)
        found = examples.of_benchmark(benchmark, queries, index, count=shown.examples, hits=shown.hits)
        return report.write(self.folder, found)

    def _models(self) -> list[str]:
        """The model directories to measure: the selected one, and the other where it differs.

        Local features are measured by the index, which is the selected model's.
        """
        others = [
            name for name in ("model-best", "model-last") if self.folder.exists(f"{name}/{DESCRIPTION}")
        ]
        local = self.recipe.method.form.kind is DescriptorKind.LOCAL
        return ["model", *(others if self.recipe.evaluate.both and not local else [])]

    def _local_queries(self) -> tuple[Folder, Folder] | None:
        """The model of the index by which vectors are verified, and where its features of the queries go."""
        index = local_index(self.recipe.evaluate.rerank)
        if index is None:
            return None
        made_by = model_of(Folder(index))
        fingerprint = read_model_description(made_by)[1]
        return made_by, self.folder / "embeddings" / f"queries-{fingerprint}"

    def _embeddings(self, model: str, role: str) -> Folder:
        return (
            self.folder
            / "embeddings"
            / (role if model == "model" else f"{role}{model.removeprefix('model')}")
        )

    def _without_broken(self, benchmark: Benchmark) -> Benchmark:
        """Look at every training and validation image once, whatever number of workers trains later."""
        if benchmark.untrainable or benchmark.decoded:
            return benchmark  # they may be missing, and are not needed; or were looked at before
        tables = {role: getattr(benchmark, role) for role in _TRAINED_ON}
        # One table may play several roles: its errors are found once, under the first of them.
        listed = {id(table): role for role, table in reversed(tables.items())}
        known = fingerprint([table.fingerprint for table in tables.values()])
        if self._checked() != known:
            with self.display.task(
                "check", sum(len(tables[r]) for r in listed.values()), "images"
            ) as advance:
                for role in listed.values():
                    self._check_images(role, tables[role], advance)
            self.folder.write_json("data.json", {"checked": known})
        kept: dict[str, Any] = {}
        whole: dict[int, ImageTable] = {}
        for role, table in tables.items():
            name = f"{listed[id(table)]}.parquet"
            errors = read_errors(self.folder / "errors", name)
            if errors:
                self.display.say(
                    f"note: {role}: {len(errors)} of {len(table)} images cannot be decoded and are left out"
                    f" (first: {errors[0].id}: {errors[0].reason}); all are in {self.folder}/errors/{name}"
                )
            # Roles that have the same table keep on having the same.
            if id(table) not in whole:
                whole[id(table)] = _without(table, {error.row for error in errors})
            kept[role] = whole[id(table)]
        return replace(benchmark, **kept)

    def _check_images(self, role: str, table: ImageTable, advance: Advance) -> None:
        seen = 0

        def tick(count: int) -> None:
            nonlocal seen
            advance(count - seen, "")
            seen = count

        errors = check_images(table, threads=cores(), progress=tick)
        write_errors(self.folder / "errors", errors, f"{role}.parquet")

    def _checked(self) -> str | None:
        return self.folder.read_json("data.json")["checked"] if self.folder.exists("data.json") else None

    def _remove(self) -> None:
        """Delete an earlier run, and nothing that is not one."""
        refuse_what_is_no_run(self.folder)
        self.folder.remove()

    def _refuse_another_recipe(self) -> None:
        """An output folder belongs to one model; only what does not change it may differ."""
        if not self.folder.exists("recipe.yaml"):
            return
        text = self.folder.read_bytes("recipe.yaml").decode()
        try:
            old = validate(Recipe, yaml.safe_load(text)).of_the_model()
        except RetrievalError:
            old = {}  # written by another release: its keys are not ours
        changed = recipes.differences(old, self.recipe.of_the_model())
        if changed:
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise RecipeError(
                f"the folder holds a run of another recipe ({'; '.join(changed[:3])}{more})",
                where=self.folder,
                mend="choose another output=… or delete that run with --fresh",
            )

    @contextmanager
    def _stage(self, name: str) -> Iterator["_Stage"]:
        """Time a stage, and keep the seconds in `timings.json` if it had anything to do."""
        started = time.monotonic()
        stage = _Stage()
        yield stage
        if not stage.worked:
            return
        known = self.folder.exists("timings.json")
        timings = self.folder.read_json("timings.json") if known else {"stages": {}}
        timings["stages"][name] = round(time.monotonic() - started + stage.earlier, 2)
        timings["versions"] = {"python": platform.python_version(), **_versions()}
        timings["machine"] = describe_machine()
        self.folder.write_json("timings.json", timings)


def refuse_what_is_no_run(folder: Folder) -> None:
    """Raise RecipeError if there is something in the folder that no run left: it must not be deleted."""
    if folder.names() and not folder.exists("recipe.yaml"):
        raise RecipeError(
            "the output folder holds something that is no run, so --fresh does not delete it",
            where=folder,
            mend="choose another output=…",
        )


def _queries(benchmark: Benchmark) -> str:
    """The role whose embeddings hold the queries: images that are queries and database are encoded once."""
    return "database" if benchmark.queries is benchmark.database else "queries"


@dataclass
class _Stage:
    """What a stage says of itself: whether it had anything to do, and seconds spent on it before."""

    worked: bool = True
    earlier: float = 0.0


def _without(table: ImageTable, broken: set[int]) -> ImageTable:
    if not broken:
        return table
    kept = np.setdiff1d(np.arange(len(table)), np.array(sorted(broken), np.int64))
    if not len(kept):
        raise DataError("none of the images can be decoded", where=table.name)
    return table.take(kept)


def _remark(record: dict[str, Any], metric: str) -> str:
    validation = record.get("validation")
    measured = f" · validation {metric} {validation[metric]:.4f}" if validation else ""
    rate = f"{record['images_per_second']:.0f} images/s"
    return f"epoch {record['epoch']} · loss {record['loss']:.4f}{measured} · {rate}"


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONS:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _facts(benchmark: Benchmark, errors: int) -> dict[str, Any]:
    roles = ("train", "validation_queries", "validation_database", "queries", "database")
    return {
        "name": benchmark.name,
        **{role: len(getattr(benchmark, role)) for role in roles},
        "errors": errors,
        "notes": benchmark.notes,
    }
