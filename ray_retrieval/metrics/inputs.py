"""What the Hamming metrics are given, checked and laid out as the kernels take it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import kernels

# Room for 2 · distance + 1 in the kernels' uint16 keys.
_MOST_BITS = 32_767


class Inputs(NamedTuple):
    """Codes and labels as the kernels take them, all read-only; see `kernels.score`."""

    query_words: npt.NDArray[np.uint64]
    query_labels: npt.NDArray[np.uint64]
    words: npt.NDArray[np.uint64]
    labels: npt.NDArray[np.uint64]
    single: bool
    bits: int

    @property
    def queries(self) -> int:
        return len(self.query_words)

    @property
    def rows(self) -> int:
        return int(self.words.shape[1])


def prepare(
    query_codes: npt.NDArray[np.uint8],
    query_labels: npt.NDArray[Any],
    database_codes: npt.NDArray[np.uint8],
    database_labels: npt.NDArray[Any],
    bits: int | None,
) -> Inputs:
    """Codes and labels for the kernels.

    Args:
        query_codes: uint8 [queries, ceil(bits / 8)], packed as `numpy.packbits` does.
        query_labels: int64 [queries] or 0/1 [queries, classes].
        database_codes: uint8 [rows, ceil(bits / 8)].
        database_labels: like the query labels, by row.
        bits: true length of the codes; None: all bits of their bytes.

    Raises:
        MetricError: if codes and labels do not fit each other, or there is no query or no row.
    """
    query_codes = _check_codes(query_codes, "query codes")
    database_codes = _check_codes(database_codes, "database codes")
    width = query_codes.shape[1]
    if database_codes.shape[1] != width:
        raise MetricError(
            f"query codes are {width} bytes wide and database codes {database_codes.shape[1]}",
            mend="encode both with the same model",
        )
    bits = 8 * width if bits is None else bits
    if not 1 <= bits <= min(8 * width, _MOST_BITS):
        raise MetricError(
            f"codes of {width} bytes hold 1 to {min(8 * width, _MOST_BITS):,} bits, got {bits:,}"
        )
    query_labels = _check_labels(query_labels, len(query_codes), "query labels")
    database_labels = _check_labels(database_labels, len(database_codes), "database labels")
    if query_labels.ndim != database_labels.ndim or query_labels.shape[1:] != database_labels.shape[1:]:
        raise MetricError(
            f"query labels are {_shape(query_labels)} and database labels {_shape(database_labels)}",
            mend="give both as class numbers [n], or both as 0/1 [n, classes] with the same classes",
        )
    return Inputs(
        query_words=kernels.frozen(kernels.code_words(query_codes, bits)),
        query_labels=kernels.frozen(kernels.label_words(query_labels)),
        words=kernels.frozen(kernels.code_words(database_codes, bits).T),
        labels=kernels.frozen(kernels.label_words(database_labels).T),
        single=query_labels.ndim == 1,
        bits=bits,
    )


def _shape(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _check_codes(codes: npt.NDArray[np.uint8], where: str) -> npt.NDArray[np.uint8]:
    codes = np.asarray(codes)
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise MetricError(
            f"codes are packed uint8 [n, bytes], got {_shape(codes)}",
            where=where,
            mend="pack them with numpy.packbits(values >= 0, axis=1)",
        )
    if codes.size == 0:
        raise MetricError(f"there is nothing to compare: {_shape(codes)}", where=where)
    return codes


def _check_labels(labels: npt.NDArray[Any], rows: int, where: str) -> npt.NDArray[Any]:
    labels = np.asarray(labels)
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and labels.shape[1] == 0):
        raise MetricError(f"labels are [n] or [n, classes], got {_shape(labels)}", where=where)
    if len(labels) != rows:
        raise MetricError(f"{counted(rows, 'code')} but {counted(len(labels), 'label')}", where=where)
    if labels.ndim == 1 and labels.dtype.kind not in "iub":
        raise MetricError(f"class numbers are whole numbers, got {_shape(labels)}", where=where)
    if labels.ndim == 2 and (labels.dtype.kind not in "iubf" or not ((labels == 0) | (labels == 1)).all()):
        raise MetricError(
            f"labels [n, classes] are 0 or 1 each, got {_shape(labels)} with other values",
            where=where,
            mend="give one class number for each row as [n]",
        )
    return labels


def cut_off(k: int | None, rows: int) -> int:
    """How many rows of a ranking count: k, or all where that is None or beyond the database.

    Raises:
        MetricError: if `k` is less than 1.
    """
    if k is not None and k < 1:
        raise MetricError(f"k is at least 1, or none for all rows, got {k}")
    return rows if k is None else min(k, rows)


def checked_ranks(at: Sequence[int]) -> list[int]:
    """The n of precision@n and recall@n, as given.

    Raises:
        MetricError: if one is less than 1.
    """
    wrong = [n for n in at if n < 1]
    if wrong:
        raise MetricError(f"precision@n and recall@n need n of at least 1, got {wrong[0]}")
    return list(at)


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one: `1 query`, `1,200 queries`."""
    plural = {"query": "queries"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"
