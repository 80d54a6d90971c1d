"""K-means: against a naive loop, and the same whatever the threads."""

import numpy as np
import pytest
from search_parts import draw_vectors

from ray_retrieval.search import faiss_index, kmeans
from ray_retrieval.search.kmeans import centres_of


def nearest(centres, rows):
    distances = ((rows[:, None].astype(np.float64) - centres[None]) ** 2).sum(axis=2)
    return distances.argmin(axis=1)


def naive(rows, count):
    """Rounds of means, in float64; no cell may be empty."""
    centres = rows[:count].astype(np.float64)
    for _ in range(10):
        cells = nearest(centres, rows)
        centres = np.stack([rows[cells == cell].mean(axis=0, dtype=np.float64) for cell in range(count)])
    return centres


@pytest.mark.parametrize("threads", [1, 3])
def test_centres_are_means_of_what_is_near_them(monkeypatch, threads):
    monkeypatch.setattr(kmeans, "_BLOCK_ROWS", 64)
    rows = draw_vectors(500, 6, seed=1).data
    found = centres_of(rows, 7, nearest, threads=threads)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, naive(rows, 7), atol=1e-5)
    np.testing.assert_allclose(centres_of(rows, 7, faiss_index._nearest), naive(rows, 7), atol=1e-5)


def test_an_empty_cell_takes_half_of_the_fullest():
    rows = np.repeat(np.float32([[0, 0], [1, 0], [0, 1]]), [1, 40, 9], axis=0)
    rows = np.concatenate([rows[1:2], rows[1:2], rows])  # the first two centres are the same row
    found = centres_of(rows, 2, nearest)
    assert set(nearest(found, rows)) == {0, 1}
    assert np.isfinite(centres_of(rows[:1], 1, nearest)).all()


def test_what_is_trained_does_not_depend_on_the_threads():
    sample = draw_vectors(9000, 8, seed=2).data
    one, three = (faiss_index.train("IVF64,PQ4x4fs", sample, 0, threads=threads) for threads in (1, 3))
    assert one == three
