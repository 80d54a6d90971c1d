"""Ray Train around the loop: workers, checkpoints, recovery."""

import json
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.constants import VALIDATE_STORAGE_MARKER_FILENAME
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from ray_retrieval import model
from ray_retrieval.cluster import fewer_or_more, is_alone, reraise, resources
from ray_retrieval.cluster.sharing import require_seen
from ray_retrieval.cores import cores
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.errors import ArtefactError, ClusterError, would_fail_alike
from ray_retrieval.history import HISTORY, History, read_history
from ray_retrieval.loop import STATE, Outcome, Process, TrainConfig, Trainer, read_outcome
from ray_retrieval.loop.checkpoints import Weights
from ray_retrieval.loop.folders import fetch_newest, newer
from ray_retrieval.loop.steplog import STEPS, read_steps
from ray_retrieval.loop.tensorboard import refuse_remote
from ray_retrieval.methods import AnyMethodConfig, build
from ray_retrieval.methods.base import Method, MethodConfig
from ray_retrieval.storage import Folder, refusal

__all__ = [
    "CHECKPOINTS_HERE",
    "checkpoint_folder",
    "for_training",
    "save_models",
    "start_weights",
    "starting",
    "train",
    "worker_resources",
]

_NAME = "checkpoints"
CHECKPOINTS_HERE = "checkpoints-here"
"""Where a training without Ray Train keeps its own, which `train` goes on from as well."""
_LIST, _COPY = "checkpoint_manager_snapshot.json", "checkpoints.json"
"""Ray's list of the checkpoints that count, and a copy of it."""
_TIMEOUT_S = 300  # how long workers wait for a lost one before the group is built anew


class _FailurePolicy(DefaultFailurePolicy):
    """Ray's, but for what would end the next attempt as well, such as a loss that is not finite."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        if any(would_fail_alike(failure) for failure in failures):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _TorchTrainer(TorchTrainer):
    """Ray's, which tries nothing again in vain, and starts no process that has nothing to do here.

    Each of those takes seconds. One looks after datasets of Ray, which no training of ours has; another frees
    the places of a controller that died, which nobody asks for where Ray ends with this process.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle = {"DatasetsCallback", "PlacementGroupCleanerCallback"} if is_alone() else {"DatasetsCallback"}
        made = super()._create_default_callbacks()  # type: ignore[misc]  # the stubs are of the older Train
        return [one for one in made if type(one).__name__ not in idle]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        config: Any = self.run_config.failure_config  # the stubs are of the older Train
        given["failure_policy"] = _FailurePolicy(config)
        return super()._initialize_and_run_controller(**given)  # type: ignore[misc]


def train(
    method: AnyMethodConfig,
    config: TrainConfig,
    benchmark: Benchmark,
    *,
    seed: int,
    run: Folder,
    provenance: dict[str, Any],
    progress: Callable[[int, dict[str, Any]], None] = lambda _done, _record: None,
    callbacks: Sequence[UserCallback] = (),
    make_start: Callable[..., Weights] | None = None,
) -> Outcome:
    """Train on the connected Ray, from the newest checkpoint in `run` where there is one.

    Args:
        method: what to train.
        config: how.
        benchmark: training and validation images.
        seed: determines every random draw.
        run: the run's folder; checkpoints go to `checkpoints/`, a record of every epoch to `history.jsonl`,
            and of every so many steps to `steps.jsonl`.
        provenance: kept in `model.json`.
        progress: called here, on the driver, with how many more epochs are done (or steps, where they say how
            long to train) and their newest record.
        callbacks: called by Ray Train's controller, among others after every checkpoint.
        make_start: what `start_weights` does, where the weights are.

    Returns:
        The best and the last model, which are also written to `model/` (the selected one) and, where they
        differ, to `model-best/` or `model-last/`.

    Raises:
        ClusterError: if the cluster has too few processors or GPUs, or workers were lost too often.
        RecipeError: if TensorBoard's events are asked for and the run's folder is not local, or a node does
            not see that folder.
    """
    if config.tensorboard:
        refuse_remote(run)
    asked = worker_resources(config.workers)
    # The starting weights are made here, once: files and downloads need not be on every node.
    start = (make_start or start_weights)(method, config, benchmark, seed=seed)
    inputs = ray.put((for_training(benchmark), method, config, start))
    _mend_list(run / _NAME)
    _copy_list(run / _NAME)
    trainer = _TorchTrainer(
        _work,
        train_loop_config={"inputs": [inputs], "seed": seed, "run": run.uri},
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu="GPU" in asked, resources_per_worker=asked
        ),
        torch_config=TorchConfig(timeout_s=_TIMEOUT_S),
        run_config=RunConfig(
            name=_NAME,
            storage_path=run.path,
            storage_filesystem=run.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            failure_config=FailureConfig(max_failures=config.max_failures),
            # The stubs are of the older Train.
            callbacks=[_KeepList(run.uri), *callbacks],  # type: ignore[list-item]
        ),
    )
    try:
        with _interruptible(), _following(run, config, progress):
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        reraise(error, "training", store=run / _NAME)
    assert result.checkpoint is not None, "the loop always ends with a checkpoint"
    with result.checkpoint.as_directory() as folder:
        outcome = read_outcome(Path(folder))
    save_models(outcome, method, config, benchmark, run, provenance)
    (run / CHECKPOINTS_HERE).remove()
    return outcome


@contextmanager
def checkpoint_folder(run: Folder) -> Iterator[Path | None]:
    """The newest checkpoint that `train` has left in a run's folder, made local; None before the first."""
    _mend_list(run / _NAME)
    if not (run / _NAME).exists(_LIST):
        yield None
        return
    result = ray.train.Result.from_path(f"{run.path}/{_NAME}", storage_filesystem=run.filesystem)
    if result.checkpoint is None:
        yield None
        return
    with result.checkpoint.as_directory() as folder:
        yield Path(folder)


class _KeepList(UserCallback):
    """Copies the list of the checkpoints that count, which Ray writes over where it lies.

    Args:
        run: address of the run's folder.
    """

    def __init__(self, run: str) -> None:
        self._run = run

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:  # noqa: ARG002
        _copy_list(Folder(self._run) / _NAME)


def _copy_list(folder: Folder) -> None:
    """Copy the list of the checkpoints that count, where there is one. Stores write whole or nothing."""
    if folder.is_local and folder.exists(_LIST):
        folder.write_bytes(_COPY, folder.read_bytes(_LIST))


def _mend_list(folder: Folder) -> None:
    """Put the copy in the place of a list that was cut off: by a full disk, or a machine that stopped.

    The checkpoints that the copy names are there then: Ray deletes old ones after it has written the list.
    """
    if not folder.is_local or not folder.exists(_LIST):
        return
    try:
        folder.read_json(_LIST)
    except ArtefactError:
        if folder.exists(_COPY):
            folder.write_bytes(_LIST, folder.read_bytes(_COPY))
        else:
            folder.remove(_LIST)


def for_training(benchmark: Benchmark) -> Benchmark:
    """The part of a benchmark that is sent to where a model is trained: all but the test images."""
    none = np.zeros(0, np.int64)
    return replace(
        benchmark,
        queries=benchmark.queries.take(none),
        database=benchmark.database.take(none),
        gallery_draws=(),
    )


def starting(method: MethodConfig, config: TrainConfig, benchmark: Benchmark) -> tuple[Method, list[str]]:
    """The method with its weights at the start, and the names of those that `config.start` did not give.

    Raises:
        ModelError: if weights are missing, cannot be fetched or do not fit.
        ArtefactError: if `config.start` is no model or is damaged.
    """
    built = build(method, classes=benchmark.train.classes, pretrained=config.start is None)
    return built, [] if config.start is None else model.start_from(built, config.start)


def start_weights(method: MethodConfig, config: TrainConfig, benchmark: Benchmark, *, seed: int) -> Weights:
    """All weights that a training begins with, the same wherever they are made; raises as `starting`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return starting(method, config, benchmark)[0].state_dict()


def worker_resources(workers: int) -> dict[str, float]:
    """What one worker asks for; threads are shared out separately, by the cores that a node really has."""
    found = resources()
    available = found.get("CPU", 0)
    if available < workers:
        raise ClusterError(
            f"{workers} workers of 1 CPU each, but the cluster has {available:g} CPUs",
            where="train.workers",
            mend=fewer_or_more(int(available)),
        )
    gpus = found.get("GPU", 0)
    if not gpus:
        return {"CPU": 1}
    if gpus < workers:
        raise ClusterError(
            f"{workers} workers of 1 GPU each, but the cluster has {gpus:g} GPUs",
            where="train.workers",
            mend=fewer_or_more(int(gpus)),
        )
    return {"CPU": 1, "GPU": 1}


def _work(inputs: dict[str, Any]) -> None:
    """What every worker runs. Ray is met in four places: context, device, reports, checkpoints."""
    context = ray.train.get_context()
    run = Folder(inputs["run"])
    if run.is_local:  # Ray itself looks with the first checkpoint, and then trains as far again and again
        require_seen([f"{run.path}/{_NAME}/{VALIDATE_STORAGE_MARKER_FILENAME}"])
    benchmark, method, config, start = ray.get(inputs["inputs"][0])
    process = Process(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        threads=config.threads_of(max(1, cores() // context.get_local_world_size())),
        device=get_device(),
    )
    built = build(method, classes=benchmark.train.classes, pretrained=False)
    built.load_state_dict(start)
    trainer = Trainer(built, benchmark, config, seed=inputs["seed"], process=process)
    trainer.fit(_RayReporter(run), run)


class _RayReporter:
    """Checkpoints through Ray Train, and the history of epochs as a file that a restart rewrites."""

    def __init__(self, run: Folder) -> None:
        self._run = run
        self._history = History(run)
        self._fetched = tempfile.TemporaryDirectory(prefix="checkpoint-")

    def latest(self) -> Path | None:
        checkpoint, fetched = ray.train.get_checkpoint(), Path(self._fetched.name)
        mine = None if checkpoint is None else Path(checkpoint.to_directory(str(fetched / "newest")))
        # A trial of a search may have been trained without Ray Train so far.
        folder = newer(mine, fetch_newest(self._run / CHECKPOINTS_HERE, fetched / "here"))
        if folder is None:
            return None
        self._history.restart(json.loads((folder / STATE).read_text())["history"])
        return folder

    def epoch_done(self, record: dict[str, Any]) -> None:
        self._history.add(record)

    def checkpoint(self, name: str, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        if write is None:
            ray.train.report(metrics, checkpoint_dir_name=name)
            return
        folder = tempfile.mkdtemp(prefix="checkpoint-")
        try:
            write(Path(folder))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
        except OSError as error:
            with suppress(ArtefactError):
                (self._run / _NAME).remove(name)  # a part of it is of no use and takes space
            raise refusal(error, (self._run / _NAME).uri_of(name)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C an interrupt again: Ray's handler ends the process with code 0 and stays installed."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _following(
    run: Folder, config: TrainConfig, progress: Callable[[int, dict[str, Any]], None]
) -> Iterator[None]:
    """Call `progress` with what workers add to the history, or to the log of steps, while the block runs.

    A store that does not answer for a while holds nothing up: what it has then is told later.
    """
    name, key, read = (
        (HISTORY, "epoch", read_history) if config.steps is None else (STEPS, "step", read_steps)
    )
    ended = threading.Event()
    size, done = 0, 0

    def look() -> None:
        nonlocal size, done
        now = run.size(name) if run.exists(name) else 0
        for record in read(run) if now != size else []:
            if record[key] > done:  # what was done again after a loss does not count twice
                progress(record[key] - done, record)
                done = record[key]
        size = now

    def follow() -> None:
        while not ended.wait(0.5):
            with suppress(ArtefactError):
                look()

    watcher = threading.Thread(target=follow, name="history", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        with suppress(ArtefactError):
            look()


def save_models(
    outcome: Outcome,
    method: AnyMethodConfig,
    config: TrainConfig,
    benchmark: Benchmark,
    run: Folder,
    provenance: dict[str, Any],
) -> None:
    """Write `model-best/` or `model-last/` where the one that is not selected differs, and `model/`.

    `model/` comes last: where it is complete, the training is. What a training that was stopped left of the
    other one goes where there is none now.
    """
    selected = outcome.weights[config.select]
    for which, weights in sorted(outcome.weights.items(), key=lambda pair: pair[0] == config.select):
        if which != config.select and weights is selected:
            (run / f"model-{which}").remove()
            continue
        name = "model" if which == config.select else f"model-{which}"
        model.save(
            run / name,
            config=method.model_dump(mode="json"),
            weights=weights,
            classes=benchmark.train.classes,
            class_names=benchmark.train.class_names,
            precision=outcome.precision,
            training={
                **provenance,
                "epoch": outcome.epochs[which],
                "of_epochs": outcome.epochs["last"],
                "step": outcome.steps[which],
                "of_steps": outcome.steps["last"],
            },
            metrics={"validation": outcome.validation[which]},
        )
