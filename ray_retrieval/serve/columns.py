"""Values of columns as JSON has them: what answers show is taken back, and nothing is changed silently."""

import math
from collections.abc import Callable, Sequence
from datetime import time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

_DURATION = TypeAdapter(timedelta)


def column_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values of JSON as a column of a type; None is null.

    Dates, times and durations are text as ISO 8601 has it, with an offset if the type has a time zone;
    decimals are text or numbers, bytes hexadecimal digits.

    Raises:
        ValueError, TypeError, ArithmeticError, ArrowException: if one of them is none of the type's.
    """
    return pa.array([_value(one, kind) for one in values], kind)


def _value(value: Any, kind: pa.DataType) -> Any:
    """A value as Arrow takes it for a type."""
    if value is None:
        return None
    if pa.types.is_null(kind):
        raise ValueError("the column holds nothing")
    for is_one, made in _MADE:
        if is_one(kind):
            return made(value, kind)
    return value


def _list(value: Any, kind: pa.DataType) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("it is no list")
    return [_value(one, kind.value_type) for one in value]


def _struct(value: Any, kind: pa.DataType) -> dict[str, Any]:
    fields = {field.name: field.type for field in kind}
    if not isinstance(value, dict) or not fields.keys() >= value.keys():
        raise ValueError(f"its keys are {', '.join(fields)}")
    return {name: _value(one, fields[name]) for name, one in value.items()}


def _map(value: Any, kind: pa.DataType) -> list[tuple[Any, Any]]:
    if not isinstance(value, list) or not all(isinstance(pair, list) for pair in value):
        raise TypeError("it is no list of pairs")
    return [(_value(key, kind.key_type), _value(item, kind.item_type)) for key, item in value]


def _whole(value: Any, _: pa.DataType) -> Any:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("it is no whole number")  # Arrow would cut it off.
    return int(value) if isinstance(value, float) else value


def _floating(value: Any, kind: pa.DataType) -> Any:
    with np.errstate(over="ignore"):
        if isinstance(_number(value), float) and not math.isfinite(kind.to_pandas_dtype()(value)):
            raise ValueError("it is beyond the largest number")
    return value


def _decimal(value: Any, _: pa.DataType) -> Decimal:
    return Decimal(str(_number(value)))


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError("true and false are no numbers")
    return value


def _moment(value: Any, kind: pa.DataType) -> int:
    """A date, time, timestamp or duration in units of its type."""
    if not isinstance(value, str):
        raise TypeError("it is no text")
    if pa.types.is_time(kind):
        moment = time.fromisoformat(value)
        if moment.tzinfo is not None:
            raise ValueError("times of a column have no offset")
        found = pa.scalar(moment, pa.time64("us"))
    elif pa.types.is_duration(kind):
        found = pa.scalar(_DURATION.validate_python(value), pa.duration("us"))
    elif pa.types.is_timestamp(kind) and kind.unit != "ns":
        # Finer first: Arrow takes 12:00:00.500000 for no milliseconds, though it is a whole number of them.
        found = pa.scalar(value).cast(pa.timestamp("us", kind.tz))
    else:
        found = pa.scalar(value)
    return int(found.cast(kind).value)


def _bytes(value: Any, _: pa.DataType) -> bytes:
    return bytes.fromhex(value)


_MADE: tuple[tuple[Callable[[pa.DataType], bool], Callable[[Any, Any], Any]], ...] = (
    (pa.types.is_dictionary, lambda value, kind: _value(value, kind.value_type)),
    (pa.types.is_map, _map),
    (pa.types.is_list, _list),
    (pa.types.is_large_list, _list),
    (pa.types.is_fixed_size_list, _list),
    (pa.types.is_struct, _struct),
    (pa.types.is_integer, _whole),
    (pa.types.is_floating, _floating),
    (pa.types.is_decimal, _decimal),
    (pa.types.is_temporal, _moment),
    (pa.types.is_binary, _bytes),
    (pa.types.is_large_binary, _bytes),
    (pa.types.is_fixed_size_binary, _bytes),
)
"""What makes values of the types for which Arrow takes others than JSON has, or changes them silently."""
