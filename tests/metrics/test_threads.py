"""Work that is shared out among threads."""

import threading

import pytest

from ray_retrieval.metrics.threads import each


def test_all_parts_are_worked_on_and_told() -> None:
    seen, told = set(), []
    names = set()

    def work(part: int) -> int:
        seen.add(part)
        names.add(threading.current_thread().name.split("_")[0])
        return 2 * part

    each(work, range(10), 3, told.append, name="test")
    assert (seen, sorted(told), names) == (set(range(10)), [2 * part for part in range(10)], {"test"})
    each(work, [], 3, told.append, name="test")
    each(work, [3], 1, None, name="test")
    assert len(told) == 10


def test_an_error_ends_the_work_and_is_raised() -> None:
    begun = []

    def work(part: int) -> int:
        begun.append(part)
        if part == 0:
            raise ValueError("part 0")
        threading.Event().wait(0.01)
        return 1

    with pytest.raises(ValueError, match="part 0"):
        each(work, range(1000), 1, None, name="test")
    assert len(begun) < 1000
