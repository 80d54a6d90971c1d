"""Columns of integers compared with numbers that need be none of their type; no value is rounded."""

import math

import pyarrow as pa
import pyarrow.compute as pc


def holds(kind: pa.DataType, value: float) -> bool:
    """Whether a type of integers has a number among its values."""
    lowest, highest = _range(kind)
    return bool(lowest <= value <= highest and value == math.floor(value))


def _range(kind: pa.DataType) -> tuple[int, int]:
    """The least and the greatest value of a type of integers."""
    if pa.types.is_signed_integer(kind):
        half = 1 << (kind.bit_width - 1)
        return -half, half - 1
    return 0, (1 << kind.bit_width) - 1


def compared(column: pa.Array, sign: str, value: float) -> pa.Array:
    """Which integers are below or above a number, which need be none of their type."""
    lowest, highest = _range(column.type)
    value = max(min(value, highest + 1), lowest - 1)
    if sign in ("<", "<="):
        last = math.ceil(value) - 1 if sign == "<" else math.floor(value)
        found = pc.less_equal(column, pa.scalar(min(max(last, lowest), highest), column.type))
        return found if last >= lowest else pc.and_(found, False)
    first = math.floor(value) + 1 if sign == ">" else math.ceil(value)
    found = pc.greater_equal(column, pa.scalar(min(max(first, lowest), highest), column.type))
    return found if first <= highest else pc.and_(found, False)
