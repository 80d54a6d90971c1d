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
@given(st.integers(0, 1000), st.integers(1, 300))
def test_blocks_change_nothing(seed, rows):
    vectors, queries, positives = photographs(seed)
    whole = gathered(vectors, queries, positives)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whitening, "_BLOCK_BYTES", 8 * 7 * rows)
        parts = gathered(vectors, queries, positives)
    assert (parts.pairs, parts.vectors) == (len(queries), len(vectors))
    for name in ("query_sum", "vector_sum", "differences", "products"):
        assert np.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-10)
    assert np.allclose(learned(parts)[1], learned(whole)[1], rtol=1e-8, atol=1e-8)


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


def test_sums_that_others_formed_are_as_good_as_the_vectors():
    vectors = np.random.default_rng(1).normal(size=(30, 5))
    statistics = PairStatistics(5)
    statistics.add_all(vectors)
    found = PairStatistics.of_sums(30, vectors.sum(axis=0), vectors.T @ vectors)
    for ours, theirs in zip(pca(found), pca(statistics), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    with pytest.raises(DataError, match=r"products \[5, 5\] were expected, found \[4, 4\]"):
        PairStatistics.of_sums(30, vectors.sum(axis=0), np.eye(4))
    with pytest.raises(DataError, match="not finite"):
        PairStatistics.of_sums(30, vectors.sum(axis=0), np.full((5, 5), np.nan))


def test_directions_that_too_few_vectors_lack_are_zero():
    vectors = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    statistics = PairStatistics(12)
    statistics.add_all(vectors)
    with pytest.warns(UserWarning, match="vary in 4 directions, .* for 6: the other 2 are always 0"):
        mean, projection = pca(statistics, 6)
    assert projection.shape == (6, 12)
    assert projection.dtype == np.float64
    assert not projection[4:].any()
    found = (vectors - mean) @ projection[:4].T
    assert np.allclose(np.cov(found, rowvar=False, bias=True), np.eye(4), atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pca(statistics, 4)[1], projection[:4])


def test_vectors_in_a_plane_have_two_directions():
    generator = np.random.default_rng(0)
    statistics = PairStatistics(6)
    statistics.add_all(generator.normal(size=(50, 2)) @ generator.normal(size=(2, 6)) + 10)
    with pytest.warns(UserWarning, match="vary in 2 directions, whitening asks for 6"):
        assert (pca(statistics)[1].any(axis=1) == [True, True, False, False, False, False]).all()
    same = PairStatistics(3)
    same.add_all(np.full((9, 3), 0.1, np.float32))
    with pytest.warns(UserWarning, match="vary in 0 directions"):
        assert not pca(same, 2)[1].any()


def test_too_few_pairs_shrink_the_covariance_of_their_differences():
    vectors, queries, positives = photographs()
    with pytest.warns(UserWarning, match="7 dimensions is learned from 13 pairs only: .* shrunk by 10%"):
        mean, projection = learned(gathered(vectors, queries[:13], positives[:13]))
    x = vectors.astype(np.float64)
    apart = x[queries[:13]] - x[positives[:13]]
    covariance = apart.T @ apart / 13
    shrunk = 0.9 * covariance + 0.1 * np.trace(covariance) / 7 * np.eye(7)
    assert np.allclose(projection @ shrunk @ projection.T, np.eye(7), atol=1e-9)
    total = projection @ (x - mean).T @ (x - mean) @ projection.T
    assert np.allclose(total, np.diag(total.diagonal()), atol=1e-8 * total.max())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned(gathered(vectors, queries[:14], positives[:14]))  # two a dimension


def spread_out(pairs, width=40, views=6):
    """Unit vectors of 150 things, whose images differ most in four directions; pairs of the first 75."""
    generator = np.random.default_rng(3)
    labels = np.repeat(np.arange(150), views)
    vectors = 1 + 0.5 * generator.normal(size=(150, width))[labels]
    vectors += generator.normal(size=(len(labels), 4))[:, generator.integers(0, 4, width)]
    vectors += 0.3 * generator.normal(size=vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    things = generator.integers(0, 75, pairs) * views
    views_of = [generator.permutation(views)[:2] for _ in range(pairs)]
    queries, positives = (things[:, None] + views_of).T
    return vectors.astype(np.float32), labels, queries, positives


def precision(vectors, labels):
    """Mean precision at 5 of each of the later half among it."""
    later = labels >= 75
    mine, ours = vectors[later], labels[later]
    similarities = mine @ mine.T
    np.fill_diagonal(similarities, -np.inf)
    best = np.argsort(-similarities, axis=1)[:, :5]
    return (ours[best] == ours[:, None]).mean()


@pytest.mark.parametrize("pairs", [30, 40, 50])
def test_as_many_pairs_as_dimensions_do_no_harm(pairs):
    vectors, labels, queries, positives = spread_out(pairs)
    with pytest.warns(UserWarning, match="shrunk"):
        mean, projection = learned(gathered(vectors, queries, positives))
    whitened = (vectors - mean) @ projection.T
    whitened /= np.linalg.norm(whitened, axis=1, keepdims=True)
    assert precision(vectors, labels) < 0.2
    assert precision(whitened, labels) > 0.85  # without shrinking: 0.53, 0.26, 0.53
    assert np.abs(projection).max() < 100


def test_channels_that_are_always_zero_are_left_out():
    vectors, queries, positives = photographs()
    with_dead = np.insert(vectors, [2, 5], 0, axis=1)
    whole = gathered(vectors, queries, positives)
    with pytest.warns(UserWarning, match="vary in 7 directions, whitening asks for 9"):
        mean, projection = learned(gathered(with_dead, queries, positives))
    expected_mean, expected = learned(whole)
    assert np.allclose(mean, np.insert(expected_mean, [2, 5], 0))
    assert np.allclose(projection[:7], np.insert(expected, [2, 5], 0, axis=1), rtol=1e-8, atol=1e-8)
    assert not projection[7:].any()
    nearly = with_dead + 1e-9 * np.random.default_rng(0).normal(size=with_dead.shape)  # rounding
    with pytest.warns(UserWarning, match="vary in 7 directions"):
        found = learned(gathered(nearly, queries, positives))[1]
    assert np.abs(found).max() < 1.01 * np.abs(expected).max()


def test_directions_in_which_no_pair_differs_are_stretched_within_bounds():
    vectors, queries, _ = photographs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projection = learned(gathered(vectors, queries, queries))[1]  # pairs of equal images
    assert np.isfinite(projection).all()
    assert np.abs(projection).max() <= 1.01e5  # 1 / sqrt(1e-10)


def test_equal_vectors_are_whitened_to_zeros():
    statistics = PairStatistics(3)
    statistics.add_all(np.full((9, 3), 0.1, np.float32))
    statistics.add(np.full((9, 3), 0.1, np.float32), np.full((9, 3), 0.1, np.float32))
    with pytest.warns(UserWarning, match="vary in 0 directions"):
        mean, projection = learned(statistics, 2)
    assert np.allclose(mean, 0.1)
    assert projection.shape == (2, 3)
    assert not projection.any()


def test_each_row_has_its_largest_entry_positive():
    statistics = gathered(*photographs())
    for _, projection in (learned(statistics), pca(statistics)):
        assert (projection.max(axis=1) >= -projection.min(axis=1)).all()


def test_the_layer_is_the_projection_of_what_differs_from_the_mean():
    mean, projection = learned(gathered(*photographs()), 4)
    vectors = photographs()[0]
    layer = Whitening(7, 4).double()
    layer.initialise(mean, projection)
    with torch.no_grad():
        found = layer(torch.from_numpy(vectors).double()).numpy()
    assert np.allclose(found, (vectors - mean) @ projection.T, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 5, 2, 3)])
def test_the_layer_computes_in_float32_within_autocast(shape):
    torch.manual_seed(0)
    layer, features = Whitening(5, 3), torch.rand(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, half = layer(features), layer(features.bfloat16())
    assert inside.dtype == half.dtype == torch.float32
    assert torch.equal(inside, layer(features))
    assert torch.equal(half, layer(features.bfloat16().float()))
    assert layer(features.double()).dtype == torch.float64
    half.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


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
    with pytest.raises(DataError, match="7 to 3 dimensions"):
        Whitening(7, 3).initialise(*learned(statistics))
