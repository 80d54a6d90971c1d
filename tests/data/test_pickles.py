"""Reading plain pickles, and nothing else."""

import contextlib
import io
import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest

from ray_retrieval.data.pickles import read_pickle
from ray_retrieval.errors import DataError

PLAIN = {
    "lists": [1, 2.5, -3, 10**30, None, True, [], ["name", "größe"]],
    "tuples": (1, ("a", b"bytes \xff"), 2 + 3j),
    "sets": [{1, 2}, frozenset({"x"}), set()],
    3: (),
}
ARRAYS = [
    np.arange(6, dtype=np.int64).reshape(2, 3),
    np.asfortranarray(np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)),
    np.arange(3, dtype=">u2"),
    np.array([True, False]),
    np.array(["ab", "ü"]),
    np.array([b"ab", b""]),
    np.array(5.0),
    np.zeros((0, 4), np.float16),
    np.array([1 + 2j]),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(protocol):
    assert read_pickle(pickle.dumps(PLAIN, protocol), "file") == PLAIN


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_scalars_come_back(protocol):
    found = read_pickle(pickle.dumps({"a": ARRAYS, "b": (np.float32(0.1), np.int64(3))}, protocol), "file")
    for array, same in zip(ARRAYS, found["a"], strict=True):
        assert type(same) is np.ndarray
        assert same.dtype == array.dtype
        assert same.flags.writeable
        np.testing.assert_array_equal(same, array)
    assert found["b"] == (np.float32(0.1), 3)
    assert type(found["b"][0]) is np.float32


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_objects_come_back(protocol):
    array = np.empty(2, object)
    array[:] = [[1, 2], [np.arange(2), "x"]]
    found = read_pickle(pickle.dumps(array, protocol), "file")
    assert found.shape == (2,)
    assert found[0] == [1, 2]
    assert found[1][1] == "x"
    np.testing.assert_array_equal(found[1][0], np.arange(2))


def test_a_pickle_of_python_2_is_read():
    # {'a': ['caf\xe9', 5L, set([1])], 'n': numpy.array([1.5])} of Python 2.7, protocol 2.
    data = (
        b"\x80\x02}q\x01(U\x01aq\x02]q\x03(U\x04caf\xe9q\x04\x8a\x01\x05c__builtin__\nset\nq\x05]q\x06K\x01a"
        b"\x85q\x07Rq\x08eU\x01nq\tcnumpy.core.multiarray\n_reconstruct\nq\ncnumpy\nndarray\nq\x0bK\x00\x85q"
        b"\x0cU\x01bq\r\x87q\x0eRq\x0f(K\x01K\x01\x85q\x10cnumpy\ndtype\nq\x11U\x02f8q\x12K\x00K\x01\x87q\x13R"
        b"q\x14(K\x03U\x01<q\x15NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x16b\x89U\x08"
        + struct.pack("<d", 1.5)
        + b"q\x17tq\x18bu."
    )
    found = read_pickle(data, "file")
    assert found["a"] == ["café", 5, {1}]
    np.testing.assert_array_equal(found["n"], [1.5])


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Refers(pickle.Pickler):
    def persistent_id(self, value):
        return "elsewhere" if value == "x" else None


def referring():
    stream = io.BytesIO()
    Refers(stream).dump(["x"])
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(Calls(os.system, "exit 1")), "names .*system, which is not plain data"),
        (pickle.dumps(Calls(eval, "1")), "names builtins.eval"),
        (pickle.dumps(Calls(getattr, 1, "real")), "names builtins.getattr"),
        (pickle.dumps(OrderedDict(a=1)), "names collections.OrderedDict"),
        (pickle.dumps(np.load), "names numpy.load"),
        (pickle.dumps(np.array([(1, 2)], [("a", "i4"), ("b", "i4")])), "holds an array of type 'V8'"),
        (pickle.dumps(np.array(["2020-01-01"], "M8[D]")), "holds an array of type 'M8'"),
        (pickle.dumps(Calls(bytes, 10**12), 4), "asks for bytes by their number"),
        (pickle.dumps(Calls(bytearray, 10**12), 4), "names builtins.bytearray"),
        (pickle.dumps(Calls(np.ndarray, (10**9, 10**9))), "calls a type of NumPy"),
        (pickle.dumps([list]), "holds a type or a function"),
        (pickle.dumps(np.dtype("f8")), "holds a type or a function"),
        (b"cbuiltins\nlist\n(dV_make\ncbuiltins\nset\nsb.", "changes a function"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(tR.", "holds an array without content"),
        (b"]r\xff\xff\xff\x7f.", "numbers a value 2,147,483,647"),
        (referring(), "refers to something outside"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(data, message):
    with pytest.raises(DataError, match=f"file.pkl: the pickle {message}") as error:
        read_pickle(data, "file.pkl")
    assert "\n" not in str(error.value)


def test_crafted_arrays_are_refused():
    data = pickle.dumps(np.arange(4, dtype=np.int32), 2)
    with pytest.raises(DataError, match=r"4 values for the shape \(5,\)"):
        read_pickle(data.replace(b"K\x04\x85", b"K\x05\x85"), "file")
    with pytest.raises(DataError, match="array of type 'O4'"):
        read_pickle(data.replace(b"i4", b"O4"), "file")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_damaged_pickles_are_errors_in_one_line(protocol):
    data = pickle.dumps({"a": ARRAYS[:3], "b": ["names", 1.5]}, protocol)
    generator = np.random.default_rng(0)
    for length in range(len(data)):
        with pytest.raises(DataError) as error:
            read_pickle(data[:length], "file")
        assert "\n" not in str(error.value)
    for _ in range(500):
        spoiled = bytearray(data)
        spoiled[generator.integers(len(data))] = generator.integers(256)
        with contextlib.suppress(DataError):  # A changed name or number can still be plain data.
            read_pickle(bytes(spoiled), "file")


def test_a_value_that_holds_itself_is_an_error():
    value = []
    value.append([value, Calls(set, [1])])
    with pytest.raises(DataError, match="not a readable pickle"):
        read_pickle(pickle.dumps(value), "file")
