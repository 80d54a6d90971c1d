"""The loops of `ids`: a number for each of many texts, and which of these may be among others."""

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


@compiled
def mark(hashes: npt.NDArray[np.uint64], shift: np.uint64, bits: npt.NDArray[np.uint8]) -> None:
    """Set a bit for each number.

    Args:
        hashes: uint64 [n].
        shift: 64 less the binary logarithm of how many bits there are.
        bits: uint8: a power of two of bits, changed.
    """
    for row in range(len(hashes)):
        place = (hashes[row] * np.uint64(0x9E3779B97F4A7C15)) >> shift
        bits[place >> np.uint64(3)] |= np.uint8(1) << np.uint8(place & np.uint64(7))


@compiled
def marked(
    hashes: npt.NDArray[np.uint64],
    shift: np.uint64,
    bits: npt.NDArray[np.uint8],
    out: npt.NDArray[np.bool_],
) -> None:
    """Whether the bit of each number is set: of those that were marked always, of others seldom.

    Args:
        hashes: uint64 [n].
        shift: as for `mark`.
        bits: that `mark` has set.
        out: bool [n], filled.
    """
    for row in range(len(hashes)):
        place = (hashes[row] * np.uint64(0x9E3779B97F4A7C15)) >> shift
        out[row] = (bits[place >> np.uint64(3)] >> np.uint8(place & np.uint64(7))) & np.uint8(1)
