"""The loop of `ids`: a number for each of many texts."""

import numpy as np
import numpy.typing as npt

from ray_retrieval.metrics.compiled import compiled


@compiled
def hash_texts(
    offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8], out: npt.NDArray[np.uint64]
) -> None:
    """64 bits for each text, the same for equal ones: FNV-1a.

    Args:
        offsets: int64 [n + 1]: where each begins, and the last one ends.
        data: uint8: the bytes of all.
        out: uint64 [n], filled.
    """
    for row in range(len(out)):
        found = np.uint64(0xCBF29CE484222325)
        for place in range(offsets[row], offsets[row + 1]):
            found = (found ^ np.uint64(data[place])) * np.uint64(0x100000001B3)
        out[row] = found
