"""Labels as the metrics take them: class numbers, or 0 or 1 for each class."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.words import counted


def described(array: npt.NDArray[Any]) -> str:
    """Type and shape, such as `int64 [3, 2]`."""
    return f"{array.dtype} {list(array.shape)}"


def shaped(labels: npt.NDArray[Any], rows: int, of: str, where: str) -> npt.NDArray[Any]:
    """Labels as an array [n] of whole numbers or [n, classes] of any numbers.

    Args:
        labels: int64 [n] or 0/1 [n, classes].
        rows: how many there should be.
        of: what has them: vector or code.
        where: what they are called.

    Raises:
        MetricError: if they are neither, or not so many.
    """
    labels = np.asarray(labels)
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and labels.shape[1] == 0):
        raise MetricError(f"labels are [n] or [n, classes], got {described(labels)}", where=where)
    if len(labels) != rows:
        raise MetricError(f"{counted(rows, of)} but {counted(len(labels), 'label')}", where=where)
    if labels.ndim == 1 and labels.dtype.kind not in "iub":
        raise MetricError(f"class numbers are whole numbers, got {described(labels)}", where=where)
    if labels.ndim == 2 and labels.dtype.kind not in "iubf":
        raise MetricError(f"labels [n, classes] are 0 or 1 each, got {described(labels)}", where=where)
    return labels


def check_alike(query_labels: npt.NDArray[Any], database_labels: npt.NDArray[Any]) -> None:
    """Raise MetricError if one is class numbers and the other is not, or their classes differ."""
    if query_labels.ndim != database_labels.ndim or query_labels.shape[1:] != database_labels.shape[1:]:
        raise MetricError(
            f"query labels are {described(query_labels)} and database labels {described(database_labels)}",
            mend="give both as class numbers [n], or both as 0/1 [n, classes] with the same classes",
        )
