"""Values of columns that come as JSON: taken as answers show them, and never changed silently."""

import json
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from gateway_parts import image

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import Record
from ray_retrieval.serve.backend import NewImage
from ray_retrieval.serve.columns import column_of
from ray_retrieval.serve.lookups import further
from ray_retrieval.serve.writing import _columns, _labels

AT = datetime(2026, 3, 1, 12, 30, 0, 500_000)
PAIR = pa.struct([("a", pa.int64()), ("b", pa.date32())])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.int8(), -7),
        (pa.uint64(), 2**64 - 1),
        (pa.float32(), 0.5),
        (pa.float64(), -3.0),
        (pa.bool_(), True),
        (pa.string(), "12"),
        (pa.binary(), b"\xff\x00"),
        (pa.large_binary(), b""),
        (pa.binary(2), b"ab"),
        (pa.decimal128(9, 2), Decimal("1.50")),
        (pa.decimal256(50, 10), Decimal("12345678901234567890.0123456789")),
        (pa.date32(), AT.date()),
        (pa.date64(), AT.date()),
        (pa.time32("s"), time(12, 30)),
        (pa.time32("ms"), AT.time()),
        (pa.time64("ns"), AT.time()),
        (pa.timestamp("s"), AT.replace(microsecond=0)),
        (pa.timestamp("ms"), AT),
        (pa.timestamp("us"), datetime(1, 1, 1)),
        (pa.timestamp("ns"), AT),
        (pa.timestamp("us", "UTC"), AT.replace(tzinfo=timezone.utc)),
        (pa.timestamp("ms", "Europe/Berlin"), AT.replace(tzinfo=timezone(timedelta(hours=1)))),
        (pa.duration("ms"), timedelta(days=-1, seconds=1, milliseconds=5)),
        (pa.list_(pa.date32()), [date(2026, 3, 1), None]),
        (pa.list_(pa.float32(), 2), [0.5, 1.0]),
        (pa.list_(pa.binary()), [b"\xff", b""]),
        (pa.struct([("a", pa.list_(pa.binary()))]), {"a": [b"\xff"]}),
        (PAIR, {"a": 1, "b": date(2026, 3, 1)}),
        (pa.map_(pa.string(), pa.int64()), [("a", 1)]),
        (pa.dictionary(pa.int8(), pa.string()), "word"),
    ],
)
def test_what_answers_show_is_taken_back(kind: pa.DataType, value: Any) -> None:
    column = pa.array([value, None], kind)
    columns = further({"x": column[0].as_py()})
    shown = Record(id="a", row=0, image="", original="", columns=columns).model_dump_json()
    sent = json.loads(shown)["columns"]["x"]
    assert column_of([sent, None], kind).equals(column)


def test_numbers_may_be_written_in_several_ways() -> None:
    assert column_of([3.0, -0.0], pa.int64()).to_pylist() == [3, 0]
    assert column_of([3, 2**24], pa.float32()).to_pylist() == [3.0, 2.0**24]
    prices = column_of([1.5, 2, "1e1"], pa.decimal128(5, 2)).to_pylist()
    assert prices == [Decimal("1.50"), Decimal("2.00"), Decimal("10.00")]
    assert column_of([{"a": 1}], PAIR).to_pylist() == [{"a": 1, "b": None}]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.int64(), 1.5),
        (pa.int64(), True),
        (pa.int64(), "3"),
        (pa.int8(), 128),
        (pa.int64(), 1e30),
        (pa.float32(), 1e300),
        (pa.float16(), -1e6),
        (pa.float64(), True),
        (pa.float64(), 10**400),
        (pa.string(), 3),
        (pa.bool_(), 1),
        (pa.binary(), "xy"),
        (pa.binary(2), "ff"),
        (pa.binary(), 3),
        (pa.decimal128(5, 2), 1.005),
        (pa.decimal128(5, 2), "12345"),
        (pa.decimal128(5, 2), "NaN"),
        (pa.decimal128(5, 2), "x"),
        (pa.decimal128(5, 2), True),
        (pa.date32(), 5),
        (pa.date32(), "2026-02-30"),
        (pa.date32(), "2026-03-01T12:30:00"),
        (pa.time32("ms"), "12:30:00.000001"),
        (pa.time64("us"), "12:30:00+01:00"),
        (pa.timestamp("ms"), "2026-03-01T12:30:00.000001"),
        (pa.timestamp("us"), "2026-03-01T12:30:00Z"),
        (pa.timestamp("us", "UTC"), "2026-03-01T12:30:00"),
        (pa.duration("s"), "soon"),
        (pa.list_(pa.int64()), [1.5]),
        (pa.list_(pa.string()), "ab"),
        (pa.list_(pa.int64(), 2), [1]),
        (PAIR, {"c": 1}),
        (PAIR, {"a": 1.5}),
        (PAIR, [["a", 1]]),
        (pa.map_(pa.string(), pa.int64()), {"ab": 1}),
        (pa.null(), 5),
    ],
)
def test_what_a_column_cannot_hold_is_refused(kind: pa.DataType, value: Any) -> None:
    index: Any = SimpleNamespace(schema=pa.schema([("x", kind)]))
    with pytest.raises(QueryError, match="values of column 'x' are not") as caught:
        _columns(index, [NewImage("a", image(1), None, {"x": value})])
    assert caught.value.status == 422


def test_a_label_that_no_number_of_a_class_can_be_is_refused() -> None:
    index: Any = SimpleNamespace(class_names=None, schema=pa.schema([("label", pa.int64())]))
    assert _labels(index, [NewImage("a", image(1), 2**63 - 1)])[1].to_pylist() == [2**63 - 1]
    for label in (2**70, -1):
        with pytest.raises(QueryError, match="no class") as caught:
            _labels(index, [NewImage("a", image(1), label)])
        assert caught.value.status == 422
