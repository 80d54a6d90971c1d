"""What the Hamming metrics are given, checked and laid out as the kernels take it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics.compiled import frozen
from ray_retrieval.metrics.labels import check_alike, described, shaped

# Room for 2 · distance + 1 in the kernels' uint16 keys.
_MOST_BITS = 32_767
# Rows of a table of labels that are checked and packed at once: bounds the memory whatever their type is. A
# multiple of 64.
_ROWS_AT_ONCE = 1 << 14


class Inputs(NamedTuple):
    """Queries and labels as the kernels take them, all read-only, and codes; see `kernels.score`."""

    query_words: npt.NDArray[np.uint64]
    query_labels: npt.NDArray[np.uint64]
    codes: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint64]
    single: bool
    bits: int

    @property
    def queries(self) -> int:
        return len(self.query_words)

    @property
    def rows(self) -> int:
        return len(self.codes)

    def words_of(self, rows: slice) -> npt.NDArray[np.uint64]:
        """uint64 [code words, n]: the codes of some rows, copied unless a code is one whole word."""
        return frozen(_code_words(self.codes[rows], self.bits).T)

    def labels_of(self, rows: slice) -> npt.NDArray[np.uint64]:
        """What the labels say of some rows, which begin at a multiple of 64."""
        if self.single:
            return frozen(self.labels[:, rows])
        return frozen(self.labels[:, rows.start // 64 : -(-rows.stop // 64)])


def prepare(
    query_codes: npt.NDArray[np.uint8],
    query_labels: npt.NDArray[Any],
    database_codes: npt.NDArray[np.uint8],
    database_labels: npt.NDArray[Any],
    bits: int | None,
    *,
    may_be_empty: bool = False,
) -> Inputs:
    """Codes and labels for the kernels.

    Args:
        query_codes: uint8 [queries, ceil(bits / 8)], packed as `numpy.packbits` does.
        query_labels: int64 [queries] or 0/1 [queries, classes].
        database_codes: uint8 [rows, ceil(bits / 8)].
        database_labels: like the query labels, by row.
        bits: true length of the codes; None: all bits of their bytes.
        may_be_empty: whether there may be no row in the database, which is then a shard of one.

    Raises:
        MetricError: if codes and labels do not fit each other, or there is no query or no row.
    """
    query_codes = _check_codes(query_codes, "query codes")
    database_codes = _check_codes(database_codes, "database codes", may_be_empty=may_be_empty)
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
    query_labels = shaped(query_labels, len(query_codes), "code", "query labels")
    database_labels = shaped(database_labels, len(database_codes), "code", "database labels")
    check_alike(query_labels, database_labels)
    single = query_labels.ndim == 1
    if single:
        wanted, labels = _class_numbers(query_labels)[:, None], _class_numbers(database_labels)[None]
    else:
        wanted = _bits_of_classes(query_labels, "query labels")
        labels = _bits_of_rows(database_labels, "database labels")
    return Inputs(
        query_words=frozen(_code_words(query_codes, bits)),
        query_labels=frozen(wanted),
        codes=database_codes,
        labels=frozen(labels),
        single=single,
        bits=bits,
    )


# Layout -----------------------------------------------------------------------------------------------------


def _code_words(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint64]:
    """uint64 [n, words]: the codes in whole words, with zeros beyond the bits; no copy if they fit."""
    if codes.shape[1] % 8 or bits != 8 * codes.shape[1]:
        width, last = -(-bits // 8), bits % 8
        padded = np.zeros((len(codes), 8 * -(-bits // 64)), np.uint8)
        padded[:, :width] = codes[:, :width]
        if last:
            padded[:, width - 1] &= 0xFF00 >> last & 0xFF
        codes = padded
    return np.require(codes, requirements=["C", "A"]).view(np.uint64)


def _class_numbers(labels: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """uint64 [n]: the same numbers, without a copy if they are int64."""
    return np.ascontiguousarray(labels, np.int64).view(np.uint64)


def _bits_of_classes(labels: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint64]:
    """uint64 [n, ceil(classes / 64)]: for each row one bit for each class."""
    words = np.zeros((len(labels), 8 * -(-labels.shape[1] // 64)), np.uint8)
    for start, hot in _checked_blocks(labels, where):
        packed = np.packbits(hot, axis=1, bitorder="little")
        words[start : start + len(hot), : packed.shape[1]] = packed
    return words.view("<u8")


def _bits_of_rows(labels: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint64]:
    """uint64 [classes, ceil(n / 64)]: for each class one bit for each row."""
    words = np.zeros((labels.shape[1], 8 * -(-len(labels) // 64)), np.uint8)
    for start, hot in _checked_blocks(labels, where):
        packed = np.packbits(np.ascontiguousarray(hot.T), axis=1, bitorder="little")
        words[:, start // 8 : start // 8 + packed.shape[1]] = packed
    return words.view("<u8")


def _checked_blocks(labels: npt.NDArray[Any], where: str) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Blocks of rows as truth values, each with the number of its first row.

    Raises:
        MetricError: if there are values other than 0 and 1.
    """
    for start in range(0, len(labels), _ROWS_AT_ONCE):
        block = labels[start : start + _ROWS_AT_ONCE]
        hot = block if block.dtype == np.bool_ else block == 1
        if hot is not block and not ((block == 0) | hot).all():
            raise MetricError(
                f"labels [n, classes] are 0 or 1 each, got {described(labels)} with other values",
                where=where,
                mend="give one class number for each row as [n]",
            )
        yield start, hot


# Checks -----------------------------------------------------------------------------------------------------


def _check_codes(
    codes: npt.NDArray[np.uint8], where: str, *, may_be_empty: bool = False
) -> npt.NDArray[np.uint8]:
    codes = np.asarray(codes)
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise MetricError(
            f"codes are packed uint8 [n, bytes], got {described(codes)}",
            where=where,
            mend="pack them with numpy.packbits(values >= 0, axis=1)",
        )
    if codes.size == 0 and not (may_be_empty and codes.shape[1] > 0):
        raise MetricError(f"there is nothing to compare: {described(codes)}", where=where)
    return codes


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
