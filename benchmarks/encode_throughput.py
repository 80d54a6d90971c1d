"""The Ray Data pipeline against a bare forward pass on tensors in memory: images a second, in one run.

    python benchmarks/encode_throughput.py            2,048 images, ResNet-18 at 160 pixels
    python benchmarks/encode_throughput.py --short    512 images, once

The pipeline reads JPEGs of 256 × 256, decodes, resizes, computes codes and writes Parquet parts. The bare
pass has its uint8 tensors ready and does nothing but the network, in as many processes of as many threads as
the pipeline, which is the most that it could reach. Both are measured twice, in turn. The steady ratio counts
from the first finished part on; the start of the actors is printed beside it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from apart import at_once
from book import arguments, claim, measuring, on_threads
from workload import photographs

from ray_retrieval import model
from ray_retrieval.cluster import connect
from ray_retrieval.compute import keep_freed_memory, pick_device, uses_bf16
from ray_retrieval.cores import cores
from ray_retrieval.encode import EncodeConfig, EncodeJob, encode
from ray_retrieval.methods import build
from ray_retrieval.methods.greedyhash import GreedyHashConfig
from ray_retrieval.model import Encoder
from ray_retrieval.storage import Folder


def main() -> None:
    parser = arguments(__doc__, "fewer images")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--threads", type=int, default=4 if cores() >= 8 else 1, help="of an encoder (%(default)s)"
    )
    options = parser.parse_args()
    if options.short:
        options.images, options.rounds = 512, 1
    said = f"{options.backbone} at {options.size} px, {options.images} JPEGs of 256 × 256"
    with measuring(f"{said}, {layout(options)}"):
        measure(options)


def encoders(options: argparse.Namespace) -> int:
    """Processes, which together have all cores."""
    return max(1, cores() // int(options.threads))


def layout(options: argparse.Namespace) -> str:
    count = encoders(options)
    return f"{count} process{'es' * (count > 1)} of {on_threads(options.threads)}"


def measure(options: argparse.Namespace) -> None:
    table = photographs(options.images)
    bare, steady, whole = [], [], []
    with tempfile.TemporaryDirectory() as folder, connect():
        where = save_model(Folder(folder) / "model", options)
        config = EncodeConfig(
            workers=encoders(options), threads=options.threads, rows_per_part=64 if options.short else 256
        )
        with at_once(describing, (where.uri, options.threads, options.size), encoders(options)) as rate:
            seconds = 4 if options.short else 8
            for turn in range(options.rounds):
                rate(seconds)  # While Ray starts, or ends what it has started, others compute too.
                bare.append(rate(seconds))
                pace, out = Pace(encoders(options)), Folder(folder) / f"embeddings-{turn}"
                encode([EncodeJob(where, table, out)], config, advance=pace.advance)
                steady.append(pace.steady())
                whole.append(pace.whole())
    ratio = statistics.median(steady) / statistics.median(bare)
    print(f"bare forward       {np.median(bare):8.1f} images/s")
    print(f"pipeline, steady   {np.median(steady):8.1f} images/s   ratio {ratio:.3f}  (goal: 0.85 or more)")
    what = f"the Ray Data pipeline with JPEG decoding, {options.images:,} images, {options.backbone}"
    for part, paces, goal in (("steady", steady, ">= 0.85"), ("with the start of its actors", whole, None)):
        claim(
            f"{what} at {options.size} px, {part}: images a second over a bare forward pass",
            peer=f"the network alone on tensors in memory, {layout(options)}",
            ratio=statistics.median(paces) / statistics.median(bare),
            goal=goal,
            detail=f"{np.median(paces):.1f} and {np.median(bare):.1f} images/s",
            headline=True,
        )
    print(f"pipeline, whole    {np.median(whole):8.1f} images/s   with the start of its actors")


class Pace:
    """When how many images were done, by so many encoders."""

    def __init__(self, encoders: int) -> None:
        self.encoders = encoders
        self.started = time.monotonic()
        self.marks: list[tuple[float, int]] = []

    def advance(self, count: int, _remark: str) -> None:
        self.marks.append((time.monotonic(), count))

    def steady(self) -> float:
        # The first parts of all encoders come nearly together: start after those.
        first = self.encoders if len(self.marks) > 2 * self.encoders else 1
        images = sum(count for _, count in self.marks[first:])
        return images / (self.marks[-1][0] - self.marks[first - 1][0])

    def whole(self) -> float:
        return sum(count for _, count in self.marks) / (self.marks[-1][0] - self.started)


def describing(uri: str, threads: int, size: int) -> Callable[[], int]:
    """The work of one process: a batch of 64."""
    encoder = Encoder(uri, threads=threads)
    keep_freed_memory()  # As the pipeline's encoders do.
    images = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8)

    def work() -> int:
        encoder.describe(images)
        return len(images)

    return work


def save_model(where: Folder, options: argparse.Namespace) -> Folder:
    torch.manual_seed(0)
    config = GreedyHashConfig(
        backbone={"name": options.backbone, "weights": "none"}, image={"size": options.size}
    )
    model.save(
        where,
        config=config.model_dump(mode="json"),
        weights=build(config, classes=10).state_dict(),
        classes=10,
        class_names=None,
        precision="bf16" if uses_bf16("auto", pick_device()) else "float32",
        training={"epoch": 0},
        metrics={},
    )
    return where


if __name__ == "__main__":
    main()
