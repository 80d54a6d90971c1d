"""Training in this process, with checkpoints in the run's folder: for a trial that one processor trains.

Ray Train takes some 15 seconds to start; a search has many short trainings.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.history import History
from ray_retrieval.loop import STATE, Outcome, Process, TrainConfig, Trainer, read_outcome
from ray_retrieval.loop.checkpoints import Weights
from ray_retrieval.loop.folders import fetch_newest, newer, put
from ray_retrieval.loop.tensorboard import refuse_remote
from ray_retrieval.methods import AnyMethodConfig, build
from ray_retrieval.storage import Folder
from ray_retrieval.train import CHECKPOINTS_HERE, checkpoint_folder, save_models, start_weights

Progress = Callable[[int, dict[str, Any]], None]


def train_here(
    method: AnyMethodConfig,
    config: TrainConfig,
    benchmark: Benchmark,
    *,
    seed: int,
    run: Folder,
    provenance: dict[str, Any],
    threads: int,
    progress: Progress = lambda _done, _record: None,
    after_checkpoint: Callable[[Folder], None] = lambda _run: None,
    make_start: Callable[..., Weights] = start_weights,
) -> Outcome:
    """Train as `ray_retrieval.train.train` does with one worker, bit for bit, but in this process.

    Args:
        method: what to train.
        config: how; `workers` is 1.
        benchmark: training and validation images.
        seed: determines every random draw.
        run: the run's folder; it goes on from the newest checkpoint there, whichever way it was trained.
        provenance: kept in `model.json`.
        threads: of the processor that it may use.
        progress: called with how many more epochs are done, or steps, and their record.
        after_checkpoint: called with the run's folder after every checkpoint.
        make_start: what `start_weights` does, where the weights are.

    Returns:
        The best and the last model, which are also written to `model/` and its like.

    Raises:
        RecipeError: if TensorBoard's events are asked for and the run's folder is not local.
    """
    if config.tensorboard:
        refuse_remote(run)
    built = build(method, classes=benchmark.train.classes, pretrained=False)
    built.load_state_dict(make_start(method, config, benchmark, seed=seed))
    with newest_checkpoint(run) as latest:
        reporter = _Checkpoints(run, config, latest, progress=progress, after=after_checkpoint)
        trainer = Trainer(
            built, benchmark, config, seed=seed, process=Process(threads=config.threads_of(threads))
        )
        trainer.fit(reporter, run)
    with newest_checkpoint(run) as newest:
        assert newest is not None, "the loop always ends with a checkpoint"
        outcome = read_outcome(newest)
    save_models(outcome, method, config, benchmark, run, provenance)
    (run / CHECKPOINTS_HERE).remove()
    return outcome


@contextmanager
def newest_checkpoint(run: Folder) -> Iterator[Path | None]:
    """The newest checkpoint in a run's folder, of Ray Train or of here, made local; None before the first."""
    with (
        tempfile.TemporaryDirectory(prefix="checkpoint-") as fetched,
        checkpoint_folder(run) as by_ray_train,
    ):
        yield newer(by_ray_train, fetch_newest(run / CHECKPOINTS_HERE, Path(fetched)))


class _Checkpoints:
    """Checkpoints in the run's folder, and the history beside them."""

    def __init__(
        self,
        run: Folder,
        config: TrainConfig,
        latest: Path | None,
        *,
        progress: Progress,
        after: Callable[[Folder], None],
    ) -> None:
        self._run, self._config, self._latest = run, config, latest
        self._progress, self._after = progress, after
        self._history = History(run)
        self._done = 0

    def latest(self) -> Path | None:
        if self._latest is not None:
            self._history.restart(json.loads((self._latest / STATE).read_text())["history"])
        return self._latest

    def epoch_done(self, record: dict[str, Any]) -> None:
        self._history.add(record)
        now = record["epoch" if self._config.steps is None else "step"]
        self._progress(now - self._done, record)
        self._done = now

    def checkpoint(self, name: str, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:  # noqa: ARG002
        assert write is not None, "a single process leads"
        put(self._run / CHECKPOINTS_HERE, name, write, keep=self._config.checkpoint.keep)
        self._after(self._run)
