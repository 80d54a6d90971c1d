"""What the leading process writes into the run's folder while a model trains."""

from typing import Any

import numpy as np
import torch

from ray_retrieval.data.mixed import groups_of
from ray_retrieval.data.source import ImageSource
from ray_retrieval.loop.config import TrainConfig
from ray_retrieval.loop.describing import Describer
from ray_retrieval.loop.profiling import Recording
from ray_retrieval.loop.steplog import StepLog
from ray_retrieval.loop.tensorboard import Board
from ray_retrieval.methods.base import Method
from ray_retrieval.storage import Folder

_SHOWN = 4
"""Validation queries of which the method's pictures are kept."""


class Monitor:
    """The log of the steps, events for TensorBoard and the profiler's recording.

    Args:
        run: the run's folder.
        config: what is asked for.
        step: optimiser steps finished.
        device: of the training.

    Raises:
        RecipeError: if events are asked for, and the folder is not local.
    """

    def __init__(self, run: Folder, config: TrainConfig, step: int, device: torch.device) -> None:
        self._every = config.log.histograms_every
        self._log = StepLog(run, step)
        self._board = Board(run, step) if config.tensorboard else None
        self._recording = Recording(config.profile, run, device) if config.profile else None

    def stepped(self, method: Method, step: int) -> None:
        """Called after every step, while the parameters still have its gradients."""
        if self._recording is not None:
            self._recording.step()
        if self._board is not None and step % self._every == 0:
            self._board.histograms(method, step)

    def line(self, record: dict[str, Any]) -> None:
        """Add a line to the log of the steps."""
        self._log.add(record)
        if self._board is not None:
            self._board.line(record)

    def show(self, method: Method, queries: ImageSource, describer: Describer, step: int) -> None:
        """Keep the method's pictures of a few validation queries, or of what they are taken from."""
        if self._board is None:
            return
        count = min(_SHOWN, len(queries.table))
        rows = np.linspace(0, len(queries.table) - 1, count).round().astype(np.int64)
        method.eval()
        with describer.context():
            for numbers, images in groups_of(queries.batch(rows).to(describer.device)):
                self._board.pictures(method.pictures(images), step, numbers.tolist())

    def flush(self) -> None:
        """Bring all files up to date."""
        self._log.write()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Write what is left."""
        self._log.write()
        if self._board is not None:
            self._board.close()
        if self._recording is not None:
            self._recording.close()
