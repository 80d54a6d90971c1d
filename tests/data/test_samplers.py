"""P × K batches."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.data.samplers import _drawn, pk_plan
from ray_retrieval.errors import DataError


def labels_of(counts, seed=0):
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(seed).permutation(labels)


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(1, 13), min_size=4, max_size=9),
    classes=st.integers(1, 3),
    images=st.integers(1, 5),
    epoch=st.integers(0, 9),
    remainder=st.sampled_from(["pad", "drop", "carry"]),
)
def test_no_class_and_no_image_stands_twice_in_a_batch(counts, classes, images, epoch, remainder):
    labels = labels_of(counts)
    try:
        plan = pk_plan(labels, classes=classes, images=images, seed=3, epoch=epoch, remainder=remainder)
    except DataError:
        assert remainder != "pad"
        assert sum(count >= images for count in counts) < classes
        return
    for batch in plan:
        assert len(batch) == classes * images
        groups = batch.reshape(classes, images)
        of_groups = [set(labels[group]) for group in groups]
        assert all(len(found) == 1 for found in of_groups)
        assert len(set.union(*of_groups)) == classes
        for group, found in zip(groups, of_groups, strict=True):
            if counts[found.pop()] >= images:
                assert len(set(group)) == images


def test_a_plan_depends_on_seed_and_epoch_alone():
    labels = labels_of([7] * 10)
    arguments = {"classes": 3, "images": 2}
    plan = pk_plan(labels, seed=1, epoch=2, **arguments)
    again = pk_plan(labels, seed=1, epoch=2, **arguments)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))
    for seed, epoch in ((1, 3), (2, 2)):
        other = pk_plan(labels, seed=seed, epoch=epoch, **arguments)
        assert not np.array_equal(np.concatenate(plan), np.concatenate(other))


def test_remainders_are_padded_dropped_or_carried():
    labels = np.zeros(7, np.int64)  # one class of 7 images, chunks of 3
    used = {}
    for remainder in ("pad", "drop", "carry"):
        used[remainder] = [
            np.concatenate(pk_plan(labels, classes=1, images=3, seed=0, epoch=epoch, remainder=remainder))
            for epoch in range(6)
        ]
    assert [len(rows) for rows in used["pad"]] == [9] * 6
    assert all(set(rows) == set(range(7)) for rows in used["pad"])
    assert [len(rows) for rows in used["drop"]] == [6] * 6
    assert len({frozenset(rows.tolist()) for rows in used["drop"]}) > 1
    # 7 · 3 images are 7 chunks: after three epochs every image has been seen three times.
    assert sorted(len(rows) for rows in used["carry"][:3]) == [6, 6, 9]
    for three in (used["carry"][:3], used["carry"][3:]):
        assert set(Counter(np.concatenate(three).tolist()).values()) == {3}


def test_classes_are_drawn_in_proportion_to_what_they_have_left():
    labels = labels_of([400, 40, 40, 40, 40])
    plan = pk_plan(labels, classes=2, images=2, seed=0, epoch=0)
    first = [int(label) for batch in plan[:40] for label in set(labels[batch])]
    # 200 of 280 chunks are of class 0, so nearly every early batch has it, beside one of the others.
    assert Counter(first)[0] >= 35
    assert min(Counter(first)[label] for label in (1, 2, 3, 4)) >= 4
    without = sum(0 not in labels[batch] for batch in plan)
    assert len(plan) == 80 - without  # each batch without class 0 uses two chunks of the others


@pytest.mark.parametrize("left", [[5] * 300, [2000, 1, 1, 0, 1], [0, 0, 3, 1, 9] * 40, [10**9, 1, 1]])
def test_a_draw_is_that_of_gumbel_noise_on_every_class(left):
    left = np.array(left)
    for seed in range(50):
        noise = np.random.default_rng(seed).gumbel(size=len(left))
        with np.errstate(divide="ignore"):
            expected = np.argsort(-(np.log(left) + noise), kind="stable")[:3]
        assert _drawn(left, 3, np.random.default_rng(seed)).tolist() == expected.tolist()


def test_too_few_classes_are_refused():
    with pytest.raises(DataError, match="1 classes have enough images, 2 are needed"):
        pk_plan(labels_of([5, 1, 1]), classes=2, images=2, seed=0, epoch=0, remainder="drop")
