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

_SIZE = {DescriptorKind.CODES: "bits", DescriptorKind.VECTORS: "dimension"}
"""What the size of a descriptor is called, by its kind."""


@dataclass(frozen=True)
class Form:
    """What each descriptor of a method, of embeddings or of an index is.

    Attributes:
        kind: how it is stored and compared.
        size: bits of a code, or dimension of a vector.
    """

    kind: DescriptorKind
    size: int

    def __str__(self) -> str:
        if self.kind is DescriptorKind.CODES:
            return f"{self.size}-bit codes"
        return f"vectors of {self.size} dimensions"

    @staticmethod
    def of(descriptors: Descriptors) -> "Form":
        if isinstance(descriptors, Codes):
            return Form(DescriptorKind.CODES, descriptors.bits)
        return Form(DescriptorKind.VECTORS, descriptors.data.shape[1])

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Form":
        """The form that `as_json` was made of; other keys are left alone.

        Raises:
            ArtefactError: if the kind is not known to this release, or its size is missing.
        """
        names = {kind.value: kind for kind in _SIZE}
        kind = names.get(str(values.get("kind")))
        if kind is None or not isinstance(values.get(_SIZE[kind]), int):
            raise ArtefactError(
                f"descriptors of kind {values.get('kind')!r} without a size, or not known to this release",
                mend="use the release that made them",
            )
        return Form(kind, values[_SIZE[kind]])

    def similarity(self, distance: float) -> float:
        """1 for equal descriptors: the share of equal bits, or the cosine."""
        return 1 - distance / (self.size if self.kind is DescriptorKind.CODES else 2)

    def in_words(self, distance: float) -> str:
        """A distance as people read it: `3 bits`, or `cosine 0.8125`."""
        if self.kind is DescriptorKind.CODES:
            return f"{distance} bit{'' if distance == 1 else 's'}"
        return f"cosine {self.similarity(distance):.4f}"

    def as_json(self) -> dict[str, Any]:
        """`{"kind": "codes", "bits": 48}` or `{"kind": "vectors", "dimension": 128}`."""
        return {"kind": self.kind.value, _SIZE[self.kind]: self.size}

    def with_rows(self, data: npt.NDArray[Any]) -> Descriptors:
        """Descriptors of this form with the given rows.

        Raises:
            ArtefactError: if type or width of the array is not that of the form.
        """
        if self.kind is DescriptorKind.CODES:
            return Codes(data, self.size)
        found = Vectors(data)
        if data.shape[1] != self.size:
            raise ArtefactError(f"{self}, got {list(data.shape)}")
        return found

    def zeros(self, rows: int) -> Descriptors:
        """So many descriptors of nothing but zeros."""
        if self.kind is DescriptorKind.CODES:
            return Codes(np.zeros((rows, (self.size + 7) // 8), np.uint8), self.size)
        return Vectors(np.zeros((rows, self.size), np.float32))


def concatenate(parts: Sequence[Descriptors]) -> Descriptors:
    """The rows of several batches of one kind, one after another. At least one part is needed."""
    return Form.of(parts[0]).with_rows(np.concatenate([part.data for part in parts]))
