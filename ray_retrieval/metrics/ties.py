"""Average precision where the order of ties does not matter, from the counts by distance alone.

Names inside the formulas: `before` rows and `hits` relevant rows are nearer than the bucket (the rows at one
distance) at hand, which has `n` rows of which `r` are relevant.
"""

import math

import numpy as np

from ray_retrieval.metrics.compiled import compiled
from ray_retrieval.metrics.kernels import Floats, Ints

# From this rank on, four terms of the asymptotic series of the harmonic numbers reach double precision.
_SERIES_FROM = 64
# A share of the most probable case that changes no digit of a sum over all cases.
_NEGLIGIBLE = 1e-25


@compiled
def _harmonic(first: int, last: int) -> float:
    """1/(first + 1) + … + 1/last; the error is relative to this sum, however far out it begins."""
    total = 0.0
    while first < last and first < _SERIES_FROM:
        first += 1
        total += 1.0 / first
    if first < last:
        # H(m) = ln m + γ + 1/2m - 1/12m² + 1/120m⁴ - 1/252m⁶ + …; the differences of the powers are written
        # as products, so that two nearby ranks do not cancel.
        u, v = 1.0 / first, 1.0 / last
        difference = (first - last) * u * v
        squares = difference * (u + v)
        total += math.log1p((last - first) * u) + difference / 2.0 - squares / 12.0
        total += squares * (u * u + v * v) / 120.0
        total -= squares * (u**4 + u * u * v * v + v**4) / 252.0
    return total


@compiled
def _run(before: int, hits: int, r: int) -> float:
    """Sum of the precisions at r relevant rows in a row: Σ (hits + i)/(before + i) for i = 1…r."""
    return r - (before - hits) * _harmonic(before, before + r)


@compiled
def _scattered(before: int, hits: int, places: int) -> tuple[float, float]:
    """(a, b): c relevant rows in random order over the places add c·a + c(c - 1)·b to the sum of precisions.

    Place i is relevant with probability c/places, and then follows (i - 1)(c - 1)/(places - 1) others.
    """
    spread = _harmonic(before, before + places)
    a = (hits + 1) * spread / places
    b = (places - (before + 1) * spread) / (places * (places - 1)) if places > 1 else 0.0
    return a, b


@compiled
def _expected_cut(total: float, before: int, hits: int, n: int, r: int, places: int) -> float:
    """Expected average precision where only the first places of the last bucket count.

    How many relevant rows fall there, c, is hypergeometric, and c is in the divisor too, so the expectation
    is summed over c: outward from the most probable one, until what is left would change no digit.
    """
    a, b = _scattered(before, hits, places)
    low, high = max(0, places - (n - r)), min(r, places)
    mode = min(high, max(low, int((places + 1.0) * (r + 1.0) / (n + 2.0))))
    weights, expectation = 0.0, 0.0
    c, weight = mode, 1.0
    while c <= high and weight > _NEGLIGIBLE:
        weights += weight
        if hits + c > 0:
            expectation += weight * (total + c * a + c * (c - 1.0) * b) / (hits + c)
        weight *= (r - c) * float(places - c) / ((c + 1.0) * (n - r - places + c + 1.0))
        c += 1
    c, weight = mode, 1.0
    while c > low and weight > _NEGLIGIBLE:
        weight *= c * float(n - r - places + c) / ((r - c + 1.0) * (places - c + 1.0))
        c -= 1
        weights += weight
        if hits + c > 0:
            expectation += weight * (total + c * a + c * (c - 1.0) * b) / (hits + c)
    return expectation / weights


@compiled
def _order_free(counts: Ints, k: int) -> tuple[float, float, float]:
    """(expected, optimistic, pessimistic) average precision of the first k rows, from the counts alone.

    Reference: McSherry & Najork 2008, Computing information retrieval performance measures efficiently in
    the presence of tied scores, for whole buckets; the bucket that k cuts is worked out in `_expected_cut`.
    """
    before, hits = 0, 0
    expected, best, worst = 0.0, 0.0, 0.0
    for d in range(len(counts)):
        r = counts[d, 1]
        n = counts[d, 0] + r
        if n == 0:
            continue
        places = min(n, k - before)
        first = min(r, places)
        last = max(0, places - (n - r))
        best += _run(before, hits, first)
        worst += _run(before + places - last, hits, last)
        if places < n:
            expected = _expected_cut(expected, before, hits, n, r, places)
            return expected, best / max(1, hits + first), worst / max(1, hits + last)
        a, b = _scattered(before, hits, n)
        expected += r * a + r * (r - 1.0) * b
        before += n
        hits += r
        if before == k:
            break
    divisor = max(1, hits)
    return expected / divisor, best / divisor, worst / divisor


@compiled
def summarise(counts: Ints, k: int) -> tuple[Floats, Ints, Floats, Floats]:
    """What follows from the counts of each query.

    Args:
        counts: int64 [queries, bits + 1, 2], rows by distance, not relevant and relevant.
        k: 1…rows, how many rows of each ranking count.

    Returns:
        average_precision: float64 [queries, 3], the ties in expected, optimistic and pessimistic order.
        relevant: int64 [queries], relevant rows in all.
        precision, recall: float64 [bits + 1], of the ball of each radius, summed over the queries one after
            another; a query for which it is undefined adds 0.
    """
    average_precision = np.zeros((len(counts), 3))
    relevant = np.zeros(len(counts), np.int64)
    precision, recall = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    for q in range(len(counts)):
        expected, best, worst = _order_free(counts[q], k)
        # Rounding may carry a perfect ranking past 1.
        average_precision[q, 0] = min(1.0, expected)
        average_precision[q, 1] = min(1.0, best)
        average_precision[q, 2] = min(1.0, worst)
        for radius in range(counts.shape[1]):
            relevant[q] += counts[q, radius, 1]
        inside, hits = 0, 0
        for radius in range(counts.shape[1]):
            inside += counts[q, radius, 0] + counts[q, radius, 1]
            hits += counts[q, radius, 1]
            precision[radius] += hits / max(1, inside)
            recall[radius] += hits / max(1, relevant[q])
    return average_precision, relevant, precision, recall
