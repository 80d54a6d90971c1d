"""Geometric verification of many images, and the step of re-ranking by it, against plain loops."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_parts import draw_set, draw_view, local_set, together
from search_parts import draw_images, draw_vectors, write

from ray_retrieval.descriptors import Local, Vectors
from ray_retrieval.errors import ArtefactError, QueryError, RecipeError
from ray_retrieval.recipe import rerank_steps
from ray_retrieval.search import Index
from ray_retrieval.search import build as build_index
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.rerank import (
    GeometricVerification,
    GeometricVerificationConfig,
    HeldVectors,
    QueryExpansionConfig,
    build,
    build_all,
    rankings,
    rerank,
)
from ray_retrieval.search.rerank.verification import NOT_VERIFIED, MatchedFeatures, inliers_of, scores
from ray_retrieval.search.verify import VerifyConfig, compare, verify

SHARED = (0, 40, 5, 25, 60, 0, 30)
"""Features that each row of the database shares with the query's scene."""


class HeldLocal:
    """Local features in memory as a database."""

    def __init__(self, sets):
        self.sets = sets

    def __len__(self):
        return len(self.sets)

    def descriptors(self, rows):
        return self.sets.take(rows)


@pytest.fixture(scope="module")
def scene():
    return draw_set(120, seed=1)


@pytest.fixture(scope="module")
def database(scene):
    """Views of the scene, one image of nothing, and the scene itself."""
    views = [draw_view(scene, shared, seed=row)[0] for row, shared in enumerate(SHARED)]
    return together([*views, local_set(np.zeros((0, 16)), np.zeros((0, 2))), scene])


def hits_of(*rows):
    distances = np.arange(len(rows[0]), dtype=np.float32)
    return Hits(np.tile(distances, (len(rows), 1)), np.array(rows, np.int64))


def naive_order(query, database, rows, config):
    """Rows by (inliers where they are enough, place in the shortlist), the deeper ones as they came."""
    keyed = []
    for place, row in enumerate(rows[: config.depth]):
        geometry = compare(query, database.take(np.array([row])), config)[1]
        inliers = 0 if geometry is None else int(geometry.inliers.sum())
        keyed.append((-inliers if inliers >= config.min_inliers else 0, place, row))
    return [row for _, _, row in sorted(keyed)] + list(rows[config.depth :])


def test_inliers_are_found_on_views_of_the_scene_alone(scene, database):
    found = verify(scene, database, VerifyConfig())
    assert found.inliers.dtype == np.int64
    for row, shared in enumerate(SHARED):
        if shared >= 25:
            assert 0.85 * shared <= found.inliers[row] <= shared + 5
            assert found.significance[row] > 15
        else:
            assert found.inliers[row] < 12
    assert found.inliers[-2] == found.significance[-2] == 0
    assert 110 <= found.inliers[-1] <= 120  # but for those that share a cell


@settings(max_examples=15, deadline=None)
@given(data=st.data(), threads=st.integers(1, 4))
def test_a_pair_of_images_gives_the_same_in_any_company(scene, database, data, threads):
    rows = np.array(data.draw(st.lists(st.integers(0, len(database) - 1), max_size=10)), np.int64)
    everything = verify(scene, database, VerifyConfig())
    found = verify(scene, database.take(rows), VerifyConfig(), threads=threads)
    np.testing.assert_array_equal(found.inliers, everything.inliers[rows])
    np.testing.assert_array_equal(found.significance, everything.significance[rows])


def test_pairs_and_model_of_two_images(scene):
    view, affine, truth = draw_view(scene, 50, seed=3, noise=0.5)
    paired, geometry = compare(scene, view, VerifyConfig())
    right = {tuple(pair) for pair in truth.tolist()}
    kept = [tuple(pair) for pair in paired[geometry.inliers].tolist()]
    assert len(set(kept) & right) >= 48
    np.testing.assert_allclose(geometry.matrix[:2, :2], affine[:, :2], atol=0.02)
    np.testing.assert_allclose(geometry.matrix[:2, 2], affine[:, 2], atol=6)


def test_features_of_another_model_are_refused(scene):
    with pytest.raises(ArtefactError, match=r"features to compare are of one model.*16.*8"):
        verify(scene, draw_set(5, dimension=8), VerifyConfig())


@pytest.mark.parametrize("depth", [3, 100])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_order_is_that_of_a_loop(scene, database, depth, threads):
    config = GeometricVerificationConfig(depth=depth)
    step = build(config, HeldLocal(database), threads=threads)
    assert step.depth == depth
    queries = together([scene, draw_view(scene, 60, seed=9)[0], database.take(np.array([7]))])
    generator = np.random.default_rng(0)
    lists = [generator.permutation(len(database)) for _ in range(3)]
    made, found = step(queries, hits_of(*lists))
    assert made is queries
    for number, rows in enumerate(lists):
        wanted = naive_order(queries.take(np.array([number])), database, rows.tolist(), config)
        assert found.rows[number].tolist() == wanted
        assert (np.diff(found.distances[number]) > 0).all()  # nothing is tied
        assert (found.distances[number] < 0).all()
    assert found.rows[2].tolist() == lists[2].tolist()  # a query without features keeps its hits


def test_the_score_is_the_number_of_inliers_and_a_fraction(scene, database):
    step = build(GeometricVerificationConfig(depth=4), HeldLocal(database))
    _, found = step(scene, hits_of([0, 1, 2, 4, 3, 6]))
    wanted = verify(scene, database, VerifyConfig()).inliers
    whole = np.floor(-found.distances[0]).astype(int)
    assert found.rows[0].tolist() == [4, 1, 0, 2, 3, 6]
    assert whole.tolist() == [wanted[4], wanted[1], 0, 0, 0, 0]
    read = [wanted[4], wanted[1], 0, 0, NOT_VERIFIED, NOT_VERIFIED]
    assert inliers_of(found.distances[0], 4).tolist() == read
    rest = -found.distances[0] - whole
    np.testing.assert_allclose(rest, [1 / 5, 3 / 5, 4 / 5, 2 / 5, 1 / 10, 1 / 15], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    depth=st.sampled_from([1, 2, 100, 2048]),
    count=st.integers(0, 2600),
    inliers=st.sampled_from([0, 4000, 4095, 60_000]),
)
def test_scores_are_lexicographic_and_never_tied(depth, count, inliers):
    some = np.full(min(depth, count), inliers)
    some[::3] //= 2
    made = scores(some, count, depth)
    assert made.dtype == np.float32
    assert len(np.unique(made)) == count
    capped = np.minimum(some, 4095)
    np.testing.assert_array_equal(np.floor(made[:depth]).astype(np.int64), capped)
    keys = [(-capped[place] if place < depth else 1, place) for place in range(count)]
    assert np.argsort(-made, kind="stable").tolist() == sorted(range(count), key=lambda place: keys[place])
    assert (made > 0).all()
    read = inliers_of(-made, depth)
    np.testing.assert_array_equal(read[: len(some)], capped)
    assert (read[len(some) :] == NOT_VERIFIED).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), depth=st.integers(1, 4))
def test_what_a_protocol_ignores_does_not_take_places_among_the_verified(scene, database, data, depth):
    """Each ranking is that of a shortlist without the ignored rows; no two images are compared twice."""
    config = GeometricVerificationConfig(depth=depth)
    step = build(config, HeldLocal(database))
    order = data.draw(st.permutations(range(len(database))))
    subsets = st.lists(st.lists(st.sampled_from(order), unique=True), min_size=1, max_size=3)
    ignored = [np.array(rows, np.int64) for rows in data.draw(subsets)]
    compared = []
    read = step.features.descriptors
    step.features = SimpleNamespace(descriptors=lambda rows: (compared.extend(rows.tolist()), read(rows))[1])
    made = rankings([step], scene, hits_of(order), [[rows] for rows in ignored])
    assert len(set(compared)) == len(compared)
    for rows, found in zip(ignored, made, strict=True):
        left = [row for row in order if row not in rows]
        wanted = naive_order(scene, database, left, config)
        assert found.rows[0].tolist() == wanted + [NO_ROW] * len(rows)
        assert np.isfinite(found.distances[0]).sum() == len(left)


def test_steps_beside_verification_take_what_is_left(scene, database):
    """Those before it are taken once, those after it for each protocol."""
    generator = np.random.default_rng(6)
    vectors = generator.standard_normal((len(database), 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    held, queries = HeldVectors(vectors), Vectors(vectors[:1])
    hits = held.search(queries, len(database))
    step = GeometricVerification(GeometricVerificationConfig(depth=2), held, HeldLocal(database))
    expansion = build(QueryExpansionConfig(n=2), held)
    nothing, some = np.zeros(0, np.int64), hits.rows[0, 1:4]
    ignored = [[nothing], [some]]
    more = GeometricVerification(GeometricVerificationConfig(), held, HeldLocal(database))
    made = rankings([expansion, step, more], queries, hits, ignored, features=scene)
    whole = rerank([expansion, step, more], queries, hits, features=scene)
    np.testing.assert_array_equal(made[0].rows, whole.rows)
    assert set(made[1].rows[0].tolist()) == set(range(len(database))) - set(some.tolist()) | {NO_ROW}
    # What has nothing to verify ignores nothing: it re-ranks as ever, for all protocols the same.
    plain = rankings([expansion], queries, hits, ignored)
    for found in plain:
        np.testing.assert_array_equal(found.rows, rerank([expansion], queries, hits).rows)


def test_features_of_two_models_are_never_compared(scene, database, indices):
    """An index of local features verified by another one of a second model of as many dimensions."""
    own = HeldLocal(database)
    config = GeometricVerificationConfig(local=str(indices / "delf"))
    ids = Index.open(indices / "gem").records(np.arange(9))["id"].to_pylist()
    (step,) = build_all([config], own, ids=ids)
    unlike = draw_set(120, seed=77)  # what the first model makes of the query
    found = rerank([step], unlike, hits_of(range(9)), features=scene)
    known = database.take(np.array([0, 1, 2, 3, 7, 5, 6, 7, 8]))
    assert found.rows[0].tolist() == naive_order(scene, known, list(range(9)), config)
    with pytest.raises(QueryError, match=r"takes the local features of 1 queries, got those of 0.*the index"):
        rerank([step], scene, hits_of(range(9)))


def test_missing_hits_stay_missing(scene, database):
    step = build(GeometricVerificationConfig(), HeldLocal(database))
    _, found = step(scene, Hits(np.float32([[0, 1, np.inf]]), np.array([[2, 4, NO_ROW]])))
    assert found.rows.tolist() == [[4, 2, NO_ROW]]
    assert math.isinf(found.distances[0, 2])
    none = Hits(np.zeros((1, 0), np.float32), np.zeros((1, 0), np.int64))
    assert step(scene, none)[1].rows.shape == (1, 0)


def test_vectors_are_verified_by_local_features_beside_them(scene, database):
    """As GeM with an index of a DELF model: rows are matched by the images' ids, in any order."""
    generator = np.random.default_rng(5)
    vectors = generator.standard_normal((len(database), 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    held, queries = HeldVectors(vectors), Vectors(vectors[:1])
    order = generator.permutation(len(database))[:-1]
    rows = np.full(len(database), NO_ROW)
    rows[order] = np.arange(len(order))
    features = MatchedFeatures(HeldLocal(database.take(order)), rows)
    missing = int(np.flatnonzero(rows == NO_ROW)[0])
    read = features.descriptors(np.arange(len(database)))
    for row in range(len(database)):
        count = 0 if row == missing else database.counts[row]
        assert read.counts[row] == count
    step = GeometricVerification(GeometricVerificationConfig(), held, features)
    hits = held.search(queries, len(database))
    found = rerank([step], queries, hits, features=scene)
    sets = together(
        [
            database.take(np.array([row])) if row != missing else database.take(np.array([7]))
            for row in range(9)
        ]
    )
    assert found.rows[0].tolist() == naive_order(scene, sets, hits.rows[0].tolist(), step.config)
    with pytest.raises(QueryError, match=r"takes the local features of 1 queries, got those of 0.*encode"):
        rerank([step], queries, hits)
    expanded = rerank([build(QueryExpansionConfig(n=2), held), step], queries, hits, features=scene)
    assert sorted(expanded.rows[0]) == sorted(found.rows[0])
    again = build(QueryExpansionConfig(n=2), held)
    assert rerank([step, again], queries, hits, features=scene).rows.shape == hits.rows.shape


@pytest.fixture(scope="module")
def indices(tmp_path_factory, database):
    """Vectors of nine images, and local features of the same in two shards but the fifth, turned round."""
    folder = tmp_path_factory.mktemp("indices")
    images, vectors = draw_images(len(database)), draw_vectors(len(database), 6)
    turned = np.array([8, 7, 6, 5, 3, 2, 1, 0])
    build_index(write(folder / "vectors", vectors, images), folder / "gem")
    sets = write(folder / "sets", database.take(turned), images.take(turned), model="model-b")
    build_index(sets, folder / "delf", shards=2)
    return folder


def test_an_index_of_local_features_is_found_by_the_images_ids(scene, database, indices):
    gem, delf = Index.open(indices / "gem"), str(indices / "delf")
    queries = Vectors(gem.vectors(np.array([3])))
    hits = gem.search(queries, 9)
    config = GeometricVerificationConfig(local=delf)
    step = build(config, gem)
    assert step.model == "model-b"
    found = rerank([step], queries, hits, features=scene)
    known = database.take(np.array([0, 1, 2, 3, 7, 5, 6, 7, 8]))  # the fifth has no features there
    assert found.rows[0].tolist() == naive_order(scene, known, hits.rows[0].tolist(), config)
    ids = gem.records(np.arange(9))["id"].to_pylist()
    held = build_all([config], HeldVectors(gem.vectors()), ids=ids)
    np.testing.assert_array_equal(rerank(held, queries, hits, features=scene).rows, found.rows)
    with pytest.raises(ArtefactError, match=r"delf: it holds none of the 1 images.*same ids"):
        build(config, HeldVectors(gem.vectors(np.array([0]))), ids=["elsewhere"])
    with pytest.raises(ArtefactError, match=r"takes local features, .*gem holds vectors of 6 dimensions"):
        build(GeometricVerificationConfig(local=str(indices / "gem")), gem)


def test_an_index_of_local_features_is_verified_by_its_own(scene, database, indices):
    delf = Index.open(indices / "delf")
    config = GeometricVerificationConfig()
    found = rerank(build_all([config], delf), scene, hits_of(range(8)))
    turned = database.take(np.array([8, 7, 6, 5, 3, 2, 1, 0]))
    assert found.rows[0].tolist() == naive_order(scene, turned, list(range(8)), config)
    with pytest.raises(ArtefactError, match="vectors are asked for"):
        build_all([QueryExpansionConfig()], delf)


def test_local_features_go_through_verification_alone(scene, database):
    held = HeldLocal(database)
    steps = build_all([GeometricVerificationConfig(depth=2), GeometricVerificationConfig()], held)
    hits = hits_of(range(9))
    assert isinstance(scene, Local)
    found = rerank(steps, scene, hits)
    once = rerank(steps[1:], scene, hits)
    assert found.rows[0, :3].tolist() == once.rows[0, :3].tolist()
    with pytest.raises(ArtefactError, match="query_expansion re-ranks vectors"):
        build_all([QueryExpansionConfig()], held)
    with pytest.raises(ArtefactError, match=r"takes local features, the database holds vectors.*`local`"):
        build_all([GeometricVerificationConfig()], HeldVectors(np.eye(3, dtype=np.float32)))
    vector_step = build(QueryExpansionConfig(), HeldVectors(np.eye(9, dtype=np.float32)))
    with pytest.raises(ArtefactError, match="queries are local features"):
        rerank([vector_step], scene, hits)


def test_hits_outside_the_database_are_refused(scene, database):
    step = build(GeometricVerificationConfig(), HeldLocal(database))
    with pytest.raises(QueryError, match="hits are rows of 9 or -1, got 0 to 9"):
        step(scene, hits_of([0, 9]))
    with pytest.raises(QueryError, match="1 queries, but hits of 2"):
        step(scene, hits_of([0], [1]))


def test_settings_are_read_from_a_line():
    step = rerank_steps(["{name: geometric_verification, depth: 50, geometry: {model: homography}}"])[0]
    assert step == GeometricVerificationConfig(depth=50, geometry={"model": "homography"})
    with pytest.raises(
        RecipeError, match=r"unknown key 'rerank.0.geometry.modle' \(did you mean 'model'\?\)"
    ):
        rerank_steps(["{name: geometric_verification, geometry: {modle: affine}}"])
    with pytest.raises(RecipeError, match="2048"):
        rerank_steps(["{name: geometric_verification, depth: 5000}"])
