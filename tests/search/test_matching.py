"""Pairs by descriptors, against loops over all features."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_parts import unit

from ray_retrieval.config import validate
from ray_retrieval.errors import RecipeError
from ray_retrieval.search import matching
from ray_retrieval.search.matching import MatchingConfig, mutual_nearest, pairs, ratio_test


def grid_vectors(generator, count, dimension, steps):
    """Unit vectors along the axes and between two of them: products are exact, and there are ties."""
    vectors = np.zeros((count, dimension), np.float32)
    vectors[np.arange(count), generator.integers(0, dimension, count)] = 0.6
    vectors[np.arange(count), generator.integers(0, dimension, count)] += 0.8
    return vectors if steps else unit(generator.standard_normal((count, dimension))).astype(np.float32)


def naive_mutual(cosines, distance):
    found = []
    for i, row in enumerate(cosines):
        j = int(np.argmax(row))
        if row[j] >= 1 - distance**2 / 2 and row[j] == cosines[:, j].max():
            found.append((-row[j], i, j))
    return one_each(found)


def naive_ratio(cosines, ratio, distance):
    found = []
    for i, row in enumerate(cosines):
        j = int(np.argmax(row))
        rest = np.delete(row, j)
        second = rest.max() if len(rest) else -np.inf
        if row[j] >= 1 - distance**2 / 2 and max(1 - row[j], 0) < ratio**2 * (1 - second):
            found.append((-row[j], i, j))
    return one_each(found)


def one_each(found):
    taken, kept = set(), []
    for _, i, j in sorted(found):
        if j not in taken:
            taken.add(j)
            kept.append([i, j])
    return kept


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    dimension=st.integers(2, 6),
    ties=st.booleans(),
    block=st.sampled_from([1, 7, 1 << 18]),
    distance=st.sampled_from([0.5, 0.9, 1.2, 2.0]),
    ratio=st.sampled_from([0.7, 0.95, 1.0]),
)
def test_pairs_are_those_of_loops(seed, rows, dimension, ties, block, distance, ratio):
    generator = np.random.default_rng(seed)
    a, b = (grid_vectors(generator, count, dimension, ties) for count in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_BLOCK", block)
        mutual, tested = mutual_nearest(a, b, distance), ratio_test(a, b, ratio, distance)
        # The products as the blocks make them: only the choice is in question.
        made = [block.copy() for _, block in matching._blocks(a, b)]
    if not rows[0] * rows[1]:
        assert mutual.shape == tested.shape == (0, 2)
        return
    cosines = np.concatenate(made)
    assert mutual.tolist() == naive_mutual(cosines, distance)
    assert tested.tolist() == naive_ratio(cosines.astype(np.float64), ratio, distance)
    for found in (mutual, tested):
        assert found.dtype == np.int64
        assert len(np.unique(found[:, 0])) == len(np.unique(found[:, 1])) == len(found)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 30), n=st.integers(1, 30))
def test_mutual_pairs_do_not_depend_on_the_side(seed, m, n):
    generator = np.random.default_rng(seed)
    a, b = (unit(generator.standard_normal((count, 8))).astype(np.float32) for count in (m, n))
    there, back = mutual_nearest(a, b), mutual_nearest(b, a)
    assert sorted(there.tolist()) == sorted(back[:, ::-1].tolist())


def test_the_most_similar_come_first():
    a = np.eye(3, dtype=np.float32)
    b = unit(np.array([[1, 0.5, 0], [0, 1, 0.1], [0.3, 0, 1]])).astype(np.float32)
    assert mutual_nearest(a, b).tolist() == [[1, 1], [2, 2], [0, 0]]


def test_the_distance_is_the_euclidean_one():
    a = np.array([[1, 0]], np.float32)
    b = np.array([[np.cos(0.5), np.sin(0.5)]], np.float32)
    far = float(np.linalg.norm(a - b))
    assert len(mutual_nearest(a, b, far + 1e-4)) == 1
    assert len(mutual_nearest(a, b, far - 1e-4)) == 0


def test_equal_features_are_paired_by_both():
    features = unit(np.random.default_rng(0).standard_normal((9, 5))).astype(np.float16)
    everything = [[row, row] for row in range(9)]
    assert sorted(mutual_nearest(features, features).tolist()) == everything
    assert sorted(ratio_test(features, features, 0.8).tolist()) == everything


def test_an_ambiguous_nearest_fails_the_ratio_test_alone():
    a = np.array([[1, 0]], np.float32)
    b = np.array([[np.cos(0.3), np.sin(0.3)], [np.cos(0.3), -np.sin(0.3)]], np.float32)
    assert pairs(a, b, MatchingConfig(kind="ratio")).tolist() == []
    assert pairs(a, b, MatchingConfig(kind="mutual")).tolist() == [[0, 0]]


def test_wrong_settings_are_named():
    with pytest.raises(RecipeError, match=r"unknown key 'max_distanc'.*max_distance"):
        validate(MatchingConfig, {"max_distanc": 1})
