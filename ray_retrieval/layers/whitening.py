"""Whitening as a linear layer, and how it is learned: from pairs or from a covariance.

What is learned depends on the vectors only through sums, which are kept in float64.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.linalg import cholesky, eigh, eigvalsh, solve_triangular
from torch import Tensor, nn

from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.workers import sum_over_workers

Array = NDArray[np.float64]
Vectors = NDArray[np.floating]

PAIRS_A_DIMENSION = 2
"""With fewer pairs for each dimension, `learned` shrinks the covariance of their differences."""
SHARE = 0.1
"""Of the identity in the covariance that is shrunk."""

_BLOCK_BYTES = 64 << 20  # of float64 copies at a time
_FIRST_SHIFT = 1e-10  # of the diagonal, then ten times as much, as in the published code
# Of the mean square of the vectors' lengths: variances below it are rounding, that of float32 (1e-7 of an
# entry) as that of the sums. Vectors of unit length are multiplied by 1e6 at most.
_NOISE = 1e-12


class Whitening(nn.Linear):
    """A linear layer with bias, over vectors [..., dim_in] or at every place of a map [n, dim_in, h, w].

    Computed in float32 or wider whatever autocast says: the bias takes away a mean that is most of a vector,
    and what is left would be rounding.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            kind = torch.promote_types(torch.promote_types(features.dtype, self.weight.dtype), torch.float32)
            values, weight, bias = features.to(kind), self.weight.to(kind), self.bias.to(kind)
            if values.ndim == 4:  # as a product: GPUs convolve float32 in TF32, unless told not to
                return F.linear(values.movedim(1, -1), weight, bias).movedim(-1, 1)
            return F.linear(values, weight, bias)

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
    """The sums from which whitening is learned.

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

    @staticmethod
    def of_sums(vectors: int, vector_sum: Array, products: Array) -> "PairStatistics":
        """Those of vectors that have been summed already, without pairs.

        Args:
            vectors: how many.
            vector_sum: float64 [d], their sum.
            products: float64 [d, d], sum over vectors of x xᵀ.

        Raises:
            DataError: if the sums do not fit together or hold numbers that are not finite.
        """
        found = PairStatistics(len(vector_sum))
        if products.shape != found.products.shape:
            raise DataError(
                f"products {list(found.products.shape)} were expected, found {list(products.shape)}",
                where="whitening",
            )
        _refuse_infinite(products)
        found.vectors, found.vector_sum, found.products = vectors, vector_sum, products
        return found

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

    def sum_over_workers(self, device: torch.device) -> None:
        """Replace the sums of this worker's share by those over all workers; all call it together.

        Args:
            device: through which tensors travel.
        """
        names = ("query_sum", "vector_sum", "differences", "products")
        parts = [np.array([self.pairs, self.vectors], np.float64), *(getattr(self, name) for name in names)]
        flat = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]))
        summed = sum_over_workers(flat.to(device)).cpu().numpy()
        counts, *found = np.split(summed, np.cumsum([part.size for part in parts])[:-1])
        self.pairs, self.vectors = int(counts[0]), int(counts[1])
        for name, values in zip(names, found, strict=True):
            setattr(self, name, values.reshape(getattr(self, name).shape))

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

    Two things keep the result of sane size beyond the published formula. Directions in which the vectors do
    not vary (channels that are always 0) are left out; their rows, the last, are 0. With fewer pairs than two
    a dimension, S becomes 0.9 S + 0.1 σ I, where σ is the mean of its diagonal: its least eigenvalues are
    far too small then, and what they belong to would drown all else. Both are warned of.

    Args:
        statistics: of pairs and of all vectors.
        dimension: of the result; None keeps that of the vectors.

    Returns:
        mean float64 [d] and projection float64 [dimension, d], the largest entry of each row positive; for
        `Whitening.initialise`.

    Raises:
        DataError: no pairs or no vectors.
        RecipeError: `dimension` is not within 1 … d.

    Reference: Radenović et al., TPAMI 2018, §3.4; Mikolajczyk and Matas, ICCV 2007; shrinking towards the
    identity: Ledoit and Wolf, 2004.
    """
    kept = _kept(statistics, dimension)
    if not statistics.pairs:
        raise DataError("whitening is learned from pairs, there are none", where="whitening")
    mean = statistics.query_sum / statistics.pairs
    total = statistics.scatter(mean)
    values, directions = _eigenvectors(total / statistics.vectors)
    # Only what varies, in coordinates of its own; which ones does not matter to the result.
    basis = directions[:, values > _noise(statistics)]
    apart = basis.T @ (statistics.differences / statistics.pairs) @ basis
    if statistics.pairs < PAIRS_A_DIMENSION * basis.shape[1]:
        warnings.warn(
            f"whitening of {basis.shape[1]} dimensions is learned from {statistics.pairs} pairs only: "
            f"the covariance of their differences is shrunk by {SHARE:.0%}",
            stacklevel=2,
        )
        apart = (1 - SHARE) * apart + SHARE * apart.diagonal().mean() * np.eye(len(apart))
    projection = np.zeros((0, statistics.dimension))
    if len(apart):
        lower = _cholesky(apart, _noise(statistics))
        half = solve_triangular(lower, basis.T @ total @ basis, lower=True)
        vectors = _eigenvectors(solve_triangular(lower, half.T, lower=True))[1]
        projection = solve_triangular(lower, vectors[:, :kept], lower=True, trans="T").T @ basis.T
    return mean, _filled(_signed(projection), kept)


def pca(
    statistics: PairStatistics, dimension: int | None = None, *, shrinkage: float = 1.0
) -> tuple[Array, Array]:
    """Whitening by principal components.

    Row i of the projection is the i-th eigenvector of the covariance, largest eigenvalue λᵢ first, times
    λᵢ^(−shrinkage / 2). Where the vectors vary in fewer directions than `dimension` (never more than one
    fewer than there are vectors), the last rows are 0, and a warning says so.

    Args:
        statistics: of all vectors; pairs do not matter.
        dimension: of the result; None keeps that of the vectors.
        shrinkage: 1 gives each direction the same variance, 0 leaves the variances as they are.

    Returns:
        mean float64 [d] and projection float64 [dimension, d], the largest entry of each row positive; for
        `Whitening.initialise`.

    Raises:
        DataError: no vectors.
        RecipeError: `dimension` is not within 1 … d.

    Reference: Jégou and Chum, Negative Evidences and Co-occurences in Image Retrieval, ECCV 2012; with
    shrinkage: Tolias et al., Learning and Aggregating Deep Local Descriptors (HOW), ECCV 2020.
    """
    kept = _kept(statistics, dimension)
    mean = statistics.vector_sum / statistics.vectors
    values, vectors = _eigenvectors(statistics.scatter(mean) / statistics.vectors)
    rank = min(int((values > _noise(statistics)).sum()), statistics.vectors - 1)
    varying = min(rank, kept)
    projection = _signed(vectors[:, :varying].T) * values[:varying, None] ** (-shrinkage / 2)
    return mean, _filled(projection, kept)


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
    _refuse_infinite(product)
    return product


def _refuse_infinite(products: Array) -> None:
    """Raise DataError if a sum of x xᵀ has something that is not finite: then its diagonal has."""
    if not np.isfinite(products.trace()):
        raise DataError("descriptors hold numbers that are not finite", where="whitening")


def _noise(statistics: PairStatistics) -> float:
    """The variance up to which a direction counts as one in which the vectors do not vary."""
    return float(_NOISE * statistics.products.trace() / statistics.vectors)


def _filled(projection: Array, rows: int) -> Array:
    """The projection with rows of 0 behind, up to `rows`; warns if there are any."""
    found = len(projection)
    if found < rows:
        warnings.warn(
            f"the vectors vary in {found} directions, whitening asks for {rows}: the other {rows - found} "
            "are always 0 (fewer dimensions would do, or more images may help)",
            stacklevel=3,
        )
    return np.concatenate([projection, np.zeros((rows - found, projection.shape[1]))])


def _cholesky(matrix: Array, noise: float) -> Array:
    """L of matrix + shift·I = L Lᵀ, the shift 0 or the first of 1e-10, 1e-9, … that makes it definite.

    Definite means that its least eigenvalue is above `noise`: a singular matrix may pass the factorisation
    with pivots of pure rounding, whose inverse would drown all else.
    """
    least, shift = float(eigvalsh(matrix)[0]), 0.0
    while least + shift <= noise:
        shift = shift * 10 if shift else _FIRST_SHIFT
    lower: Array = cholesky(matrix + shift * np.eye(len(matrix)), lower=True)
    return lower


def _eigenvectors(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, descending, and eigenvectors as columns of a matrix that is symmetric up to rounding."""
    values, vectors = eigh((matrix + matrix.T) / 2)
    return values[::-1], vectors[:, ::-1]


def _signed(rows: Array) -> Array:
    """The rows, each with the sign that makes its entry of largest size positive."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    return np.where(largest < 0, -rows, rows)
