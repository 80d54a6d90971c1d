"""Whitening in GeM: what linear layers start from, and what is learned when training has ended."""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ray_retrieval.config import Config
from ray_retrieval.data.mining import LabelPairs
from ray_retrieval.errors import DataError
from ray_retrieval.layers.whitening import PairStatistics, Whitening, learned, pca
from ray_retrieval.methods.base import Encode, Rows, Work
from ray_retrieval.methods.statistics import statistics_of
from ray_retrieval.workers import my_share

_SEED = int.from_bytes(b"whiten", "big")
"""Keeps what is drawn for whitening apart from other draws."""
_PLACES = 16
"""Vectors of a map, or of its regions, that a layer's start is learned from, evenly spread."""


class WhiteningConfig(Config):
    """What is learned of the trained network's descriptors."""

    name: Literal["none", "learned", "pca"] = "none"
    """`learned`: by pairs of images of one thing, whose differences become white; `pca`: by single images."""
    shrinkage: float = Field(default=1.0, ge=0, le=1)
    """Of `pca`: 1 makes all directions equally strong, 0 leaves them as they are."""
    images: int = Field(default=20_000, ge=2)
    """Training images that it is learned from, at most, drawn at random."""


def learn_by_pairs(
    layer: Whitening, pairs: Rows | LabelPairs, images: int, encode: Encode, describe: Work
) -> None:
    """Give a layer the whitening that is learned from pairs; warns where they tell too little of it.

    Args:
        layer: set.
        pairs: int64 [n, 2], rows of the training table, or those of equal labels.
        images: that are described at most.
        encode: as for `Method.before_step`.
        describe: gives `vectors` [n, d] of images.

    Raises:
        DataError: if a vector holds what is no finite number.
    """
    generator = np.random.default_rng(_SEED)
    if isinstance(pairs, LabelPairs):
        drawn = pairs.draw(images // 2, generator)
    else:
        drawn = pairs[np.sort(generator.permutation(len(pairs))[: images // 2])]
    rows = np.unique(drawn)
    # A pair's images may be described by two workers, so descriptors travel; each then sums its share.
    described = encode(rows, describe)["vectors"]
    vectors = described.double().cpu().numpy()
    if not np.isfinite(vectors).all():  # on every worker alike: none waits for another's sums
        raise DataError("descriptors hold numbers that are not finite", where="whitening")
    queries, positives = np.searchsorted(rows, drawn[my_share(len(drawn))]).T
    statistics = PairStatistics(vectors.shape[1])
    statistics.add_all(vectors[my_share(len(rows))])
    statistics.add(vectors[queries], vectors[positives])
    statistics.sum_over_workers(described.device)
    layer.initialise(*learned(statistics, layer.out_features))


def learn_by_images(
    layer: Whitening, count: int, images: int, encode: Encode, describe: Work, *, shrinkage: float
) -> None:
    """Give a layer the whitening by principal components.

    Where the vectors vary in fewer directions than the layer gives, the others are 0, and a warning says so:
    it is learned when a training has ended, which would be lost otherwise.

    Args:
        layer: set.
        count: training images that there are.
        images: that are described at most.
        encode: as for `Method.before_step`.
        describe: gives `vectors` [n, d] of images.
        shrinkage: see `layers.whitening.pca`.
    """
    statistics = statistics_of(encode, _drawn(count, images), lambda found: describe(found)["vectors"])
    layer.initialise(*pca(statistics, layer.out_features, shrinkage=shrinkage))


def start_by_places(layer: Whitening, count: int, images: int, encode: Encode, describe: Work) -> None:
    """Let a layer that whitens places or regions start from their principal components.

    Directions in which they do not vary start at 0, with a warning.

    Args:
        layer: set.
        count: training images that there are.
        images: that are described at most.
        encode: as for `Method.before_step`.
        describe: gives `vectors` [n, places, d] of images, as many places for images of every size.
    """
    statistics = statistics_of(encode, _drawn(count, images), lambda found: describe(found)["vectors"])
    layer.initialise(*pca(statistics, layer.out_features))


def spread(vectors: Tensor) -> Tensor:
    """Some of the places of [n, places, d], as many of any number: [n, 16, d]."""
    chosen = torch.linspace(0, vectors.shape[1] - 1, _PLACES, device=vectors.device).round().long()
    return vectors[:, chosen]


def start_as_identity(layer: Whitening) -> None:
    """Let a layer hand on its input, or the first of its dimensions."""
    with torch.no_grad():
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def _drawn(count: int, images: int) -> Rows:
    return np.sort(np.random.default_rng(_SEED).permutation(count)[:images]).astype(np.int64)
