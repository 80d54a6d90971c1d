"""What a method makes of images: packed binary codes, unit vectors, or sets of local features."""

from collections.abc import Iterable, Sequence
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
    """Sets of local features, compared by those that agree on where things are."""


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
        if not _is_table(self.data, np.uint8) or self.data.shape[1] != width:
            raise ArtefactError(
                f"codes of {self.bits} bits are uint8 [n, {width}], got {_in_words(self.data)}",
                mend="pack the bits of each with numpy.packbits(bits, axis=1)",
            )

    def __len__(self) -> int:
        return len(self.data)

    def take(self, rows: "npt.NDArray[np.int64]") -> "Codes":
        """Those of some rows, int64 [m], in the order asked."""
        return Codes(self.data[rows], self.bits)


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
        if not _is_table(self.data, np.float32):
            raise ArtefactError(
                f"vectors are float32 [n, dimension], got {_in_words(self.data)}",
                mend="give numpy.asarray(vectors, numpy.float32), each of length 1",
            )

    def __len__(self) -> int:
        return len(self.data)

    def take(self, rows: "npt.NDArray[np.int64]") -> "Vectors":
        """Those of some rows, int64 [m], in the order asked."""
        return Vectors(self.data[rows])


@dataclass(frozen=True)
class Local:
    """Sets of local features, one set an image; a set may be empty.

    The features of image i are the rows offsets[i] to offsets[i + 1] of the other arrays, those of the
    highest score first.

    Attributes:
        offsets: int64 [n + 1], ascending from 0 to m.
        data: float16 [m, d], descriptors of length 1 but for the rounding.
        locations: float32 [m, 2], x and y in pixels of the upright image; the centre of its first pixel is
            (0, 0).
        scales: float32 [m], the factors by which the image was resized when the features were found.
        scores: float32 [m], how much the network attends to them; only the order has a meaning.
        sizes: int32 [n, 2], width and height of the images in pixels.
        vectors: float32 [n, g], global descriptors of length 1 from the same pass; g may be 0.

    Raises:
        ArtefactError: if the arrays' shapes or types do not fit together.
    """

    offsets: npt.NDArray[np.int64]
    data: npt.NDArray[np.float16]
    locations: npt.NDArray[np.float32]
    scales: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    sizes: npt.NDArray[np.int32]
    vectors: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        images, features = len(self.offsets) - 1, len(self.data)
        dimension, extra = self.data.shape[-1], self.vectors.shape[-1]
        wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
            "offsets": (np.int64, (images + 1,)),
            "data": (np.float16, (features, dimension)),
            "locations": (np.float32, (features, 2)),
            "scales": (np.float32, (features,)),
            "scores": (np.float32, (features,)),
            "sizes": (np.int32, (images, 2)),
            "vectors": (np.float32, (images, extra)),
        }
        for name, (dtype, shape) in wanted.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise ArtefactError(
                    f"'{name}' of local features is {np.dtype(dtype)} {list(shape)}, "
                    f"got {array.dtype} {list(array.shape)}"
                )
        if self.offsets[0] != 0 or self.offsets[-1] != features or (np.diff(self.offsets) < 0).any():
            raise ArtefactError(f"'offsets' of local features ascend from 0 to {features}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """int64 [n]: features of each image."""
        return np.diff(self.offsets)

    def take(self, rows: "npt.NDArray[np.int64]") -> "Local":
        """The sets of some images, int64 [m], in the order asked."""
        rows = np.asarray(rows, np.int64)
        starts = self.offsets[:-1][rows]
        counts = self.offsets[1:][rows] - starts  # of these alone: there may be millions of others
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        features = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return Local(
            offsets,
            self.data[features],
            self.locations[features],
            self.scales[features],
            self.scores[features],
            self.sizes[rows],
            self.vectors[rows],
        )


Descriptors = Codes | Vectors | Local

_SIZE = {DescriptorKind.CODES: "bits", DescriptorKind.VECTORS: "dimension", DescriptorKind.LOCAL: "dimension"}
"""What the size of a descriptor is called, by its kind."""


@dataclass(frozen=True)
class Form:
    """What each descriptor of a method, of embeddings or of an index is.

    Attributes:
        kind: how it is stored and compared.
        size: bits of a code, or dimension of a vector or of a local feature.
        vectors: dimension of the global descriptor that comes with a set of local features; 0 without one.
    """

    kind: DescriptorKind
    size: int
    vectors: int = 0

    def __str__(self) -> str:
        if self.kind is DescriptorKind.CODES:
            return f"{self.size}-bit codes"
        if self.kind is DescriptorKind.VECTORS:
            return f"vectors of {self.size} dimensions"
        more = f", with vectors of {self.vectors}" if self.vectors else ""
        return f"sets of local features of {self.size} dimensions{more}"

    @staticmethod
    def of(descriptors: Descriptors) -> "Form":
        """The form of some descriptors.

        Raises:
            ArtefactError: if they are something else, such as an array.
        """
        if isinstance(descriptors, Codes):
            return Form(DescriptorKind.CODES, descriptors.bits)
        if isinstance(descriptors, Vectors):
            return Form(DescriptorKind.VECTORS, descriptors.data.shape[1])
        if isinstance(descriptors, Local):
            return Form(DescriptorKind.LOCAL, descriptors.data.shape[1], descriptors.vectors.shape[1])
        raise ArtefactError(
            f"descriptors are Codes, Vectors or Local, got {_in_words(descriptors)}",
            mend="make them of an array with Vectors(array) or Codes(array, bits); of what an encoder "
            "returns, they are the first",
        )

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
        return Form(kind, values[_SIZE[kind]], int(values.get("vectors") or 0))

    def similarity(self, distance: float) -> float:
        """1 for equal codes or vectors: the share of equal bits, or the cosine; of local features the score.

        The distance of sets of local features is their score in a search with the sign turned: 0 for images
        that have nothing in common, and below 1, however alike they are.
        """
        if self.kind is DescriptorKind.LOCAL:
            return -distance
        return 1 - distance / (self.size if self.kind is DescriptorKind.CODES else 2)

    def in_words(self, distance: float, inliers: int | None = None) -> str:
        """A distance as people read it: `3 bits`, `cosine 0.8125` or `score 0.1250`.

        Args:
            distance: of a search.
            inliers: where the image was verified, the features that agree on where things are, or 0 if there
                are too few. They are what counts then: `42 inliers`, `no match`, `42 inliers, cosine 0.8125`.
        """
        if inliers is not None:
            found = f"{inliers} inlier{'' if inliers == 1 else 's'}" if inliers else "no match"
            return found if self.kind is DescriptorKind.LOCAL else f"{found}, {self.in_words(distance)}"
        if self.kind is DescriptorKind.CODES:
            return f"{distance} bit{'' if distance == 1 else 's'}"
        if self.kind is DescriptorKind.VECTORS:
            return f"cosine {self.similarity(distance):.4f}"
        return f"score {self.similarity(distance):.4f}"

    def as_json(self) -> dict[str, Any]:
        """`{"kind": "codes", "bits": 48}` or `{"kind": "vectors", "dimension": 128}`.

        Of local features `{"kind": "local", "dimension": 128, "vectors": 2048}`, the last where there is one.
        """
        more = {"vectors": self.vectors} if self.vectors else {}
        return {"kind": self.kind.value, _SIZE[self.kind]: self.size, **more}

    def with_rows(self, data: npt.NDArray[Any]) -> Codes | Vectors:
        """Codes or vectors of this form with the given rows, uint8 [n, bits/8] or float32 [n, d].

        Raises:
            ArtefactError: if type or width of the array is not that of the form.
        """
        assert self.kind is not DescriptorKind.LOCAL, "local features are more than one array"
        if self.kind is DescriptorKind.CODES:
            return Codes(data, self.size)
        found = Vectors(data)
        if data.shape[1] != self.size:
            raise ArtefactError(f"{self}, got {list(data.shape)}")
        return found

    def zeros(self, rows: int) -> Descriptors:
        """So many descriptors of nothing but zeros, or so many empty sets of local features."""
        if self.kind is DescriptorKind.CODES:
            return Codes(np.zeros((rows, (self.size + 7) // 8), np.uint8), self.size)
        if self.kind is DescriptorKind.VECTORS:
            return Vectors(np.zeros((rows, self.size), np.float32))
        return Local(
            np.zeros(rows + 1, np.int64),
            np.zeros((0, self.size), np.float16),
            np.zeros((0, 2), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.float32),
            np.zeros((rows, 2), np.int32),
            np.zeros((rows, self.vectors), np.float32),
        )


def concatenate(parts: Sequence[Descriptors]) -> Descriptors:
    """The rows of several batches of one form, one after another. At least one part is needed."""
    first = parts[0]
    if not isinstance(first, Local):
        return Form.of(first).with_rows(np.concatenate([part.data for part in parts]))
    sets = [part for part in parts if isinstance(part, Local)]
    counts = np.concatenate([part.counts for part in sets])
    return Local(
        np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        *(
            np.concatenate([getattr(part, name) for part in sets])
            for name in ("data", "locations", "scales", "scores", "sizes", "vectors")
        ),
    )


def assembled(
    form: Form, count: int, parts: Iterable[tuple[npt.NDArray[np.int64], Descriptors]]
) -> Descriptors:
    """Descriptors of `count` images from those of some of them at a time.

    Args:
        form: of all.
        count: images.
        parts: positions of images, int64 [k], and their descriptors; an image that is in no part has zeros,
            or an empty set.
    """
    found = form.zeros(count)
    if not isinstance(found, Local):
        for positions, some in parts:
            found.data[positions] = some.data
        return found
    given = list(parts)
    missing = np.ones(count, np.bool_)
    for positions, _ in given:
        missing[positions] = False
    rest = np.flatnonzero(missing)
    order = np.argsort(np.concatenate([*(positions for positions, _ in given), rest]), kind="stable")
    joined = concatenate([*(some for _, some in given), found.take(rest)])
    return joined.take(order.astype(np.int64))


def _is_table(given: object, dtype: "type[np.uint8] | type[np.float32]") -> bool:
    """Whether it is an array [n, width] of a type."""
    return isinstance(given, np.ndarray) and given.dtype == dtype and given.ndim == 2


def _in_words(given: object) -> str:
    """What was given in place of descriptors, for errors."""
    if isinstance(given, np.ndarray):
        return f"{given.dtype} {list(given.shape)}"
    return f"a {type(given).__name__}"
