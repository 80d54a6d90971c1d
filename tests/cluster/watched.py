"""Work that notes who does it and when, and takes its time: to disturb it in the middle and see what is lost.

Ray's processes import this module when a method or a table of it reaches them; `nodes.py` sees to the path.
"""

import json
import os
import time
from pathlib import Path

import ray
from samples import coloured_benchmark

from ray_retrieval.data.table import ImageTable
from ray_retrieval.loop import TrainConfig

EPOCH = 9
"""Steps of an epoch of `training`."""
INTERVAL = 3
"""Steps between two of its checkpoints."""


def note(log, **what):
    """Add a line that says what is done, and by whom."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
    line = json.dumps({**what, "node": node, "process": os.getpid()}) + "\n"
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(file, line.encode())  # at once, so that lines of several processes stay apart
    finally:
        os.close(file)


def read(log):
    """The lines that have been noted, the oldest first."""
    return [json.loads(line) for line in Path(log).read_text().splitlines()] if Path(log).exists() else []


def training(log, *, workers, epochs, seconds=0.0):
    """A method, how to train it, and images to do so: all the same but for the length and the workers."""
    from watched_method import WatchedConfig

    method = WatchedConfig(
        log=str(log),
        seconds=seconds,
        dimension=16,
        backbone={"name": "small", "weights": "none"},
        image={"size": 16},
        memory_size=60,
        warmup_steps=2,
    )
    config = TrainConfig.model_validate(
        {
            "epochs": epochs,
            "workers": workers,
            "batch_size": 24,
            "precision": "float32",
            "threads": 1,
            "optimizer": {"lr": 0.01},
            "augmentation": {"pad": 2, "flip": True},
            "checkpoint": {"min_seconds": 0, "every_steps": INTERVAL},
            "log": {"every": 1},
            "select": "last",
        }
    )
    return method, config, coloured_benchmark(24 * EPOCH, classes=6)


class WatchedTable(ImageTable):
    """Images whose reading is noted, and takes its time."""

    @staticmethod
    def over(table, log, seconds):
        """The images of another table."""
        made = WatchedTable.__new__(WatchedTable)
        made.__dict__.update(table.__dict__, log=str(log), seconds=seconds)
        return made

    def __reduce__(self):
        restore, arguments = super().__reduce__()
        return _restored, (restore, arguments, self.log, self.seconds)

    def take(self, rows, *, name=None):
        return WatchedTable.over(super().take(rows, name=name), self.log, self.seconds)

    def image_bytes(self, row, *limit):
        note(self.log, image=self.ids[row])
        time.sleep(self.seconds)
        return super().image_bytes(row, *limit)


def _restored(restore, arguments, log, seconds):
    return WatchedTable.over(restore(*arguments), log, seconds)
