"""Training in this process, with checkpoints in the run's folder: for a trial that one processor trains.

Ray Train takes some 15 seconds to start; a search has many short trainings.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.history import History
from ray_retrieval.loop import STATE, Outcome, Process, TrainConfig, Trainer, read_outcome
from ray_retrieval.methods import AnyMethodConfig
from ray_retrieval.storage import Folder
from ray_retrieval.train import save_models, starting

_CHECKPOINTS = "checkpoints-here"
"""Apart from those of Ray Train, which has files of its own among them."""


def train_here(
    method: AnyMethodConfig,
    config: TrainConfig,
    benchmark: Benchmark,
    *,
    seed: int,
    run: Folder,
    provenance: dict[str, Any],
    threads: int,
    after_checkpoint: Callable[[Folder], None] = lambda _run: None,
    **_shown: Any,
) -> Outcome:
    """Train as `ray_retrieval.train.train` does with one worker, bit for bit, but in this process.

    Args:
        method: what to train.
        config: how; `workers` is 1.
        benchmark: training and validation images.
        seed: determines every random draw.
        run: the run's folder; it goes on from the newest checkpoint there.
        provenance: kept in `model.json`.
        threads: of the processor.
        after_checkpoint: called with the run's folder after every checkpoint.

    Returns:
        The best and the last model, which are also written to `model/` and its like.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = starting(method, config, benchmark)[0]
    with _Checkpoints(run, keep=config.checkpoint.keep, after=after_checkpoint) as checkpoints:
        trainer = Trainer(built, benchmark, config, seed=seed, process=Process(threads=threads))
        trainer.fit(checkpoints, run)
        newest = checkpoints.latest()
        assert newest is not None, "the loop always ends with a checkpoint"
        outcome = read_outcome(newest)
    save_models(outcome, method, config, benchmark, run, provenance)
    (run / _CHECKPOINTS).remove()
    return outcome


def outcome_here(run: Folder) -> Outcome | None:
    """What the newest checkpoint of a training in its own process holds; None before the first."""
    with _Checkpoints(run, keep=1) as checkpoints:
        newest = checkpoints.latest()
        return None if newest is None else read_outcome(newest)


class _Checkpoints:
    """Checkpoints in the run's folder, each whole once its last file is there, `state.json`."""

    def __init__(
        self, run: Folder, *, keep: int, after: Callable[[Folder], None] = lambda _run: None
    ) -> None:
        self._run, self._folder, self._keep, self._after = run, run / _CHECKPOINTS, keep, after
        self._history = History(run)
        self._fetched = tempfile.TemporaryDirectory(prefix="checkpoint-")

    def __enter__(self) -> "_Checkpoints":
        return self

    def __exit__(self, *_reason: object) -> None:
        self._fetched.cleanup()

    def latest(self) -> Path | None:
        whole = [name for name in self._folder.names() if (self._folder / name).exists(STATE)]
        if not whole:
            return None
        newest = self._folder / whole[-1]
        local = Path(self._fetched.name) / whole[-1]
        local.mkdir(exist_ok=True)
        for name in newest.names():
            with newest.reading(name) as source, (local / name).open("wb") as target:
                shutil.copyfileobj(source, target)
        self._history.restart(json.loads((local / STATE).read_text())["history"])
        return local

    def epoch_done(self, record: dict[str, Any]) -> None:
        self._history.add(record)

    def checkpoint(self, name: str, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:  # noqa: ARG002
        assert write is not None, "a single process leads"
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as made:
            write(Path(made))
            files = sorted(Path(made).iterdir(), key=lambda file: file.name == STATE)
            for file in files:
                with file.open("rb") as source, (self._folder / name).writing(file.name) as target:
                    shutil.copyfileobj(source, target)
        for old in self._folder.names()[: -self._keep]:
            (self._folder / old).remove(STATE)  # first: what is half deleted is no checkpoint
            (self._folder / old).remove()
        self._after(self._run)
