"""What passes between the server's processes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.search import Index
from ray_retrieval.storage import fingerprint

Row = npt.NDArray[Any]
"""One descriptor: a packed code, uint8 [ceil(bits / 8)], or a unit vector, float32 [dimension]."""


@dataclass(frozen=True)
class GroupHits:
    """What a group of shards found for one query.

    Attributes:
        index: identity of the index that the group searched, as `identity` gives it.
        distances: int32 (Hamming) or float32 (squared Euclidean) [k], ascending.
        rows: int64 [k]; -1 where the group has no further row.
    """

    index: str
    distances: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]


def identity(index: Index) -> str:
    """Stands for the content of an index version; two indices of the same number differ in it."""
    return fingerprint(index.manifest.model_dump(mode="json"))
