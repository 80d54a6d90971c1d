"""No two rows have the same id: found by 8 bytes of each, against counting them."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import draw_codes, draw_images, write

from ray_retrieval.errors import DataError
from ray_retrieval.search import build, ids
from ray_retrieval.search.ids import check_once


def blocks_of(names, step=3):
    whole = pa.array(names, pa.large_string())
    return lambda: (whole.slice(start, step) for start in range(0, len(names), step))


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


def test_of_very_many_the_first_are_named(monkeypatch):
    monkeypatch.setattr(ids, "_LOOKED_AT", 2)
    with pytest.raises(DataError, match="5 ids come more than once: "):
        check_once(blocks_of(list("abcdeabcde")), 10, "here")


def test_a_build_never_asks_for_all_ids(tmp_path, monkeypatch):
    source = write(tmp_path / "e", draw_codes(90, 16), draw_images(90))
    monkeypatch.delattr("ray_retrieval.search.sources.EmbeddedRows.ids")
    monkeypatch.setattr(np, "isin", None)  # nothing comes twice, so nothing is looked at again
    assert build(source, tmp_path / "index").rows == 90
