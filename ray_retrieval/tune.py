"""Ray Tune around training: a search for hyperparameters.

Tune starts the trials, shares the cluster out among them and ends those that are stopped. What is tried, what
is stopped and what came of it is decided and written down by `tuning`, so a search that was killed goes on
from its own records, whatever became of Tune's.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
import ray.tune
import yaml
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ray_retrieval.cluster import connect, reraise, resources
from ray_retrieval.compute import cores
from ray_retrieval.config import validate
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.errors import ClusterError, DataError, RecipeError, RetrievalError
from ray_retrieval.history import read_history
from ray_retrieval.loop import read_outcome
from ray_retrieval.model import DESCRIPTION, read_model_description
from ray_retrieval.progress import Display
from ray_retrieval.recipe import Recipe
from ray_retrieval.run import Run
from ray_retrieval.storage import Folder
from ray_retrieval.train import checkpoint_folder, for_training, save_models, train
from ray_retrieval.tuning import ledger, page
from ray_retrieval.tuning.here import outcome_here, train_here
from ray_retrieval.tuning.ledger import Ledger, Trial
from ray_retrieval.tuning.plan import Plan, plan
from ray_retrieval.tuning.proposals import require_optuna
from ray_retrieval.tuning.space import Parameters
from ray_retrieval.tuning.trials import Report, Trials, check, identity, reports

_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one has a table even where it is asked to be silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the records are ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, and the same command goes on
}
_LOST = "the process of the trial was lost"
_TUNE = "tune"
"""The folder of Tune's own files, in the search's."""


@dataclass(frozen=True)
class Tuned:
    """What a search left.

    Attributes:
        folder: of the search.
        objectives: what was looked for, and which way.
        trials: all of them, by their numbers.
        best: those of which no other is better in all objectives; the first one's model is in `model/`.
        metrics: on the test queries, what `metrics.json` says; None where they were not measured.
        report: path or URI of the report.
    """

    folder: Folder
    objectives: dict[str, str]
    trials: list[Trial]
    best: list[Trial]
    metrics: dict[str, Any] | None
    report: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "folder": self.folder.uri,
            "objectives": self.objectives,
            "best": [asdict(trial) for trial in self.best],
            "trials": [asdict(trial) for trial in self.trials],
            "metrics": self.metrics,
            "report": self.report,
        }


class Search:
    """The search that a recipe states: `Search(template("jobs/tune_digits.yaml")).all()`.

    Args:
        make: gives the recipe of parameters, as `recipe.template` does.
        fresh: delete what an earlier search left there.
        display: where progress is shown.

    Raises:
        RecipeError: if the recipe states no search, a field of it is unknown, listed values make no recipe,
            or the folder holds another search, or, with `fresh`, something that is none.
    """

    def __init__(
        self, make: Callable[[Parameters], Recipe], *, fresh: bool = False, display: Display | None = None
    ) -> None:
        self.recipe = make({})
        self.display = display or Display(quiet=True)
        if self.recipe.tune is None:
            raise RecipeError(
                "the recipe states no search",
                where="tune",
                mend="e.g. tune: {space: {train.optimizer.lr: {loguniform: [1.0e-4, 1.0e-1]}}}",
            )
        self.config = self.recipe.tune
        if self.config.searcher == "optuna":
            require_optuna()
        check(self.recipe, make)
        self.folder = Folder(self.recipe.output)
        if fresh:
            ledger.remove(self.folder)
        self._ledger = Ledger(self.folder, identity(self.recipe))
        self._ledger.check()
        self.trials = Trials(self.recipe, make, self._ledger, said=self._say)

    def all(self) -> Tuned:
        """Train all trials, keep the best model, measure it, and write the report.

        Raises:
            ClusterError: with the sum, if the cluster has no room for what the recipe asks.
            RetrievalError: if images or weights are missing, or every trial failed.
        """
        with connect():
            planned = self._plan() if self.trials.left else None
            if planned is not None or self._without_model():
                benchmark = self._prepare()
                self._ledger.begin()
                if planned is not None:
                    self._train(planned, benchmark)
                for recipe in self._without_model():
                    _keep_best_so_far(recipe, benchmark)
            return self._conclude()

    def _without_model(self) -> list[Recipe]:
        """Of trials that were stopped, whose best model so far has not been taken from their checkpoints."""
        stopped = [trial for trial in self._ledger.in_order() if trial.state == "stopped"]
        found = [self.trials.recipe(trial) for trial in stopped]
        return [recipe for recipe in found if not Folder(recipe.output).exists(f"model/{DESCRIPTION}")]

    def _plan(self) -> Plan:
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
        made = plan(self.config, resources(), left=self.trials.left, nodes=nodes, cores=cores())
        together = "one at a time" if made.concurrent == 1 else f"{made.concurrent} at a time"
        self.display.say(f"tune: {self.trials.left} trials, {together}")
        return made

    def _prepare(self) -> Benchmark:
        """The images, loaded and looked at once for all trials."""
        folder = self.folder / ledger.DATA
        # What the recipe says of the fields that are searched may change, and tells nothing of the images.
        folder.remove("recipe.yaml")
        whole = self.recipe.model_copy(update={"output": folder.uri, "tune": None})
        benchmark = Run(whole, display=self.display).prepare()
        if benchmark.untrainable:
            raise DataError(f"nothing can be trained: {benchmark.untrainable}", where=benchmark.name)
        if not len(benchmark.validation_queries):
            raise DataError(
                "there are no validation queries, by which trials are compared",
                where=benchmark.name,
                mend="set data.validation_queries, or what takes its place in this benchmark",
            )
        return benchmark

    def _train(self, planned: Plan, benchmark: Benchmark) -> None:
        """Let Tune run all trials that have not ended."""
        shared = ray.put(for_training(benchmark))
        folder = self.folder.uri

        def work(config: dict[str, Any]) -> None:
            _work(config["number"], Folder(folder), [shared], planned)

        # Tune's files say nothing that is not in ours.
        (self.folder / _TUNE).remove()
        with _quiet(), self.display.task("tune", self.trials.left, "trials") as advance:
            searcher = _Searcher(self.trials, planned.concurrent, lambda count: advance(count, ""))
            ray.tune.Tuner(
                ray.tune.with_resources(work, {"cpu": planned.cpus}),
                tune_config=ray.tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=_Scheduler(self.trials),
                    num_samples=-1,
                    reuse_actors=planned.here,  # a new process takes seconds to import what it needs
                ),
                run_config=ray.tune.RunConfig(
                    name=_TUNE,
                    storage_path=self.folder.path,
                    storage_filesystem=self.folder.filesystem,
                    verbose=0,
                ),
            ).fit()

    def _conclude(self) -> Tuned:
        """The best model with its recipe and metrics, and the report."""
        trials = self._ledger.in_order()
        best = ledger.front(trials, self.trials.objectives)
        if not best:
            failed = [trial for trial in trials if trial.state == "failed"]
            last = failed[-1].error if failed else "none was trained"
            raise ClusterError(f"every trial failed; the last one: {last}", where=self.folder)
        metrics = None
        chosen = Folder(self.trials.recipe(best[0]).output)
        if best[0].state != "finished":
            self.display.say("note: no trial came to its end; the best of those that were stopped is kept")
        elif self.config.evaluate:
            self.display.say(f"trial {best[0].name} is the best; it is measured on the test queries")
            metrics = Run(self.trials.recipe(best[0]), display=self.display).all().metrics
        _copy(chosen, self.folder, measured=metrics is not None)
        report = page.write(self.folder, self.recipe, self.trials.objectives, trials, best)
        return Tuned(self.folder, dict(self.trials.objectives), trials, best, metrics, report)

    def _say(self, trial: Trial) -> None:
        """Tell how a trial stands."""
        chosen = ", ".join(f"{key}={page.plain(value)}" for key, value in trial.parameters.items())
        values = ", ".join(f"{name} {page.plain(value)}" for name, value in (trial.values or {}).items())
        how = trial.error if trial.state in ("failed", "stopped") else trial.state
        self.display.say(f"trial {trial.name}: {chosen} · epoch {trial.epochs} · {values or '–'} · {how}")


# On the driver: what Tune asks of a search


class _Searcher(Searcher):
    """Hands out the trials' numbers, and hears how each ended."""

    def __init__(self, trials: Trials, concurrent: int, ended: Callable[[int], None]) -> None:
        super().__init__()
        self._trials, self._concurrent, self._have_ended = trials, concurrent, ended
        self._left = trials.left
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        if self._trials.running >= self._concurrent:
            return None
        trial = self._trials.next()
        self._count()
        if trial is None:
            # One that still trains may fail, and is tried again.
            return None if self._trials.running else Searcher.FINISHED
        self._numbers[trial_id] = trial.number
        return {"number": trial.number}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        number = self._numbers.pop(trial_id)
        failure = (result or {}).get("failure")
        if failure is not None:
            self._trials.failed(number, **json.loads(failure))
        elif error:
            self._trials.failed(number, _LOST)
        else:
            self._trials.completed(number)
        self._count()

    def _count(self) -> None:
        before, self._left = self._left, self._trials.left
        if before != self._left:
            self._have_ended(before - self._left)

    def get_state(self) -> dict[str, Any]:
        return {}  # the ledger has it all

    def set_state(self, state: dict[str, Any]) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Scheduler(FIFOScheduler):
    """Stops the trials that `tuning.stopping` says."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trials = trials

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        if "report" not in result:
            return str(TrialScheduler.CONTINUE)
        stop = self._trials.reported(trial.config["number"], Report(**json.loads(result["report"])))
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def __getstate__(self) -> dict[str, Any]:
        return {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune with our settings, and without lines about itself."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


# In a trial's process


def _work(number: int, search: Folder, shared: list[Any], planned: Plan) -> None:
    """Train one trial; Tune is told of every checkpoint, and of an error.

    Args:
        number: of the trial.
        search: the folder of the search.
        shared: a reference to the benchmark, in a list, so that it is not fetched for nothing.
        planned: says where to train.
    """
    text = (search / Trial(number, {}).folder).read_bytes("recipe.yaml")
    try:
        recipe = validate(Recipe, yaml.safe_load(text))
        if planned.here:
            _train_here(recipe, ray.get(shared[0]), planned.threads)
        else:
            _train_with_workers(recipe, shared)
    except RetrievalError as error:
        # The same recipe would be as wrong the next time; anything else may have been an accident.
        _tell_failure(str(error), final=isinstance(error, RecipeError | DataError))
        return
    except Exception as error:
        _tell_failure(f"{type(error).__name__}: {error}".splitlines()[0], final=False)
        return
    made = read_model_description(Folder(recipe.output) / "model")[0]
    epochs = max(made["training"]["of_epochs"], 1)
    _tell(Report(epochs, made["metrics"]["validation"], last=True, kept=True))


def _train_here(recipe: Recipe, benchmark: Benchmark, threads: int) -> None:
    teller = _Teller(recipe)
    training = partial(train_here, threads=threads, after_checkpoint=teller.checkpoint)
    Run(recipe, training=training).train(benchmark)


def _train_with_workers(recipe: Recipe, shared: list[Any]) -> None:
    """Train with Ray Train, looked after by a process that Ray ends when the trial is stopped.

    The workers' processors are then freed by an actor of Ray Train, which asks the cluster whether the
    training is still controlled. Where several clusters run on a machine it does not know which one it is
    in, unless RAY_ADDRESS says so; it inherits the variable from that process.
    """
    address = ray.get_runtime_context().gcs_address
    beside = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": {"RAY_ADDRESS": address}})(_fit)
    try:
        ray.get(beside.remote(recipe, shared, _Forward(recipe)))
    except ray.exceptions.RayError as error:
        reraise(error, "training")


def _fit(recipe: Recipe, shared: list[Any], forward: "_Forward") -> None:
    Run(recipe, training=partial(train, callbacks=[forward])).train(ray.get(shared[0]))


def _tell(report: Report) -> None:
    ray.tune.report({"report": json.dumps(asdict(report))})


def _tell_failure(error: str, *, final: bool) -> None:
    ray.tune.report({"failure": json.dumps({"error": error, "final": final})})


class _Teller:
    """Tells Tune what a trial's history says, once each."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._trial = recipe, Folder(recipe.output)
        self._told = 0

    def checkpoint(self, run: Folder) -> None:
        """Tell what is new; nothing for a training that comes before the trial's own."""
        for report in self._new() if run.uri == self._trial.uri else ():
            _tell(report)

    def _new(self) -> list[Report]:
        found = [
            report for report in reports(read_history(self._trial), self._recipe) if report.epoch > self._told
        ]
        self._told = max((report.epoch for report in found), default=self._told)
        return found


class _Forward(TuneReportCallback):
    """Tells Tune what a trial's workers have reported, from where Ray Train's controller runs."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recipe = recipe

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        newest = reports(read_history(Folder(self._recipe.output)), self._recipe)[-1:]
        for report in newest if newest and newest[0].epoch == int(metrics[0]["epoch"]) else ():
            super().after_report(run_context, [{"report": json.dumps(asdict(report))}], None)


# What is kept


def _keep_best_so_far(recipe: Recipe, benchmark: Benchmark) -> None:
    """Write `model/` of a trial that was stopped, from its newest checkpoint.

    Its `training` says `unfinished`; what a method learns of a trained network, such as whitening, it lacks.
    Running the trial's recipe trains it to the end.
    """
    run = Folder(recipe.output)
    if run.exists(f"model/{DESCRIPTION}"):
        return
    outcome = outcome_here(run)
    if outcome is None:
        with checkpoint_folder(run) as folder:
            outcome = None if folder is None else read_outcome(folder)
    if outcome is not None:
        provenance = {
            "key": "unfinished",
            "data": benchmark.name,
            "images": benchmark.train.name,
            "seed": recipe.seed,
            "unfinished": True,
        }
        save_models(outcome, recipe.method, recipe.train, benchmark, run, provenance)


def _copy(trial: Folder, search: Folder, *, measured: bool) -> None:
    """Copy a trial's model, its description last, its recipe and metrics into the folder of the search."""
    source, target = trial / "model", search / "model"
    same = target.exists(DESCRIPTION) and source.read_bytes(DESCRIPTION) == target.read_bytes(DESCRIPTION)
    if not same:
        target.remove()
        for name in sorted(source.names(), key=lambda name: name == DESCRIPTION):
            with source.reading(name) as read, target.writing(name) as written:
                while chunk := read.read(1 << 24):
                    written.write(chunk)
    search.write_bytes("recipe.yaml", trial.read_bytes("recipe.yaml"))
    if measured:
        search.write_bytes("metrics.json", trial.read_bytes("metrics.json"))
    else:
        search.remove("metrics.json")
