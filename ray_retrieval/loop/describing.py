"""What a network makes of images beside its training: descriptors to validate, to mine and to learn from."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ray_retrieval.compute import autocast
from ray_retrieval.data.mixed import Images, groups_of, in_order
from ray_retrieval.data.source import ImageSource
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.descriptors import DescriptorKind, Descriptors, Vectors
from ray_retrieval.loop.config import TrainConfig
from ray_retrieval.loop.process import Process
from ray_retrieval.methods.base import Method, Outputs, Rows, Work
from ray_retrieval.workers import gather_rows

_DECODED = 64
"""Images that are decoded together to be described, at the least: so that some are of one size."""


class Describer:
    """Passes without gradients that all processes make together, each over its share of the images.

    Args:
        method: the network.
        config: states how many images a pass of the training has.
        process: this process among its peers.

    Attributes:
        precision: of the network.
    """

    def __init__(self, method: Method, config: TrainConfig, process: Process) -> None:
        self._method, self._process, self._batch_size = method, process, config.batch_size
        # Without gradients, a pass may be twice as long as one of the training.
        self._limit = 2 * -(-config.batch_size // (process.world * config.accumulate))
        self.precision: Literal["bf16", "float32"] = "float32"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._process.device

    def describe(self, source: ImageSource, *, classes: bool = False) -> tuple[Descriptors, Rows | None]:
        """What validation looks at, of all images of a source in one pass; the same on all processes.

        Args:
            source: of the images.
            classes: whether to ask the method, which has a class head, for the likeliest class of each.

        Returns:
            What is compared of them; and int64 [n], the likeliest classes, or None.
        """

        def work(images: Tensor) -> Outputs:
            outputs = {"descriptors": self._method.compared(images)}
            if classes:
                probabilities = self._method.class_probabilities(images)
                assert probabilities is not None
                outputs["classes"] = probabilities.argmax(dim=1)
            return outputs

        found = {
            name: value.cpu().numpy()
            for name, value in self.rows(source, np.arange(len(source.table)), work).items()
        }
        data, form = found["descriptors"], self._method.config.form
        # Vectors that will be whitened, and cut, at the end are longer until then.
        described = (
            form.with_rows(data) if form.kind is DescriptorKind.CODES else Vectors(data.astype(np.float32))
        )
        return described, found.get("classes")

    def rows(self, source: ImageSource, rows: Rows, work: Work) -> Outputs:
        """What `work` makes of some rows of a source, in their order; the same on all processes.

        The shares are of equally many pixels; the results are gathered.
        """
        shares = source.shares(rows, self._process.world)
        sizes, device = [len(share) for share in shares], self._process.device
        count = sizes[self._process.rank]
        with self.context():
            parts = [_in_batch(work, batch) for batch in self._batches(source, rows, shares)]
        gathered = {
            name: gather_rows(torch.cat([part[name] for part in parts])[:count].to(device), sizes)
            for name in parts[0]
        }
        return {name: in_order(shares, [values]) for name, values in gathered.items()}

    def totals(self, source: ImageSource, rows: Rows, work: Work) -> Outputs:
        """The sums of what `work` makes of some rows of a source: float64, the same on all processes."""
        shares = source.shares(rows, self._process.world)
        sums: Outputs = {}
        with self.context():
            for _, images in itertools.chain.from_iterable(self._batches(source, rows, shares)):
                for name, value in work(images).items():
                    assert value.dtype == torch.float64, f"'{name}' is summed in float64, got {value.dtype}"
                    part = value.to(self._process.device)
                    sums[name] = sums[name] + part if name in sums else part
        if not len(shares[self._process.rank]):
            sums = {name: torch.zeros_like(value) for name, value in sums.items()}
        for value in sums.values():
            self._process.add_up(value)
        return sums

    def _batches(
        self, source: ImageSource, rows: Rows, shares: Sequence[Rows]
    ) -> Iterator[list[tuple[Rows, Tensor]]]:
        """The passes of each batch of this process's share: positions in the batch, and images of one size.

        With fewer images than processes there is one all the same, so that the results' shapes are known.
        """
        mine = rows[shares[self._process.rank]]
        if not len(mine):
            mine = rows[:1]
        limit = self._images_a_pass(source.preprocessing)
        size = min(2 * self._batch_size, max(limit, _DECODED))
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        for images in source.stream(batches):
            yield self._passes(images, limit)

    def _images_a_pass(self, preprocessing: Preprocessing) -> int:
        """Fewer where images are larger than those of the training: a pass has as many pixels."""
        share = (self._method.config.training_image.size / preprocessing.size) ** 2
        return max(1, int(self._limit * min(1.0, share)))

    def _passes(self, images: Images, limit: int) -> list[tuple[Rows, Tensor]]:
        device = self._process.device
        return [(some, part.to(device, non_blocking=True)) for some, part in groups_of(images, limit)]

    @contextmanager
    def context(self) -> Iterator[None]:
        """Without gradients, at the training's precision."""
        with torch.no_grad(), autocast(self.precision, self._process.device):
            yield


def _in_batch(work: Work, passes: list[tuple[Rows, Tensor]]) -> Outputs:
    """What `work` makes of the passes of a batch, in its order."""
    found = [work(images) for _, images in passes]
    positions = [some for some, _ in passes]
    return {name: in_order(positions, [one[name] for one in found]) for name in found[0]}


class TrainingImages:
    """The training images as validation sees them, never augmented: what methods get as `Encode`.

    Args:
        method: the network; put into evaluation mode.
        describer: makes the passes.
        table: the training images.
        preprocessing: how they are prepared.
        sources: those that there are already: taken where one has these images in memory.
        threads: decoders, where there is none.
    """

    def __init__(
        self,
        method: Method,
        describer: Describer,
        table: ImageTable,
        preprocessing: Preprocessing,
        *,
        sources: Sequence[ImageSource],
        threads: int,
    ) -> None:
        self._method, self._describer = method, describer
        self._table, self._preprocessing = table, preprocessing
        self._sources, self._threads = sources, threads

    def __call__(self, rows: Rows, work: Work | None = None) -> Outputs:
        """See `Encode`."""
        self._method.eval()
        with self._opened() as source:
            return self._describer.rows(source, rows, work or self._method)

    def totals(self, rows: Rows, work: Work) -> Outputs:
        """See `Encode`."""
        self._method.eval()
        with self._opened() as source:
            return self._describer.totals(source, rows, work)

    def known_source(self) -> ImageSource | None:
        """The source among the known ones that has these images prepared like that."""
        for source in self._sources:
            if source.table is self._table and source.preprocessing == self._preprocessing:
                return source
        return None

    @contextmanager
    def _opened(self) -> Iterator[ImageSource]:
        known = self.known_source()
        if known is not None:
            yield known
            return
        with ImageSource(self._table, self._preprocessing, memory_bytes=0, threads=self._threads) as source:
            yield source


def sources_of(
    wanted: Sequence[tuple[ImageTable, Preprocessing]], *, memory_bytes: int, threads: int
) -> list[ImageSource]:
    """A source for each table, one for those that are the same; the first ones get the memory."""
    sources: dict[tuple[int, int], ImageSource] = {}
    for table, preprocessing in wanted:
        if (id(table), preprocessing.size) not in sources:
            source = ImageSource(table, preprocessing, memory_bytes=memory_bytes, threads=threads)
            memory_bytes -= len(table) * 3 * preprocessing.size**2 if source.cached else 0
            sources[id(table), preprocessing.size] = source
    return [sources[id(table), preprocessing.size] for table, preprocessing in wanted]
