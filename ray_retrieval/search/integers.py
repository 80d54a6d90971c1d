"""Columns of whole numbers compared with numbers that need be none of their type; no value is rounded.

Decimals are whole numbers too, of units of their last digit.
"""

import math
from collections.abc import Iterable
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc

Number = int | float | Decimal


def whole(kind: pa.DataType) -> bool:
    """Whether a type is one of integers, or of decimals."""
    return bool(pa.types.is_integer(kind) or pa.types.is_decimal(kind))


def in_units(kind: pa.DataType, value: Number) -> Number:
    """A number in units of a type: of the last digit of decimals, of 1 of integers."""
    if not pa.types.is_decimal(kind):
        return value
    sign, digits, exponent = Decimal(value).as_tuple()
    assert isinstance(exponent, int), "it is a finite number"
    return Decimal((sign, digits, exponent + kind.scale))


def those_of(kind: pa.DataType, values: Iterable[Number]) -> pa.Array:
    """Those of some numbers, in units of a type, that are among its values."""
    return pa.array([_value(kind, int(value)) for value in values if holds(kind, value)], kind)


def holds(kind: pa.DataType, value: Number) -> bool:
    """Whether a type has a number, in its units, among its values."""
    lowest, highest = _range(kind)
    return bool(lowest <= value <= highest and value == math.floor(value))


def _range(kind: pa.DataType) -> tuple[int, int]:
    """The least and the greatest value of a type, in its units."""
    if pa.types.is_decimal(kind):
        return 1 - 10**kind.precision, 10**kind.precision - 1
    if pa.types.is_signed_integer(kind):
        half = 1 << (kind.bit_width - 1)
        return -half, half - 1
    return 0, (1 << kind.bit_width) - 1


def _value(kind: pa.DataType, number: int) -> int | Decimal:
    """The value of a type that is so many of its units."""
    if not pa.types.is_decimal(kind):
        return number
    return Decimal((number < 0, tuple(map(int, str(abs(number)))), -kind.scale))


def compared(column: pa.Array, sign: str, value: Number) -> pa.Array:
    """Which values are below or above a number, in units of their type, which need be none of it."""
    lowest, highest = _range(column.type)
    value = max(min(value, highest + 1), lowest - 1)
    if sign in ("<", "<="):
        last = math.ceil(value) - 1 if sign == "<" else math.floor(value)
        found = pc.less_equal(
            column, pa.scalar(_value(column.type, min(max(last, lowest), highest)), column.type)
        )
        return found if last >= lowest else pc.and_(found, False)
    first = math.floor(value) + 1 if sign == ">" else math.ceil(value)
    found = pc.greater_equal(
        column, pa.scalar(_value(column.type, min(max(first, lowest), highest)), column.type)
    )
    return found if first <= highest else pc.and_(found, False)
