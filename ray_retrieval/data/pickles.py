"""Pickles of benchmarks, read without running anything that they name.

Ground truth is published as pickles of lists, numbers, text and arrays. A pickle is a program: it may call
any function by its name. Here a name stands for one of a few functions of this file, and is an error
otherwise. NumPy's own functions are not among them either: what they accept of a crafted type can reach
memory that is not theirs. Arrays are made from their bytes and a plain type instead.
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import DataError

__all__ = ["read_pickle"]

_NUMBERS_A_VALUE = {"PUT", "BINPUT", "LONG_BINPUT"}
# Numbers, truth values and text of a fixed width.
_PLAIN_TYPE = re.compile(r"(b1|[iu][1248]|f[248]|c8|c16|[SU][1-9][0-9]{0,5})")


def read_pickle(data: bytes, where: object) -> Any:
    """What a pickle holds: lists, tuples, dictionaries, sets, numbers, text, bytes, None, NumPy arrays.

    Args:
        data: the whole pickle, of any protocol; text of Python 2 is taken as Latin-1.
        where: the file, for messages.

    Raises:
        DataError: if the pickle names anything else, or is damaged.
    """
    try:
        _check_sizes(data)
        reader = _Reader(io.BytesIO(data), encoding="latin1")
        value = reader.load()
        return _with_arrays(value) if reader.names_something else value
    except _NotPlainError as error:
        raise DataError(
            str(error), where=where, mend="take the file from its publisher; only plain data are read"
        ) from None
    except Exception as error:  # A damaged pickle fails in any way: whatever it does is an error of the file.
        raise DataError(
            f"not a readable pickle: {type(error).__name__}: {error}".splitlines()[0],
            where=where,
            mend="the file may be damaged or cut short: fetch it again",
        ) from None


def _check_sizes(data: bytes) -> None:
    """Go through the steps of a pickle without taking any: what they ask room for has to be there.

    A value's number is the room that the table of values is given. A pickle has no more values than bytes.
    """
    for step, argument, _ in pickletools.genops(data):
        if step.name in _NUMBERS_A_VALUE and int(argument or 0) > len(data):
            raise _NotPlainError(f"the pickle numbers a value {argument:,}")


class _NotPlainError(Exception):
    """A pickle holds what is not admitted."""


class _Global:
    """Stands for a name of a pickle. Has no attribute that a pickle could set."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, _state: Any) -> NoReturn:
        raise _NotPlainError("the pickle changes a function")


class _Type:
    """A NumPy type while it is read."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_flags: Any) -> None:
        if code not in ("O", "O8") and not (isinstance(code, str) and _PLAIN_TYPE.fullmatch(code)):
            raise _NotPlainError(f"the pickle holds an array of type {code!r}"[:200])
        self.dtype: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, order, *parts = state[:5]
        if any(part is not None for part in parts):
            raise _NotPlainError("the pickle holds an array of records")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array while it is read."""

    __slots__ = ("value",)

    def __init__(self, *_kind_shape_and_type: Any) -> None:
        self.value: npt.NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, kind, by_columns, content = state[-4:]
        self.value = _filled(content, kind, shape, "F" if by_columns else "C")


def _filled(content: Any, kind: _Type, shape: Any, order: Any) -> npt.NDArray[Any]:
    """An array of its own from its bytes, or from a list of objects."""
    if kind.dtype.hasobject:
        flat = np.empty(len(content), object)
        for place, item in enumerate(content):  # An assignment at once would take lists of one length apart.
            flat[place] = item
    else:
        flat = np.frombuffer(_as_bytes(content), kind.dtype).copy()
    if math.prod(shape) != len(flat):
        raise _NotPlainError(f"the pickle holds an array of {len(flat):,} values for the shape {shape}")
    return flat.reshape(shape, order=order)


def _array_of_buffer(content: Any, kind: _Type, shape: Any, order: str = "C") -> _Array:
    array = _Array()
    array.value = _filled(content, kind, shape, order)
    return array


def _scalar(kind: _Type, content: Any) -> Any:
    return _filled(content, kind, (1,), "C")[0]


def _as_bytes(content: Any) -> bytes:
    # Python 2 wrote bytes as text.
    return content.encode("latin1") if isinstance(content, str) else bytes(content)


def _bytes(*arguments: Any) -> bytes:
    """Bytes of text or of bytes; a number would ask for that much memory."""
    if any(isinstance(argument, int) for argument in arguments):
        raise _NotPlainError("the pickle asks for bytes by their number")
    return bytes(*arguments)


def _encoded(text: str, _encoding: str) -> bytes:
    """Bytes as protocols before 3 have them: as text of the same code points."""
    return text.encode("latin1")


def _nothing(*_arguments: Any) -> NoReturn:
    raise _NotPlainError("the pickle calls a type of NumPy")


_BUILTINS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind for kind in (list, dict, tuple, set, frozenset, int, float, complex, bool, str)
} | {"bytes": _bytes, "long": int, "unicode": str}
_NUMPY: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _nothing,
    "numpy.dtype": _Type,
    "multiarray._reconstruct": _Array,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _array_of_buffer,
}
_GLOBALS = (
    {f"{module}.{name}": make for module in ("builtins", "__builtin__") for name, make in _BUILTINS.items()}
    | {f"numpy.{core}.{name}": make for core in ("core", "_core") for name, make in _NUMPY.items()}
    | {name: _NUMPY[name] for name in ("numpy.ndarray", "numpy.dtype")}
    | {"_codecs.encode": _encoded}
)


class _Reader(pickle.Unpickler):
    """Knows only the names above."""

    names_something = False

    def find_class(self, module: str, name: str) -> Any:
        make = _GLOBALS.get(f"{module}.{name}")
        if make is None:
            raise _NotPlainError(f"the pickle names {module}.{name}, which is not plain data"[:200])
        self.names_something = True
        return _Global(make)

    def persistent_load(self, _name: Any) -> NoReturn:
        raise _NotPlainError("the pickle refers to something outside of itself")


def _with_arrays(value: Any) -> Any:
    """The value with arrays in the place of what stood for them while they were read."""
    if isinstance(value, _Array):
        if value.value is None:
            raise _NotPlainError("the pickle holds an array without content")
        array = value.value
        if array.dtype.hasobject:
            for place, item in enumerate(array.flat):
                array.flat[place] = _with_arrays(item)
        return array
    if isinstance(value, _Type | _Global):
        raise _NotPlainError("the pickle holds a type or a function")
    if isinstance(value, dict):
        return {key: _with_arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_arrays(item) for item in value)
    return value
