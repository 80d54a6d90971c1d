"""What XBM's memory costs a training step, and against pytorch-metric-learning, in one run.

    python benchmarks/xbm_step.py            ResNet-50, 64 images of 224 px, a memory of 55,000 x 128
    python benchmarks/xbm_step.py --short    ResNet-18, 32 images of 64 px, the same memory: seconds
    python benchmarks/xbm_step.py --no-network    the memory's term alone

`step` is a whole training step on decoded images (augmentation, network, both terms, gradients, Adam), with
the full memory and without one, in turns; the ratio is that of the medians, of wall time and of processor
time. The goal is 1.10 or less; with ResNet-50 the run fails where the processor time is above it. On a busy
machine threads wait for each other at every operation, and the many small ones of the memory's term look
slow: --threads 1 does not have that.

`term` is the memory's part of a step alone, from embeddings to their gradient: writing the batch into the
full memory, the contrastive loss of its pairs with all of it, gradients. The peer is CrossBatchMemory of
pytorch-metric-learning with the same loss on the same embeddings, summed over pairs as XBM's is. `agreement`
is the largest difference of a gradient from the peer's, as a share of its largest entry; above 1e-4 the run
fails, as it does where ours is not the faster. `watching` is what the drift and the ages add to a step.

How much a term costs depends on how many negatives are above the margin; `active` is their number for each
anchor. Embeddings are drawn around the centres of their classes, one class in 11,318 for each.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from book import arguments, claim, measuring, on_threads
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory
from pytorch_metric_learning.reducers import SumReducer
from timing import in_turns, shortest
from torch import Tensor
from workload import photographs_benchmark

from ray_retrieval.compute import uses_bf16
from ray_retrieval.cores import cores
from ray_retrieval.loop import Process, TrainConfig, Trainer
from ray_retrieval.methods.base import Batch
from ray_retrieval.methods.xbm import Xbm, XbmConfig

CLASSES = 11_318
EACH = 4
GOAL = 1.10


def embeddings_of(labels: Tensor, width: int, seed: int) -> Tensor:
    """Unit vectors float32 [n, width] about the centres of their classes, which lean to one side."""
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(0)) + 0.8
    noise = torch.randn(len(labels), width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(centres[labels] + noise, dim=1)


def labels_of(count: int, seed: int) -> Tensor:
    """int64 [n]: as many classes as there are groups of four, in P x K order."""
    classes = np.random.default_rng(seed).choice(CLASSES, -(-count // EACH), replace=count > EACH * CLASSES)
    return torch.from_numpy(np.repeat(classes, EACH)[:count])


def milliseconds(work: Callable[[], object], times: int) -> float:
    """The shortest of several runs, after one to warm up."""
    return 1e3 * shortest(work, times, warm_up=True).wall


class Ours:
    """The memory's part of a step of XBM, from embeddings to their gradient."""

    def __init__(self, capacity: int, width: int, batch: int) -> None:
        self.method = Xbm(
            XbmConfig(
                dimension=width,
                backbone={"name": "small", "weights": "none"},
                memory_size=capacity,
                warmup_steps=0,
                batch_weight=0.0,
            ),
            classes=CLASSES,
            pretrained=False,
        )
        self.method.start_training(photographs_benchmark(20).train, torch.device("cpu"))
        memory = self.method.memory
        assert memory is not None
        labels = labels_of(capacity, seed=1)
        memory.write(torch.arange(capacity), embeddings_of(labels, width, seed=2), labels, step=0)
        self.rows = torch.arange(batch)

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The memory's term of `Xbm.objective`, without that of the batch."""
        memory, batch = self.method.memory, Batch.whole(self.rows, labels)
        assert memory is not None
        slots = memory.write(batch.global_rows, embeddings, labels, step=1)
        return self.method._against(memory, batch, embeddings, slots)

    def watch(self, embeddings: Tensor, labels: Tensor) -> None:
        """What `Xbm.objective` observes."""
        memory = self.method.memory
        assert memory is not None
        self.method._observe_drift(memory, Batch.whole(self.rows, labels), embeddings.detach())
        memory.ages(1).sum()

    def active(self) -> float:
        pushing, anchors = self.method.observations()["active_negatives"]
        return float(pushing) / float(anchors)


def peer(capacity: int, width: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Likewise of pytorch-metric-learning, its gradient the same: Σ over pairs, divided by the anchors."""
    # The embeddings are unit vectors already: like ours, it need not divide by lengths.
    distance = DotProductSimilarity(normalize_embeddings=False)
    loss = ContrastiveLoss(pos_margin=1, neg_margin=0.5, distance=distance, reducer=SumReducer())
    memory = CrossBatchMemory(loss, width, memory_size=capacity)
    labels = labels_of(capacity, seed=1)
    memory.add_to_memory(embeddings_of(labels, width, seed=2), labels, capacity)
    return lambda embeddings, labels: memory(embeddings, labels) / len(labels)


def measure_term(capacity: int, width: int, batch: int, threads: list[int], times: int) -> bool:
    """Print the table of the term; whether gradients agree and ours is faster."""
    labels = labels_of(batch, seed=3)
    start = embeddings_of(labels, width, seed=4)
    ours, theirs = Ours(capacity, width, batch), peer(capacity, width)

    def gradient(term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        embeddings = start.clone().requires_grad_()
        term(embeddings, labels).backward()
        assert embeddings.grad is not None
        return embeddings.grad

    expected = gradient(theirs)
    agreement = float((gradient(ours) - expected).abs().max() / expected.abs().max())
    print(
        f"memory of {capacity:,} x {width}, batch of {batch}; active {ours.active():.0f} a row; "
        f"agreement {agreement:.1e}\n"
    )
    print(f"{'':14}{'threads':>8}{'ours ms':>10}{'watching':>10}{'peer ms':>10}{'ratio':>8}")
    faster = True
    for count in threads:
        torch.set_num_threads(count)
        mine = milliseconds(lambda: gradient(ours), times)
        watching = milliseconds(lambda: ours.watch(start, labels), times)
        other = milliseconds(lambda: gradient(theirs), max(3, times // 3))
        faster &= mine < other
        claim(
            f"XBM's memory term, {batch} x {capacity:,} x {width}, contrastive, {on_threads(count)}: its "
            "time over ours",
            peer="pytorch-metric-learning, CrossBatchMemory",
            ratio=other / mine,
            goal=">= 1",
            detail=f"{other:.1f} ms, {mine:.1f} ms; gradients equal to {agreement:.0e}",
            headline=True,
        )
        print(f"{'term':14}{count:8}{mine:10.1f}{watching:10.1f}{other:10.1f}{other / mine:8.1f}", flush=True)
    return faster and agreement <= 1e-4


def trainer(options: Any, capacity: int | None) -> Trainer:
    """One that has gone through a step, its memory, if any, full."""
    benchmark = photographs_benchmark(options.batch, classes=options.batch // EACH)
    torch.manual_seed(0)
    method = Xbm(
        XbmConfig(
            dimension=options.dimension,
            backbone={"name": options.backbone, "weights": "none"},
            image={"size": options.size},
            memory_size=capacity,
            memory_weight=0.0 if capacity is None else 1.0,
            warmup_steps=0,
            images_per_class=EACH,
        ),
        classes=CLASSES,
        pretrained=False,
    )
    config = TrainConfig(
        batch_size=options.batch,
        optimizer={"name": "adam", "lr": 1e-4},
        augmentation={"flip": True},
        precision=options.precision,
    )
    made = Trainer(method, benchmark, config, seed=0, process=Process(threads=options.threads))
    if method.memory is not None:
        labels = labels_of(capacity or 0, seed=1)
        vectors = embeddings_of(labels, options.dimension, seed=2)
        method.memory.write(torch.arange(len(labels)), vectors, labels, step=0)
    return made


def measure_step(options: Any) -> bool:
    """Print the times of whole steps with and without a memory, in turns; whether the goal is reached."""
    kinds = {"without": trainer(options, None), "with": trainer(options, options.memory)}
    rows = np.arange(options.batch)
    images = kinds["with"].train_images.batch(rows)
    steps = {name: partial(made._step, rows, images) for name, made in kinds.items()}
    medians = in_turns(steps, options.steps)
    bf16 = uses_bf16(options.precision, torch.device("cpu"))
    print(
        f"\n{options.backbone}, {options.batch} images of {options.size} px, "
        f"{'bf16' if bf16 else 'float32'}, {options.steps} steps each\n"
    )
    print(f"{'':24}{'threads':>8}{'wall s':>10}{'cpu s':>10}")
    for name, (wall, processor) in medians.items():
        print(f"{f'step {name} memory':24}{options.threads:8}{wall:10.3f}{processor:10.3f}")
    ratios = [one / other for one, other in zip(medians["with"], medians["without"], strict=True)]
    print(f"{'ratio':24}{'':8}{ratios[0]:10.3f}{ratios[1]:10.3f}")
    claim(
        f"a step of XBM, {options.backbone}, {options.batch} images of {options.size} px, with a memory of "
        f"{options.memory:,} x {options.dimension}: processor time over that without one",
        peer="the same step without a memory",
        ratio=ratios[1],
        goal=None if options.short else f"<= {GOAL}",
        detail=f"{ratios[0]:.2f} in wall time",
        headline=True,
    )
    return ratios[1] <= GOAL


def main() -> int:
    parser = arguments(__doc__, "a small network, few steps")
    parser.add_argument("--no-network", action="store_true", help="the term alone")
    parser.add_argument("--memory", type=int, default=55_000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--backbone")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int, default=5, help="of each kind, after one to warm up")
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto")
    parser.add_argument("--threads", type=int, default=cores(), help="of the steps")
    options = parser.parse_args()
    sizes = ("resnet18", 32, 64) if options.short else ("resnet50", 64, 224)
    for name, value in zip(("backbone", "batch", "size"), sizes, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    with measuring("XBM"):
        good = measure_term(
            options.memory,
            options.dimension,
            options.batch,
            sorted({1, cores()}),
            9 if options.short else 30,
        )
        if not options.no_network:
            reached = measure_step(options)
            good = good and (reached or options.short)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
