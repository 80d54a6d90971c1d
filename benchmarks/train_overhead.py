"""Ray Train with one worker against the plain loop: images a second while training, in one run.

    python benchmarks/train_overhead.py            768 images, four epochs, twice
    python benchmarks/train_overhead.py --short    256 images of 64 px, three epochs, once

Both train the same method on the same images with the same loop; the plain one calls it in this process,
the other through Ray Train, with checkpoints. The two take turns; the first ratio is that of their medians
over all epochs but the first of each (which decodes the images), the second that of the whole times, which
have what Ray Train adds outside of the steps as well: starting workers, reports and checkpoints. The goal of
the first, 0.97 or more, is one of the long form: epochs of four steps cannot tell so little.
"""

import statistics
import tempfile
import time
from argparse import Namespace

import numpy as np
import torch
from book import arguments, claim, measuring
from workload import photographs_benchmark

from ray_retrieval.cluster import connect
from ray_retrieval.cores import cores
from ray_retrieval.loop import Process, TrainConfig, Trainer
from ray_retrieval.methods import build
from ray_retrieval.methods.greedyhash import GreedyHashConfig
from ray_retrieval.storage import Folder
from ray_retrieval.train import read_history, train

RESTING_S = 10  # in which Ray has started, or has ended what it started: the plain loop is to be alone


class Nowhere:
    """A reporter that keeps nothing."""

    def latest(self):
        return None

    def epoch_done(self, record):
        pass

    def checkpoint(self, name, metrics, write):
        pass


def main() -> None:
    parser = arguments(__doc__, "fewer and smaller images, and fewer epochs")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=96)
    options = parser.parse_args()
    if options.short:
        options.epochs, options.images, options.rounds, options.size = 3, 256, 1, 64
    with measuring(f"{options.backbone} at {options.size} px, {options.images} images"):
        measure(options)


def measure(options: Namespace) -> None:
    benchmark = photographs_benchmark(options.images)
    method = GreedyHashConfig(
        backbone={"name": options.backbone, "weights": "none"}, image={"size": options.size}
    )
    config = TrainConfig(epochs=options.epochs, batch_size=64, checkpoint={"min_seconds": 0})
    plain: list[float] = []
    through_ray: list[float] = []
    started_in: list[float] = []
    alone: list[float] = []
    whole: list[float] = []
    with connect():
        for turn in range(options.rounds):
            time.sleep(RESTING_S)
            torch.manual_seed(0)
            begun = time.monotonic()
            trainer = Trainer(
                build(method, classes=benchmark.train.classes),
                benchmark,
                config,
                seed=turn,
                process=Process(threads=cores()),
            )
            plain += [record["images_per_second"] for record in trainer.fit(Nowhere())[1:]]
            alone.append(time.monotonic() - begun)
            with tempfile.TemporaryDirectory() as folder:
                begun = time.monotonic()
                train(method, config, benchmark, seed=turn, run=Folder(folder), provenance={})
                took = time.monotonic() - begun
                history = read_history(Folder(folder))
            whole.append(took)
            started_in.append(took - sum(record["seconds"] for record in history))
            through_ray += [record["images_per_second"] for record in history[1:]]
    ratio = statistics.median(through_ray) / statistics.median(plain)
    print(f"plain loop         {np.median(plain):8.1f} images/s  ({min(plain):.1f} to {max(plain):.1f})")
    low, high = min(through_ray), max(through_ray)
    print(f"Ray Train          {np.median(through_ray):8.1f} images/s  ({low:.1f} to {high:.1f})")
    print(f"ratio              {ratio:8.3f}")
    claim(
        f"Ray Train with one worker, {options.backbone} at {options.size} px: images a second over the plain "
        "loop's",
        peer="the same loop in this process",
        ratio=ratio,
        goal=None if options.short else ">= 0.97",
        detail=f"{np.median(through_ray):.1f} and {np.median(plain):.1f} images/s",
        headline=True,
    )
    claim(
        f"Ray Train with one worker, {options.epochs} epochs of {options.images} images: whole time over "
        "that of the plain loop, with start, checkpoints and validation",
        peer="the same loop in this process, without checkpoints",
        ratio=statistics.median(whole) / statistics.median(alone),
        detail=f"{np.median(whole):.1f} and {np.median(alone):.1f} s",
        headline=True,
    )
    print(f"whole              {np.median(alone):8.1f} s plain, {np.median(whole):.1f} s through Ray Train")
    print(f"outside of epochs  {np.median(started_in):8.1f} s of start, checkpoints and validation")


if __name__ == "__main__":
    main()
