"""A memory of what the network made of images in earlier steps, to pair the current batch with.

Every worker holds the same memory: the embeddings of a step are gathered, so that all workers write the same
bytes to the same slots in the same order. It is no part of the model and is never exported; a checkpoint
holds all of it.

Reference: Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020 (a queue of the newest); the
memory of all training codes of deep hashing's later implementations (a slot for each image).
"""

from typing import Any

import torch
from torch import Tensor


class CrossBatchMemory:
    """Embeddings with the ids and labels of their images, in a fixed number of slots.

    Args:
        capacity: number of slots.
        width: of an embedding.
        classes: number of classes where labels are multi-hot; None where they are class numbers.
        slot_per_image: image `i` always lies in slot `i`, and its newer embedding replaces the older one;
            ids are then below `capacity`. Otherwise a ring: the newest `capacity` embeddings lie in it, in
            the order of writing, and an image may be in it more than once.
        dtype: of the embeddings.
        device: where all of it lies.

    Attributes:
        ids: int64 [capacity], the images in the slots; -1 where nothing has been written yet.
        embeddings: float [capacity, width].
        labels: int64 [capacity], or bool [capacity, classes].
        steps: int64 [capacity], the training step at which each slot was written.
        written: how many embeddings have been written in all.
    """

    def __init__(
        self,
        capacity: int,
        width: int,
        *,
        classes: int | None = None,
        slot_per_image: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"a memory has 1 slot or more, got {capacity}")
        self.slot_per_image = slot_per_image
        self.ids = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        self.embeddings = torch.zeros((capacity, width), dtype=dtype, device=device)
        shape, kind = ((capacity,), torch.int64) if classes is None else ((capacity, classes), torch.bool)
        self.labels = torch.zeros(shape, dtype=kind, device=device)
        self.steps = torch.zeros((capacity,), dtype=torch.int64, device=device)
        self.written = 0

    def __len__(self) -> int:
        """Slots that have been written."""
        return int((self.ids >= 0).sum()) if self.slot_per_image else min(self.written, self.capacity)

    @property
    def capacity(self) -> int:
        return len(self.ids)

    @property
    def seen(self) -> Tensor:
        """Bool [capacity]: the slots that have been written."""
        return self.ids >= 0

    def write(self, ids: Tensor, embeddings: Tensor, labels: Tensor, *, step: int) -> Tensor:
        """Put a global batch into the memory; no gradient goes into it.

        Args:
            ids: int64 [n], ≥ 0. With a slot for each image, the last of equal ids stays.
            embeddings: [n, width], the same on every worker.
            labels: int64 [n], or 0/1 [n, classes].
            step: of the training, kept with each slot.

        Returns:
            int64 [m]: the slots that were written. A ring keeps the last `capacity` of a larger batch, so
            that m ≤ n.
        """
        ids, embeddings, labels = ids.to(self.ids.device), embeddings.detach(), labels.to(self.labels)
        if self.slot_per_image:
            # Several writes to one slot have no defined order on a GPU: only the last one is made.
            last = _last_of_equals(ids)
            ids, embeddings, labels = ids[last], embeddings[last], labels[last]
            slots = ids
        else:
            skipped = max(0, len(ids) - self.capacity)
            ids, embeddings, labels = ids[skipped:], embeddings[skipped:], labels[skipped:]
            first = self.written + skipped
            slots = torch.arange(first, first + len(ids), device=ids.device) % self.capacity
            self.written += skipped
        self.ids[slots] = ids
        self.embeddings[slots] = embeddings.to(self.embeddings)
        self.labels[slots] = labels
        self.steps[slots] = step
        self.written += len(ids)
        return slots

    def contents(self) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, embeddings, labels) of the m slots that have been written, in the order of the slots.

        They are int64 [m], of the memory's type [m, width], and int64 [m] or bool [m, classes].
        Of a ring, and of a full memory, they are views: the next write may change them.
        """
        count = len(self)
        if not self.slot_per_image or count == self.capacity:  # a ring fills from its first slot on
            return self.ids[:count], self.embeddings[:count], self.labels[:count]
        seen = self.seen
        return self.ids[seen], self.embeddings[seen], self.labels[seen]

    def newest(self, ids: Tensor) -> Tensor:
        """int64 [n]: the slot with the newest embedding of each image; -1 where the memory holds none.

        Args:
            ids: int64 [n], ≥ 0.
        """
        places = torch.arange(self.capacity, device=self.ids.device)
        # By image, and within an image by the order of writing; unwritten slots come before all of them.
        oldest = self.written % self.capacity
        keys, slots = torch.sort(self.ids * self.capacity + (places - oldest) % self.capacity)
        last = torch.searchsorted(keys, (ids.to(keys) + 1) * self.capacity) - 1
        found = slots[last.clamp(min=0)]
        return torch.where(self.ids[found] == ids.to(keys), found, -1)

    def ages(self, step: int) -> Tensor:
        """int64 [m]: how many steps ago each of the written slots was written, in the order of the slots."""
        written: Tensor = self.steps[: len(self)] if not self.slot_per_image else self.steps[self.seen]
        return step - written

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "ids": self.ids,
            "embeddings": self.embeddings,
            "labels": self.labels,
            "steps": self.steps,
            "written": self.written,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave.

        Raises:
            ValueError: if it is of a memory of another shape.
        """
        for name in ("ids", "embeddings", "labels", "steps"):
            mine, saved = getattr(self, name), state[name]
            if mine.shape != saved.shape:
                raise ValueError(f"{name} of the memory are {list(mine.shape)}, saved {list(saved.shape)}")
            mine.copy_(saved)
        self.written = int(state["written"])


def _last_of_equals(ids: Tensor) -> Tensor:
    """int64, ascending: the positions that hold the last occurrence of their value."""
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    is_last = torch.ones_like(ids, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return order[is_last].sort().values
