"""ASMK*: against the formula in plain loops, and the same however a database is cut."""

import math

import numpy as np
import pytest
from feature_parts import draw_features, features_of, segments_of
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import assert_same

from ray_retrieval.errors import ArtefactError, QueryError, RecipeError
from ray_retrieval.search import asmk
from ray_retrieval.search.asmk import AsmkSegment, Codebook, fill, search_asmk, train
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.votes import LocalSearchConfig


def opened(folder, centres, segments):
    found = []
    for segment in segments:
        path = folder / f"{segment.first_row}-{len(segment)}.asmk"
        with path.open("wb") as stream:
            fill(centres.tobytes(), segment, stream.write)
        found.append(AsmkSegment(path, segment))
    return found


def draw_centres(words, dimension, seed=0):
    """As means of cells are: shorter than 1."""
    return 0.8 * draw_features([words], dimension, seed=seed, centres=words).data.astype(np.float32)


def naive_signs(features, centres, assigned):
    """For each word of one image, the signs of the sum of residuals."""
    sums = {}
    for feature in features.astype(np.float64):
        distances = [np.sum((feature - centre) ** 2) for centre in centres.astype(np.float64)]
        for word in np.argsort(distances, kind="stable")[:assigned].tolist():
            sums[word] = sums.get(word, 0) + (feature - centres[word].astype(np.float64))
    return {word: total > 0 for word, total in sums.items()}


def naive_similarities(database, query, centres, config):
    """Of one query with each image, by the formula."""
    asked = naive_signs(query.data, centres, config.multiple_assignment)
    found = []
    for row in range(len(database)):
        there = naive_signs(database.take(np.array([row])).data, centres, 1)
        total = 0.0
        for word in asked.keys() & there.keys():
            cosine = 1 - 2 * np.mean(asked[word] != there[word])
            total += cosine**config.alpha if cosine > config.tau else 0
        found.append(total / math.sqrt(len(asked) * len(there)) if total else 0.0)
    return found


def similarities(hits, images, query=0):
    """By image, from hits that are all there are."""
    found = np.zeros(images)
    real = hits.rows[query] != NO_ROW
    found[hits.rows[query][real]] = -hits.distances[query][real]
    return found


@pytest.mark.parametrize("dimension", [5, 40, 64, 70])
@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    asked=st.integers(0, 6),
    words=st.integers(1, 12),
    assigned=st.integers(1, 5),
    tau=st.sampled_from([0.0, 0.3]),
    alpha=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 100),
)
def test_similarities_are_the_formula(
    tmp_path_factory, dimension, counts, asked, words, assigned, tau, alpha, seed
):
    database, query = (draw_features(some, dimension, seed=seed, centres=6) for some in (counts, [asked]))
    centres = draw_centres(words, dimension, seed)
    config = LocalSearchConfig(multiple_assignment=assigned, tau=tau, alpha=alpha)
    segments = opened(tmp_path_factory.mktemp("index"), centres, segments_of(database))
    hits = search_asmk(segments, query, len(counts), config)
    expected = naive_similarities(database, query, centres, config)
    np.testing.assert_allclose(similarities(hits, len(counts)), expected, rtol=1e-5, atol=1e-7)
    assert np.all(np.diff(hits.distances[0][hits.rows[0] != NO_ROW]) >= 0)


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=4).map(sorted), threads=st.sampled_from([1, 3]))
def test_hits_do_not_depend_on_segments_and_threads(tmp_path_factory, cuts, threads):
    database = draw_features(np.random.default_rng(1).integers(0, 20, 30), 40, seed=1)
    query, centres = draw_features([30, 0, 5], 40, seed=2), draw_centres(16, 40)
    folder, config = tmp_path_factory.mktemp("index"), LocalSearchConfig()
    whole = search_asmk(opened(folder, centres, segments_of(database)), query, 10, config)
    parts = opened(folder, centres, segments_of(database, cuts))
    assert_same(search_asmk(parts, query, 10, config, threads=threads), whole)


def test_the_order_of_images_does_not_matter(tmp_path):
    database, query, centres = draw_features([9] * 15, 16), draw_features([10], 16), draw_centres(8, 16)
    order, config = np.random.default_rng(0).permutation(15), LocalSearchConfig()
    hits = search_asmk(opened(tmp_path, centres, segments_of(database)), query, 15, config)
    other = search_asmk(opened(tmp_path, centres, segments_of(database.take(order))), query, 15, config)
    np.testing.assert_array_equal(similarities(other, 15), similarities(hits, 15)[order])


def test_an_image_is_most_like_itself(tmp_path):
    database = draw_features([20] * 10, 40, noise=1.0)
    segments = opened(tmp_path, draw_centres(16, 40), segments_of(database, first_row=50))
    hits = search_asmk(segments, database, 3, LocalSearchConfig(multiple_assignment=1))
    np.testing.assert_array_equal(hits.rows[:, 0], np.arange(50, 60))
    np.testing.assert_array_equal(-hits.distances[:, 0], np.nextafter(np.float32(1), np.float32(0)))
    assert (-hits.distances[:, 1] < 0.9).all()


def test_opposite_residuals_are_no_hits(tmp_path):
    centres = np.zeros((1, 2), np.float32)
    database = features_of([[0.8, 0.6], [0.8, -0.6], [-0.8, -0.6]], [1, 1, 1])
    segments = opened(tmp_path, centres, segments_of(database))
    hits = search_asmk(segments, features_of([[0.6, 0.8]], [1]), 3, LocalSearchConfig())
    np.testing.assert_array_equal(hits.rows, [[0, NO_ROW, NO_ROW]])


def test_nearest_words_are_those_of_the_euclidean_distance():
    generator = np.random.default_rng(0)
    centres = generator.uniform(0.2, 1, (50, 1)) * draw_centres(50, 12)
    features = draw_features([200], 12).data.astype(np.float32)
    distances = np.sum((features[:, None].astype(np.float64) - centres.astype(np.float32)) ** 2, axis=2)
    found = Codebook(centres.astype(np.float32)).nearest(features, 5)
    np.testing.assert_array_equal(found, np.argsort(distances, axis=1)[:, :5])
    assert Codebook(centres[:3].astype(np.float32)).nearest(features, 5).shape == (200, 3)


def test_a_codebook_has_the_centres_of_clusters():
    sample = draw_features([600], 16, centres=8, noise=0.02).data.astype(np.float32)
    trained = train(8, sample, 0)
    assert trained == train(8, sample, 0)
    centres = np.frombuffer(trained, np.float32).reshape(8, 16)
    nearest = Codebook(centres).nearest(sample, 1)[:, 0]
    for word in np.unique(nearest):
        np.testing.assert_allclose(centres[word], sample[nearest == word].mean(axis=0), atol=0.05)
    with pytest.raises(RecipeError, match="8 cells"):
        train(8, sample[:7], 0)


def test_blocks_and_threads_do_not_change_the_file(monkeypatch):
    segment = segments_of(draw_features([3, 0, 9, 4, 0, 20, 1], 16))[0]
    trained = draw_centres(8, 16).tobytes()

    def written(threads):
        parts = []
        fill(trained, segment, lambda data: parts.append(bytes(data)), threads=threads)
        return b"".join(parts)

    whole = written(1)
    monkeypatch.setattr(asmk, "_FEATURES_AT_ONCE", 5)
    assert written(2) == whole


def test_without_features_there_are_no_hits(tmp_path):
    nothing, something = draw_features([0, 0], 8), draw_features([3, 3], 8)
    config, centres = LocalSearchConfig(), draw_centres(4, 8)
    for database, query in (
        (something, nothing),
        (nothing, something),
        (nothing.take(np.array([])), nothing),
    ):
        segments = opened(tmp_path, centres, segments_of(database))
        hits = search_asmk(segments, query, 3, config)
        assert (hits.rows == NO_ROW).all()
        assert np.isinf(hits.distances).all()
    assert search_asmk([], something, 3, config).rows.shape == (2, 3)


def test_wrong_queries_and_files_are_refused(tmp_path):
    database, config = draw_features([5, 5], 8), LocalSearchConfig()
    segments = segments_of(database)
    found = opened(tmp_path, draw_centres(4, 8), segments)
    assert len(found[0]) == 2
    with pytest.raises(QueryError, match="at least 1"):
        search_asmk(found, database, 0, config)
    with pytest.raises(ArtefactError, match="8 dimensions, the queries 6"):
        search_asmk(found, draw_features([5], 6), 1, config)
    with pytest.raises(QueryError, match="finite"):
        search_asmk(found, features_of(np.full((1, 8), np.nan), [1]), 1, config)
    path = tmp_path / "0-2.asmk"
    with pytest.raises(ArtefactError, match="no inverted file of 1 images"):
        AsmkSegment(path, segments_of(draw_features([5], 8))[0])
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], whole[:-8]):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ArtefactError, match="restore the file"):
            AsmkSegment(tmp_path / "damaged", segments[0])
    with pytest.raises(ArtefactError, match="restore the file"):
        AsmkSegment(tmp_path / "missing", segments[0])
