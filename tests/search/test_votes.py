"""Votes of local features: against the formula in plain loops, and the same however a database is cut."""

import math

import numpy as np
import pytest
from feature_parts import draw_features, features_of, segments_of
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import assert_same

from ray_retrieval.config import validate
from ray_retrieval.errors import ArtefactError, MetricError, QueryError, RecipeError
from ray_retrieval.search import faiss_index, neighbours
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.neighbours import (
    FeatureSegment,
    IndexedFeatures,
    fill,
    merge_neighbours,
    nearest_features,
    sample_features,
)
from ray_retrieval.search.votes import (
    EXACT_FEATURES,
    LocalSearchConfig,
    cast,
    choose_shortlist,
    recall_of_votes,
    search_votes,
)

COUNTS = st.lists(st.integers(0, 7), min_size=1, max_size=12)


def naive_votes(database, query, neighbours):
    """The similarity of each image, by the formula."""
    owners = np.repeat(np.arange(len(database)), database.counts)
    votes, most = [0.0] * len(database), 0.0
    for feature in query.data.astype(np.float64):
        distances = [
            float(np.float32(np.sum((feature - other) ** 2))) for other in database.data.astype(float)
        ]
        nearest = sorted(range(len(distances)), key=lambda place: (distances[place], place))[:neighbours]
        cosines = {place: 1 - distances[place] / 2 for place in nearest}
        reference = max(cosines[nearest[-1]], 0) if len(nearest) == neighbours else 0
        images = {int(owners[place]) for place in nearest if cosines[place] > reference}
        weight = math.log(1 + len(database) / max(len(images), 1)) / math.log(1 + len(database))
        most += weight * (1 - reference)
        for image in images:
            best = max(cosines[place] for place in nearest if owners[place] == image)
            votes[image] += weight * (best - reference)
    return [
        vote / (math.sqrt(count) * most) if vote > 0 else 0.0
        for vote, count in zip(votes, database.counts.tolist(), strict=True)
    ]


def similarities(hits, images, query=0):
    """By image, from hits that are all there are."""
    found = np.zeros(images)
    real = hits.rows[query] != NO_ROW
    found[hits.rows[query][real]] = -hits.distances[query][real]
    return found


def indexed(folder, trained, segments):
    """The segments with an index, which `trained` is or names."""
    if isinstance(trained, str):
        trained = faiss_index.train(trained, sample_features(segments, 1000, 0), 0)
    opened = []
    for segment in segments:
        path = folder / f"{segment.first_row}-{len(segment)}.faiss"
        with path.open("wb") as stream:
            fill(trained, segment, stream.write)
        opened.append(IndexedFeatures(path, segment))
    return opened


@settings(max_examples=30, deadline=None)
@given(counts=COUNTS, asked=st.integers(0, 6), neighbours=st.integers(2, 12), seed=st.integers(0, 1000))
def test_exact_votes_are_the_formula(counts, asked, neighbours, seed):
    database = draw_features(counts, 6, seed=seed, centres=4)
    query = draw_features([asked], 6, seed=seed + 1, centres=4)
    config = LocalSearchConfig(neighbours=neighbours)
    hits = search_votes(segments_of(database), query, len(counts), config, images=len(counts))
    expected = naive_votes(database, query, neighbours)
    np.testing.assert_allclose(similarities(hits, len(counts)), expected, rtol=1e-5, atol=1e-7)
    assert np.all(np.diff(hits.distances[0][hits.rows[0] != NO_ROW]) >= 0)


def test_an_image_gets_one_vote_of_a_feature_worth_its_best():
    # The query's cosines with the two images: 1, 0.8, 0.6 and 0.6, 0.
    angles = np.arccos([1, 0.8, 0.6, 0.6, 0])
    database = features_of(np.stack([np.cos(angles), np.sin(angles)], axis=1), [3, 2])
    hits = search_votes(
        segments_of(database), features_of([[1, 0]], [1]), 2, LocalSearchConfig(neighbours=5), images=2
    )
    np.testing.assert_array_equal(hits.rows, [[0, 1]])
    # The fifth neighbour's cosine is 0, both images are among the neighbours: the weight cancels.
    np.testing.assert_allclose(-hits.distances, [[1 / math.sqrt(3), 0.6 / math.sqrt(2)]], rtol=1e-3)


def test_features_that_vote_for_many_images_count_less():
    common, rare = np.eye(4)[:2]
    database = features_of([common, common, common, rare], [1, 1, 1, 1])
    query = features_of([common, rare], [2])
    hits = search_votes(segments_of(database), query, 4, LocalSearchConfig(neighbours=4), images=4)
    np.testing.assert_array_equal(hits.rows, [[3, 0, 1, 2]])
    weight = math.log(1 + 4 / 3) / math.log(1 + 4)
    expected = [1 / (1 + weight)] + [weight / (1 + weight)] * 3
    np.testing.assert_allclose(-hits.distances[0], expected, rtol=1e-6)


@pytest.fixture(scope="module", params=[None, "IVF16,SQ8", "IVF16,PQ5x4", "SQ8"])
def trained(request, shared_database):
    """An index to fill, or nothing for the exact votes."""
    if request.param is None:
        return None
    return faiss_index.train(request.param, sample_features(segments_of(shared_database), 400, 0), 0)


@pytest.fixture(scope="module")
def shared_database():
    return draw_features(np.random.default_rng(1).integers(0, 30, 40), 10, seed=1)


@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted), threads=st.sampled_from([1, 3]))
def test_hits_do_not_depend_on_segments_and_threads(
    tmp_path_factory, trained, shared_database, cuts, threads
):
    query = draw_features([70, 0, 5], 10, seed=2)
    config, folder = LocalSearchConfig(neighbours=20, nprobe=4), tmp_path_factory.mktemp("index")

    def search(segments, threads):
        if trained is not None:
            segments = indexed(folder, trained, segments)
        return search_votes(segments, query, 15, config, images=40, threads=threads)

    assert_same(search(segments_of(shared_database, cuts), threads), search(segments_of(shared_database), 1))


def test_equal_images_in_different_segments_stand_in_their_order(tmp_path):
    once = draw_features([20, 20, 20], 8)
    twice = features_of(np.concatenate([once.data, once.data]), [20] * 6)
    config = LocalSearchConfig(neighbours=10, nprobe=4)
    for cuts in ([], [3], [1, 2, 5]):
        segments = segments_of(twice, cuts)
        for found in (segments, indexed(tmp_path, "IVF4,SQ8", segments)):
            hits = search_votes(found, once.take(np.array([1])), 4, config, images=6)
            np.testing.assert_array_equal(hits.rows[0, :2], [1, 4])
            assert hits.distances[0, 0] == hits.distances[0, 1]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_order_of_images_does_not_matter(seed):
    generator = np.random.default_rng(seed)
    database = draw_features(generator.integers(1, 9, 15), 8, seed=seed)
    query, order = draw_features([10], 8, seed=seed + 1), generator.permutation(15)
    config = LocalSearchConfig(neighbours=12)
    hits = search_votes(segments_of(database), query, 15, config, images=15)
    other = search_votes(segments_of(database.take(order)), query, 15, config, images=15)
    np.testing.assert_allclose(similarities(other, 15), similarities(hits, 15)[order], rtol=1e-6)


def test_what_parts_of_a_database_answer_is_merged_before_it_votes():
    database, query = draw_features([9] * 12, 8, seed=3), draw_features([5, 0, 6], 8, seed=4)
    segments, config = segments_of(database, [3, 7], first_row=100), LocalSearchConfig(neighbours=15)
    asked = query.data.astype(np.float32)
    parts = [
        nearest_features(some, asked, 15, config.effort)
        for some in (segments[2:], segments[:1], segments[1:2])
    ]
    hits = cast(merge_neighbours(parts, 15), query.offsets, 5, images=12)
    assert_same(hits, search_votes(segments, query, 5, config, images=12))
    assert hits.rows[0].min() >= 100


def test_blocks_of_features_do_not_change_the_exact_neighbours(monkeypatch):
    segment = segments_of(draw_features([9] * 12, 8, seed=3))[0]
    asked = draw_features([20], 8, seed=4).data.astype(np.float32)
    whole = segment.nearest(asked, 7, Effort())
    monkeypatch.setattr(neighbours, "_BYTES_AT_ONCE", 4 * 8 * 13)
    assert_same(segment.nearest(asked, 7, Effort(), threads=2), whole)


def test_similarities_stay_below_one():
    database = features_of(np.eye(3), [1, 1, 1])
    hits = search_votes(segments_of(database), database, 3, LocalSearchConfig(), images=3)
    np.testing.assert_array_equal(hits.rows[:, 0], [0, 1, 2])
    np.testing.assert_array_equal(hits.rows[:, 1:], NO_ROW)
    assert (-hits.distances[:, 0] < 1).all()
    assert (-hits.distances[:, 0] > 0.999).all()


def test_without_features_there_are_no_hits(tmp_path):
    nothing, something = draw_features([0, 0], 8), draw_features([3, 3], 8)
    config = LocalSearchConfig()
    for database, query in ((something, nothing), (nothing, something)):
        hits = search_votes(segments_of(database), query, 3, config, images=2)
        assert (hits.rows == NO_ROW).all()
        assert np.isinf(hits.distances).all()
    assert search_votes([], something, 3, config, images=0).rows.shape == (2, 3)
    trained = faiss_index.train("IVF2,SQ8", draw_features([100], 8).data.astype(np.float32), 0)
    with (tmp_path / "empty.faiss").open("wb") as stream:
        fill(trained, segments_of(nothing)[0], stream.write)
    empty = IndexedFeatures(tmp_path / "empty.faiss", segments_of(nothing)[0])
    assert len(empty) == 2
    assert (search_votes([empty], something, 3, config, images=2).rows == NO_ROW).all()


def test_an_index_finds_what_the_exact_votes_find(tmp_path):
    database = draw_features([40] * 60, 16, seed=5, noise=0.3)
    query, segments = draw_features([40] * 4, 16, seed=6, noise=0.3), segments_of(database, [25])
    config = LocalSearchConfig(neighbours=30, nprobe=8)
    exact = search_votes(segments, query, 10, config, images=60)
    everything = search_votes(indexed(tmp_path, "IVF8,Flat", segments), query, 10, config, images=60)
    np.testing.assert_array_equal(everything.rows, exact.rows)
    np.testing.assert_allclose(everything.distances, exact.distances, rtol=1e-4)
    coded = search_votes(indexed(tmp_path, "IVF8,SQ8", segments), query, 10, config, images=60)
    assert recall_of_votes(exact, coded) >= 0.9


def test_the_same_features_give_the_same_file(tmp_path):
    segment = segments_of(draw_features([50] * 10, 8))[0]
    written = []
    for _ in range(2):
        trained, parts = faiss_index.train("IVF8,SQ8", sample_features([segment], 400, 0), 0), []
        fill(trained, segment, lambda data, parts=parts: parts.append(bytes(data)))
        written.append(b"".join(parts))
    assert written[0] == written[1]


def test_a_sample_is_the_same_however_the_database_is_cut():
    database = draw_features([5, 0, 8, 3, 0, 9], 8)
    whole = sample_features(segments_of(database), 10, 0)
    np.testing.assert_array_equal(sample_features(segments_of(database, [1, 1, 4]), 10, 0), whole)
    assert whole.shape == (10, 8)
    everything = sample_features(segments_of(database), 100, 0)
    np.testing.assert_array_equal(everything, database.data.astype(np.float32))


def test_recall_is_the_share_of_exact_images_found():
    exact = Hits(np.array([[-0.5, -0.4], [-0.3, np.inf]], np.float32), np.array([[3, 1], [2, NO_ROW]]))
    found = Hits(np.array([[-0.9, -0.1], [-0.3, np.inf]], np.float32), np.array([[7, 3], [2, NO_ROW]]))
    assert recall_of_votes(exact, found) == pytest.approx(2 / 3)
    assert recall_of_votes(exact, exact) == 1
    with pytest.raises(MetricError, match="same queries"):
        recall_of_votes(exact, found.take([0]))


@pytest.mark.parametrize(
    ("values", "features", "vectors", "kind", "factory"),
    [
        ({}, EXACT_FEATURES, 0, "exact", None),
        ({}, EXACT_FEATURES + 1, 0, "votes", "IVF1024,SQ8"),
        ({}, 2_000_000, 256, "votes", "IVF4096,SQ8"),
        ({"factory": "IVF16,PQ20"}, 5000, 0, "votes", "IVF16,PQ20"),
        ({"shortlist": "votes"}, 100, 0, "votes", "IVF1,SQ8"),
        ({"shortlist": "votes", "train_rows": 6400}, 2_000_000, 0, "votes", "IVF64,SQ8"),
        ({"shortlist": "exact"}, 2_000_000, 0, "exact", None),
        ({"shortlist": "global"}, 2_000_000, 256, "global", None),
    ],
)
def test_the_shortlist_is_chosen_by_the_number_of_features(values, features, vectors, kind, factory):
    chosen = choose_shortlist(LocalSearchConfig(**values), features=features, vectors=vectors)
    assert (chosen.kind, chosen.factory) == (kind, factory)
    assert 0 <= chosen.train_rows <= features


def test_words_are_chosen_by_the_number_of_features():
    chosen = choose_shortlist(LocalSearchConfig(shortlist="asmk"), features=10**10, vectors=0)
    assert (chosen.words, chosen.train_rows) == (65_536, 64 * 65_536)
    asked = LocalSearchConfig(shortlist="asmk", words=100)
    assert choose_shortlist(asked, features=10**6, vectors=0).words == 100


@pytest.mark.parametrize(
    ("values", "features", "message"),
    [
        ({"shortlist": "global"}, 10, "no global vectors"),
        ({"shortlist": "votes"}, 0, "nothing to train"),
        ({"shortlist": "asmk", "factory": "IVF2,SQ8"}, 10, "has none"),
    ],
)
def test_impossible_shortlists_are_refused(values, features, message):
    with pytest.raises(RecipeError, match=message):
        choose_shortlist(LocalSearchConfig(**values), features=features, vectors=0)


def test_a_misspelt_key_is_named():
    with pytest.raises(RecipeError, match="did you mean 'neighbours'"):
        validate(LocalSearchConfig, {"neighbors": 60})


def test_wrong_queries_and_files_are_refused(tmp_path):
    database, config = draw_features([5, 5], 8), LocalSearchConfig()
    segments = segments_of(database)
    with pytest.raises(QueryError, match="at least 1"):
        search_votes(segments, database, 0, config, images=2)
    with pytest.raises(ArtefactError, match="8 dimensions, the queries 6"):
        search_votes(segments, draw_features([5], 6), 1, config, images=2)
    with pytest.raises(QueryError, match="finite"):
        search_votes(segments, features_of(np.full((1, 8), np.nan), [1]), 1, config, images=2)
    with pytest.raises(ArtefactError, match="float16"):
        FeatureSegment(database.offsets, database.data.astype(np.float32), 0, 0)
    with pytest.raises(ArtefactError, match="go from 0"):
        FeatureSegment(database.offsets[:-1], database.data, 0, 0)
    (tmp_path / "damaged.faiss").write_bytes(b"no index")
    with pytest.raises(ArtefactError, match="damaged"):
        IndexedFeatures(tmp_path / "damaged.faiss", segments[0])
    opened = indexed(tmp_path, "IVF2,Flat", segments)
    assert len(opened[0]) == 2
    with pytest.raises(ArtefactError, match="build the index again"):
        IndexedFeatures(tmp_path / "0-2.faiss", segments_of(draw_features([4], 8))[0])
