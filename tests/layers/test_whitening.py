"""Learned and principal-component whitening against the definitions and scikit-learn."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.layers import whitening
from ray_retrieval.layers.whitening import PairStatistics, Whitening, learned, pca


def photographs(seed=0, things=60, views=4, width=7):
    """Vectors [things · views, width] that vary between and within things, and pairs of rows of one thing."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width))
    centres = generator.normal(size=(things, 1, width)) @ mixing + 3
    noise = 0.3 * generator.normal(size=(things, views, width)) @ generator.normal(size=(width, width))
    vectors = (centres + noise).reshape(-1, width)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    first = np.arange(things)[:, None] * views + np.zeros(views - 1, np.int64)
    queries, positives = first.ravel(), (first + np.arange(1, views)).ravel()
    return vectors.astype(np.float32), queries, positives


def gathered(vectors, queries, positives):
    statistics = PairStatistics(vectors.shape[1])
    statistics.add(vectors[queries], vectors[positives])
    statistics.add_all(vectors)
    return statistics


def naive_learned(vectors, queries, positives):
    """The definition, in the published order of steps (columns are vectors)."""
    x = vectors.astype(np.float64).T
    mean = x[:, queries].mean(axis=1, keepdims=True)
    apart = x[:, queries] - x[:, positives]
    inverse = np.linalg.inv(np.linalg.cholesky(apart @ apart.T / len(queries)))
    turned = inverse @ (x - mean)
    values, columns = np.linalg.eigh(turned @ turned.T)
    return mean[:, 0], columns[:, np.argsort(-values)].T @ inverse


def test_learned_whitening_is_the_definition():
    vectors, queries, positives = photographs()
    mean, projection = learned(gathered(vectors, queries, positives))
    expected_mean, expected = naive_learned(vectors, queries, positives)
    assert np.allclose(mean, expected_mean, atol=1e-12)
    signs = np.sign((projection * expected).sum(axis=1, keepdims=True))
    assert np.allclose(projection, signs * expected, rtol=1e-8, atol=1e-8)


def test_pairs_differ_by_the_identity_and_all_vary_along_the_axes():
    vectors, queries, positives = photographs(seed=1)
    mean, projection = learned(gathered(vectors, queries, positives))
    whitened = (vectors - mean) @ projection.T
    apart = whitened[queries] - whitened[positives]
    assert np.allclose(apart.T @ apart / len(queries), np.eye(7), atol=1e-10)
    total = whitened.T @ whitened
    assert np.allclose(total, np.diag(total.diagonal()), atol=1e-8 * total.max())
    assert (np.diff(total.diagonal()) <= 0).all()


def test_fewer_dimensions_are_the_first_rows():
    statistics = gathered(*photographs())
    assert np.array_equal(learned(statistics, 3)[1], learned(statistics)[1][:3])
    assert np.allclose(pca(statistics, 3)[1], pca(statistics)[1][:3])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]))
def test_statistics_of_parts_merge_to_those_of_the_whole(seed, parts):
    vectors, queries, positives = photographs(seed)
    whole = gathered(vectors, queries, positives)
    merged = PairStatistics(7)
    for part in range(parts):
        mine = PairStatistics(7)
        mine.add(vectors[queries[part::parts]], vectors[positives[part::parts]])
        mine.add_all(vectors[part::parts])
        merged = merged.merge(PairStatistics.from_array(mine.as_array(), 7))
    assert (merged.pairs, merged.vectors) == (len(queries), len(vectors))
    assert np.allclose(merged.as_array(), whole.as_array(), rtol=1e-12, atol=1e-10)
    assert np.allclose(learned(merged)[1], learned(whole)[1], rtol=1e-8, atol=1e-8)


def test_blocks_change_nothing(monkeypatch):
    vectors, queries, positives = photographs()
    whole = gathered(vectors, queries, positives)
    mean, projection = learned(whole)
    at_once = whitening.apply(vectors, mean, projection)
    monkeypatch.setattr(whitening, "_BLOCK_BYTES", 8 * 7 * 5)
    assert np.allclose(gathered(vectors, queries, positives).as_array(), whole.as_array(), rtol=1e-12)
    assert np.array_equal(whitening.apply(vectors, mean, projection), at_once)


def test_principal_components_are_those_of_scikit_learn():
    vectors, *_ = photographs(seed=2)
    statistics = gathered(*photographs(seed=2))
    mean, projection = pca(statistics, 4)
    peer = PCA(n_components=4, whiten=True, svd_solver="full").fit(vectors.astype(np.float64))
    # scikit-learn divides the variance by n − 1.
    scale = np.sqrt(len(vectors) / (len(vectors) - 1))
    expected = peer.transform(vectors.astype(np.float64)) * scale
    found = (vectors - mean) @ projection.T
    assert np.allclose(np.abs(found), np.abs(expected), rtol=1e-6, atol=1e-6)
    assert np.allclose(found.T @ found / len(vectors), np.eye(4), atol=1e-9)


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 1.0])
def test_shrinkage_leaves_part_of_the_variances(shrinkage):
    vectors, *_ = photographs()
    mean, projection = pca(gathered(*photographs()), shrinkage=shrinkage)
    covariance = np.cov((vectors - mean) @ projection.T, rowvar=False, bias=True)
    values = np.sort(np.linalg.eigvalsh(np.cov(vectors.astype(np.float64), rowvar=False, bias=True)))[::-1]
    assert np.allclose(covariance, np.diag(values ** (1 - shrinkage)), atol=1e-10)


def test_too_few_vectors_are_cut_to_their_rank_or_refused():
    vectors = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    statistics = PairStatistics(12)
    statistics.add_all(vectors)
    mean, projection = pca(statistics)
    assert projection.shape == (4, 12)
    assert projection.dtype == np.float64
    assert np.allclose(np.cov((vectors - mean) @ projection.T, rowvar=False, bias=True), np.eye(4), atol=1e-9)
    with pytest.raises(DataError, match="5 vectors vary in 4 directions, whitening asks for 6"):
        pca(statistics, 6)


def test_vectors_in_a_plane_have_two_directions():
    generator = np.random.default_rng(0)
    statistics = PairStatistics(6)
    statistics.add_all(generator.normal(size=(50, 2)) @ generator.normal(size=(2, 6)) + 10)
    assert pca(statistics)[1].shape == (2, 6)
    same = PairStatistics(3)
    same.add_all(np.full((9, 3), 0.1, np.float32))
    with pytest.raises(DataError, match="vary in 0 directions"):
        pca(same)


def test_a_singular_covariance_of_pairs_is_shifted_until_it_is_definite():
    vectors, queries, positives = photographs(width=7)
    with pytest.warns(UserWarning, match="7 dimensions is learned from 3 pairs"):
        projection = learned(gathered(vectors, queries[:3], positives[:3]))[1]
    assert np.isfinite(projection).all()
    assert np.abs(projection).max() <= 1.01e5  # 1 / sqrt(1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned(gathered(vectors, queries, queries))  # pairs of equal images


def test_each_row_has_its_largest_entry_positive():
    statistics = gathered(*photographs())
    for _, projection in (learned(statistics), pca(statistics)):
        assert (projection.max(axis=1) >= -projection.min(axis=1)).all()


def test_applied_vectors_have_unit_length_and_equal_the_layer():
    vectors, queries, positives = photographs()
    mean, projection = learned(gathered(vectors, queries, positives), 4)
    found = whitening.apply(vectors, mean, projection)
    assert found.dtype == np.float32
    assert found.shape == (len(vectors), 4)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    layer = Whitening(7, 4).double()
    layer.initialise(mean, projection)
    with torch.no_grad():
        layered = torch.nn.functional.normalize(layer(torch.from_numpy(vectors).double()), dim=1)
    assert np.allclose(found, layered.numpy(), atol=1e-6)
    assert whitening.apply(vectors[:0], mean, projection).shape == (0, 4)
    assert not whitening.apply(mean[None], mean, projection).any()


def test_the_layer_whitens_each_place_of_a_map():
    torch.manual_seed(0)
    layer, features = Whitening(5, 3), torch.rand(2, 5, 4, 6)
    found = layer(features)
    assert found.shape == (2, 3, 4, 6)
    assert torch.allclose(
        found.permute(0, 2, 3, 1),
        layer(features.permute(0, 2, 3, 1).reshape(-1, 5)).reshape(2, 4, 6, 3),
        atol=1e-6,
    )


def test_what_cannot_be_is_refused():
    vectors, queries, positives = photographs()
    statistics, empty = gathered(vectors, queries, positives), PairStatistics(7)
    with pytest.raises(RecipeError, match="1 to 7 dimensions, 8"):
        learned(statistics, 8)
    with pytest.raises(RecipeError, match="1 to 7 dimensions, 0"):
        pca(statistics, 0)
    with pytest.raises(DataError, match="there are none"):
        pca(empty)
    empty.add_all(vectors)
    with pytest.raises(DataError, match="from pairs, there are none"):
        learned(empty)
    with pytest.raises(DataError, match="one positive"):
        empty.add(vectors, vectors[:1])
    with pytest.raises(DataError, match=r"vectors \[n, 7\]"):
        empty.add_all(vectors[:, :5])
    with pytest.raises(DataError, match="not finite"):
        empty.add_all(np.full((2, 7), np.nan, np.float32))
    with pytest.raises(DataError, match="no statistics of 6"):
        PairStatistics.from_array(empty.as_array(), 6)
    with pytest.raises(DataError, match="7 dimensions, the vectors"):
        whitening.apply(vectors[:, :5], *learned(statistics))
    with pytest.raises(DataError, match="7 to 3 dimensions"):
        Whitening(7, 3).initialise(*learned(statistics))
