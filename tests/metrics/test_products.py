import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ray_retrieval.metrics import products


@given(st.lists(st.tuples(st.sampled_from([-1.0, -0.0, 0.0, 0.5]), st.sampled_from([0.0, 1.0])), max_size=30))
def test_copies_are_found_with_the_first_of_each(rows: list[tuple[float, float]]) -> None:
    copies, originals = products.copies_in(np.array(rows, np.float32).reshape(len(rows), 2))
    expected = [(row, rows.index(vector)) for row, vector in enumerate(rows) if rows.index(vector) < row]
    assert list(zip(copies.tolist(), originals.tolist(), strict=True)) == expected


def test_keys_that_are_equal_by_chance_make_no_copies(monkeypatch) -> None:
    monkeypatch.setattr(products, "_weights", lambda dimension: np.zeros(dimension, np.uint64))
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    copies, originals = products.copies_in(vectors)
    assert (copies.tolist(), originals.tolist()) == ([2], [0])
