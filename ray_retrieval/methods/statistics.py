"""What methods learn of many vectors at once, wherever their images are encoded."""

from collections.abc import Callable

import torch
from torch import Tensor

from ray_retrieval.layers.whitening import PairStatistics
from ray_retrieval.methods.base import Encode, Outputs, Rows


def statistics_of(encode: Encode, rows: Rows, vectors_of: Callable[[Tensor], Tensor]) -> PairStatistics:
    """The sums over vectors of images, without pairs; only sums leave a worker.

    Args:
        encode: computes something of training images.
        rows: int64 [n], of these.
        vectors_of: makes vectors [..., d] of images uint8 [n, 3, h, w], any number of each.

    Raises:
        DataError: if a vector is not finite.
    """

    def sums(images: Tensor) -> Outputs:
        vectors = vectors_of(images).flatten(0, -2).double()
        count = torch.tensor(len(vectors), dtype=torch.float64, device=vectors.device)
        return {"count": count, "sum": vectors.sum(dim=0), "products": vectors.T @ vectors}

    totals = {name: value.cpu().numpy() for name, value in encode.totals(rows, sums).items()}
    return PairStatistics.of_sums(int(totals["count"]), totals["sum"], totals["products"])
