"""What the tests of shortlists share: made local features, and a database of them cut into segments."""

import itertools

import numpy as np

from ray_retrieval.descriptors import Local
from ray_retrieval.search.neighbours import FeatureSegment


def features_of(data, counts):
    """Local features with nothing but descriptors."""
    counts = np.asarray(counts, np.int64)
    total = int(counts.sum())
    return Local(
        np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        np.asarray(data, np.float16)[:total],
        np.zeros((total, 2), np.float32),
        np.ones(total, np.float32),
        np.zeros(total, np.float32),
        np.full((len(counts), 2), 100, np.int32),
        np.zeros((len(counts), 0), np.float32),
    )


def draw_features(counts, dimension, *, seed=0, centres=30, noise=0.5):
    """Unit vectors around centres that are the same for every seed."""
    generator = np.random.default_rng(seed)
    around = np.random.default_rng(99).standard_normal((centres, dimension))
    total = int(np.sum(counts))
    drawn = around[generator.integers(0, centres, total)]
    drawn = drawn + noise * generator.standard_normal((total, dimension))
    return features_of(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), counts)


def segments_of(features, cuts=(), first_row=0):
    """The images as segments that begin at 0 and at each of the cuts."""
    bounds = [0, *cuts, len(features)]
    parts = []
    for start, stop in itertools.pairwise(bounds):
        offsets = features.offsets[start : stop + 1]
        data = features.data[offsets[0] : offsets[-1]]
        parts.append(FeatureSegment(offsets - offsets[0], data, first_row + start, int(offsets[0])))
    return parts
