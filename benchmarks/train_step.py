"""A training step of each method against a plain PyTorch loop, in turns in one run.

    python benchmarks/train_step.py                        ResNet-50, 32 images of 224 px: minutes a method
    python benchmarks/train_step.py --short                ResNet-18, 16 images of 64 px
    python benchmarks/train_step.py --methods xbm gem

`ours` is the step of our loop: augmentation (none here), learning rate, network, loss, gradients, optimiser,
sums for the log. `plain` is what is written in `plain_steps.py`: the paper's loss behind the same layers with
the same weights, memory format, precision and optimiser. Both get the same decoded images. Of XBM there is
`trainer` too, the `MetricLossOnly` trainer of pytorch-metric-learning with its CrossBatchMemory on the same
batch, given at once instead of by its data loader.

`images/s` is by the median of the wall times. `ratio` is a peer's time over ours, `cpu` that of processor
time, which other work on the machine changes less. `agreement` is the relative difference of the two losses
of the first step; above 0.01 the run fails, for then they are not the same work. Goal: 0.95 or more, the
loop takes no more than a twentieth.
"""

import itertools
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from book import arguments, claim, measuring
from plain_steps import PLAIN, Loop, Plain
from timing import in_turns
from torch import Tensor
from workload import photographs_benchmark
from xbm_step import embeddings_of, labels_of

from ray_retrieval.compute import Precision, autocast, pick_device, uses_bf16
from ray_retrieval.config import Config
from ray_retrieval.cores import cores
from ray_retrieval.loop import Process, TrainConfig, Trainer
from ray_retrieval.methods import METHODS, build

GOAL = ">= 0.95"
AGREEMENT = 0.01
LR = 1e-4
EACH, TUPLE = 4, 7
"""Images of a class in a batch; of a tuple of GeM."""
_SETTLING = 2
"""Rounds that are timed in vain: the heap, which all share, takes some steps to grow to its size."""


def config_of(name: str, backbone: str, size: int, memory: int) -> Config:
    """A method's published settings but for the network and the size of images."""
    preprocessing = {"size": size, "resize": "squash"}
    options: dict[str, Any] = {"backbone": {"name": backbone, "weights": "none"}, "image": preprocessing}
    if name == "xbm":
        options |= {"memory_size": memory, "warmup_steps": 0, "images_per_class": EACH}
    if name == "delf":
        options |= {"crop": preprocessing, "image": {"size": size, "resize": "long_side"}}
    return METHODS[name][0].model_validate(options)


def trainer_of(name: str, options: Namespace) -> Trainer:
    """Ours, ready for a step; a memory is full."""
    size = options.batch - options.batch % (TUPLE if name == "gem" else EACH)
    # Enough for validation, and for GeM, whose tuples are of so many classes.
    benchmark = photographs_benchmark(max(size, 3 * TUPLE), classes=max(TUPLE, size // EACH))
    torch.manual_seed(0)
    config = config_of(name, options.backbone, options.size, options.memory)
    training = TrainConfig(
        batch_size=size,
        optimizer={"name": "sgd", "lr": LR},
        precision=options.precision,
    )
    device = pick_device()
    made = Trainer(
        build(config, classes=benchmark.train.classes),
        benchmark,
        training,
        seed=0,
        process=Process(threads=options.threads, device=device),
    )
    if name == "xbm":
        labels = labels_of(options.memory, seed=1)
        vectors = embeddings_of(labels, made.method.config.dimension, seed=2)
        made.method.memory.write(torch.arange(len(labels)), vectors.to(device), labels.to(device), step=0)
    made._gradients.network.train()
    return made


def agreement(ours: Trainer, plain: Plain, rows: Any, images: Tensor, precision: Precision) -> float:
    """The relative difference of the two losses, without a step."""
    batch, device = ours._batch(rows), ours.process.device
    images = images.to(device)
    with torch.no_grad():
        with autocast(precision, device):
            outputs = ours.method(images)
        mine = float(sum(ours.method.objective(outputs, batch, ours._clock()).values()))
        other = float(plain.loss(images, batch.labels, precision))
    return abs(mine - other) / max(abs(mine), 1e-12)


def library_trainer(plain: Any, images: Tensor, labels: Tensor, precision: Precision) -> Callable[[], object]:
    """A step of pytorch-metric-learning's trainer with the network and the memory of the plain loop."""
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory
    from pytorch_metric_learning.reducers import SumReducer
    from pytorch_metric_learning.trainers import MetricLossOnly

    class Trunk(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = plain

        def forward(self, given: Tensor) -> Tensor:
            with autocast(precision, given.device):
                return self.network.embed(given)

    distance = DotProductSimilarity(normalize_embeddings=False)
    loss = ContrastiveLoss(pos_margin=1, neg_margin=0.5, distance=distance, reducer=SumReducer())
    width, size = plain.memory.shape[1], len(plain.memory)
    memory = CrossBatchMemory(loss, width, memory_size=size)
    memory.add_to_memory(plain.memory, plain.memory_labels, size)
    trunk, device = Trunk(), plain.memory.device
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    trainer = MetricLossOnly(
        models={"trunk": trunk, "embedder": torch.nn.Identity()},
        optimizers={"trunk_optimizer": optimizer},
        batch_size=len(images),
        loss_funcs={"metric_loss": memory},
        dataset=[*range(len(images))],
        data_device=device,
    )
    trainer.set_to_train()
    trainer.dataloader = trainer.dataloader_iter = itertools.repeat((images, labels))
    return trainer.forward_and_backward


def measure(name: str, options: Namespace) -> bool:
    """Print the lines of a method; whether both losses are the same."""
    ours = trainer_of(name, options)
    precision = options.precision
    plain = PLAIN[name](ours.method).train()
    rows = np.arange(ours.config.batch_size)
    images, labels = ours.train_images.batch(rows), ours.labels[torch.from_numpy(rows)]
    assert isinstance(images, Tensor)
    same = agreement(ours, plain, rows, images, precision)
    works = {
        "ours": partial(ours._step, rows, images),
        "plain": partial(Loop(plain, precision, LR).step, images, labels),
    }
    if name == "xbm":
        works["trainer"] = library_trainer(PLAIN[name](ours.method), images, labels, precision)
    steps = {who: partial(_finished, work) for who, work in works.items()}
    in_turns(steps, _SETTLING)
    taken = in_turns(steps, options.rounds)
    for who, (wall, processor) in taken.items():
        ratios = wall / taken["ours"].wall, processor / taken["ours"].processor
        shown = f"{ratios[0]:8.2f}{ratios[1]:8.2f}" if who != "ours" else f"{'':16}{same:12.0e}"
        print(f"{name:12}{who:10}{1e3 * wall:10.1f}{len(rows) / wall:10.1f}{shown}", flush=True)
        if who != "ours":
            claim(
                f"a training step of {name}, {options.backbone}, {len(rows)} images of {options.size} px: "
                "its time over ours",
                peer="a plain PyTorch loop" if who == "plain" else "pytorch-metric-learning, MetricLossOnly",
                ratio=ratios[0],
                goal=None if options.short or who != "plain" else GOAL,
                detail=f"{len(rows) / wall:.1f} and {len(rows) / taken['ours'].wall:.1f} images/s; "
                f"{ratios[1]:.2f} in processor time",
                headline=True,
            )
    for source in (ours.train_images, ours.queries, ours.database):
        source.close()
    return same <= AGREEMENT


def _finished(work: Callable[[], object]) -> None:
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> int:
    parser = arguments(__doc__, "a small network, few steps")
    parser.add_argument("--methods", nargs="+", choices=PLAIN, default=list(PLAIN))
    parser.add_argument("--backbone", help="default resnet50; resnet18 with --short")
    parser.add_argument("--batch", type=int, help="images; default 32, or 16")
    parser.add_argument("--size", type=int, help="pixels of a side; default 224, or 64")
    parser.add_argument("--rounds", type=int, help="steps of each, after four to warm up; default 5, or 9")
    parser.add_argument("--memory", type=int, default=55_000, help="of XBM")
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto")
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    sizes = ("resnet18", 16, 64, 9) if options.short else ("resnet50", 32, 224, 5)
    for name, value in zip(("backbone", "batch", "size", "rounds"), sizes, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    kind = "bf16" if uses_bf16(options.precision, pick_device()) else "float32"
    said = (
        f"{options.backbone}, {options.batch} images of {options.size} px, {kind}, {options.threads} threads"
    )
    good = True
    with measuring(said):
        heads = "".join(f"{head:>{width}}" for head, width in (("ms", 10), ("images/s", 10), ("ratio", 8)))
        print(f"{'':22}{heads}{'cpu':>8}{'agreement':>12}")
        for name in options.methods:
            good &= measure(name, options)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
