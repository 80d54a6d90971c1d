"""No two rows have the same id: found by 8 bytes of each, against counting them."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import draw_codes, images_of, write

from ray_retrieval.errors import DataError
from ray_retrieval.search import Index, add, build, ids, rows
from ray_retrieval.search.id_kernels import hash_texts
from ray_retrieval.search.ids import found_again, hashes_of


def blocks_of(names, step=3):
    whole = pa.array(names, pa.large_string())
    return lambda: (whole.slice(start, step) for start in range(0, len(names), step))


def check_once(blocks, rows, where):
    ids.check_once(blocks, hashes_of(blocks, rows), where)


def again(coming, known, removed=(), step=3):
    """The places of ids that are those of known rows, and these rows."""
    there = pa.array(known, pa.large_string())
    some = [(start, there.slice(start, 2)) for start in range(0, len(known), 2)]
    blocks = blocks_of(coming, step)
    found = found_again(blocks, hashes_of(blocks, len(coming)), some, there.take, np.array(removed, np.int64))
    return list(zip(*(array.tolist() for array in found), strict=True))


@settings(deadline=None)
@given(st.lists(st.text(max_size=3), max_size=30))
def test_ids_that_come_twice_are_counted(names):
    several = [name for name, count in Counter(names).items() if count > 1]
    if not several:
        check_once(blocks_of(names), len(names), "here")
        return
    with pytest.raises(DataError, match=f"{len(several)} ids come more than once") as caught:
        check_once(blocks_of(names), len(names), "here")
    assert all(repr(name) in str(caught.value) for name in several[:3])


def test_equal_hashes_are_no_equal_ids(monkeypatch):
    monkeypatch.setattr(ids, "hash_texts", lambda offsets, _, out: out.fill(len(offsets) and 7))
    check_once(blocks_of(["a", "b", "c", "d"]), 4, "here")
    with pytest.raises(DataError, match="1 ids come more than once: 'a'"):
        check_once(blocks_of(["a", "b", "c", "a"]), 4, "here")


@settings(deadline=None)
@given(
    st.lists(st.text(max_size=2), max_size=30),
    st.lists(st.text(max_size=2), max_size=30),
    st.sets(st.integers(0, 29)),
    st.booleans(),
)
def test_ids_that_are_there_are_found_again(coming, known, removed, alike):
    expected = [
        (place, row)
        for place, name in enumerate(coming)
        for row, other in enumerate(known)
        if name == other and row not in removed
    ]
    with pytest.MonkeyPatch.context() as patch:
        if alike:
            patch.setattr(ids, "hash_texts", lambda offsets, _, out: out.fill(len(offsets) and 7))
        assert sorted(again(coming, known, sorted(removed))) == expected


def test_few_known_rows_are_read_again_at_once(monkeypatch):
    monkeypatch.setattr(ids, "_READ_AGAIN", 4)
    names, asked = [f"image-{row}" for row in range(30)], []
    there = pa.array(names, pa.large_string())

    def texts(rows):
        asked.append(len(rows))
        return there.take(rows)

    blocks = blocks_of(names, step=30)
    places, found = found_again(blocks, hashes_of(blocks, 30), [(0, there)], texts, np.zeros(0, np.int64))
    assert places.tolist() == found.tolist() == list(range(30))
    assert max(asked) == 4


def test_of_very_many_the_first_are_named(monkeypatch):
    monkeypatch.setattr(ids, "_LOOKED_AT", 2)
    with pytest.raises(DataError, match="5 ids come more than once: "):
        check_once(blocks_of(list("abcdeabcde")), 10, "here")


def test_few_ids_are_read_at_once_however_many_there_are(tmp_path, monkeypatch):
    read = []

    def hashed(offsets, data, out):
        read.append(len(out))
        hash_texts(offsets, data, out)

    monkeypatch.setattr(ids, "hash_texts", hashed)
    monkeypatch.setattr(rows, "_BATCH_ROWS", 16)
    monkeypatch.setattr(np, "isin", None)  # nothing comes twice, so nothing is looked at again
    monkeypatch.setattr(Index, "records", None)
    source = write(tmp_path / "e", draw_codes(90, 16), images_of(90), part_rows=8)
    more = write(tmp_path / "more", draw_codes(30, 16), images_of(30, start=90), part_rows=8)
    assert build(source, tmp_path / "index").rows == 90
    assert (max(read), sum(read)) == (8, 90)
    read.clear()
    assert add(tmp_path / "index", more).added == 30
    assert (max(read), sum(read)) == (16, 30 + 90)
