"""The training loop: plain PyTorch, on one process or on several under torch.distributed.

Exact by construction. The plan of batches, the augmentation, the learning rate and the seeds of every step
are pure functions of (seed, epoch, step); each worker takes its slice of the global batch; losses are scaled
so that averaged gradients are those of the global batch. So one, two and four workers train alike, and a run
that was killed and started again ends where an undisturbed one does.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from pydantic import ByteSize, Field, model_validator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ray_retrieval.compute import Precision, autocast, place, uses_bf16
from ray_retrieval.config import Config
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.source import ImageSource
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Augmentation, Preprocessing, apply, draw
from ray_retrieval.descriptors import (
    Codes,
    DescriptorKind,
    Descriptors,
    Form,
    Vectors,
    concatenate,
)
from ray_retrieval.errors import RecipeError
from ray_retrieval.layers.batch_norm import synchronise_batch_norm
from ray_retrieval.layers.dropout import GlobalDropout, synchronise_dropout
from ray_retrieval.methods.base import Batch, Clock, Method, Rows
from ray_retrieval.metrics import retrieval
from ray_retrieval.metrics.hamming import mean_average_precision
from ray_retrieval.optim import (
    OptimizerConfig,
    ScheduleConfig,
    StepSchedule,
    build_optimizer,
    set_learning_rate,
)

_VALIDATED = {
    DescriptorKind.CODES: ("map",),
    DescriptorKind.VECTORS: ("map", "map@r", "recall@1"),
}
"""What is measured on validation queries, by what the method makes."""

LAST, BEST, OPTIMIZER, STATE = "last.safetensors", "best.safetensors", "optimizer.pt", "state.json"


class ValidationConfig(Config):
    """How the model is watched while it trains; test queries are never used for it."""

    every: int = Field(default=1, ge=1)
    """Epochs between two measurements; the last epoch is always measured."""
    k: int | None = Field(default=None, ge=1)
    """Cut-off of the MAP; unset: the benchmark's own."""


class CheckpointConfig(Config):
    """What a killed run can fall back on."""

    every_epochs: int = Field(default=1, ge=1)
    """Epochs between two checkpoints."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints inside an epoch, for long epochs."""
    min_seconds: float = Field(default=10.0, ge=0)
    """At least so long between two checkpoints, but for the last one."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest to keep; each holds the best model so far as well."""


class TrainConfig(Config):
    """How a method is trained."""

    epochs: int = Field(default=50, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=32, ge=2)
    """Images an optimiser step, over all workers."""
    accumulate: int = Field(default=1, ge=1)
    """Parts in which a worker computes its share of a batch, to save memory; the gradient stays the same
    but for batch normalisation, which sees one part at a time."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = StepSchedule(every=30)
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient; unset: not clipped."""
    augmentation: Augmentation = Augmentation()
    """Random changes to training images, applied to batches."""
    precision: Precision = "auto"
    """`bf16`, `float32`, or `auto`: bfloat16 where the hardware has instructions for it."""
    select: Literal["best", "last"] = "best"
    """Which model the run goes on with: the best on validation queries, or that of the last epoch."""
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cache_memory: ByteSize = Field(default=ByteSize(2 << 30), validate_default=True)
    """Memory for decoded images, for each worker (`2GiB`); what does not fit is decoded in every epoch."""
    workers: int = Field(default=1, ge=1)
    """Processes that train together; with GPUs one each."""
    max_failures: int = Field(default=3, ge=0)
    """How often lost workers are replaced before the run gives up."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.batch_size < 2 * self.workers:
            raise ValueError(
                f"'batch_size' is 2 or more for each of {self.workers} workers, got {self.batch_size}"
            )
        return self


@dataclass(frozen=True)
class Process:
    """One of the processes that train together."""

    rank: int = 0
    world: int = 1
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        return self.rank == 0


class Reporter(Protocol):
    """Where checkpoints come from and go to; the loop knows nothing else of what runs it."""

    def latest(self) -> Path | None:
        """The folder of the newest checkpoint, or None in a fresh run."""

    def epoch_done(self, record: dict[str, Any]) -> None:
        """Called on the leading process after every epoch."""

    def checkpoint(self, name: str, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        """Called on every process at the same steps; `write` fills a folder and is None but on the leader."""


@dataclass
class _Progress:
    """What a checkpoint says beside the tensors."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best_value: float | None = None
    best_epoch: int = 0
    precision: Literal["bf16", "float32"] = "float32"
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """One process's part in training a method.

    Args:
        method: with its starting weights, the same on every process.
        benchmark: training, validation-query and validation-database images.
        config: how to train.
        seed: determines every random draw.
        process: this process among its peers; torch.distributed is initialised when there are several.

    Raises:
        RecipeError: if there are fewer training images a step than workers, or a batch that the loss pairs
            images of is to be computed in parts.
    """

    def __init__(
        self, method: Method, benchmark: Benchmark, config: TrainConfig, *, seed: int, process: Process
    ) -> None:
        torch.set_num_threads(process.threads)
        self.config, self.seed, self.process, self.benchmark = config, seed, process, benchmark
        if config.accumulate > 1 and method.whole_batches:
            raise RecipeError(
                f"{type(method).__name__} pairs images across the whole batch",
                where="train.accumulate",
                mend="set it to 1",
            )
        self.method = method
        bf16 = uses_bf16(config.precision, process.device)
        self.progress = _Progress(precision="bf16" if bf16 else "float32")
        plan = self._plan(0)
        smallest = min(len(batch) for batch in plan)
        if smallest < process.world:
            raise RecipeError(
                f"{smallest} training images a step for {process.world} workers",
                where="train.workers",
                mend=f"set it to {smallest} or fewer",
            )
        self.steps_per_epoch = len(plan)
        place(method, process.device)
        self._dropout: list[GlobalDropout] = []
        if process.world > 1:
            synchronise_batch_norm(self.method)
            self._dropout = synchronise_dropout(self.method)
        self.wrapped = self._wrap()
        self.optimizer = build_optimizer(config.optimizer, method)
        # Where crops are cut at random, training images are prepared whole.
        whole = config.augmentation.source(method.preprocessing)
        self.train_images, self.queries, self.database = _sources(
            [
                (benchmark.train, whole),
                (benchmark.validation_queries, method.preprocessing),
                (benchmark.validation_database, method.preprocessing),
            ],
            memory_bytes=int(config.cache_memory),
            threads=process.threads,
        )
        self._side = whole.size
        self.labels = torch.tensor(benchmark.train.labels)
        if self.labels.ndim == 2:
            self.labels = self.labels.float()
        method.start_training(benchmark.train, process.device)
        self._terms: dict[str, Tensor] = {}
        self._rate = 0.0
        self.best: dict[str, Tensor] | None = None
        if process.device.type == "cuda":
            # Some of cuDNN's gradients add in any order: a resumed run would not end like an undisturbed one.
            torch.backends.cudnn.deterministic = True

    def fit(self, reporter: Reporter) -> list[dict[str, Any]]:
        """Train to the end, from the newest checkpoint where there is one.

        Returns:
            One record an epoch: loss, its terms, learning rate, seconds, images a second, validation.
        """
        latest = reporter.latest()
        if latest is not None:
            self._restore(latest)
        try:
            self._train(reporter)
        finally:
            for source in (self.train_images, self.queries, self.database):
                source.close()
        return self.progress.history

    def _train(self, reporter: Reporter) -> None:
        saved_at = time.monotonic()
        while self.progress.epoch < self.config.epochs:
            started, images = time.monotonic(), 0
            plan = self._plan(self.progress.epoch)
            for batch, loaded in self._batches(plan[self.progress.batch :]):
                self._step(batch, loaded)
                images += len(batch)
                every = self.config.checkpoint.every_steps
                if every and self.progress.step % every == 0 and self.progress.batch < len(plan):
                    saved_at = self._checkpoint(reporter, saved_at)
            planned = sum(len(batch) for batch in plan)
            self._finish_epoch(images, time.monotonic() - started, planned)
            if self.process.leads:
                reporter.epoch_done(self.progress.history[-1])
            if self.progress.epoch % self.config.checkpoint.every_epochs == 0 or self._finished:
                saved_at = self._checkpoint(reporter, saved_at, always=self._finished)

    @property
    def _finished(self) -> bool:
        return self.progress.epoch == self.config.epochs

    def _wrap(self) -> Method | DistributedDataParallel:
        if self.process.world == 1:
            return self.method
        devices = [self.process.device] if self.process.device.type == "cuda" else None
        return DistributedDataParallel(self.method, device_ids=devices)

    def _clock(self) -> Clock:
        return Clock(
            self.seed,
            self.progress.epoch,
            self.progress.step,
            self.progress.samples,
            self.config.epochs * self.steps_per_epoch,
        )

    def _plan(self, epoch: int) -> list[Rows]:
        clock = Clock(self.seed, epoch, self.progress.step, self.progress.samples)
        return self.method.plan(self.benchmark.train, self.config.batch_size, clock)

    def _batches(self, plan: list[Rows]) -> Iterator[tuple[Rows, Tensor]]:
        """Global batches with the decoded images of this process's share."""
        shares = (self._share(batch) for batch in plan)
        return zip(plan, self.train_images.stream(shares), strict=True)

    def _share(self, rows: Rows) -> Rows:
        return np.array_split(rows, self.process.world)[self.process.rank]

    def _step(self, rows: Rows, images: Tensor) -> None:
        """One optimiser step on a global batch."""
        clock, config = self._clock(), self.config
        images = self._augment(images.to(self.process.device, non_blocking=True), len(rows), clock)
        rate = set_learning_rate(self.optimizer, config.optimizer, config.schedule, clock, config.batch_size)
        # Dropout: the same after a restart, and on every process, which takes its rows of the global mask.
        torch.manual_seed(_mix(self.seed, clock.step, 0))
        self.wrapped.train()
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._batch(rows)
        # The same number on every worker, or batch normalisation waits for a part that never comes.
        count = min(config.accumulate, len(rows) // self.process.world)
        parts = np.array_split(np.arange(len(batch.rows)), count)
        for number, part in enumerate(parts):
            # Gradients travel between the workers once a step, with the last part.
            waits = self.process.world > 1 and number < len(parts) - 1
            with self.wrapped.no_sync() if waits else nullcontext():  # type: ignore[operator]
                self._backward(batch.part(part), images[part[0] : part[-1] + 1], clock)
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.method.parameters(), config.clip_norm)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.batch += 1
        self.progress.samples += len(rows)
        self._rate = rate

    def _batch(self, rows: Rows) -> Batch:
        """This process's share of a global batch."""
        everyone = torch.from_numpy(rows)
        labels = self.labels[everyone].to(self.process.device)
        everyone = everyone.to(self.process.device)
        mine = self._share(np.arange(len(rows)))
        start, stop = int(mine[0]), int(mine[-1]) + 1
        return Batch(everyone[start:stop], labels[start:stop], everyone, labels, start, self.process.world)

    def _backward(self, batch: Batch, images: Tensor, clock: Clock) -> None:
        for layer in self._dropout:
            layer.start, layer.total = batch.start, batch.global_size
        with autocast(self.progress.precision, self.process.device):
            outputs = self.wrapped(images)
        terms = self.method.objective(outputs, batch, clock)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        for name, term in terms.items():
            weighted = term.detach().double() * batch.global_size
            self._terms[name] = self._terms[name] + weighted if name in self._terms else weighted

    def _augment(self, images: Tensor, count: int, clock: Clock) -> Tensor:
        """Augment this process's share with its part of what is drawn for the whole global batch."""
        generator = torch.Generator().manual_seed(_mix(self.seed, clock.step, -1))
        draws = draw(self.config.augmentation, count, generator, self._side, self.method.preprocessing.size)
        mine = self._share(np.arange(count))
        return apply(images, draws.take(slice(int(mine[0]), int(mine[-1]) + 1)))

    def _finish_epoch(self, images: int, seconds: float, planned: int) -> None:
        """Record an epoch of `planned` images, of which this process has just seen `images`."""
        progress = self.progress
        self._collect_terms()
        progress.epoch, progress.batch = progress.epoch + 1, 0
        terms = {name: total / planned for name, total in progress.sums.items()}
        if not math.isfinite(sum(terms.values())):
            raise RecipeError(
                f"the loss is not finite in epoch {progress.epoch}",
                where="train.optimizer.lr",
                mend="lower it, or set train.clip_norm",
            )
        record: dict[str, Any] = {
            "epoch": progress.epoch,
            "step": progress.step,
            "lr": self._rate,
            "loss": sum(terms.values()),
            "terms": terms,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / max(seconds, 1e-9), 1),
        }
        due = progress.epoch % self.config.validation.every == 0 or self._finished
        if due and len(self.benchmark.validation_queries):
            measured = self.validate()
            record["validation"] = measured
            value = measured["map"]
            if progress.best_value is None or value > progress.best_value:
                progress.best_value, progress.best_epoch = value, progress.epoch
                if self.process.leads:
                    self.best = _to_cpu(self.method.state_dict())
        progress.sums = {}
        progress.history.append(record)

    def validate(self) -> dict[str, float]:
        """How the validation queries find their like in the validation database; `map` is always measured.

        Codes: MAP, ties by their expectation. Vectors: MAP of the full ranking, MAP@R and recall@1, a query
        itself not counted.
        """
        self.method.eval()
        queries = self.describe(self.queries)
        database = queries if self.database is self.queries else self.describe(self.database)
        measured = dict.fromkeys(_VALIDATED[self.method.config.form.kind], 0.0)
        if self.process.leads:
            measured = self._measure(queries, database)
        return {name: self._from_leader(value) for name, value in measured.items()}

    def _measure(self, queries: Descriptors, database: Descriptors) -> dict[str, float]:
        labels, database_labels = self.queries.table.labels, self.database.table.labels
        if isinstance(queries, Codes) and isinstance(database, Codes):
            metric = mean_average_precision(
                queries.data,
                labels,
                database.data,
                database_labels,
                k=self.config.validation.k or self.benchmark.k,
                ties="expected",
                bits=queries.bits,
            )
            return {"map": metric.value}
        assert isinstance(queries, Vectors)
        assert isinstance(database, Vectors)
        found = retrieval.evaluate(
            queries.data,
            labels,
            database.data,
            database_labels,
            ks=(1,),
            query_ids=self.queries.table.ids,
            database_ids=self.database.table.ids,
            threads=self.process.threads,
        )
        return {name: found[name].value for name in _VALIDATED[self.method.config.form.kind]}

    def describe(self, source: ImageSource) -> Descriptors:
        """Descriptors of all images of a source, each process computing its share; the same on all."""
        share = self._share(np.arange(len(source.table)))
        if not len(share):  # fewer images than workers: describe one all the same, it is cut off below
            share = np.zeros(1, np.int64)
        size = 2 * self.config.batch_size
        batches = [share[start : start + size] for start in range(0, len(share), size)]
        with torch.inference_mode(), autocast(self.progress.precision, self.process.device):
            parts = [
                self.method.describe(images.to(self.process.device, non_blocking=True))
                for images in source.stream(batches)
            ]
        return self._gather(concatenate(parts), len(source.table))

    def _gather(self, mine: Descriptors, total: int) -> Descriptors:
        if self.process.world == 1:
            return mine
        # Shares differ by one row at the most; collectives want equal shapes.
        longest = -(-total // self.process.world)
        padded = np.zeros((longest, mine.data.shape[1]), mine.data.dtype)
        padded[: len(mine)] = mine.data[:longest]
        local = torch.from_numpy(padded).to(self.process.device)
        everyone = [torch.empty_like(local) for _ in range(self.process.world)]
        dist.all_gather(everyone, local)
        sizes = [len(share) for share in np.array_split(np.arange(total), self.process.world)]
        rows = [part[:size].cpu().numpy() for part, size in zip(everyone, sizes, strict=True)]
        return Form.of(mine).with_rows(np.concatenate(rows))

    def _from_leader(self, value: float) -> float:
        if self.process.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.process.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def _collect_terms(self) -> None:
        """Add what all processes have summed since the last time to the epoch's sums."""
        for name, total in self._terms.items():
            if self.process.world > 1:
                dist.all_reduce(total)
            value = float(total) / self.process.world
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value
        self._terms = {}

    def _checkpoint(self, reporter: Reporter, saved_at: float, *, always: bool = False) -> float:
        """Hand a checkpoint to the reporter if it is time; returns when the last one was made."""
        due = self._from_leader(float(time.monotonic() - saved_at >= self.config.checkpoint.min_seconds))
        if not (always or due):
            return saved_at
        self._collect_terms()
        progress = self.progress
        name = f"epoch_{progress.epoch:04d}" + (f"_batch_{progress.batch:06d}" if progress.batch else "")
        metrics = {"epoch": float(progress.epoch), "map": progress.best_value or 0.0}
        reporter.checkpoint(name, metrics, self._write if self.process.leads else None)
        return time.monotonic()

    def _write(self, folder: Path) -> None:
        last = _to_cpu(self.method.state_dict())
        safetensors.torch.save_file(last, folder / LAST)
        if self.best is not None and not self._last_is_best:
            safetensors.torch.save_file(self.best, folder / BEST)
        tensors = {"optimizer": self.optimizer.state_dict(), "method": self.method.training_state()}
        torch.save(tensors, folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps(asdict(self.progress)))

    def _restore(self, folder: Path) -> None:
        self.progress = _Progress(**json.loads((folder / STATE).read_text()))
        last = safetensors.torch.load_file(folder / LAST)
        self.method.load_state_dict(last)
        tensors = torch.load(folder / OPTIMIZER, map_location=self.process.device, weights_only=True)
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.method.load_training_state(tensors["method"])
        if self.process.leads and self.progress.best_value is not None:
            self.best = last if self._last_is_best else safetensors.torch.load_file(folder / BEST)

    @property
    def _last_is_best(self) -> bool:
        return self.progress.batch == 0 and self.progress.best_epoch == self.progress.epoch


@dataclass(frozen=True)
class Outcome:
    """What a finished training leaves, read from its last checkpoint.

    Attributes:
        weights: of the `best` and the `last` model; one object where they are the same.
        epochs: after which each was taken.
        validation: MAP of each on the validation queries; None where there are none.
        precision: the arithmetic of the training.
    """

    weights: dict[str, dict[str, Tensor]]
    epochs: dict[str, int]
    validation: dict[str, float | None]
    precision: Literal["bf16", "float32"]


def read_outcome(folder: Path) -> Outcome:
    """The outcome of the training whose last checkpoint lies in `folder`."""
    progress = _Progress(**json.loads((folder / STATE).read_text()))
    last = safetensors.torch.load_file(folder / LAST)
    best = safetensors.torch.load_file(folder / BEST) if (folder / BEST).exists() else last
    measured = progress.history[-1].get("validation", {}).get("map")
    return Outcome(
        weights={"best": best, "last": last},
        epochs={"best": progress.best_epoch or progress.epoch, "last": progress.epoch},
        validation={"best": progress.best_value, "last": measured},
        precision=progress.precision,
    )


def _sources(
    wanted: list[tuple[ImageTable, Preprocessing]], *, memory_bytes: int, threads: int
) -> list[ImageSource]:
    """A source for each table, one for those that are the same; the first ones get the memory."""
    sources: dict[tuple[int, int], ImageSource] = {}
    for table, preprocessing in wanted:
        if (id(table), preprocessing.size) not in sources:
            source = ImageSource(table, preprocessing, memory_bytes=memory_bytes, threads=threads)
            memory_bytes -= len(table) * 3 * preprocessing.size**2 if source.cached else 0
            sources[id(table), preprocessing.size] = source
    return [sources[id(table), preprocessing.size] for table, preprocessing in wanted]


def _to_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def _mix(seed: int, step: int, stream: int) -> int:
    """A seed for one stream of random numbers at one step."""
    return int(np.random.SeedSequence([seed, step, stream + 1]).generate_state(1, np.uint64)[0] >> 1)
