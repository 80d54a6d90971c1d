"""Filters: what they mean, against a naive reading of each row, and what is no filter."""

import datetime
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.errors import QueryError
from ray_retrieval.search import filters
from ray_retrieval.search.filters import Among, Either, Every, Filter, IsNull, Not, Ordered, Value

_SMALL = getattr(pa, "decimal32", pa.decimal128)  # older releases of pyarrow have none so small
NAMES = ["cat", "dog", "red fox", "7"]
ROWS = pa.RecordBatch.from_pydict(
    {
        "id": pa.array(["a", "b", "10", "c d", "it's"], pa.large_string()),
        "label": pa.array([0, 1, 2, None, 7], pa.int64()),
        "price": pa.array([1.5, None, 10, 20, float("nan")], pa.float64()),
        "size": pa.array([1, 2, 3, None, 2**40], pa.int64()),
        "tags": pa.array([["x"], [], None, ["x", "y"], ["y", None]], pa.list_(pa.string())),
        "fine": pa.array([True, False, None, True, False]),
        "day": pa.array([datetime.date(2020, 1, day) for day in range(1, 6)]),
        "raw": pa.array([b"1"] * 5, pa.large_binary()),
    }
)


def passing(text, rows=ROWS, schema=None, names=NAMES):
    return [
        row
        for row, passes in enumerate(Filter.parse(text).mask(rows, schema or rows.schema, names))
        if passes
    ]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("label = dog", [1]),
        ("label in (cat, 'red fox', 7)", [0, 2]),  # the class of that name is number 3
        ("label = '7'", []),
        ("label in (0, 2)", [0, 2]),
        ("label != cat", [1, 2, 4]),
        ("label is null", [3]),
        ("not label is null and label >= 2", [2, 4]),
        ("price >= 10 and price < 20", [2]),
        ("price<20", [0, 2]),
        ("not price < 20", [3, 4]),  # NaN is known, and not below 20
        ("price != 10", [0, 3, 4]),
        ("price in (10, 1.5)", [0, 2]),
        ("size = 1.0 or size > 2.5", [0, 2, 4]),
        ("size in (1.5)", []),
        ("size > -1e3", [0, 1, 2, 4]),
        ("id = a", [0]),
        ("id = 10", [2]),
        ("id in ('c d', 'it''s')", [3, 4]),
        ('id = "it\'s"', [4]),
        ("id < b", [0, 2]),
        ("tags = x", [0, 3]),
        ("tags != x", [1, 4]),
        ("tags in (y, z)", [3, 4]),
        ("tags is null", [2]),
        ("fine = true", [0, 3]),
        ("NOT fine = TRUE", [1, 4]),
        ("day >= 2020-01-03 AND day != '2020-01-04'", [2, 4]),
        ("not (label = cat or label = dog)", [2, 4]),
        ("label = cat or label = dog and price = 1", [0]),
        ("(label = cat or label = dog) and price = 1", []),
        ("'price' is not null", [0, 2, 3, 4]),
        ("size not in (1, 2)", [2, 4]),
        ("size = 99999999999999999999 or size < 99999999999999999999 and size > 2", [2, 4]),
    ],
)
def test_by_hand(text, rows):
    assert passing(text) == rows


def test_an_image_of_several_classes_is_of_each():
    rows = pa.RecordBatch.from_pydict({"label": pa.array([[0, 2], [1], [], None], pa.list_(pa.int64()))})
    assert passing("label = cat", rows) == [0]
    assert passing("label in (dog, 'red fox')", rows) == [0, 1]
    assert passing("label != cat", rows) == [1, 2]
    assert passing("not label = cat and label is not null", rows.slice(1)) == [0, 1]


@pytest.mark.parametrize("several", [pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray])
def test_what_is_null_has_no_items_also_where_some_lie_under_it(several):
    items, mask = pa.array([0, 1, 2, 0, 1, 1]), pa.array([False, True, False])
    if several is pa.FixedSizeListArray:
        label = several.from_arrays(items, 2, mask=mask)
    else:
        label = several.from_arrays(pa.array([0, 2, 4, 6]), items, mask=mask)
    rows = pa.record_batch({"label": label})
    assert passing("label = dog", rows) == [0, 2]
    assert passing("label != dog or label is null", rows) == [1]
    assert passing("label = dog", rows.slice(1)) == [1]


def test_a_number_means_the_same_below_above_and_equal():
    """0.1 is not the same in 32 and in 64 bits; in a filter it is that of the column."""
    rows = pa.RecordBatch.from_pydict({"share": pa.array([0.1, 0.2, -0.1, float("inf")], pa.float32())})
    for text, expected in {
        "share = 0.1": [0],
        "share <= 0.1": [0, 2],
        "share >= 0.1": [0, 1, 3],
        "share < 0.1": [2],
        "share > 0.1": [1, 3],
        "share != 0.1": [1, 2, 3],
        "share in (0.1, 0.2)": [0, 1],
        "share > 0": [0, 1, 3],
    }.items():
        assert passing(text, rows) == expected, text


def test_of_classes_of_one_name_the_first_counts():
    assert passing("label = dog", names=["cat", "dog", "dog", "7"]) == [1]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_zero_has_no_sign(kind):
    rows = pa.RecordBatch.from_pydict({"c": pa.array([0.0, -0.0, 1.0, None]).cast(kind)})
    for zero in ("0", "-0.0", "0.0"):
        assert passing(f"c = {zero}", rows) == passing(f"c in ({zero}, 7)", rows) == [0, 1]
        assert passing(f"c != {zero}", rows) == [2]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([pa.float16(), pa.float32(), pa.float64(), pa.int8(), pa.uint8(), pa.int64()]),
    st.lists(st.integers(0, 100), min_size=1, max_size=6),
    st.integers(0, 100),
)
def test_exactly_one_of_below_equal_and_above_is_true(kind, held, asked):
    """Of floating columns in hundredths, few of which they hold exactly."""
    floating = pa.types.is_floating(kind)
    values = [value / 100 for value in held] if floating else held
    rows = pa.RecordBatch.from_pydict({"value": pa.array(values).cast(kind)})
    text = f"{asked / 100}" if floating else f"{asked}"
    for sign, truth in {
        "<": [value < asked for value in held],
        "=": [value == asked for value in held],
        ">": [value > asked for value in held],
        "<=": [value <= asked for value in held],
        ">=": [value >= asked for value in held],
    }.items():
        assert passing(f"value {sign} {text}", rows) == np.flatnonzero(truth).tolist()


INTEGERS = {
    "int8": (-(2**7), 2**7 - 1),
    "uint8": (0, 2**8 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint64": (0, 2**64 - 1),
}


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(sorted(INTEGERS)))
def test_integers_are_compared_with_any_number(data, kind):
    """Also with those that their type cannot hold, and with fractions; no integer is rounded."""
    lowest, highest = INTEGERS[kind]
    held = data.draw(st.lists(st.integers(lowest, highest), min_size=1, max_size=5))
    near = [lowest - 1, lowest, highest, highest + 1, 2**70, -(2**70), *held, *(value + 1 for value in held)]
    fractions = [Fraction(number) / 4 for number in (-5, 0, 1, 3, 8, 1021)]
    asked = data.draw(st.sampled_from([*near, *fractions]))
    text = str(asked) if isinstance(asked, int) else str(float(asked))
    rows = pa.RecordBatch.from_pydict({"value": pa.array([*held, None], kind)})
    for sign, truth in {
        "<": [value < asked for value in held],
        "<=": [value <= asked for value in held],
        "=": [value == asked for value in held],
        "!=": [value != asked for value in held],
        ">=": [value >= asked for value in held],
        ">": [value > asked for value in held],
    }.items():
        assert passing(f"value {sign} {text}", rows) == np.flatnonzero(truth).tolist()
        assert passing(f"not value {sign} {text}", rows) == np.flatnonzero(~np.array(truth)).tolist()
    assert passing(f"value in ({text}, {held[0]}, 1e300)", rows) == [
        place for place, value in enumerate(held) if value in (asked, held[0])
    ]


@pytest.mark.parametrize("number", ["1e99999999999999999999", "1e-99999999999999999999", "1" * 5000])
def test_numbers_of_too_many_digits_are_refused(number):
    rows = pa.RecordBatch.from_pydict({"value": pa.array([Decimal("1.50")], _SMALL(5, 2))})
    with pytest.raises(QueryError, match=r"column 'value' holds decimal\d+\(5, 2\): \S+"):
        Filter.parse(f"value > {number}").mask(rows, rows.schema, None)


def test_times_that_a_clock_shows_twice_or_never_are_the_earliest():
    zone = pa.timestamp("s", "Europe/Berlin")
    # Each an hour from the next: 01:30, 02:30 twice, 03:30.
    first = int(datetime.datetime(2024, 10, 26, 23, 30, tzinfo=datetime.timezone.utc).timestamp())
    rows = pa.RecordBatch.from_pydict({"at": pa.array([first + 3600 * n for n in range(4)], zone)})
    for text, found in {"at >= '2024-10-27 02:30:00'": 3, "at >= '2024-03-31 02:30:00'": 4}.items():
        assert np.asarray(Filter.parse(text).mask(rows, rows.schema, None)).sum() == found


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([_SMALL(5, 2), pa.decimal128(38, 0), pa.decimal256(60, 40)]))
def test_decimals_are_compared_with_any_number(data, kind):
    """Also with those that have more digits, or are far beyond what their type can hold."""
    most = 10**kind.precision - 1
    units = data.draw(st.lists(st.integers(-most, most), min_size=1, max_size=5))
    exact = [Decimal((number < 0, tuple(map(int, str(abs(number)))), -kind.scale)) for number in units]
    rows = pa.RecordBatch.from_pydict({"value": pa.array([*exact, None], kind)})
    texts = [*map(str, exact), f"{exact[0]:f}", "0.015", "-7", "1e999999999", "-1e999999999", "1e-999999999"]
    text = data.draw(st.sampled_from(texts))
    asked = Decimal(text)
    for sign, truth in {
        "<": [value < asked for value in exact],
        "<=": [value <= asked for value in exact],
        "=": [value == asked for value in exact],
        "!=": [value != asked for value in exact],
        ">=": [value >= asked for value in exact],
        ">": [value > asked for value in exact],
    }.items():
        assert passing(f"value {sign} {text}", rows) == np.flatnonzero(truth).tolist()
    assert passing(f"value in ({text}, {exact[0]:f})", rows) == [
        place for place, value in enumerate(exact) if value in (asked, exact[0])
    ]


def test_a_time_without_an_offset_is_of_the_columns_zone():
    """In Berlin it is 01:00 of the first of January when it is midnight in UTC."""
    times = [datetime.datetime(2024, 1, 1, hour, tzinfo=datetime.timezone.utc) for hour in (0, 1, 2)]
    rows = pa.RecordBatch.from_pydict({"at": pa.array([*times, None], pa.timestamp("us", "Europe/Berlin"))})
    for text, expected in {
        "at = '2024-01-01T01:00:00'": [0],
        "at = '2024-01-01T00:00:00Z'": [0],
        "at in ('2024-01-01 01:00:00Z', '2024-01-01 03:00:00')": [1, 2],
        "at > '2024-01-01T03:00:00+02:00'": [2],
        "at < 2024-01-01": [],
        "at >= 2024-01-01 and at < '2024-01-01 02:30'": [0, 1],
    }.items():
        assert passing(text, rows) == expected, text
    with pytest.raises(QueryError, match=r"times in microseconds, 'soon' is none.*Europe/Berlin"):
        passing("at = soon", rows)


def test_times_of_day_are_compared():
    hours = [datetime.time(9), datetime.time(12, 30), None]
    for kind in (pa.time32("s"), pa.time64("us")):
        rows = pa.RecordBatch.from_pydict({"at": pa.array(hours, kind)})
        assert passing("at > 09:00", rows) == passing("at in (12:30:00, 13:00)", rows) == [1]
        assert passing("at != '09:00:00'", rows) == [1]


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (pa.date32(), "'2020-01-31 12:30'", "holds dates, .* is none .write a date as 2020-01-31.$"),
        (pa.time32("s"), "2020-01-31", "holds times of day in seconds, .* .write a time as 12:30:05.$"),
        (pa.time32("s"), "12:30:05.5", "holds times of day in seconds"),
        (
            pa.timestamp("s"),
            "2020",
            "times in seconds, '2020' is none .write them as 2020-01-31 or ",
        ),
        (pa.timestamp("s"), "'2020-01-31 12:30:05.5'", "holds dates and times in seconds, "),
        (pa.timestamp("ns"), "2020-01-31T12:30Z", "without an offset, as the column has no time zone"),
        (pa.duration("s"), "5", r"holds duration\[s\], '5' is none .filter on text, .* dates or times"),
    ],
)
def test_how_dates_and_times_are_written_is_said(kind, text, said):
    rows = pa.record_batch({"at": pa.nulls(1, kind)})
    for sign in ("=", ">"):
        with pytest.raises(QueryError, match=said):
            passing(f"at {sign} {text}", rows)


def test_digits_are_names_of_classes_before_they_are_numbers():
    rows = pa.RecordBatch.from_pydict({"label": pa.array([0, 1, 2, 3])})
    digits = ["0", "1", "10", "2"]
    for text, expected in {"label = 2": [3], "label = 10": [2], "label in (3, '10')": [2, 3]}.items():
        mask = Filter.parse(text).mask(rows, rows.schema, digits)
        assert np.flatnonzero(mask).tolist() == expected
    assert passing("label in (2, 3)", rows, names=None) == [2, 3]


@pytest.mark.parametrize("condition", ["label {} 3", "label {} dog", "n {} 3", "n {} '2020-01-01'"])
def test_of_a_column_that_is_null_throughout_nothing_is_true_or_false(condition):
    rows = pa.record_batch({"label": pa.nulls(2), "n": pa.nulls(2)})
    for sign in ("=", "!=", "<", "<=", ">", ">="):
        assert passing(condition.format(sign), rows) == passing(f"not {condition.format(sign)}", rows) == []


def test_items_that_are_null_throughout_are_equal_to_nothing():
    rows = pa.RecordBatch.from_pydict({"c": pa.array([[None], [], None], pa.list_(pa.null()))})
    assert passing("c = 1", rows) == passing("c in (1, dog)", rows) == []
    assert passing("c != 1", rows) == [0, 1]


def test_a_column_that_these_rows_lack_is_null():
    schema = pa.schema([*ROWS.schema, ("later", pa.int64())])
    assert passing("later is null", schema=schema) == [0, 1, 2, 3, 4]
    assert passing("later = 3 or not later = 3", schema=schema) == []
    nothing = pa.RecordBatch.from_pydict({"label": pa.nulls(2)})
    assert passing("label = 3", nothing) == []
    assert passing("label is null", nothing) == [0, 1]
    assert passing("label = cat", ROWS.slice(0, 0)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the end, expected a column"),
        ("label", "the end after 'label', expected =, "),
        ("label =", "the end after 'label =', expected a value"),
        ("label = cat dog", "'dog' after 'label = cat', expected 'and', 'or' or the end"),
        ("label in cat", "'cat' after 'label in', expected '\\('"),
        ("label in ()", "expected a value"),
        ("label in (cat dog)", "expected ',' or '\\)'"),
        ("(label = cat", "the end .* expected 'and', 'or' or '\\)'"),
        ("label = and", "'and' after 'label =', expected a value"),
        ("label = 'cat", "a quote is not closed"),
        ("label = !", "'!' means nothing"),
        ("not", "expected a column"),
        ("(" * 60 + "label = cat" + ")" * 60, "nested at most 50"),
        ("lable = cat", "no column 'lable' .did you mean 'label'"),
        ("colour = red", "no column 'colour' .there are: id, label, price"),
        ("label = dgo", "no class 'dgo' .did you mean 'dog'"),
        ("label = 1.5", "no class '1.5'"),
        ("label = 4", "no class '4'"),
        ("label = -1", "no class '-1'"),
        ("price = cheap", "column 'price' holds numbers, 'cheap' is none"),
        ("size = '3'", "holds numbers, '3' is none"),
        ("tags < x", "holds lists, which are not below"),
        ("raw = 1", "column 'raw' holds large_binary, '1' is none"),
        ("day = someday", "column 'day' holds dates, 'someday' is none"),
        ("fine = maybe", "column 'fine' holds bool"),
    ],
)
def test_what_is_no_filter_is_refused(text, message):
    with pytest.raises(QueryError, match=message) as caught:
        passing(text)
    assert "\n" not in str(caught.value)


def test_among_countless_classes_the_nearest_is_not_looked_for(monkeypatch):
    monkeypatch.setattr(filters.difflib, "get_close_matches", lambda word, names, **_: names[:1])
    many = [f"class {number}" for number in range(20_000)]
    with pytest.raises(QueryError, match=r"no class 'clas 1' .name a class of the index"):
        passing("label = 'clas 1'", names=many)
    with pytest.raises(QueryError, match="did you mean 'class 0'"):
        passing("label = 'clas 1'", names=many[:100])


values = st.integers(-2, 4).map(lambda number: Value(str(number), False))
leaves = st.one_of(
    st.builds(Among, st.sampled_from(["one", "many"]), st.lists(values, min_size=1, max_size=3).map(tuple)),
    st.builds(Ordered, st.just("one"), st.sampled_from(["<", "<=", ">", ">="]), values),
    st.builds(IsNull, st.sampled_from(["one", "many"])),
)
pairs = st.deferred(lambda: st.lists(conditions, min_size=2, max_size=3).map(tuple))
conditions = st.recursive(
    leaves,
    lambda inner: st.one_of(st.builds(Not, inner), st.builds(Every, pairs), st.builds(Either, pairs)),
    max_leaves=8,
)


def truth(condition, row):
    """True, False, or None where it is neither."""
    if isinstance(condition, Not):
        inner = truth(condition.condition, row)
        return None if inner is None else not inner
    if isinstance(condition, Every | Either):
        parts = [truth(part, row) for part in condition.conditions]
        decides = isinstance(condition, Either)
        return decides if decides in parts else None if None in parts else not decides
    held = row[condition.column]
    if isinstance(condition, IsNull):
        return held is None
    if held is None:
        return None
    if isinstance(condition, Among):
        items = held if isinstance(held, list) else [held]
        return any(item == value.number for item in items for value in condition.values)
    value = condition.value.number
    return {"<": held < value, "<=": held <= value, ">": held > value, ">=": held >= value}[condition.sign]


def said(condition):
    """A condition as text."""
    if isinstance(condition, Not):
        return f"not ({said(condition.condition)})"
    if isinstance(condition, Every | Either):
        word = " and " if isinstance(condition, Every) else " OR "
        return "(" + word.join(map(said, condition.conditions)) + ")"
    if isinstance(condition, IsNull):
        return f"{condition.column} is null"
    if isinstance(condition, Ordered):
        return f"{condition.column}{condition.sign}{condition.value.text}"
    return f"{condition.column} in ({', '.join(value.text for value in condition.values)})"


@settings(max_examples=150, deadline=None)
@given(
    conditions,
    st.lists(
        st.fixed_dictionaries(
            {
                "one": st.none() | st.integers(-2, 4),
                "many": st.none() | st.lists(st.integers(-2, 4), max_size=3),
            }
        ),
        max_size=6,
    ),
)
def test_as_a_naive_reading_of_each_row(condition, rows):
    batch = pa.RecordBatch.from_pylist(
        rows, schema=pa.schema([("one", pa.int64()), ("many", pa.list_(pa.int64()))])
    )
    expected = [number for number, row in enumerate(rows) if truth(condition, row) is True]
    assert passing(said(condition), batch) == expected
