"""Compiled loops of the shortlists of local features: votes, and the postings of aggregated residuals."""

import numpy as np
import numpy.typing as npt

from ray_retrieval.metrics.compiled import compiled, ones
from ray_retrieval.search.vector_kernels import Doubles, Floats, Rows

Words = npt.NDArray[np.uint64]


@compiled
def cast_votes(
    distances: Floats, images: Rows, neighbours: int, weights: Doubles, last_voter: Rows, votes: Doubles
) -> float:
    """Add up what each image gets from one query's features; see `votes`.

    Args:
        distances: float32 [m, K], squared Euclidean distances, ascending.
        images: int64 [m, K], places in `votes`; negative where there is no neighbour.
        neighbours: K.
        weights: float64 [K + 1], by the number of images that a feature votes for.
        last_voter: int64 [images], filled with negative numbers; used up.
        votes: float64 [images], filled with zeros; the votes are added.

    Returns:
        What an image can reach at most.
    """
    most = 0.0
    for feature in range(len(images)):
        found, near = images[feature], distances[feature]
        reference = 0.0
        if found[neighbours - 1] >= 0:
            reference = max(0.0, 1.0 - np.float64(near[neighbours - 1]) / 2)
        # Two marks a feature: one when its images are counted, one when they get its vote.
        counted, voted, of_images, above = 2 * feature, 2 * feature + 1, 0, 0
        while above < neighbours and found[above] >= 0 and 1.0 - np.float64(near[above]) / 2 > reference:
            if last_voter[found[above]] != counted:
                last_voter[found[above]] = counted
                of_images += 1
            above += 1
        most += weights[of_images] * (1.0 - reference)
        for j in range(above):
            if last_voter[found[j]] != voted:
                last_voter[found[j]] = voted
                votes[found[j]] += weights[of_images] * (1.0 - np.float64(near[j]) / 2 - reference)
    return most


@compiled
def score_postings(
    words: Rows,
    residuals: Words,
    offsets: Rows,
    images: npt.NDArray[np.int32],
    postings: Words,
    similarities: Doubles,
    scores: Doubles,
) -> None:
    """Add the similarity of each word's residual to the scores of the images that have the word.

    Args:
        words: int64 [w], those of the query.
        residuals: uint64 [w, c], its packed bits for each.
        offsets: int64 [words of the codebook + 1]: the postings of a word.
        images: int32 [p], of each posting.
        postings: uint64 [p, c], packed bits of each.
        similarities: float64 [bits + 1], by the number of different bits.
        scores: float64 [images], added to.
    """
    for number in range(len(words)):
        start, stop = offsets[words[number]], offsets[words[number] + 1]
        residual, some, of_images = residuals[number], postings[start:stop], images[start:stop]
        for place in range(len(some)):
            different = np.uint64(0)
            for j in range(len(residual)):
                different += ones(residual[j] ^ some[place, j])
            scores[of_images[place]] += similarities[different]
