from typing import Any

import numba
import numpy as np
import pytest

from ray_retrieval.metrics import masks
from ray_retrieval.metrics.compiled import ones


@numba.njit  # type: ignore[untyped-decorator]
def at_most(values: Any, start: int, limit: Any) -> Any:
    return masks.at_most(values, start, limit)


@numba.njit  # type: ignore[untyped-decorator]
def equal(values: Any, start: int, wanted: Any) -> Any:
    return masks.equal(values, start, wanted)


@numba.njit  # type: ignore[untyped-decorator]
def add(values: Any, start: int, mask: Any) -> None:
    masks.add(values, start, mask)


@numba.njit  # type: ignore[untyped-decorator]
def lowest(mask: Any) -> Any:
    return masks.lowest(mask)


@numba.njit  # type: ignore[untyped-decorator]
def count(word: Any) -> Any:
    return ones(word)


def as_word(bits: Any) -> int:
    return sum(1 << j for j, bit in enumerate(bits) if bit)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("limit", [0, 1, 127, 128, 200, 255])
def test_at_most_sets_the_bits_of_small_values(dtype: Any, limit: int) -> None:
    values = np.random.default_rng(limit).integers(0, 256, 131).astype(dtype)
    for start in (0, 3, 67):
        assert at_most(values, start, np.uint64(limit)) == as_word(values[start : start + 64] <= limit)


def test_equal_compares_whole_words() -> None:
    values = np.array([7, 2**40 + 7, 2**63 + 7, 8] * 17, np.uint64)
    assert equal(values, 1, np.uint64(7)) == as_word(values[1:65] == 7)
    assert equal(values, 4, np.uint64(2**63 + 7)) == as_word(values[4:68] == 2**63 + 7)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_add_changes_the_values_of_set_bits_only(dtype: Any) -> None:
    values = np.arange(80, dtype=dtype)
    bits = np.random.default_rng(0).random(64) < 0.5
    add(values, 8, np.uint64(as_word(bits)))
    expected = np.arange(80)
    expected[8:72] += bits
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("place", [0, 1, 31, 32, 63])
def test_lowest_is_the_number_of_the_first_set_bit(place: int) -> None:
    assert lowest(np.uint64(1 << place)) == place
    assert lowest(np.uint64((1 << 64) - (1 << place))) == place


@pytest.mark.parametrize("word", [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
def test_ones_are_counted(word: int) -> None:
    assert count(np.uint64(word)) == bin(word).count("1")
