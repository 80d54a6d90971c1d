"""The gradient of a global batch: in parts, in two passes, and over the processes, exactly."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ray_retrieval.compute import autocast
from ray_retrieval.data.mixed import Images, groups_of, in_order
from ray_retrieval.layers.batch_norm import synchronise_batch_norm
from ray_retrieval.layers.dropout import GlobalDropout, synchronise_dropout
from ray_retrieval.loop.process import Process
from ray_retrieval.loop.sums import Sums
from ray_retrieval.methods.base import Batch, Clock, Method, Outputs


class Gradients:
    """Adds the gradients of global batches to a method's parameters, the same on every process.

    Args:
        method: on its device; its batch normalisation is made to span the processes, its dropout these and
            the parts.
        accumulate: parts in which a process computes its share of a batch.
        process: this process among its peers.

    Attributes:
        network: the method as its gradients travel between the processes.
        precision: of the network.
        sums: of the loss's terms and of what the method observes.
    """

    def __init__(self, method: Method, *, accumulate: int, process: Process) -> None:
        self._method, self._accumulate, self._process = method, accumulate, process
        self._dropout: list[GlobalDropout] = []
        if process.world > 1 or accumulate > 1:
            self._dropout = synchronise_dropout(method)
        self.network: Method | DistributedDataParallel = method
        if process.world > 1:
            synchronise_batch_norm(method)
            devices = [process.device] if process.device.type == "cuda" else None
            self.network = DistributedDataParallel(method, device_ids=devices)
        self.precision: Literal["bf16", "float32"] = "float32"
        self.sums = Sums()

    def add(self, batch: Batch, images: Images, clock: Clock) -> None:
        """Add the gradients of a global batch.

        Args:
            batch: this process's share of it.
            images: of the share.
            clock: of the step.
        """
        if isinstance(images, Tensor) and not (self._accumulate > 1 and self._method.whole_batches):
            self._in_parts(batch, images, clock)
        else:
            self._in_two_passes(batch, images, clock)

    def _in_parts(self, batch: Batch, images: Tensor, clock: Clock) -> None:
        """Add the gradients of this process's share, part by part."""
        # The same number on every worker, or batch normalisation waits for a part that never comes.
        count = min(self._accumulate, batch.global_size // self._process.world)
        parts = np.array_split(np.arange(len(batch.rows)), count)
        for number, part in enumerate(parts):
            for layer in self._dropout:
                layer.start, layer.total = batch.start + int(part[0]), batch.global_size
            with self._gradients_wait(number < len(parts) - 1):
                with self._draws_again(number < len(parts) - 1):
                    outputs = self._forward(self.network, images[part[0] : part[-1] + 1])
                self._backward(outputs, batch.part(part), clock)

    def _in_two_passes(self, batch: Batch, images: Images, clock: Clock) -> None:
        """Add the gradients of this process's share, whatever the loss pairs, keeping one part in memory.

        All images are described without gradients; the loss gives the gradient of each descriptor; and each
        part goes through the network again and takes its descriptors' gradients back. That is exact where a
        pass can be repeated.

        Reference: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021.
        """
        parts = groups_of(images, -(-len(batch.rows) // self._accumulate))
        if len(parts) == 1 and self._process.world == 1:
            self._backward(self._forward(self.network, parts[0][1]), batch, clock)
            return
        positions = [some for some, _ in parts]
        with torch.no_grad():
            found = [self._forward(self._method, some) for _, some in parts]
        outputs = {
            name: in_order(positions, [one[name] for one in found]).requires_grad_() for name in found[0]
        }
        self._backward(outputs, batch, clock)
        for number, (some, part) in enumerate(parts):
            with self._gradients_wait(number < len(parts) - 1):
                again = self._forward(self.network, part)
                asked = {name: outputs[name].grad for name in again}
                pairs = [(again[name], grad[some]) for name, grad in asked.items() if grad is not None]
                torch.autograd.backward([one for one, _ in pairs], [grad for _, grad in pairs])

    def _gradients_wait(self, waits: bool) -> AbstractContextManager[None]:
        """Gradients travel between the workers once a step, with the last part."""
        if self._process.world == 1 or not waits:
            return nullcontext()
        return self.network.no_sync()  # type: ignore[operator]

    def _draws_again(self, again: bool) -> AbstractContextManager[None]:
        """The next part draws what this one does: dropout's masks of the global batch."""
        if not again:
            return nullcontext()
        device = self._process.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def _forward(self, network: Method | DistributedDataParallel, images: Tensor) -> Outputs:
        with autocast(self.precision, self._process.device):
            outputs: Outputs = network(images)
        return outputs

    def _backward(self, outputs: Outputs, batch: Batch, clock: Clock) -> None:
        terms = self._method.objective(outputs, batch, clock)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        self.sums.add_terms(terms, batch.global_size)
        self.sums.add_observations(self._method.observations())
