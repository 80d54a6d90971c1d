"""Which trials are stopped before their end.

Pure functions of what the trials have measured so far: a search that was killed goes on deciding as if it had
not been.
"""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from ray_retrieval.tuning.config import TuneConfig

Curve = Sequence[tuple[int, float]]
"""What one trial measured: (epoch, value), the epochs ascending; more is better."""

_MEDIAN_OF = 3
"""So many other trials at least have to tell the median."""


def stops(config: TuneConfig, curves: Mapping[int, Curve], number: int) -> bool:
    """Whether a trial is stopped after its newest value.

    Args:
        config: names the rule.
        curves: of all trials that have measured something, by their numbers.
        number: of the trial that is judged.
    """
    if config.scheduler == "asha":
        return asha(curves, number, grace=config.grace, reduction=config.reduction)
    return config.scheduler == "median" and median(curves, number, grace=config.grace)


def asha(curves: Mapping[int, Curve], number: int, *, grace: int, reduction: int) -> bool:
    """Whether a trial is below the best 1/reduction of those that have come as far.

    Trials are compared at the rungs of grace, grace · reduction, grace · reduction², … epochs, each by its
    first value at or after the rung, with those that are there at that moment: the first one goes on.

    Reference: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, in the form
    that stops trials in place of pausing them.
    """
    epoch, value = curves[number][-1]
    rung = _rung(epoch, grace, reduction)
    if rung is None or _rung_value(curves[number][:-1], rung, reduction) is not None:
        return False
    others = [_rung_value(curve, rung, reduction) for other, curve in curves.items() if other != number]
    reached = [other for other in others if other is not None]
    return bool(reached) and value < float(np.percentile(reached, 100 * (1 - 1 / reduction)))


def _rung(epoch: int, grace: int, reduction: int) -> int | None:
    """The highest rung that is not above the epoch; None before the first."""
    if epoch < grace:
        return None
    rung = grace
    while rung * reduction <= epoch:
        rung *= reduction
    return rung


def _rung_value(curve: Curve, rung: int, reduction: int) -> float | None:
    """The first value at a rung; None where there is none before the next rung."""
    return next((value for epoch, value in curve if rung <= epoch < rung * reduction), None)


def median(curves: Mapping[int, Curve], number: int, *, grace: int) -> bool:
    """Whether a trial's best value so far is below the median of the others' means up to the same epoch.

    Others count that have come as far; with fewer than three of them no trial is stopped.

    Reference: Golovin et al., "Google Vizier", KDD 2017, §3.2.2.
    """
    epoch = curves[number][-1][0]
    if epoch < grace:
        return False
    means = []
    for other, curve in curves.items():
        if other != number and curve and curve[-1][0] >= epoch:
            seen = [value for at, value in curve if grace <= at <= epoch]
            means += [statistics.fmean(seen)] if seen else []
    if len(means) < _MEDIAN_OF:
        return False
    return max(value for _, value in curves[number]) < statistics.median(means)
