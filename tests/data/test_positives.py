"""The column `positives` of a table: rows of the same table, whatever becomes of it."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_retrieval.data.source import check_images
from ray_retrieval.data.table import ImageTable, concatenate
from ray_retrieval.errors import DataError


def picture(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(buffer, format="JPEG")
    return buffer.getvalue()


def table_of(lists, *, first=0, kind=None, data=None):
    data = data or [b"x"] * len(lists)
    images = pa.array([{"bytes": one, "path": None} for one in data])
    ids = [f"i{first + row}" for row in range(len(lists))]
    column = lists if isinstance(lists, pa.Array) else pa.array(lists, kind or pa.list_(pa.int64()))
    return ImageTable(pa.table({"id": ids, "image": images, "positives": column}), name="pairs")


def pairs_of(table):
    """The pairs by id, in order."""
    lists = table.column("positives").to_pylist()
    return [(table.ids[row], table.ids[other]) for row, others in enumerate(lists) for other in others]


@st.composite
def lists_and_rows(draw):
    count = draw(st.integers(1, 9))
    rows = st.integers(0, count - 1)
    lists = draw(st.lists(st.none() | st.lists(rows, max_size=4), min_size=count, max_size=count))
    first = draw(st.lists(rows, unique=True))
    second = draw(st.lists(st.integers(0, len(first) - 1), unique=True)) if first else []
    return lists, np.array(first, np.int64), np.array(second, np.int64)


@settings(deadline=None)
@given(lists_and_rows())
def test_taking_keeps_the_pairs_of_which_both_are_taken(drawn):
    lists, first, second = drawn
    whole = table_of(lists)
    for part in (whole.take(first), whole.take(first).take(second)):
        kept = set(part.ids)
        by_query = {query: [pair for pair in pairs_of(whole) if pair[0] == query] for query in part.ids}
        wanted = [pair for query in part.ids for pair in by_query[query] if pair[1] in kept]
        assert pairs_of(part) == wanted
        assert pairs_of(pickle.loads(pickle.dumps(part))) == wanted
    assert whole.take(first).take(second).fingerprint == whole.take(first[second]).fingerprint
    order = np.random.default_rng(0).permutation(len(lists))
    assert whole.take(order).take(np.argsort(order)).fingerprint == whole.fingerprint


def test_a_broken_image_shifts_no_pair():
    data = [picture(40 * row) for row in range(6)]
    data[1] = data[1][:-40]
    table = table_of([[1], [], [3], [], [5], []], data=data)
    broken = [error.row for error in check_images(table, 1)]
    assert broken == [1]
    assert pairs_of(table.take(np.setdiff1d(np.arange(6), broken))) == [("i2", "i3"), ("i4", "i5")]


def test_joined_tables_keep_their_pairs():
    first, second = table_of([[1], None]), table_of([[], [2], [0, 1]], first=2)
    plain = ImageTable(table_of([[]], first=5).table.drop_columns(["positives"]), name="plain")
    joined = concatenate([first, plain, second.take(np.array([2, 1, 0]))], name="all")
    assert pairs_of(joined) == [("i0", "i1"), ("i4", "i2"), ("i4", "i3"), ("i3", "i4")]
    assert joined.column("positives").to_pylist() == [[1], [], [], [5, 4], [3], []]


def test_other_labels_keep_the_pairs():
    table = ImageTable(table_of([[1], [0]]).table.set_column(2, "label", pa.array([4, 2])), name="t")
    assert pairs_of(table.renumbered()) == pairs_of(table) == [("i0", "i1"), ("i1", "i0")]


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 1)])
def test_any_lists_of_whole_numbers_are_taken(kind):
    table = table_of([[1], None, [0]], kind=kind)
    assert table.column("positives").type == pa.list_(pa.int64())
    assert table.column("positives").to_pylist() == [[1], [], [0]]
    assert table_of(pa.nulls(2)).column("positives").to_pylist() == [[], []]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1], [], [0, 3]]), r"row 2 has the positives \[0, 3\], rows are 0…2"),
        (pa.array([[], [-1], []]), r"row 1 has the positives \[-1\]"),
        (pa.array([[], [], [None]], pa.list_(pa.int64())), r"row 2 has the positives \[None\]"),
        (pa.array([["a"], [], []]), r"lists of rows of the same table, found list<.*string>"),
        (pa.array([1, 2, 0]), "found int64"),
        (pa.array([[1], [2**63], []], pa.list_(pa.uint64())), rf"row 1 has the positives \[{2**63}\]"),
        (pa.array([[1], [], [2**64 - 1]], pa.list_(pa.uint64())), r"row 2 has the positives"),
    ],
)
def test_what_is_no_row_is_refused(column, message):
    with pytest.raises(DataError, match=message) as caught:
        table_of(column)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_stands_for_the_pairs():
    tables = [
        table_of([[1], [0], []]),
        table_of([[1], [], [0]]),
        table_of([[1, 0], [], []]),
        table_of([[], [], []]),
        ImageTable(table_of([[], [], []]).table.drop_columns(["positives"]), name="none"),
    ]
    assert len({table.fingerprint for table in tables}) == len(tables)
    assert len({table.row_fingerprint for table in tables}) == 1
    assert table_of([None, [], []]).fingerprint == tables[3].fingerprint
