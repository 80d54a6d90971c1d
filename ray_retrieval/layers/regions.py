"""Pooling by regions: a fixed grid of overlapping squares of the map, each described, then summed."""

from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ray_retrieval.layers.pooling import GlobalPooling, GlobalPoolingName, l2_normalised
from ray_retrieval.layers.whitening import Whitening

PoolingKind = Literal[GlobalPoolingName, "rmac"]

LEVELS = 3
_OVERLAP = Fraction(2, 5)  # wanted of neighbours on the first level, of their area
_MOST_ON_LONG_SIDE = 7


class Region(NamedTuple):
    """A rectangle of a map, in features."""

    top: int
    left: int
    height: int
    width: int


class RegionalPooling(nn.Module):
    """Pools float [n, channels, h, w] to unit vectors [n, channels] by the regions of `region_grid`.

    Each region is pooled and divided by its length, whitened and divided by its length again; the sum over
    the regions is divided by its length.

    Args:
        pooling: from a map [n, channels, h, w] to [n, channels].
        whitening: a linear layer from channels to channels; None leaves it out, which with maximum pooling
            is R-MAC.
        levels: of the grid.

    Reference: Tolias et al., Particular Object Retrieval with Integral Max-Pooling of CNN Activations, ICLR
    2016; with learnt whitening: Gordo et al., Deep Image Retrieval, ECCV 2016.
    """

    def __init__(self, pooling: nn.Module, whitening: Whitening | None, *, levels: int = LEVELS) -> None:
        super().__init__()
        self.pooling, self.whitening, self.levels = pooling, whitening, levels

    def forward(self, features: Tensor) -> Tensor:
        vectors = self.regions(features)
        if self.whitening is not None:
            vectors = l2_normalised(self.whitening(vectors))
        return l2_normalised(vectors.sum(dim=1))

    def regions(self, features: Tensor) -> Tensor:
        """Each region pooled and divided by its length, before the whitening: [n, regions, channels].

        What a whitening is learned from.
        """
        height, width = features.shape[2:]
        pooled = [
            self.pooling(features[:, :, top : top + high, left : left + wide])
            for top, left, high, wide in region_grid(height, width, self.levels)
        ]
        return l2_normalised(torch.stack(pooled, dim=1))


def region_grid(height: int, width: int, levels: int = LEVELS) -> list[Region]:
    """The whole map and, on each level l = 1, 2, … `levels`, squares of side 2·min(height, width) / (l + 1).

    A square map has l × l of them on level l. Along the longer side of another there are a few more on each
    level, so many that on the first the overlap of neighbours is as near 40 % as possible with two to seven.
    Squares are spread evenly from border to border; positions are rounded down. Levels whose squares would
    have no side are left out, so a map of 1 × 1 is its own two regions.

    Args:
        height: of the map, in features.
        width: of the map, in features.
        levels: how many; each has smaller squares than the one before.

    Returns:
        The whole map first, then level by level, row by row.

    Reference: Tolias et al. 2016.
    """
    short, long = sorted((height, width))
    extra = _extra(short, long)
    found = [Region(0, 0, height, width)]
    for level in range(1, levels + 1):
        side = 2 * short // (level + 1)
        if side == 0:
            break
        tops = _positions(height, side, level + (extra if height > width else 0))
        lefts = _positions(width, side, level + (extra if width > height else 0))
        found += [Region(top, left, side, side) for top in tops for left in lefts]
    return found


def build_pooling(
    kind: PoolingKind,
    channels: int,
    *,
    p: float = 3.0,
    regional: bool = False,
    levels: int = LEVELS,
) -> nn.Module:
    """A module from float [n, channels, h, w] to [n, channels].

    Args:
        kind: one of `GlobalPooling`, or `rmac`: the maximum by regions, without whitening.
        channels: of the map.
        p: where the exponent of `gem` and `gemmp` starts.
        regional: pool by regions, each whitened by a layer that is learnt.
        levels: of the grid of regions.
    """
    if kind == "rmac":
        return RegionalPooling(
            GlobalPooling("max"), Whitening(channels, channels) if regional else None, levels=levels
        )
    pooling = GlobalPooling(kind, p=p, channels=channels)
    return RegionalPooling(pooling, Whitening(channels, channels), levels=levels) if regional else pooling


def _extra(short: int, long: int) -> int:
    """How many more squares a level has along the longer side than along the other."""
    if short == long:
        return 0

    def miss(regions: int) -> Fraction:
        """How far the overlap of neighbours is from the wanted one; exact, so that equals are recognised."""
        return abs(1 - Fraction(long - short, short * (regions - 1)) - _OVERLAP)

    return min(range(2, _MOST_ON_LONG_SIDE + 1), key=miss) - 1  # of equals, the fewest


def _positions(length: int, side: int, count: int) -> list[int]:
    """Where `count` intervals of `side` begin that are spread over `length`."""
    if count == 1:
        return [0]
    return [index * (length - side) // (count - 1) for index in range(count)]
