"""What a search starts from, as descriptors of the index's form."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes, DescriptorKind, Descriptors, Form, Local, Vectors
from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import Example
from ray_retrieval.serve.backend import AnyExample, DescriptorExample, IdExample, ImageExample

_MOST = 1e18  # beyond, squares are no float32


def understood(example: AnyExample) -> Example:
    """What an answer says of an example."""
    if isinstance(example, ImageExample):
        return Example(
            kind="image",
            format=example.format,
            width=example.width,
            height=example.height,
            bytes=len(example.data),
            box=example.box,
        )
    if isinstance(example, IdExample):
        return Example(kind="id", id=example.id, box=example.box)
    return Example(kind="descriptor")


def given(example: DescriptorExample, form: Form) -> Codes | Vectors:
    """A descriptor that was sent, as one row of the index's form; vectors are brought to length 1.

    Raises:
        QueryError: if it is of another kind or size, or a vector without a direction.
    """
    if form.kind is DescriptorKind.LOCAL:
        raise _unfit("an index of local features is searched by images, not by a descriptor")
    data: npt.NDArray[Any] = np.atleast_1d(example.data)
    like = form.zeros(1).data
    if data.shape != like.shape[1:] or (data.dtype == np.uint8) != (like.dtype == np.uint8):
        what = (
            f"{len(data)} bytes of a code" if data.dtype == np.uint8 else f"a vector of {len(data)} numbers"
        )
        raise _unfit(f"the index holds {form}, got {what}")
    if form.kind is DescriptorKind.CODES:
        if np.unpackbits(data)[form.size :].any():
            raise _unfit(f"bits after the first {form.size} are not 0")
        return Codes(data[None], form.size)
    return Vectors(normalised(data[None].astype(np.float64)))


def normalised(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """float32 [n, d]: rows of length 1.

    Raises:
        QueryError: if one has no direction.
    """
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0) & (lengths < _MOST)).all():
        raise _unfit("the vector has no direction: it is zero, or not finite")
    return np.asarray(rows / lengths, np.float32)


def average(parts: Sequence[Descriptors]) -> Descriptors:
    """One query of several: the majority of each bit, or the mean of unit vectors.

    Where half of the codes have a bit, the first one's counts. Of one query it is the query itself.

    Args:
        parts: one row each, all of one form.

    Raises:
        QueryError: if they are sets of local features, or vectors that cancel each other out.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Local):
        raise QueryError(
            "sets of local features have no average",
            where="combine",
            mend="set combine to best",
            status=422,
        )
    rows = np.concatenate([np.asarray(part.data) for part in parts])
    if isinstance(first, Vectors):
        return Vectors(normalised(rows.astype(np.float64).mean(axis=0, keepdims=True)))
    bits = np.unpackbits(rows, axis=1).astype(np.int64)
    twice = 2 * bits.sum(axis=0)
    majority = np.where(twice == len(rows), bits[0], twice > len(rows))
    return Codes(np.packbits(majority.astype(np.uint8))[None], first.bits)


def _unfit(problem: str) -> QueryError:
    return QueryError(problem, where="examples", mend="see /v1/indexes for what it holds", status=422)
