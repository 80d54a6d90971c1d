"""The training loop: plain PyTorch, on one process or on several under torch.distributed.

Exact by construction. The plan of batches, the augmentation, the learning rate and the seeds of every step
are pure functions of (seed, epoch, step) and of what earlier epochs measured; each worker takes its slice of
the global batch; losses are scaled so that averaged gradients are those of the global batch. So one, two and
four workers train alike, and a run that was killed and started again ends where an undisturbed one does.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ray_retrieval.compute import autocast, place, uses_bf16
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.mixed import Images, groups_of, in_order
from ray_retrieval.data.source import ImageSource
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing, apply, draw
from ray_retrieval.descriptors import DescriptorKind, Descriptors, Vectors
from ray_retrieval.errors import RecipeError
from ray_retrieval.layers.batch_norm import synchronise_batch_norm
from ray_retrieval.layers.dropout import GlobalDropout, synchronise_dropout
from ray_retrieval.loop.checkpoints import BEST, LAST, OPTIMIZER, STATE, Progress, Reporter
from ray_retrieval.loop.config import TrainConfig
from ray_retrieval.loop.validation import MEASURED, measure, refuse_unmeasured
from ray_retrieval.methods.base import Batch, Clock, Method, Outputs, Rows, Work
from ray_retrieval.optim import PlateauSchedule, build_optimizer, set_learning_rate
from ray_retrieval.workers import gather_rows

_DECODED = 64
"""Images that are decoded together to be described, at the least: so that some are of one size."""


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


class Trainer:
    """One process's part in training a method.

    Args:
        method: with its starting weights, the same on every process.
        benchmark: training, validation-query and validation-database images.
        config: how to train.
        seed: determines every random draw.
        process: this process among its peers; torch.distributed is initialised when there are several.

    Raises:
        RecipeError: if there are fewer training images a step than workers, a batch that the loss pairs
            images of is to be computed in parts, or what the schedule or the choice of the best model goes by
            is not measured.
    """

    def __init__(
        self, method: Method, benchmark: Benchmark, config: TrainConfig, *, seed: int, process: Process
    ) -> None:
        torch.set_num_threads(process.threads)
        self.config, self.seed, self.process, self.benchmark = config, seed, process, benchmark
        if not method.preprocessing.square and not method.repeatable:
            raise RecipeError(
                f"{type(method).__name__} takes images of one size",
                where="method.image.resize",
                mend="set it to squash or short_side, or method.image.shapes to pad",
            )
        if config.accumulate > 1 and method.whole_batches and not method.repeatable:
            raise RecipeError(
                f"{type(method).__name__} pairs images across the whole batch",
                where="train.accumulate",
                mend="set it to 1",
            )
        self._refuse_unmeasured(method)
        self.method = method
        bf16 = uses_bf16(config.precision, process.device)
        self.progress = Progress(precision="bf16" if bf16 else "float32")
        sizes = method.plan_sizes(benchmark.train, config.batch_size, Clock(seed))
        smallest = min(sizes)
        if smallest < process.world:
            raise RecipeError(
                f"{smallest} training images a step for {process.world} workers",
                where="train.workers",
                mend=f"set it to {smallest} or fewer",
            )
        self.steps_per_epoch = len(sizes) * method.rounds
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
        self._observed: dict[str, Tensor] = {}
        self._rate = 0.0
        self.best: dict[str, Tensor] | None = None
        if process.device.type == "cuda":
            # Some of cuDNN's gradients add in any order: a resumed run would not end like an undisturbed one.
            torch.backends.cudnn.deterministic = True

    def fit(self, reporter: Reporter) -> list[dict[str, Any]]:
        """Train to the end, from the newest checkpoint where there is one.

        Returns:
            One record an epoch: loss, its terms, learning rate, seconds, images a second, what the method
            observes, validation.
        """
        latest = reporter.latest()
        if latest is not None:
            self._restore(latest)
        try:
            if latest is None:
                self.method.before_training(self._encode)
                # Solvers of workers with more or fewer threads differ in their last bits.
                self._copy_from_leader(self.method)
            self._train(reporter, fresh=latest is None)
        finally:
            for source in (self.train_images, self.queries, self.database):
                source.close()
        return self.progress.history

    def _refuse_unmeasured(self, method: Method) -> None:
        refuse_unmeasured(self.config.validation.metric, method.config.form.kind)
        if isinstance(self.config.schedule, PlateauSchedule) and not len(self.benchmark.validation_queries):
            raise RecipeError(
                "the plateau schedule follows the validation, and there are no validation queries",
                where="train.schedule",
                mend="hold images out for validation in data, or choose another schedule",
            )

    def _train(self, reporter: Reporter, *, fresh: bool) -> None:
        saved_at = time.monotonic()
        if self._finished and not fresh:
            return
        if self._finished:
            self._complete()
            self._checkpoint(reporter, saved_at, always=True)
        while self.progress.epoch < self.config.epochs:
            started, images, planned, every = time.monotonic(), 0, 0, self.config.checkpoint.every_steps
            for number in range(self.method.rounds):
                plan, first = self._plan(number)
                planned += sum(len(batch) for batch in plan)
                last = number == self.method.rounds - 1
                for batch, loaded in self._batches(plan[max(0, self.progress.batch - first) :]):
                    self._step(batch, loaded)
                    images += len(batch)
                    ended = last and self.progress.batch == first + len(plan)
                    if every and self.progress.step % every == 0 and not ended:
                        saved_at = self._checkpoint(reporter, saved_at)
            self._finish_epoch(images, time.monotonic() - started, planned)
            if self._finished:
                self._complete()
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
            epoch=self.progress.epoch,
            step=self.progress.step,
            samples=self.progress.samples,
            total_steps=self.config.epochs * self.steps_per_epoch,
            measured=self.progress.measured(self.config.validation.metric),
        )

    def _plan(self, number: int) -> tuple[list[Rows], int]:
        """The batches of a round of the epoch under way, and how many come before it."""
        method, table, size = self.method, self.benchmark.train, self.config.batch_size
        clock = replace(self._clock(), round=number)
        first = 0
        if method.rounds > 1:
            sizes = method.plan_sizes(table, size, clock)
            first = number * len(sizes)
            if self.progress.batch >= first + len(sizes):  # done before the training was killed
                return [np.zeros(count, np.int64) for count in sizes], first
        method.before_round(clock, self._encode)
        return method.plan(table, size, clock), first

    def _batches(self, plan: list[Rows]) -> Iterator[tuple[Rows, Images]]:
        """Global batches with the decoded images of this process's share."""
        shares = (self._share(batch) for batch in plan)
        return zip(plan, self.train_images.stream(shares), strict=True)

    def _share(self, rows: Rows) -> Rows:
        return np.array_split(rows, self.process.world)[self.process.rank]

    def _step(self, rows: Rows, images: Images) -> None:
        """One optimiser step on a global batch."""
        clock, config = self._clock(), self.config
        self.method.before_step(clock, self._encode)
        images = images.to(self.process.device, non_blocking=True)
        if isinstance(images, Tensor):
            images = self._augment(images, len(rows), clock)
        rate = set_learning_rate(self.optimizer, config.optimizer, config.schedule, clock, config.batch_size)
        # Dropout: the same after a restart, and on every process, which takes its rows of the global mask.
        torch.manual_seed(_mix(self.seed, clock.step, 0))
        self.wrapped.train()
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._batch(rows)
        if isinstance(images, Tensor) and not (config.accumulate > 1 and self.method.whole_batches):
            self._in_parts(batch, images, clock)
        else:
            self._in_two_passes(batch, images, clock)
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

    def _in_parts(self, batch: Batch, images: Tensor, clock: Clock) -> None:
        """Add the gradients of this process's share, part by part."""
        # The same number on every worker, or batch normalisation waits for a part that never comes.
        count = min(self.config.accumulate, batch.global_size // self.process.world)
        parts = np.array_split(np.arange(len(batch.rows)), count)
        for number, part in enumerate(parts):
            for layer in self._dropout:
                layer.start, layer.total = batch.start + int(part[0]), batch.global_size
            with self._gradients_wait(number < len(parts) - 1):
                outputs = self._forward(self.wrapped, images[part[0] : part[-1] + 1])
                self._backward(outputs, batch.part(part), clock)

    def _in_two_passes(self, batch: Batch, images: Images, clock: Clock) -> None:
        """Add the gradients of this process's share, whatever the loss pairs, keeping one part in memory.

        All images are described without gradients; the loss gives the gradient of each descriptor; and each
        part goes through the network again and takes its descriptors' gradients back. That is exact where a
        pass can be repeated.

        Reference: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021.
        """
        parts = groups_of(images, -(-len(batch.rows) // self.config.accumulate))
        if len(parts) == 1 and self.process.world == 1:
            self._backward(self._forward(self.wrapped, parts[0][1]), batch, clock)
            return
        positions = [some for some, _ in parts]
        with torch.no_grad():
            found = [self._forward(self.method, some) for _, some in parts]
        outputs = {
            name: in_order(positions, [one[name] for one in found]).requires_grad_() for name in found[0]
        }
        self._backward(outputs, batch, clock)
        for number, (some, part) in enumerate(parts):
            with self._gradients_wait(number < len(parts) - 1):
                again = self._forward(self.wrapped, part)
                asked = {name: outputs[name].grad for name in again}
                pairs = [(again[name], grad[some]) for name, grad in asked.items() if grad is not None]
                torch.autograd.backward([one for one, _ in pairs], [grad for _, grad in pairs])

    def _gradients_wait(self, waits: bool) -> AbstractContextManager[None]:
        """Gradients travel between the workers once a step, with the last part."""
        if self.process.world == 1 or not waits:
            return nullcontext()
        return self.wrapped.no_sync()  # type: ignore[operator]

    def _forward(self, network: Method | DistributedDataParallel, images: Tensor) -> Outputs:
        with autocast(self.progress.precision, self.process.device):
            outputs: Outputs = network(images)
        return outputs

    def _backward(self, outputs: Outputs, batch: Batch, clock: Clock) -> None:
        terms = self.method.objective(outputs, batch, clock)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        for name, term in terms.items():
            weighted = term.detach().double() * batch.global_size
            self._terms[name] = self._terms[name] + weighted if name in self._terms else weighted
        for name, (total, count) in self.method.observations().items():
            both = torch.stack([total.detach().double(), count.double()])
            self._observed[name] = self._observed[name] + both if name in self._observed else both

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
        observed = {name: total / count for name, (total, count) in progress.observed.items() if count}
        if observed:
            record["observed"] = observed
        due = progress.epoch % self.config.validation.every == 0 or self._finished
        if due and len(self.benchmark.validation_queries):
            measured = self.validate()
            record["validation"] = measured
            value = measured[self.config.validation.metric]
            if progress.best_value is None or value > progress.best_value:
                progress.best_value, progress.best_epoch = value, progress.epoch
                if self.process.leads:
                    self.best = _to_cpu(self.method.state_dict())
        progress.sums, progress.observed = {}, {}
        progress.history.append(record)

    def _complete(self) -> None:
        """Let the method compute what belongs to a trained network, for the best model and for the last."""
        progress, method = self.progress, self.method
        if progress.best_value is not None and not progress.last_is_best:
            last = _to_cpu(method.state_dict())
            if self.best is not None:
                method.load_state_dict(self.best)
            self._copy_from_leader(method)
            method.after_training(self._encode)
            self._copy_from_leader(method)
            if self.process.leads:
                self.best = _to_cpu(method.state_dict())
            method.load_state_dict(last)
        method.after_training(self._encode)
        self._copy_from_leader(method)
        if progress.last_is_best and self.process.leads:
            self.best = _to_cpu(method.state_dict())

    def _copy_from_leader(self, method: Method) -> None:
        if self.process.world > 1:
            for value in method.state_dict().values():
                dist.broadcast(value, src=0)

    def validate(self) -> dict[str, float]:
        """How the validation queries find their like in the validation database: all of `MEASURED`."""
        self.method.eval()
        queries = self.describe(self.queries)
        database = queries if self.database is self.queries else self.describe(self.database)
        names = MEASURED[self.method.config.form.kind]
        measured: dict[str, float] = dict.fromkeys(names, 0.0)
        if self.process.leads:
            tables = (self.queries.table, self.database.table)
            k = self.config.validation.k or self.benchmark.k
            measured = measure(queries, tables[0], database, tables[1], k=k, threads=self.process.threads)
        return {name: self._from_leader(measured[name]) for name in names}

    def describe(self, source: ImageSource) -> Descriptors:
        """Descriptors of all images of a source, each process computing its share; the same on all."""

        def work(images: Tensor) -> Outputs:
            return {"descriptors": torch.from_numpy(self.method.describe(images).data)}

        found = self._compute(source, np.arange(len(source.table)), work)
        data, form = found["descriptors"].cpu().numpy(), self.method.config.form
        # Vectors that will be whitened, and cut, at the end are longer until then.
        return Vectors(data) if form.kind is DescriptorKind.VECTORS else form.with_rows(data)

    def _encode(self, rows: Rows, work: Work | None = None) -> Outputs:
        """What is made of training images; see `Encode`."""
        self.method.eval()
        source = self._plain_training_images()
        try:
            return self._compute(source, rows, work or self.method)
        finally:
            if source not in (self.train_images, self.queries, self.database):
                source.close()

    def _plain_training_images(self) -> ImageSource:
        """The training images as validation prepares its own: from memory, where a source has them there."""
        table, preprocessing = self.benchmark.train, self.method.preprocessing
        for source in (self.train_images, self.queries, self.database):
            if source.table is table and source.preprocessing == preprocessing:
                return source
        return ImageSource(table, preprocessing, memory_bytes=0, threads=self.process.threads)

    def _compute(self, source: ImageSource, rows: Rows, work: Work) -> Outputs:
        """What `work` makes of some rows of a source, in their order and without gradients.

        Each process works on its share, of as many pixels as those of the others; the results are gathered.
        """
        shares = source.shares(rows, self.process.world)
        mine = rows[shares[self.process.rank]]
        if not len(mine):  # fewer images than workers: take one all the same, which is cut off again
            mine = rows[:1]
        # Without gradients, a pass may be twice as long as one of the training.
        limit = 2 * -(-self.config.batch_size // (self.process.world * self.config.accumulate))
        size = min(2 * self.config.batch_size, max(limit, _DECODED))
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        with torch.no_grad(), autocast(self.progress.precision, self.process.device):
            parts = [self._in_passes(work, images, limit) for images in source.stream(batches)]
        sizes, device = [len(share) for share in shares], self.process.device
        count = sizes[self.process.rank]
        gathered = {
            name: gather_rows(torch.cat([part[name] for part in parts])[:count].to(device), sizes)
            for name in parts[0]
        }
        return {name: in_order(shares, [values]) for name, values in gathered.items()}

    def _in_passes(self, work: Work, images: Images, limit: int) -> Outputs:
        """What `work` makes of a batch, in its order, so many images of one size at a time."""
        passes = groups_of(images, limit)
        positions = [some for some, _ in passes]
        found = [work(part.to(self.process.device, non_blocking=True)) for _, part in passes]
        return {name: in_order(positions, [one[name] for one in found]) for name in found[0]}

    def _from_leader(self, value: float) -> float:
        if self.process.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.process.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def _collect_terms(self) -> None:
        """Add what all processes have summed since the last time to the epoch's sums."""
        for name, both in self._observed.items():
            if self.process.world > 1:
                dist.all_reduce(both)
            before = self.progress.observed.get(name, [0.0, 0.0])
            self.progress.observed[name] = [old + new for old, new in zip(before, both.tolist(), strict=True)]
        for name, total in self._terms.items():
            if self.process.world > 1:
                dist.all_reduce(total)
            value = float(total) / self.process.world
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value
        self._terms, self._observed = {}, {}

    def _checkpoint(self, reporter: Reporter, saved_at: float, *, always: bool = False) -> float:
        """Hand a checkpoint to the reporter if it is time; returns when the last one was made."""
        due = self._from_leader(float(time.monotonic() - saved_at >= self.config.checkpoint.min_seconds))
        if not (always or due):
            return saved_at
        self._collect_terms()
        progress = self.progress
        name = f"epoch_{progress.epoch:04d}" + (f"_batch_{progress.batch:06d}" if progress.batch else "")
        metrics = {"epoch": float(progress.epoch), self.config.validation.metric: progress.best_value or 0.0}
        reporter.checkpoint(name, metrics, self._write if self.process.leads else None)
        return time.monotonic()

    def _write(self, folder: Path) -> None:
        last = _to_cpu(self.method.state_dict())
        safetensors.torch.save_file(last, folder / LAST)
        if self.best is not None and not self.progress.last_is_best:
            safetensors.torch.save_file(self.best, folder / BEST)
        tensors = {"optimizer": self.optimizer.state_dict(), "method": self.method.training_state()}
        torch.save(tensors, folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps(asdict(self.progress)))

    def _restore(self, folder: Path) -> None:
        self.progress = Progress.read(folder)
        last = safetensors.torch.load_file(folder / LAST)
        self.method.load_state_dict(last)
        tensors = torch.load(folder / OPTIMIZER, map_location=self.process.device, weights_only=True)
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.method.load_training_state(tensors["method"])
        if self.process.leads and self.progress.best_value is not None:
            self.best = last if self.progress.last_is_best else safetensors.torch.load_file(folder / BEST)


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
