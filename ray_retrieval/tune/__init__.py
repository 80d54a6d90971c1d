"""Ray Tune around training: a search for hyperparameters.

Tune starts the trials, shares the cluster out among them and ends those that are stopped. What is tried, what
is stopped and what came of it is decided and written down by `tuning`, so a search that was killed goes on
from its own records, whatever became of Tune's.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.tune

from ray_retrieval.cluster import connect, fewer_or_more
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.table import ImageTable
from ray_retrieval.errors import DataError, RecipeError, RetrievalError
from ray_retrieval.lock import writing_alone
from ray_retrieval.model_folder import DESCRIPTION
from ray_retrieval.progress import Display
from ray_retrieval.recipe import Recipe
from ray_retrieval.run import Run
from ray_retrieval.run.checks import refuse_deleted
from ray_retrieval.run_folder import start_of
from ray_retrieval.storage import Folder, fingerprint
from ray_retrieval.train import for_training
from ray_retrieval.tune import nodes
from ray_retrieval.tune.following import Ending, Following, HandingOut, settings
from ray_retrieval.tune.keeping import copy_model, keep_best_so_far
from ray_retrieval.tune.trial import Shared, work
from ray_retrieval.tuning import ledger, page, space
from ray_retrieval.tuning.handout import Handout
from ray_retrieval.tuning.ledger import Ledger, Trial
from ray_retrieval.tuning.plan import Plan, plan, room
from ray_retrieval.tuning.proposals import require_optuna
from ray_retrieval.tuning.space import Parameters
from ray_retrieval.tuning.trials import Trials, check, identity

__all__ = ["Search", "Tuned"]


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
        fresh: delete what an earlier search left there, once it is clear that this one can begin.
        retry: try trials again that failed for good; not with `fresh`, which leaves none of them.
        display: where progress is shown.

    Raises:
        RecipeError: if the recipe states no search, a field of it is unknown, listed values make no recipe,
            both `fresh` and `retry` are asked for, or the folder holds another search, or, with `fresh`,
            something that is none.
    """

    def __init__(
        self,
        make: Callable[[Parameters], Recipe],
        *,
        fresh: bool = False,
        retry: bool = False,
        display: Display | None = None,
    ) -> None:
        if fresh and retry:
            raise RecipeError(
                "it deletes the trials that `retry` is to try again",
                where="`fresh`",
                mend="leave one of them out",
            )
        self.recipe, self._make = make({}), make
        self.display = display or Display(quiet=True)
        check(self.recipe, make)
        assert self.recipe.tune is not None
        self.config = self.recipe.tune
        if self.config.searcher == "optuna":
            require_optuna()
        self.folder, self._fresh = Folder(self.recipe.output), fresh
        self._retry = retry
        self._read()

    def _read(self) -> None:
        """What the folder holds by now."""
        self._ledger = Ledger(self.folder, identity(self.recipe), fresh=self._fresh)
        if self._fresh:
            ledger.refuse_foreign(self.folder)
        else:
            self._ledger.check()
        self.trials = Trials(self.recipe, self._make, self._ledger, retry=self._retry, said=self._say)

    def all(self) -> Tuned:
        """Train all trials, keep the best model, measure it, and write the report.

        Raises:
            ClusterError: with the sum, if the cluster has no room for what the recipe asks.
            ConflictError: if another process works in the folder.
            RetrievalError: if images or weights are missing, or every trial failed.
        """
        with writing_alone(self.folder, "tune"), connect():
            self._read()
            if self.trials.left:
                self._plan()
            if self._fresh:
                self._begin_anew()
            if self.trials.left or self._without_model():
                with self._ledger.beginning():
                    benchmark = self._prepare()
                    nodes.require_shared(self.folder)
                if self.trials.left:
                    self._train(self._plan(benchmark), benchmark)
                for recipe in self._without_model():
                    keep_best_so_far(recipe, benchmark)
            return self._conclude()

    def _begin_anew(self) -> None:
        """Delete what an earlier search wrote, once it is clear that this one can begin."""
        if self.folder.names():
            refuse_deleted(self.recipe, [self.folder], ledger.WRITTEN)
            nodes.require_shared(self.folder)
            with TemporaryDirectory(prefix="tune-") as place:
                found = Folder(place)
                _refuse_incomparable(self._looking_in(found).rehearse(found, measured=self.config.evaluate))
                self._ledger.begin_anew()
                self._looking_in(self.folder / ledger.DATA).take_over(found)
        self._fresh = False

    def _without_model(self) -> list[Recipe]:
        """Of trials that were stopped, whose best model so far has not been taken from their checkpoints."""
        stopped = [trial for trial in self._ledger.in_order() if trial.state == "stopped"]
        found = [self.trials.recipe(trial) for trial in stopped]
        return [recipe for recipe in found if not Folder(recipe.output).exists(f"model/{DESCRIPTION}")]

    def _plan(self, benchmark: Benchmark | None = None) -> Plan:
        there = list(nodes.for_work().values())
        images = 0 if benchmark is None else self._kept(benchmark)
        return plan(self.config, there, left=self.trials.left, images=images, mend=fewer_or_more)

    def _kept(self, benchmark: Benchmark) -> int:
        """Bytes of decoded images that a trial keeps at most."""
        image = self.recipe.method.training_image
        side = max(image.size, image.resize_to or 0)
        tables = {id(table): table for table in _trained_on(benchmark)}
        whole = sum(len(table) for table in tables.values()) * 3 * side * side
        return min(whole, int(self.recipe.train.cache_memory))

    def _room(self, planned: Plan, benchmark: Benchmark) -> Callable[[], int]:
        """How many trials may train at the same time: more as the cluster grows, unless the recipe says."""
        if self.config.concurrent != "auto":
            return lambda: planned.concurrent
        images = self._kept(benchmark)
        return nodes.Lately(
            lambda: room(self.config, list(nodes.for_work().values()), here=planned.here, images=images)
        )

    def _prepare(self) -> Benchmark:
        """The images, loaded and looked at once for all trials."""
        looking = self._looking_in(self.folder / ledger.DATA)
        settled = bool(self._ledger.trials)
        benchmark = looking.prepare(measured=self.config.evaluate, settled=settled)
        _refuse_incomparable(benchmark)
        images = fingerprint([table.fingerprint for table in _trained_on(benchmark)])
        self._ledger.keep_beginning(images, start_of(looking.recipe))
        return benchmark

    def _looking_in(self, folder: Folder) -> Run:
        """What looks at the images for all trials, and writes what it finds into a folder."""
        # Of all recipes of the space the same one with every start, whatever the file says of its fields.
        of_all = self._make(next(space.to_check(self.config)))
        train = of_all.train.model_copy(update={"workers": self.config.workers})
        changes = {"output": folder.uri, "train": train, "tune": None}
        return Run(of_all.model_copy(update=changes), display=self.display)

    def _train(self, planned: Plan, benchmark: Benchmark) -> None:
        """Let Tune run all trials that have not ended.

        Raises:
            RetrievalError: if the records could not be written.
        """
        left, together = self.trials.left, f"{planned.concurrent} at a time"
        self.display.say(
            f"tune: {left} {'trial' if left == 1 else 'trials'}, "
            f"{'one at a time' if planned.concurrent == 1 else together}"
        )
        shared = Shared(
            self.folder.uri,
            [ray.put(for_training(benchmark))],
            planned,
            node=ray.get_runtime_context().get_node_id(),
            place=os.getcwd(),
        )

        def train(config: dict[str, Any]) -> None:
            work(config["number"], shared)

        with settings(), self.display.task("tune", left, "trials") as advance:
            handout = Handout(
                self.trials,
                self._room(planned, benchmark),
                ended=lambda count: advance(count, ""),
                alive=nodes.alive,
            )
            following = Following(handout, shared.node)
            tuner = ray.tune.Tuner(
                ray.tune.with_resources(train, {"cpu": planned.cpus}),
                tune_config=ray.tune.TuneConfig(
                    search_alg=HandingOut(handout, following),
                    scheduler=following,
                    num_samples=-1,
                    reuse_actors=planned.here,  # a new process takes seconds to import what it needs
                ),
                run_config=ray.tune.RunConfig(
                    name=ledger.TUNE,
                    storage_path=self.folder.path,
                    storage_filesystem=self.folder.filesystem,
                    stop=Ending(handout),
                    verbose=0,
                ),
            )
            try:
                tuner.fit()
            finally:
                # Tune's files say nothing that is not in ours, and are pickles.
                (self.folder / ledger.TUNE).remove()
        if handout.error is not None:
            raise handout.error

    def _conclude(self) -> Tuned:
        """The best model with its recipe and metrics, and the report."""
        trials, objectives = self._ledger.in_order(), self.trials.objectives
        best = ledger.front(trials, objectives)
        self.folder.remove("metrics.json")
        if best:
            copy_model(self.folder / best[0].folder, self.folder)
        report = page.write(self.folder, self.recipe, objectives, trials, best)
        if not best:
            errors = [trial.error for trial in trials if trial.state == "failed"]
            raise RetrievalError(
                f"every trial failed; the last one: {errors[-1] if errors else 'none was trained'}",
                where=report,
                mend="put right what they say, then search again with `retry`",
            )
        metrics = None
        if best[0].state != "finished":
            self.display.say("note: no trial came to its end; the best of those that were stopped is kept")
        elif self.config.evaluate:
            self.display.say(f"trial {best[0].name} is the best; it is measured on the test queries")
            metrics = Run(self.trials.recipe(best[0]), display=self.display).all().metrics
            measured = self.folder / best[0].folder
            self.folder.write_bytes("metrics.json", measured.read_bytes("metrics.json"))
            report = page.write(self.folder, self.recipe, objectives, trials, best)
        return Tuned(self.folder, dict(objectives), trials, best, metrics, report)

    def _say(self, trial: Trial) -> None:
        """Tell how a trial stands."""
        chosen = ", ".join(f"{key}={page.plain(value)}" for key, value in trial.parameters.items())
        found = (trial.values or {}).items()
        values = ", ".join(f"best {name} {page.plain(value)}" for name, value in found)
        how = trial.error if trial.state in ("failed", "stopped") else trial.state
        self.display.say(f"trial {trial.name}: {chosen} · epoch {trial.epochs} · {values or '–'} · {how}")


def _refuse_incomparable(benchmark: Benchmark) -> None:
    """Raise DataError if nothing can be trained, or trials cannot be compared."""
    if benchmark.untrainable:
        raise DataError(f"nothing can be trained: {benchmark.untrainable}", where=benchmark.name)
    if not len(benchmark.validation_queries):
        raise DataError(
            "there are no validation queries, by which trials are compared",
            where=benchmark.name,
            mend="set data.validation_queries, or what takes its place in this benchmark",
        )


def _trained_on(benchmark: Benchmark) -> list[ImageTable]:
    """The images that a trial reads."""
    return [benchmark.train, benchmark.validation_queries, benchmark.validation_database]
