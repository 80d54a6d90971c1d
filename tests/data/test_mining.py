"""Plans of an epoch, hard negatives and shares of images."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.data.mining import epoch_plan, hard_negatives, pairs_of_labels, shares_by_pixels
from ray_retrieval.errors import DataError


def greedy(query, cluster, pool, clusters, count):
    """The published walk down the sorted pool, for one query."""
    similarities = pool @ query
    found, used = [], {cluster}
    for position in sorted(range(len(pool)), key=lambda i: (-similarities[i], i)):
        if len(found) < count and clusters[position] not in used:
            used.add(clusters[position])
            found.append(position)
    return found


def small_integers(shape, seed):
    """Vectors whose products are exact in float32, and often equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 9999),
    queries=st.integers(0, 7),
    pool=st.integers(1, 40),
    clusters=st.integers(1, 9),
    count=st.integers(0, 6),
)
def test_negatives_are_those_of_the_greedy_walk(seed, queries, pool, clusters, count):
    random = np.random.default_rng(seed)
    q, p = small_integers((queries, 3), seed), small_integers((pool, 3), seed + 1)
    of_queries, of_pool = (
        random.integers(0, clusters + 1, queries) * 5,
        random.integers(0, clusters, pool) * 5,
    )
    expected = [greedy(q[i], of_queries[i], p, of_pool, count) for i in range(queries)]
    if count and any(len(set(of_pool) - {one}) < count for one in of_queries):
        with pytest.raises(DataError, match=f"{count} negatives of different clusters"):
            hard_negatives(q, of_queries, p, of_pool, count)
        return
    found = hard_negatives(q, of_queries, p, of_pool, count)
    assert found.dtype == np.int64
    assert found.shape == (queries, count)
    assert found.tolist() == expected


def unit_vectors(count, seed, width=24):
    vectors = np.random.default_rng(seed).standard_normal((count, width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_threads_and_shares_of_the_queries_do_not_matter():
    q, p = unit_vectors(300, 0), unit_vectors(2500, 1)
    random = np.random.default_rng(2)
    of_queries, of_pool = random.integers(0, 60, 300), random.integers(0, 50, 2500)
    whole = hard_negatives(q, of_queries, p, of_pool, 5)
    assert np.array_equal(whole, hard_negatives(q, of_queries, p, of_pool, 5, threads=2))
    for workers in (2, 4, 7):
        shares = np.array_split(np.arange(300), workers)
        parts = [hard_negatives(q[rows], of_queries[rows], p, of_pool, 5) for rows in shares]
        assert np.array_equal(whole, np.concatenate(parts))


def test_equal_images_come_in_the_order_of_the_pool():
    q = unit_vectors(1, 0)
    pool = np.repeat(q, 6, axis=0)
    found = hard_negatives(q, np.array([3]), pool, np.array([9, 3, 7, 9, 1, 7]), 3)
    assert found.tolist() == [[0, 2, 4]]


def test_too_few_clusters_are_refused_with_the_mend():
    q, p = unit_vectors(1, 0), unit_vectors(40, 1)
    with pytest.raises(DataError, match=r"5 negatives .* 40 images has 3 clusters .*at most 3 negatives"):
        hard_negatives(q, np.array([2]), p, np.arange(40) % 4, 5)
    # A query whose own cluster is not in the pool has one more to choose from.
    assert hard_negatives(q, np.array([4]), p, np.arange(40) % 4, 4).shape == (1, 4)
    with pytest.raises(DataError, match="0 images has 0 clusters"):
        hard_negatives(q, np.array([2]), p[:0], np.arange(0), 1)


def test_descriptors_that_are_no_numbers_are_refused():
    q, p = unit_vectors(2, 0), unit_vectors(40, 1)
    p[7, 3] = np.nan
    with pytest.raises(DataError, match="not a finite number"):
        hard_negatives(q, np.array([2, 3]), p, np.arange(40) % 4, 2)


@pytest.mark.parametrize("kind", ["listed", "labels"])
def test_a_plan_depends_on_seed_epoch_and_repeat_alone(kind):
    labels = np.arange(200) // 4
    listed = np.stack([np.arange(0, 200, 2), np.arange(1, 200, 2)], axis=1)
    pairs = listed if kind == "listed" else pairs_of_labels(labels)

    def drawn(**changes):
        return epoch_plan(pairs, 200, 40, 90, **{"seed": 1, "epoch": 2, **changes})

    plan = drawn()
    assert all(np.array_equal(a, b) for a, b in zip(plan, drawn(), strict=True))
    assert all(part.dtype == np.int64 for part in plan)
    for change in ({"seed": 2}, {"epoch": 3}, {"repeat": 1}):
        assert not np.array_equal(plan.pool, drawn(**change).pool)
    assert (len(plan.queries), len(plan.positives), len(set(plan.pool.tolist()))) == (40, 40, 90)
    assert (labels[plan.queries] == labels[plan.positives]).all()
    assert (plan.queries != plan.positives).all()
    assert len(set(plan.queries.tolist())) == 40
    assert set(plan.described.tolist()) == {*plan.queries.tolist(), *plan.pool.tolist()}
    assert len(plan.described) == len(set(plan.described.tolist()))
    state = np.random.get_state()[1].tolist()
    drawn()
    assert np.random.get_state()[1].tolist() == state


def test_more_than_there_is_gives_all_there_is():
    pairs = np.array([[0, 1], [1, 2], [2, 0]])
    plan = epoch_plan(pairs, 5, 100, 100, seed=0, epoch=0)
    assert sorted(zip(plan.queries.tolist(), plan.positives.tolist(), strict=True)) == [
        (0, 1),
        (1, 2),
        (2, 0),
    ]
    assert plan.pool.tolist() == [0, 1, 2, 3, 4]


def test_pairs_that_are_not_there_are_refused():
    with pytest.raises(DataError, match="no pairs"):
        epoch_plan(np.empty((0, 2), np.int64), 5, 1, 1, seed=0, epoch=0)
    with pytest.raises(DataError, match="image 5 of 5"):
        epoch_plan(np.array([[0, 5]]), 5, 1, 1, seed=0, epoch=0)
    with pytest.raises(DataError, match="no class has two images"):
        pairs_of_labels(np.array([0, 1, 2, -1, -1]))


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(-1, 5), min_size=2, max_size=30),
    count=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_pairs_of_labels_share_a_class_and_are_two_images(labels, count, seed):
    labels = np.array(labels)
    eligible = [i for i, one in enumerate(labels) if one >= 0 and (labels == one).sum() >= 2]
    if not eligible:
        with pytest.raises(DataError):
            pairs_of_labels(labels)
        return
    pairs = pairs_of_labels(labels)
    drawn = pairs.draw(count, np.random.default_rng(seed))
    assert len(pairs) == len(eligible)
    assert drawn.shape == (min(count, len(eligible)), 2)
    assert (labels[drawn[:, 0]] == labels[drawn[:, 1]]).all()
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert len(set(drawn[:, 0].tolist())) == len(drawn)
    assert set(drawn.ravel().tolist()) <= set(eligible)


def test_every_pair_of_a_class_is_drawn_equally_often():
    pairs = pairs_of_labels(np.array([7, 3, 7, 7, -1, 7]))
    generator = np.random.default_rng(0)
    drawn = np.concatenate([pairs.draw(1, generator) for _ in range(12_000)])
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 12
    assert all(850 < number < 1150 for number in counts.values())  # 1,000 ± 5 standard deviations


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=60), world=st.integers(1, 7)
)
def test_shares_have_every_image_once_and_nearly_equal_pixels(shapes, world):
    shares = shares_by_pixels(shapes, world)
    assert len(shares) == world
    order = np.concatenate(shares).tolist()
    assert sorted(order) == list(range(len(shapes)))
    assert [shapes[i] for i in order] == sorted(shapes)
    pixels = [max(1, height * width) for height, width in shapes]
    for share in shares:
        if shapes:
            assert abs(sum(pixels[i] for i in share) - sum(pixels) / world) <= max(pixels)


def test_shares_of_equal_images_are_equal():
    assert [len(share) for share in shares_by_pixels(np.full((12, 2), 362), 4)] == [3, 3, 3, 3]
