"""What passes between the server's processes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_retrieval.search import Index
from ray_retrieval.storage import fingerprint

Code = npt.NDArray[np.uint8]
"""A packed code, uint8 [ceil(bits / 8)]."""


@dataclass(frozen=True)
class GroupHits:
    """What a group of shards found for one query.

    Attributes:
        index: identity of the index that the group searched, as `identity` gives it.
        distances: int32 [k], ascending.
        rows: int64 [k]; -1 where the group has no further row.
    """

    index: str
    distances: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]


def identity(index: Index) -> str:
    """Stands for the content of an index version; two indices of the same number differ in it."""
    return fingerprint(index.manifest.model_dump(mode="json"))
