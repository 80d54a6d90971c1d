"""Pairs that share a label, against all pairs one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.data import labels as module
from ray_retrieval.data.labels import positive_pair_rate, sharing_pairs


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), rows=st.integers(0, 25), classes=st.integers(1, 12))
def test_pairs_of_multi_hot_labels_are_counted_one_by_one(seed, rows, classes):
    hot = np.random.default_rng(seed).random((rows, classes)) < 0.3
    naive = sum(bool((hot[i] & hot[j]).any()) for i in range(rows) for j in range(rows))
    assert sharing_pairs(hot) == naive


def test_blocks_do_not_change_the_count(monkeypatch):
    hot = np.random.default_rng(0).random((300, 9)) < 0.3
    whole = sharing_pairs(hot)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert sharing_pairs(hot) == whole


def test_class_numbers_give_the_sum_of_squares():
    assert sharing_pairs(np.array([0, 0, 1, 5, 5, 5])) == 4 + 1 + 9
    assert positive_pair_rate(np.arange(10) % 5) == pytest.approx(0.2)
    assert positive_pair_rate(np.zeros(0, np.int64)) == 0
