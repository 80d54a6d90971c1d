"""Whitening: learned from pairs or from a covariance, as a layer or applied to stored vectors.

What is learned depends on the vectors only through sums, which are kept in float64 and add up over workers.
"""

import warnings
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.linalg import cholesky, eigh, solve_triangular
from torch import Tensor, nn

from ray_retrieval.errors import DataError, RecipeError

Array = NDArray[np.float64]
Vectors = NDArray[np.floating]

_BLOCK_BYTES = 64 << 20  # of float64 copies at a time
_FIRST_SHIFT = 1e-10  # of the diagonal, then ten times as much, as in the published code


class Whitening(nn.Linear):
    """A linear layer with bias, over vectors [..., dim_in] or at every place of a map [n, dim_in, h, w]."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out)

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim == 4:
            return F.conv2d(features, self.weight[:, :, None, None], self.bias)
        return F.linear(features, self.weight, self.bias)

    def initialise(self, mean: Array, projection: Array) -> None:
        """Make the layer x ↦ projection · (x − mean): weight = projection, bias = −projection · mean.

        Args:
            mean: float64 [dim_in].
            projection: float64 [dim_out, dim_in].

        Raises:
            DataError: other shapes.
        """
        if projection.shape != tuple(self.weight.shape) or mean.shape != projection.shape[1:]:
            raise DataError(
                f"a whitening of {self.in_features} to {self.out_features} dimensions was expected, "
                f"a mean {mean.shape} and a projection {projection.shape} were found",
                where="whitening",
            )
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(projection))
            self.bias.copy_(torch.from_numpy(-projection @ mean))


@dataclass
class PairStatistics:
    """The sums from which whitening is learned: each is a plain sum, so those of parts add up.

    Args:
        dimension: of the vectors, d.
    """

    dimension: int
    pairs: int = field(default=0, init=False)
    vectors: int = field(default=0, init=False)
    query_sum: Array = field(init=False)  # [d]
    vector_sum: Array = field(init=False)  # [d]
    differences: Array = field(init=False)  # [d, d], sum over pairs of (q − p)(q − p)ᵀ
    products: Array = field(init=False)  # [d, d], sum over vectors of x xᵀ

    def __post_init__(self) -> None:
        d = self.dimension
        self.query_sum, self.vector_sum = np.zeros(d), np.zeros(d)
        self.differences, self.products = np.zeros((d, d)), np.zeros((d, d))

    def add(self, queries: Vectors, positives: Vectors) -> None:
        """Add pairs: row i of `queries` [n, d] shows what row i of `positives` [n, d] shows.

        Raises:
            DataError: the two have other shapes, or numbers that are not finite.
        """
        if queries.shape != positives.shape:
            raise DataError(
                f"each query has one positive, found {queries.shape} and {positives.shape}", where="whitening"
            )
        for block in self._blocks(len(self._checked(queries))):
            mine = queries[block].astype(np.float64)
            self.differences += _product(mine - positives[block])
            self.query_sum += mine.sum(axis=0)
        self.pairs += len(queries)

    def add_all(self, vectors: Vectors) -> None:
        """Add vectors [n, d] whose covariance counts: those of every image, each once.

        Raises:
            DataError: another shape, or numbers that are not finite.
        """
        for block in self._blocks(len(self._checked(vectors))):
            mine = vectors[block].astype(np.float64)
            self.products += _product(mine)
            self.vector_sum += mine.sum(axis=0)
        self.vectors += len(vectors)

    def merge(self, other: "PairStatistics") -> "PairStatistics":
        """The statistics of both parts together."""
        return PairStatistics.from_array(self.as_array() + other.as_array(), self.dimension)

    def as_array(self) -> Array:
        """All sums in one float64 [2 + 2d + 2d²], to be added to those of other workers."""
        return np.concatenate(
            [
                [self.pairs, self.vectors],
                self.query_sum,
                self.vector_sum,
                self.differences.ravel(),
                self.products.ravel(),
            ]
        )

    @classmethod
    def from_array(cls, array: Array, dimension: int) -> "PairStatistics":
        """The inverse of `as_array`.

        Raises:
            DataError: the array has another length than statistics of `dimension` have.
        """
        d = dimension
        if array.shape != (2 + 2 * d + 2 * d * d,):
            raise DataError(f"these are no statistics of {d} dimensions: {array.shape}", where="whitening")
        found = cls(d)
        counts, found.query_sum, found.vector_sum, differences, products = np.split(
            array, np.cumsum([2, d, d, d * d])
        )
        found.pairs, found.vectors = (round(float(count)) for count in counts)
        found.differences, found.products = differences.reshape(d, d), products.reshape(d, d)
        return found

    def scatter(self, mean: Array) -> Array:
        """Sum over all vectors of (x − mean)(x − mean)ᵀ, float64 [d, d]."""
        cross = np.outer(self.vector_sum, mean)
        return self.products - cross - cross.T + self.vectors * np.outer(mean, mean)

    def _blocks(self, rows: int) -> list[slice]:
        size = max(1, _BLOCK_BYTES // (8 * self.dimension))
        return [slice(start, start + size) for start in range(0, rows, size)]

    def _checked(self, vectors: Vectors) -> Vectors:
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise DataError(
                f"vectors [n, {self.dimension}] were expected, found {vectors.shape}", where="whitening"
            )
        return vectors


def learned(statistics: PairStatistics, dimension: int | None = None) -> tuple[Array, Array]:
    """Discriminative whitening: shrinks what differs between images of one thing, then turns to what varies.

    With m the mean of the queries, S = L Lᵀ the mean of (q − p)(q − p)ᵀ over pairs and V the eigenvectors,
    largest eigenvalue first, of the scatter about m of all L⁻¹x: the projection is the first `dimension` rows
    of Vᵀ L⁻¹. Where S is not positive definite, 1e-10, or ten times that, … is added to its diagonal.

    Args:
        statistics: of pairs and of all vectors.
        dimension: of the result; None keeps that of the vectors.

    Returns:
        mean float64 [d] and projection float64 [dimension, d], the largest entry of each row positive; for
        `apply` and `Whitening.initialise`.

    Raises:
        DataError: no pairs or no vectors.
        RecipeError: `dimension` is not within 1 … d.

    Reference: Radenović et al., TPAMI 2018, §3.4; Mikolajczyk and Matas, ICCV 2007.
    """
    kept = _kept(statistics, dimension)
    if not statistics.pairs:
        raise DataError("whitening is learned from pairs, there are none", where="whitening")
    if statistics.pairs < statistics.dimension:
        warnings.warn(
            f"whitening of {statistics.dimension} dimensions is learned from {statistics.pairs} pairs only: "
            "directions in which no pair differs are stretched beyond what is known of them",
            stacklevel=2,
        )
    mean = statistics.query_sum / statistics.pairs
    lower = _cholesky(statistics.differences / statistics.pairs)
    half = solve_triangular(lower, statistics.scatter(mean), lower=True)
    vectors = _eigenvectors(solve_triangular(lower, half.T, lower=True))[1]
    projection = solve_triangular(lower, vectors[:, :kept], lower=True, trans="T").T
    return mean, _signed(projection)


def pca(
    statistics: PairStatistics, dimension: int | None = None, *, shrinkage: float = 1.0
) -> tuple[Array, Array]:
    """Whitening by principal components.

    Row i of the projection is the i-th eigenvector of the covariance, largest eigenvalue λᵢ first, times
    λᵢ^(−shrinkage / 2).

    Args:
        statistics: of all vectors; pairs do not matter.
        dimension: of the result; None keeps every direction in which the vectors vary.
        shrinkage: 1 gives each direction the same variance, 0 leaves the variances as they are.

    Returns:
        mean float64 [d] and projection float64 [dimension, d], the largest entry of each row positive; for
        `apply` and `Whitening.initialise`.

    Raises:
        DataError: no vectors, or they vary in fewer directions than `dimension` (never more than one fewer
            than there are vectors).
        RecipeError: `dimension` is not within 1 … d.

    Reference: Jégou and Chum, Negative Evidences and Co-occurences in Image Retrieval, ECCV 2012; with
    shrinkage: Tolias et al., Learning and Aggregating Deep Local Descriptors (HOW), ECCV 2020.
    """
    _kept(statistics, dimension)
    mean = statistics.vector_sum / statistics.vectors
    values, vectors = _eigenvectors(statistics.scatter(mean) / statistics.vectors)
    # What remains of a variance of zero after E[xx] - E[x]E[x] is of the order of the rounding of E[xx].
    noise = np.finfo(np.float64).eps * statistics.dimension * statistics.products.trace() / statistics.vectors
    rank = min(int((values > noise).sum()), statistics.vectors - 1)
    kept = rank if dimension is None else dimension
    if kept > rank or not rank:
        raise DataError(
            f"{statistics.vectors} vectors vary in {rank} directions, whitening asks for {max(kept, 1)}",
            where="whitening",
            mend=f"take more images, or {rank} dimensions at most" if rank else "take more images",
        )
    return mean, _signed(vectors[:, :kept].T) * values[:kept, None] ** (-shrinkage / 2)


def apply(vectors: Vectors, mean: Array, projection: Array) -> NDArray[np.float32]:
    """Vectors whitened: projection · (x − mean) of each row, divided by its length, float32 [n, k] of [n, d].

    Computed in float64, in blocks of bounded memory. A row that is the mean becomes zeros.

    Raises:
        DataError: the vectors have another dimension than the mean.
    """
    if vectors.ndim != 2 or vectors.shape[1:] != mean.shape:
        raise DataError(
            f"the whitening is of {len(mean)} dimensions, the vectors are {vectors.shape}", where="whitening"
        )
    found = np.empty((len(vectors), len(projection)), np.float32)
    size = max(1, _BLOCK_BYTES // (8 * len(mean)))
    for start in range(0, len(vectors), size):
        projected = (vectors[start : start + size] - mean) @ projection.T
        lengths = np.linalg.norm(projected, axis=1, keepdims=True)
        found[start : start + size] = projected / np.maximum(lengths, np.finfo(np.float64).tiny)
    return found


def _kept(statistics: PairStatistics, dimension: int | None) -> int:
    """The dimension of the result, checked."""
    if not statistics.vectors:
        raise DataError("whitening is learned from descriptors, there are none", where="whitening")
    if dimension is not None and not 1 <= dimension <= statistics.dimension:
        raise RecipeError(
            f"whitening keeps 1 to {statistics.dimension} dimensions, {dimension} were asked for",
            where="whitening",
        )
    return dimension or statistics.dimension


def _product(rows: Array) -> Array:
    """Sum over the rows of x xᵀ."""
    product: Array = rows.T @ rows
    if not np.isfinite(product.trace()):
        raise DataError("descriptors hold numbers that are not finite", where="whitening")
    return product


def _cholesky(matrix: Array) -> Array:
    """L of matrix + shift·I = L Lᵀ, the shift 0 or the first of 1e-10, 1e-9, … that makes it definite.

    Definite means beyond rounding: a singular matrix may pass the factorisation with pivots of pure noise,
    whose inverse would drown all else.
    """
    shift, identity, largest = 0.0, np.eye(len(matrix)), matrix.diagonal().max()
    noise = np.finfo(np.float64).eps * len(matrix) * largest
    while shift <= 10 * largest + _FIRST_SHIFT:
        with suppress(np.linalg.LinAlgError):
            lower: Array = cholesky(matrix + shift * identity, lower=True)
            if (lower.diagonal() ** 2).min() > noise:
                return lower
        shift = shift * 10 if shift else _FIRST_SHIFT
    raise DataError("the differences of pairs have no valid covariance", where="whitening")


def _eigenvectors(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, descending, and eigenvectors as columns of a matrix that is symmetric up to rounding."""
    values, vectors = eigh((matrix + matrix.T) / 2)
    return values[::-1], vectors[:, ::-1]


def _signed(rows: Array) -> Array:
    """The rows, each with the sign that makes its entry of largest size positive."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    return np.where(largest < 0, -rows, rows)
