"""Batches of images of several sizes.

A network takes images of one size at a time. Where images keep their proportions, a batch falls into groups
of equal size, and each group is one pass through the network. The groups of a batch are a function of its
images alone, and results come back in the batch's order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Positions = npt.NDArray[np.int64]


class MixedImages:
    """Images of several sizes.

    Args:
        images: uint8 [3, h, w] each.

    Attributes:
        groups: of equal size, by the place of their first image: int64 [n], ascending positions in the batch,
            and uint8 [n, 3, h, w].
    """

    def __init__(self, images: Sequence[npt.NDArray[np.uint8]]) -> None:
        places: dict[tuple[int, ...], list[int]] = {}
        for place, image in enumerate(images):
            places.setdefault(image.shape, []).append(place)
        self._count = len(images)
        self.groups = [
            (np.array(some, np.int64), torch.from_numpy(np.stack([images[place] for place in some])))
            for some in places.values()
        ]

    def __len__(self) -> int:
        return self._count

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "MixedImages":
        """The same on a device."""
        moved = MixedImages([])
        moved._count = self._count
        moved.groups = [(some, images.to(device, non_blocking=non_blocking)) for some, images in self.groups]
        return moved


Images = Tensor | MixedImages
"""uint8 [n, 3, h, w], or images of several sizes."""


def groups_of(images: Images, limit: int | None = None) -> list[tuple[Positions, Tensor]]:
    """The passes that a batch takes: positions in it, and their images of one size.

    Args:
        images: the batch.
        limit: images of a pass, at most; None: any number.

    Returns:
        Of each pass the positions, int64 [m], and the images, uint8 [m, 3, h, w].
    """
    groups = images.groups if isinstance(images, MixedImages) else [(np.arange(len(images)), images)]
    size = limit or max(1, len(images))
    return [
        (positions[start : start + size], some[start : start + size])
        for positions, some in groups
        for start in range(0, len(positions), size)
    ]


def in_order(positions: Sequence[Positions], rows: Sequence[Any]) -> Any:
    """The rows of several passes, Tensors or arrays [n, …], in the order of the batch."""
    order = np.argsort(np.concatenate(list(positions)))
    if isinstance(rows[0], Tensor):
        return torch.cat(list(rows))[torch.from_numpy(order).to(rows[0].device)]
    return np.concatenate(list(rows))[order]
