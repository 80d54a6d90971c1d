"""Batches of P classes with K images each, planned for a whole epoch at once.

One global plan is drawn from (seed, epoch) and cut among the workers afterwards, so that no class stands
twice in a step, on whatever worker, and one, two and four workers see the same batches.

The images of a class are shuffled and cut into chunks of K; each step takes the next chunk of P different
classes, drawn without replacement with a probability in proportion to the chunks that a class has left. What
remains when fewer than P classes have chunks is left for other epochs.

Reference: the P × K batches of Hermans et al. 2017, arXiv 1703.07737; the weighted draw and `pad` as in the
code of Wang et al., Cross-Batch Memory, CVPR 2020.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import DataError

Rows = npt.NDArray[np.int64]
Remainder = Literal["pad", "drop", "carry"]


def pk_plan(
    labels: npt.NDArray[np.int64],
    *,
    classes: int,
    images: int,
    seed: int,
    epoch: int,
    remainder: Remainder = "pad",
) -> list[Rows]:
    """The batches of one epoch.

    Args:
        labels: int64 [n], class numbers.
        classes: P, different classes in a batch.
        images: K, images of each class.
        seed: of the training.
        epoch: epochs finished.
        remainder: what happens to the images of a class beyond a multiple of K: `pad`: a chunk is filled up
            with other images of the class; `drop`: they are not used in this epoch, others are left out in
            the next; `carry`: they begin the class's first chunk of the next epoch. Whatever it is, chunks
            that are left when fewer than P classes have any are not used in this epoch.

    Returns:
        Batches of P · K rows, the K rows of a class side by side. No row stands twice in a batch, unless its
        class has fewer than K images and the remainder is padded; with `drop` and `carry` such classes are
        left out.

    Raises:
        DataError: if fewer than P classes have enough images.
    """
    usable = usable_classes(labels, images, remainder)
    if usable < classes:
        raise DataError(
            f"{usable} classes have enough images, {classes} are needed in a batch",
            mend=f"ask for fewer classes or images a batch, got {classes} × {images}",
        )
    names, starts = np.unique(np.sort(labels), return_index=True)
    rows_of = np.split(np.argsort(labels, kind="stable"), starts[1:])
    cut = (
        _chunks(rows, label, images, seed, epoch, remainder)
        for rows, label in zip(rows_of, names.tolist(), strict=True)
    )
    chunks = [chunk for chunk in cut if chunk]
    left = np.array([len(chunk) for chunk in chunks])
    generator = np.random.default_rng([seed, epoch])
    batches = []
    while (left > 0).sum() >= classes:
        chosen = _drawn(left, classes, generator)
        batches.append(np.concatenate([chunks[one][left[one] - 1] for one in chosen]))
        left[chosen] -= 1
    return batches


def _drawn(left: Rows, count: int, generator: np.random.Generator) -> Rows:
    """Classes drawn one after another without replacement, each in proportion to its chunks.

    A race: a class of c chunks arrives at the time −log(1 − u) / c, u uniform, and the first `count` are the
    draw. No class arrives before u / c, so that most need no logarithm and no place in a sorted order.

    Args:
        left: int64 [classes], chunks of each; `count` classes or more have some.
        count: how many classes to draw.
        generator: gives one number a class.
    """
    uniform = generator.random(len(left))
    within = 2 * count / left.sum()  # twice the time in which `count` chunks arrive
    while True:
        near = np.flatnonzero(uniform < within * left)
        times = -np.log1p(-uniform[near]) / left[near]
        if (times <= within).sum() >= count:
            return near[np.argsort(times, kind="stable")[:count]]
        within *= 2


def usable_classes(labels: npt.NDArray[np.int64], images: int, remainder: Remainder) -> int:
    """How many classes can give a batch its K images.

    Args:
        labels: int64 [n].
        images: K.
        remainder: what becomes of the images of a class that fill no K; with `pad` every class can.
    """
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) if remainder == "pad" else int((counts >= images).sum())


def _chunks(rows: Rows, label: int, images: int, seed: int, epoch: int, remainder: Remainder) -> list[Rows]:
    """The chunks of K rows of one class."""
    if remainder == "carry":
        return _carried(rows, label, images, seed, epoch) if len(rows) >= images else []
    order = _shuffled(rows, label, seed, epoch)
    whole = len(rows) // images * images
    chunks = list(order[:whole].reshape(-1, images))
    rest = order[whole:]
    if remainder == "pad" and len(rest):
        # From the front of the order, none of which is in the rest; again and again where a class is small.
        fill = np.resize(order[:whole] if whole else order, images - len(rest))
        chunks.append(np.concatenate([rest, fill]))
    return chunks


def _carried(rows: Rows, label: int, images: int, seed: int, epoch: int) -> list[Rows]:
    """The chunks of an epoch that goes on where the one before it stopped.

    The class is one circle of images. Epoch e takes what lies between ⌊e · n / K⌋ · K and
    ⌊(e + 1) · n / K⌋ · K on the way around it, shuffled: now and then K − 1 images more than there are.
    """
    count = len(rows)
    first, last = (((epoch + step) * count // images) * images for step in (0, 1))
    circle = _shuffled(rows, label, seed, 0)
    taken = circle[np.arange(first, last) % count]
    once, again = taken[:count], taken[count:]
    shuffled = _shuffled(once, label, seed, epoch + 1)
    if not len(again):
        return list(shuffled.reshape(-1, images))
    # Those that come a second time stand in another chunk than the first.
    others = shuffled[~np.isin(shuffled, again)]
    rest = others[: images - len(again)]
    whole = shuffled[~np.isin(shuffled, rest)]
    return [*whole.reshape(-1, images), np.concatenate([rest, again])]


def _shuffled(rows: Rows, label: int, seed: int, epoch: int) -> Rows:
    shuffled: Any = np.random.default_rng([seed, epoch, label]).permutation(rows)
    return np.asarray(shuffled, dtype=np.int64)
