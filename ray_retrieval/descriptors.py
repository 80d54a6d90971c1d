"""What a method makes of images: packed binary codes or unit vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import ArtefactError


class DescriptorKind(str, Enum):
    """How descriptors are stored and compared."""

    CODES = "codes"
    """Binary codes under the Hamming distance."""
    VECTORS = "vectors"
    """Unit vectors under the squared Euclidean distance."""
    LOCAL = "local"
    """Sets of local features, compared after geometric verification."""


@dataclass(frozen=True)
class Codes:
    """Binary codes.

    Attributes:
        data: uint8 [n, ceil(bits / 8)], bits packed big-endian within the byte as `numpy.packbits` does;
            the bits that fill the last byte are zero.
        bits: true number of bits of a code.

    Raises:
        ArtefactError: if the array's shape or type does not fit the number of bits.
    """

    data: npt.NDArray[np.uint8]
    bits: int

    def __post_init__(self) -> None:
        width = (self.bits + 7) // 8
        if self.data.dtype != np.uint8 or self.data.ndim != 2 or self.data.shape[1] != width:
            raise ArtefactError(
                f"codes of {self.bits} bits are uint8 [n, {width}], "
                f"got {self.data.dtype} {list(self.data.shape)}"
            )

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Vectors:
    """Unit vectors.

    Attributes:
        data: float32 [n, d], each row of length 1.

    Raises:
        ArtefactError: if the array is of another shape or type.
    """

    data: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.data.dtype != np.float32 or self.data.ndim != 2:
            raise ArtefactError(
                f"vectors are float32 [n, dimension], got {self.data.dtype} {list(self.data.shape)}"
            )

    def __len__(self) -> int:
        return len(self.data)


Descriptors = Codes | Vectors


def with_data(like: Descriptors, data: npt.NDArray[Any]) -> Descriptors:
    """Descriptors of the same kind with other rows."""
    return Codes(data, like.bits) if isinstance(like, Codes) else Vectors(data)


def concatenate(parts: Sequence[Descriptors]) -> Descriptors:
    """The rows of several batches of one kind, one after another. At least one part is needed."""
    return with_data(parts[0], np.concatenate([part.data for part in parts]))
