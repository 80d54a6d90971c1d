"""Collectives that gradients pass through, for sums and pairs that span the workers of a training.

Data parallelism averages gradients over the workers. Where each worker's loss is its own part of one global
sum, times the number of workers, and everything that crosses from one worker to another goes through these
functions, the average is exactly the gradient of the global sum. Without several workers they do nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_workers(value: Tensor) -> Tensor:
    """Sum over all workers, the same on each; its gradient is the sum of the gradients of all workers.

    Args:
        value: [...], of the same shape and type on all; without other workers it is returned as it is.
    """
    if not several():
        return value
    summed: Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return summed


def gather_rows(mine: Tensor, sizes: list[int]) -> Tensor:
    """The rows of all workers, one worker after another, the same bytes on each.

    The gradient of a worker's rows is the sum of what all workers ask of them. Backward is a collective too:
    every worker has to run it.

    Args:
        mine: [n, …], this worker's rows.
        sizes: number of rows of each worker.

    Returns:
        [sum of the sizes, …].
    """
    if not several():
        return mine
    gathered: Tensor = _Gather.apply(mine, sizes)  # type: ignore[no-untyped-call]
    return gathered


def several() -> bool:
    """Whether there are other workers."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def my_share(count: int) -> slice:
    """This worker's run of so many things; those of different workers differ by one in length at most."""
    if not several():
        return slice(0, count)
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(count * rank // world, count * (rank + 1) // world)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, mine: Tensor, sizes: list[int]) -> Tensor:
        rank, longest = dist.get_rank(), max(sizes)
        assert len(mine) == sizes[rank], f"worker {rank} has {len(mine)} rows, {sizes[rank]} are agreed"
        context.start, context.rows = sum(sizes[:rank]), sizes[rank]
        # Collectives want equal shapes.
        padded = mine.new_zeros((longest, *mine.shape[1:]))
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everyone, padded)
        return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[context.start : context.start + context.rows], None
