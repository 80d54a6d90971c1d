"""Filters: conditions on what is known of a row, under which it may be a hit.

    label in (3, dog) and price >= 10 and not (note is null or id = "a.jpg")

    filter      conditions joined by `and`, `or`, `not` and parentheses; `not` binds closest, then `and`
    condition   COLUMN = VALUE, and with != < <= > >= · COLUMN in (VALUE, …) · COLUMN not in (VALUE, …) ·
                COLUMN is null · COLUMN is not null
    column      id, label, path, row, or one that came with the images
    value       a number, a word, or text in quotes, which are doubled inside it

Words and quoted text mean the same, but that a quoted one is never a keyword. The values of `label` are
names of classes, or their numbers; what is the name of one class and the number of another is the name. An
`id` is text, also where rows are known by numbers: '5' is the row 5, and '05' and other text are none. A
number that a column cannot hold equals none of its values. Dates and times are written as 2020-01-31,
'2020-01-31 12:30:05' and 12:30:05. A date and time without an offset, such as +01:00 or Z, is one of the
column's time zone, where it has one. A column of lists, such as the label of images
of several classes, equals a value if any of its items does. As in SQL, a condition on what is null is neither
true nor false, and neither is its opposite; what is not true does not pass.
"""

import datetime
import difflib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.errors import QueryError
from ray_retrieval.search.column_values import plain
from ray_retrieval.search.integers import Number, compared, in_units, those_of, whole
from ray_retrieval.search.rows import numbers_in

Mask = npt.NDArray[np.bool_]

_TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>'(?:[^']|'')*'|"(?:[^"]|"")*")|(?P<sign><=|>=|!=|<>|==|=|<|>|\(|\)|,)"""
    r"""|(?P<word>[^\s()<>=!,'"]+))"""
)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_OFFSET = re.compile(r"\d[T ]\d\d.*(Z|[+-]\d\d(:?\d\d)?)$")
_KEYWORDS = frozenset({"and", "or", "not", "in", "is", "null"})
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_LONGEST, _DEEPEST = 100_000, 50
_MOST_COMPARED = 5_000
_EXAMPLE = "such as: label in (3, dog) and price < 20"


class _Token(NamedTuple):
    text: str
    kind: str
    """`quoted`, `sign`, `word` or `end`."""

    @property
    def keyword(self) -> str | None:
        word = self.text.lower()
        return word if self.kind == "word" and word in _KEYWORDS else None


class Value(NamedTuple):
    """A value as it was written.

    Attributes:
        text: without quotes.
        quoted: whether it had some.
    """

    text: str
    quoted: bool

    @property
    def number(self) -> int | float | None:
        """The number that it is, if it is one."""
        if self.quoted or not _NUMBER.fullmatch(self.text):
            return None
        return float(self.text) if re.search(r"[.eE]", self.text) else int(self.text)


@dataclass(frozen=True)
class Among:
    """A column equals one of some values."""

    column: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Ordered:
    """A column is below or above a value."""

    column: str
    sign: str
    value: Value


@dataclass(frozen=True)
class IsNull:
    """Nothing is known."""

    column: str


@dataclass(frozen=True)
class Not:
    """The opposite."""

    condition: "Condition"


@dataclass(frozen=True)
class Every:
    """Several conditions at once."""

    conditions: "tuple[Condition, ...]"


@dataclass(frozen=True)
class Either:
    """One of several conditions."""

    conditions: "tuple[Condition, ...]"


Condition = Among | Ordered | IsNull | Not | Every | Either


@dataclass(frozen=True)
class Filter:
    """Which rows of an index may be hits. Make one with `Filter.parse`.

    Attributes:
        condition: what must be true of a row.
    """

    condition: Condition

    @classmethod
    def of(cls, where: "str | Filter") -> "Filter":
        """A filter as it is, or as a text says it.

        Raises:
            QueryError: as `parse`, and if it is neither.
        """
        if isinstance(where, str):
            return cls.parse(where)
        if not isinstance(where, cls):
            raise QueryError(
                f"a filter is text, got {type(where).__name__}",
                mend="write it as 'label = dog and price < 20'",
            )
        return where

    @staticmethod
    def parse(text: str) -> "Filter":
        """The filter that a text says; see the module for the language.

        Raises:
            QueryError: saying what is expected where.
        """
        return Filter(_Parser(text).whole())

    def mask(self, records: pa.RecordBatch, schema: pa.Schema, class_names: Sequence[str] | None) -> Mask:
        """Bool [n]: which of some rows pass.

        Args:
            records: of the rows; a column that it lacks is null.
            schema: of the index.
            class_names: of the index's labels, where they have any.

        Raises:
            QueryError: if a column or class is unknown, or a value is none of the column's.
        """
        found = _Masks(records, schema, class_names).of(self.condition)
        return np.asarray(pc.fill_null(found, False).to_numpy(zero_copy_only=False), np.bool_)


class _Parser:
    """Reads a filter from left to right."""

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise QueryError(f"a filter has at most {_LONGEST:,} characters, got {len(text):,}")
        self._text, self._tokens, self._place, self._depth = text, list(_tokens(text)), 0, 0

    def whole(self) -> Condition:
        found = self._any()
        if self._next.kind != "end":
            raise self._expected("'and', 'or' or the end")
        return found

    @property
    def _next(self) -> _Token:
        return self._tokens[self._place]

    def _take(self) -> _Token:
        self._place += 1
        return self._tokens[self._place - 1]

    def _found(self, *expected: str) -> bool:
        """Take keywords or signs if just these follow."""
        following = self._tokens[self._place : self._place + len(expected)]
        if [token.keyword or token.text for token in following if token.kind != "quoted"] != list(expected):
            return False
        self._place += len(expected)
        return True

    def _any(self) -> Condition:
        parts = [self._all()]
        while self._found("or"):
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def _all(self) -> Condition:
        parts = [self._one()]
        while self._found("and"):
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else Every(tuple(parts))

    def _one(self) -> Condition:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise QueryError(f"a filter is nested at most {_DEEPEST} deep", where=_short(self._text))
        if self._found("not"):
            found: Condition = Not(self._one())
        elif self._found("("):
            found = self._any()
            if not self._found(")"):
                raise self._expected("'and', 'or' or ')'")
        else:
            found = self._condition()
        self._depth -= 1
        return found

    def _condition(self) -> Condition:
        column = self._word("a column")
        if self._found("is", "not", "null"):
            return Not(IsNull(column.text))
        if self._found("is", "null"):
            return IsNull(column.text)
        if self._found("not", "in"):
            return Not(Among(column.text, self._values()))
        if self._found("in"):
            return Among(column.text, self._values())
        sign = self._next.text if self._next.kind == "sign" else ""
        if sign not in ("=", "==", "!=", "<>", *_COMPARISONS):
            raise self._expected("=, !=, <, <=, >, >=, 'in' or 'is null'")
        self._take()
        value = self._word("a value")
        if sign in _COMPARISONS:
            return Ordered(column.text, sign, value)
        among = Among(column.text, (value,))
        return among if sign in ("=", "==") else Not(among)

    def _values(self) -> tuple[Value, ...]:
        if not self._found("("):
            raise self._expected("'('")
        values = [self._word("a value")]
        while self._found(","):
            values.append(self._word("a value"))
        if not self._found(")"):
            raise self._expected("',' or ')'")
        return tuple(values)

    def _word(self, what: str) -> Value:
        if self._next.kind not in ("word", "quoted") or self._next.keyword:
            raise self._expected(what)
        token = self._take()
        return Value(token.text, token.kind == "quoted")

    def _expected(self, what: str) -> QueryError:
        found = f"'{self._next.text}'" if self._next.kind != "end" else "the end"
        before = " ".join(token.text for token in self._tokens[max(0, self._place - 4) : self._place])
        after = f" after '{before}'" if before else ""
        return QueryError(
            f"the filter has {found}{after}, expected {what}", where=_short(self._text), mend=_EXAMPLE
        )


def _tokens(text: str) -> Iterator[_Token]:
    place, end = 0, len(text.rstrip())
    while place < end:
        found = _TOKEN.match(text, place)
        if found is None:
            rest = text[place:].strip()
            problem = "a quote is not closed" if rest[:1] in "'\"" else f"'{rest[:1]}' means nothing"
            raise QueryError(f"the filter cannot be read: {problem}", where=_short(text), mend=_EXAMPLE)
        place, kind = found.end(), str(found.lastgroup)
        said = found[kind]
        yield _Token(said[1:-1].replace(said[0] * 2, said[0]) if kind == "quoted" else said, kind)
    yield _Token("", "end")


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Masks:
    """Conditions over the columns of some rows: true, false, or null where they are neither."""

    def __init__(self, records: pa.RecordBatch, schema: pa.Schema, class_names: Sequence[str] | None) -> None:
        self._records, self._schema, self._class_names = records, schema, class_names or []

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        """Of the classes, by their names; of several of one name the first."""
        return {name: number for number, name in reversed(list(enumerate(self._class_names)))}

    def of(self, condition: Condition) -> pa.Array:
        """Bool array of all rows."""
        if isinstance(condition, Not):
            return pc.invert(self.of(condition.condition))
        if isinstance(condition, Every | Either):
            joined = pc.and_kleene if isinstance(condition, Every) else pc.or_kleene
            found, *rest = map(self.of, condition.conditions)
            for other in rest:
                found = joined(found, other)
            return found
        column = self._column(condition.column)
        if isinstance(condition, IsNull):
            return pc.is_null(column)
        try:
            if isinstance(condition, Among):
                return self._among(condition, column)
            return self._ordered(condition, column)
        except (pa.ArrowException, ArithmeticError, ValueError) as error:
            problem = "a number has too many digits" if isinstance(error, ArithmeticError) else str(error)
            raise QueryError(
                f"column '{condition.column}' holds {column.type}: {problem.splitlines()[0]}",
                mend="compare it with values of that kind",
            ) from None

    def _column(self, name: str) -> pa.Array:
        if name not in self._schema.names:
            near = difflib.get_close_matches(name, self._schema.names, n=1, cutoff=0.5)
            listed = ", ".join(self._schema.names)
            mend = f"did you mean '{near[0]}'?" if near else f"there are: {listed}"
            raise QueryError(f"the index has no column '{name}'", mend=mend)
        kind = plain(self._schema.field(name).type)
        if name not in self._records.schema.names:
            return pa.nulls(len(self._records), kind)
        column = self._records[name]
        return column if column.type == kind else column.cast(kind)

    def _among(self, condition: Among, column: pa.Array) -> pa.Array:
        items = pc.list_flatten(column) if _is_list(column.type) else column
        known = condition.values
        if condition.column == "id" and pa.types.is_integer(items.type):
            known = tuple(value for value in known if value.number is not None or numbers_in([value.text]))
        values = [self._value(condition.column, value, items.type) for value in known]
        if whole(items.type):
            possible = those_of(items.type, values)
        else:
            possible = _of_type(pa.array(values), items.type)
        # An item that is null is equal to nothing, even where no value of the column's type is known.
        found = pc.is_in(_comparable(items), value_set=_comparable(possible), skip_nulls=True)
        if _is_list(column.type):
            # What is null may still have items, which `list_flatten` leaves out.
            counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
            parents = np.repeat(np.arange(len(column)), counts)
            among = np.zeros(len(column), np.bool_)
            among[parents[found.to_numpy(zero_copy_only=False)]] = True
            found = pa.array(among)
        return pc.if_else(pc.is_valid(column), found, pa.scalar(None, pa.bool_()))

    def _ordered(self, condition: Ordered, column: pa.Array) -> pa.Array:
        if _is_list(column.type):
            raise QueryError(
                f"column '{condition.column}' holds lists, which are not below or above a value",
                mend="compare it by =, != or in",
            )
        if pa.types.is_null(column.type):
            return pa.nulls(len(column), pa.bool_())
        value = self._value(condition.column, condition.value, column.type)
        if whole(column.type):
            return compared(_comparable(column), condition.sign, value)
        # A number that the column's type rounds is rounded as those in the column were, as for `=`.
        limit = _comparable(_of_type(pa.array([value]), column.type))[0]
        return _COMPARISONS[condition.sign](_comparable(column), limit)

    def _value(self, name: str, value: Value, kind: pa.DataType) -> Any:
        """What a value means in a column whose values, or items of lists, are of a kind."""
        if name == "label" and not pa.types.is_null(kind):
            return self._class_number(value)
        if pa.types.is_boolean(kind) and value.text.lower() in ("true", "false"):
            return value.text.lower() == "true"
        if whole(kind) or pa.types.is_floating(kind):
            if name == "id" and numbers_in([value.text]):
                return int(value.text)
            if value.number is None:
                raise QueryError(f"column '{name}' holds numbers, '{value.text}' is none")
            return _as_number(value, kind)
        if pa.types.is_null(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return None if pa.types.is_null(kind) else value.text
        if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind):
            return _as_time(name, value, kind)
        raise QueryError(
            f"column '{name}' holds {kind}, '{value.text}' is none",
            mend="filter on text, numbers, true or false, dates or times",
        )

    def _class_number(self, value: Value) -> int:
        if value.text in self._numbers:
            return self._numbers[value.text]
        number = value.number
        if isinstance(number, int) and (not self._numbers or 0 <= number < len(self._class_names)):
            return number
        # Of countless names it would take seconds to find the nearest.
        names = self._class_names if len(self._class_names) <= _MOST_COMPARED else []
        near = difflib.get_close_matches(value.text, names, n=1, cutoff=0.5)
        known = f"did you mean '{near[0]}'?" if near else "name a class of the index, or give its number"
        raise QueryError(f"the index has no class '{value.text}'", mend=known)


def _as_number(value: Value, kind: pa.DataType) -> Number:
    """A value that is a number, for a column of numbers."""
    assert value.number is not None, "it is a number"
    if pa.types.is_decimal(kind):
        return in_units(kind, Decimal(value.text))
    return float(value.number) if pa.types.is_floating(kind) else value.number


_UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


def _as_time(name: str, value: Value, kind: pa.DataType) -> str | datetime.time:
    """A value that is a date, a time or both, for a column of such; text is what `_of_type` understands.

    Raises:
        QueryError: saying how they are written, if it is none, or finer than those of the column.
    """
    try:
        found = datetime.time.fromisoformat(value.text) if pa.types.is_time(kind) else value.text
        _of_type(pa.array([found]), kind)
    except (pa.ArrowException, ValueError):
        if pa.types.is_date(kind):
            held, mend = "dates", "write a date as 2020-01-31"
        elif pa.types.is_time(kind):
            held, mend = f"times of day in {_UNITS[kind.unit]}", "write a time as 12:30:05"
        else:
            held = f"dates and times in {_UNITS[kind.unit]}"
            mend = "write them as 2020-01-31 or '2020-01-31 12:30:05', " + (
                "without an offset, as the column has no time zone"
                if kind.tz is None
                else f"of the time zone {kind.tz} or with an offset: '2020-01-31 12:30:05+01:00'"
            )
        raise QueryError(f"column '{name}' holds {held}, '{value.text}' is none", mend=mend) from None
    return found


def _of_type(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Values as they are written, as those of a column's type."""
    if not pa.types.is_timestamp(kind) or kind.tz is None or not pa.types.is_string(values.type):
        return values.cast(kind)
    return pa.chunked_array(
        [
            text.cast(kind)
            if _OFFSET.search(text[0].as_py())
            else pc.assume_timezone(
                text.cast(pa.timestamp(kind.unit)), kind.tz, ambiguous="earliest", nonexistent="earliest"
            )
            for text in (values.slice(place, 1) for place in range(len(values)))
        ],
        kind,
    ).combine_chunks()


def _comparable(column: pa.Array) -> pa.Array:
    """A column as a type whose values Arrow compares; each is the same."""
    kind = column.type
    if pa.types.is_floating(kind):
        column = column.cast(pa.float32()) if pa.types.is_float16(kind) else column
        return pc.add(column, pa.scalar(0, column.type))  # to Arrow, -0.0 is another item than 0.0
    if pa.types.is_decimal(kind) and kind.bit_width < 128:
        return column.cast(pa.decimal128(kind.precision, kind.scale))
    return column


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
