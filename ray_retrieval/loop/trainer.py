"""The training loop: plain PyTorch, on one process or on several under torch.distributed.

Exact by construction. The plan of batches, the augmentation, the learning rate and the seeds of every step
are pure functions of (seed, epoch, step) and of what was measured before; each worker takes its slice of
the global batch; losses are scaled so that averaged gradients are those of the global batch. So one, two and
four workers train alike, and a run that was killed and started again ends where an undisturbed one does.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from ray_retrieval.compute import place, uses_bf16
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.mixed import Images
from ray_retrieval.data.transforms import Preprocessing, apply, draw
from ray_retrieval.errors import RecipeError
from ray_retrieval.loop.checkpoints import (
    Progress,
    Reporter,
    read_checkpoint,
    weights_of,
    write_checkpoint,
)
from ray_retrieval.loop.checks import planned_steps, refuse_misfits
from ray_retrieval.loop.config import TrainConfig
from ray_retrieval.loop.describing import Describer, TrainingImages, sources_of
from ray_retrieval.loop.gradients import Gradients
from ray_retrieval.loop.monitor import Monitor
from ray_retrieval.loop.optim import build_optimizer, set_learning_rate
from ray_retrieval.loop.process import Process
from ray_retrieval.loop.steplog import Window
from ray_retrieval.loop.validation import MEASURED, measure, rows_of_accuracy, rows_of_queries
from ray_retrieval.methods.base import Batch, Clock, Method, Rows
from ray_retrieval.storage import Folder


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
        self.method = method
        refuse_misfits(method, benchmark, config)
        self.total_steps = planned_steps(method, benchmark, config, seed=seed, workers=process.world)
        place(method, process.device)
        self._gradients = Gradients(method, accumulate=config.accumulate, process=process)
        self._describer = Describer(method, config, process)
        self.optimizer = build_optimizer(config.optimizer, method)
        # Where crops are cut at random, training images are prepared whole.
        image = method.config.training_image
        whole = config.augmentation.source(image)
        queries, database = benchmark.validation_queries, benchmark.validation_database
        self._query_rows = rows_of_queries(queries, database)
        self.train_images, self.queries, self.database = sources_of(
            [
                (benchmark.train, whole),
                (queries if self._query_rows is None else database, image),
                (database, image),
            ],
            memory_bytes=int(config.cache_memory),
            threads=process.threads,
        )
        self._side, self._output = whole.size, image.size
        self.encode = self._training_images(image)
        self.labels = torch.tensor(benchmark.train.labels)
        if self.labels.ndim == 2:
            self.labels = self.labels.float()
        method.start_training(benchmark.train, process.device)
        # One arithmetic for all: their nodes may have other processors.
        bf16 = process.all_say(uses_bf16(config.precision, process.device))
        self._go_on_from(Progress(precision="bf16" if bf16 else "float32"))
        self._rate = 0.0
        self._monitor: Monitor | None = None
        self.best: dict[str, Tensor] | None = None
        if process.device.type == "cuda":
            # Some of cuDNN's gradients add in any order: a resumed run would not end like an undisturbed one.
            torch.backends.cudnn.deterministic = True

    def fit(self, reporter: Reporter, run: Folder | None = None) -> list[dict[str, Any]]:
        """Train to the end, from the newest checkpoint where there is one.

        Args:
            reporter: where checkpoints come from and go to.
            run: the folder for logs, events and recordings, which the leading process writes; None: none are
                kept.

        Returns:
            One record an epoch: loss, its terms, learning rate, seconds, images a second, what the method
            observes, validation.
        """
        latest = reporter.latest()
        if latest is not None:
            progress, best = read_checkpoint(latest, self.method, self.optimizer, self.process.device)
            self._go_on_from(progress)
            self.best = best if self.process.leads else None
        if run is not None and self.process.leads:
            self._monitor = Monitor(run, self.config, self.progress.step, self.process.device)
        try:
            # What whitening is learned by has threads of its own beside torch.
            with threadpool_limits(self.process.threads, user_api="blas"):
                if latest is None:
                    self.method.before_training(self.encode)
                    # Solvers of workers with more or fewer threads differ in their last bits.
                    self.process.copy_from_leader(self.method)
                self._train(reporter, fresh=latest is None)
        finally:
            if self._monitor is not None:
                self._monitor.close()
            for source in (self.train_images, self.queries, self.database):
                source.close()
        return self.progress.history

    def _training_images(self, preprocessing: Preprocessing) -> TrainingImages:
        return TrainingImages(
            self.method,
            self._describer,
            self.benchmark.train,
            preprocessing,
            sources=(self.train_images, self.queries, self.database),
            threads=self.process.threads,
        )

    def _train(self, reporter: Reporter, *, fresh: bool) -> None:
        saved_at = time.monotonic()
        if self._finished and fresh:  # nothing to train, but something to learn of the network as it is
            self._complete()
            self._checkpoint(reporter, saved_at, always=True)
        while not self._finished:
            saved_at = self._epoch(reporter, saved_at)

    def _epoch(self, reporter: Reporter, saved_at: float) -> float:
        """Train for an epoch, or for what is left of it; returns when the last checkpoint was made."""
        started, images, planned = time.monotonic(), 0, 0
        end = self._batches_of_epoch()
        for number in range(self.method.rounds):
            plan, first = self._plan(number)
            plan = plan[: end - first]
            planned += sum(len(batch) for batch in plan)
            last = number == self.method.rounds - 1 or first + len(plan) == end
            for batch, loaded in self._batches(plan[max(0, self.progress.batch - first) :]):
                self._step(batch, loaded)
                images += len(batch)
                if not (last and self.progress.batch == first + len(plan)):
                    saved_at = self._within_epoch(reporter, saved_at)
            if last:
                break
        self._finish_epoch(images, time.monotonic() - started, planned)
        if self._finished:
            self._complete()
        if self.process.leads:
            reporter.epoch_done(self.progress.history[-1])
        if self.progress.epoch % self.config.checkpoint.every_epochs == 0 or self._finished:
            saved_at = self._checkpoint(reporter, saved_at, always=self._finished)
        return saved_at

    def _batches_of_epoch(self) -> int:
        """After how many batches the epoch under way ends at the latest."""
        if self.config.steps is None:
            return sys.maxsize
        return self.config.steps - (self.progress.step - self.progress.batch)

    @property
    def _finished(self) -> bool:
        if self.config.steps is None:
            return self.progress.epoch == self.config.epochs
        return self.progress.step == self.config.steps and not self.progress.batch

    def _clock(self) -> Clock:
        return Clock(
            self.seed,
            epoch=self.progress.epoch,
            step=self.progress.step,
            samples=self.progress.samples,
            total_steps=self.total_steps,
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
        method.before_round(clock, self.encode)
        return method.plan(table, size, clock), first

    def _batches(self, plan: list[Rows]) -> Iterator[tuple[Rows, Images]]:
        """Global batches with the decoded images of this process's share."""
        shares = (self.process.share(batch) for batch in plan)
        asked = time.perf_counter()
        for batch, images in zip(plan, self.train_images.stream(shares), strict=True):
            self.progress.window.waiting += time.perf_counter() - asked
            yield batch, images
            asked = time.perf_counter()

    def _step(self, rows: Rows, images: Images) -> None:
        """One optimiser step on a global batch."""
        started, progress, config = time.perf_counter(), self.progress, self.config
        clock = self._clock()
        self.method.before_step(clock, self.encode)
        images = images.to(self.process.device, non_blocking=True)
        if isinstance(images, Tensor):
            images = self._augment(images, len(rows), clock)
        self._rate = set_learning_rate(
            self.optimizer, config.optimizer, config.schedule, clock, config.batch_size
        )
        # Dropout: the same after a restart, and on every process, which takes its rows of the global mask.
        torch.manual_seed(_mix(self.seed, clock.step, 0))
        self._gradients.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients.add(self._batch(rows), images, clock)
        if config.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.method.parameters(), config.clip_norm)
            self._gradients.sums.add_gradient_norm(norm)
        self.optimizer.step()
        progress.step += 1
        progress.batch += 1
        progress.samples += len(rows)
        progress.window.steps += 1
        progress.window.images += len(rows)
        progress.window.computing += time.perf_counter() - started
        if self._monitor is not None:
            self._monitor.stepped(self.method, progress.step)

    def _batch(self, rows: Rows) -> Batch:
        """This process's share of a global batch."""
        everyone = torch.from_numpy(rows)
        labels = self.labels[everyone].to(self.process.device)
        everyone = everyone.to(self.process.device)
        mine = self.process.share(np.arange(len(rows)))
        start, stop = int(mine[0]), int(mine[-1]) + 1
        return Batch(everyone[start:stop], labels[start:stop], everyone, labels, start, self.process.world)

    def _augment(self, images: Tensor, count: int, clock: Clock) -> Tensor:
        """Augment this process's share with its part of what is drawn for the whole global batch."""
        generator = torch.Generator().manual_seed(_mix(self.seed, clock.step, -1))
        draws = draw(self.config.augmentation, count, generator, self._side, self._output)
        mine = self.process.share(np.arange(count))
        return apply(images, draws.take(slice(int(mine[0]), int(mine[-1]) + 1)))

    def _within_epoch(self, reporter: Reporter, saved_at: float) -> float:
        """What is due after a step that does not end an epoch; returns when the last checkpoint was made."""
        config, step = self.config, self.progress.step
        every = config.validation.every_steps
        measured = self._validated() if every and step % every == 0 else None
        self._log(measured)
        every = config.checkpoint.every_steps
        return self._checkpoint(reporter, saved_at) if every and step % every == 0 else saved_at

    def _finish_epoch(self, images: int, seconds: float, planned: int) -> None:
        """Record an epoch of `planned` images, of which this process has just seen `images`."""
        progress, times = self.progress, self.config.validation
        self._collect()
        record = progress.end_epoch(rate=self._rate, planned=planned, images=images, seconds=seconds)
        self._refuse_divergence(record["loss"])
        by_steps = times.every_steps is not None and progress.step % times.every_steps == 0
        by_epochs = times.every is not None and progress.epoch % times.every == 0
        due = by_epochs or by_steps or self._finished
        measured = self._validated() if due else None
        if measured is not None:
            record["validation"] = measured
        self._log(measured)

    def _log(self, measured: dict[str, float] | None) -> None:
        """Add a line to the log of the steps, if it is time or something was measured."""
        progress = self.progress
        if not (progress.step % self.config.log.every == 0 or measured is not None or self._finished):
            return
        started = time.perf_counter()
        self._collect()  # waits for the device
        progress.window.computing += time.perf_counter() - started
        clipped = self.config.clip_norm is not None
        record = progress.window.record(
            epoch=self.progress.current_epoch, step=progress.step, rate=self._rate, clipped=clipped
        )
        progress.window = Window()
        self._refuse_divergence(record["loss"])
        if self._monitor is not None:
            self._monitor.line(record if measured is None else {**record, "validation": measured})

    def _refuse_divergence(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise RecipeError(
                f"the loss is not finite in epoch {self.progress.current_epoch}",
                where="train.optimizer.lr",
                mend="lower it, or set train.clip_norm",
            )

    def _collect(self) -> None:
        """Add what all processes have summed since the last time to what is recorded."""
        self.progress.add_sums(self._gradients.sums.collect(self.process))

    def _validated(self) -> dict[str, float] | None:
        """Measure the model, and keep it if it is the best so far; None without validation queries."""
        if not len(self.benchmark.validation_queries):
            return None
        measured = self.validate()
        best = self.progress.add_validation(
            measured, epoch=self.progress.current_epoch, metric=self.config.validation.metric
        )
        if best and self.process.leads:
            self.best = weights_of(self.method)
        if self._monitor is not None:
            self._monitor.show(self.method, self.queries, self._describer, self.progress.step)
        return measured

    def validate(self) -> dict[str, float]:
        """How the validation queries find their like in the validation database, and which class they get."""
        self.method.eval()
        benchmark, told = self.benchmark, rows_of_accuracy(self.method, self.benchmark)
        database, likeliest = self._describer.describe(self.database, classes=len(told) > 0)
        if self._query_rows is None:
            queries, _ = self._describer.describe(self.queries)
        else:
            queries = database.take(self._query_rows)
        names = [name for name in MEASURED[self.method.config.form.kind] if name != "accuracy"]
        measured: dict[str, float] = dict.fromkeys(names, 0.0)
        if self.process.leads:
            tables = (benchmark.validation_queries, benchmark.validation_database)
            k = self.config.validation.k or benchmark.k
            measured = measure(queries, tables[0], database, tables[1], k=k, threads=self.process.threads)
        found: dict[str, float] = {name: self.process.from_leader(measured[name]) for name in names}
        if likeliest is not None:
            found["accuracy"] = float((likeliest == benchmark.validation_database.labels)[told].mean())
        return found

    def _complete(self) -> None:
        """Let the method compute what belongs to a trained network, for the best model and for the last."""
        progress, method = self.progress, self.method
        # Of images as descriptors will be made of them, not as they are trained on.
        encode = self._training_images(method.preprocessing)
        if progress.best_value is not None and not progress.last_is_best:
            last = weights_of(method)
            if self.best is not None:
                method.load_state_dict(self.best)
            self.process.copy_from_leader(method)
            method.after_training(encode)
            self.process.copy_from_leader(method)
            if self.process.leads:
                self.best = weights_of(method)
            method.load_state_dict(last)
        method.after_training(encode)
        self.process.copy_from_leader(method)
        if progress.last_is_best and self.process.leads:
            self.best = weights_of(method)

    def _checkpoint(self, reporter: Reporter, saved_at: float, *, always: bool = False) -> float:
        """Hand a checkpoint to the reporter if it is time; returns when the last one was made."""
        waited = time.monotonic() - saved_at >= self.config.checkpoint.min_seconds
        if not (always or self.process.from_leader(float(waited))):
            return saved_at
        self._collect()
        if self._monitor is not None:
            self._monitor.flush()
        progress = self.progress
        name = f"epoch_{progress.epoch:04d}" + (f"_batch_{progress.batch:06d}" if progress.batch else "")
        metrics = {"epoch": float(progress.epoch), self.config.validation.metric: progress.best_value or 0.0}

        def write(folder: Path) -> None:
            write_checkpoint(folder, self.method, self.optimizer, progress, self.best)

        reporter.checkpoint(name, metrics, write if self.process.leads else None)
        return time.monotonic()

    def _go_on_from(self, progress: Progress) -> None:
        self.progress = progress
        self._gradients.precision = self._describer.precision = progress.precision


def _mix(seed: int, step: int, stream: int) -> int:
    """A seed for one stream of random numbers at one step."""
    return int(np.random.SeedSequence([seed, step, stream + 1]).generate_state(1, np.uint64)[0] >> 1)
