"""In the process of a trial: training it, and telling Tune of it."""

import json
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
import ray.exceptions
import ray.tune
import yaml
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_retrieval.cluster import reraise
from ray_retrieval.config import validate
from ray_retrieval.cores import cores
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.errors import RetrievalError, would_fail_alike
from ray_retrieval.loop import TrainConfig
from ray_retrieval.loop.checkpoints import Weights
from ray_retrieval.methods import AnyMethodConfig
from ray_retrieval.model_folder import read_model_description
from ray_retrieval.recipe import Recipe
from ray_retrieval.run import Run
from ray_retrieval.storage import Folder
from ray_retrieval.train import start_weights, train
from ray_retrieval.tuning.here import train_here
from ray_retrieval.tuning.ledger import Trial
from ray_retrieval.tuning.plan import Plan
from ray_retrieval.tuning.reports import Report, Untold

ERROR = "error.txt"
"""The file in a trial's folder with the traceback of its newest failure."""
_ENDING_S = "600"
"""Seconds that a trial's thread may take to end before its process is given to another trial; by default it
is 2, after which Tune drops that other trial without a word."""


@dataclass(frozen=True)
class Shared:
    """What all trials of a search have in common.

    Attributes:
        uri: of its folder.
        benchmark: a reference to it, in a list, so that it is not fetched for nothing.
        plan: says where to train.
        node: of the driver, where weights to start from may be.
        place: the driver's working folder, which their paths may start from.
    """

    uri: str
    benchmark: list[Any]
    plan: Plan
    node: str
    place: str


def work(number: int, shared: Shared) -> None:
    """Train one trial; Tune is told of every checkpoint, and of an error."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = _ENDING_S
    ray.tune.report({"node": ray.get_runtime_context().get_node_id()})
    run = Folder(shared.uri) / Trial(number, {}).folder
    try:
        recipe = validate(Recipe, yaml.safe_load(run.read_bytes("recipe.yaml")))
        if shared.plan.here:
            _train_here(recipe, shared)
        else:
            _train_with_workers(recipe, shared)
        made = read_model_description(run / "model")[0]
        epochs = max(made["training"]["of_epochs"], 1)
        run.remove(ERROR)
    except Exception as error:
        with suppress(RetrievalError):
            run.write_text(ERROR, traceback.format_exc())
        _tell_failure(error)
    else:
        _tell(Report(epochs, made["metrics"]["validation"], last=True, kept=True))


def _train_here(recipe: Recipe, shared: Shared) -> None:
    untold, benchmark = Untold(recipe), ray.get(shared.benchmark[0])

    def tell(run: Folder) -> None:
        # Not of a training that comes before the trial's own.
        for report in untold.take() if run.uri == Folder(recipe.output).uri else ():
            _tell(report)

    training = partial(
        train_here, threads=_threads(shared.plan), after_checkpoint=tell, make_start=_starting(shared)
    )
    Run(recipe, training=training).train(benchmark)
    tell(Folder(recipe.output))  # of one that went on after its last checkpoint


def _threads(plan: Plan) -> int:
    mine = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    cpus = next(node["Resources"].get("CPU", 1) for node in nodes if node["NodeID"] == mine)
    return plan.threads(cpus, cores())


def _train_with_workers(recipe: Recipe, shared: Shared) -> None:
    """Train with Ray Train, looked after by a process that Ray ends when the trial is stopped.

    It is on the trial's own node, so that the loss of another one is a matter of Ray Train.
    The workers' processors are then freed by an actor of Ray Train, which asks the cluster whether the
    training is still controlled. Where several clusters run on a machine it does not know which one it is
    in, unless RAY_ADDRESS says so; it inherits the variable from that process.
    """
    context = ray.get_runtime_context()
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    variables = {"env_vars": {"RAY_ADDRESS": context.gcs_address}}
    fit = ray.remote(num_cpus=0, max_retries=0, runtime_env=variables)(_fit)
    beside = fit.options(scheduling_strategy=here)
    try:
        ray.get(beside.remote(recipe, shared, _Forward(recipe)))
    except ray.exceptions.RayError as error:
        reraise(error, "training")
    for report in Untold(recipe).take()[-1:]:  # of one that went on after its last checkpoint
        _tell(report)


def _fit(recipe: Recipe, shared: Shared, forward: "_Forward") -> None:
    training = partial(train, callbacks=[forward], make_start=_starting(shared))
    Run(recipe, training=training).train(ray.get(shared.benchmark[0]))


def _starting(shared: Shared) -> Callable[..., Weights]:
    """Makes starting weights on the driver's node: files and downloads need not be on every node."""
    if ray.get_runtime_context().get_node_id() == shared.node:
        return start_weights
    there = NodeAffinitySchedulingStrategy(shared.node, soft=False)
    make = ray.remote(num_cpus=0)(_start).options(scheduling_strategy=there)

    def made(method: AnyMethodConfig, config: TrainConfig, _benchmark: Benchmark, *, seed: int) -> Weights:
        try:
            weights: Weights = ray.get(make.remote(method, config, seed, shared))
        except ray.exceptions.RayError as error:
            reraise(error, "making the starting weights")
        return weights

    return made


def _start(method: AnyMethodConfig, config: TrainConfig, seed: int, shared: Shared) -> Weights:
    os.chdir(shared.place)
    return start_weights(method, config, ray.get(shared.benchmark[0]), seed=seed)


def _tell(report: Report) -> None:
    ray.tune.report({"report": json.dumps(asdict(report))})


def _tell_failure(error: Exception) -> None:
    mendable = isinstance(error, RetrievalError)
    text = str(error) if mendable else f"{type(error).__name__}: {error}".splitlines()[0]
    ray.tune.report({"failure": json.dumps({"error": text, "final": would_fail_alike(error)})})


class _Forward(TuneReportCallback):
    """Tells Tune what a trial's workers have reported, from where Ray Train's controller runs."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._untold = Untold(recipe)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        for report in self._untold.take(int(metrics[0]["epoch"])):
            super().after_report(run_context, [{"report": json.dumps(asdict(report))}], None)
