import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_retrieval.serve import limits
from ray_retrieval.serve.limits import RateError, RateLimit


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_empties_and_fills_again() -> None:
    clock = Clock()
    limit = RateLimit(2.0, 3, clock)
    for _ in range(3):
        limit.take("a")
    with pytest.raises(RateError) as caught:
        limit.take("a")
    assert caught.value.status == 429
    assert caught.value.retry_after_s == pytest.approx(0.5)
    limit.take("b")
    clock.now += 0.5
    limit.take("a")
    with pytest.raises(RateError):
        limit.take("a")
    clock.now += 1000
    for _ in range(3):
        limit.take("a")
    with pytest.raises(RateError):
        limit.take("a")


def test_a_debt_has_to_drip_in_first() -> None:
    clock = Clock()
    limit = RateLimit(1.0, 2, clock)
    limit.take("a")
    limit.charge("a", 9)
    with pytest.raises(RateError) as caught:
        limit.take("a")
    assert caught.value.retry_after_s == pytest.approx(9)
    clock.now += 9
    limit.take("a")


def test_who_asked_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_CALLERS", 2)
    limit = RateLimit(1.0, 1, Clock())
    for caller in ("a", "b", "c"):
        limit.take(caller)
    for caller in ("b", "c"):
        with pytest.raises(RateError):
            limit.take(caller)
    limit.take("a")


@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.1, 5), st.integers(1, 5))
def test_no_more_pass_than_the_burst_and_the_rate(waits: list[float], rate: float, burst: int) -> None:
    clock = Clock()
    limit, passed = RateLimit(rate, burst, clock), 0
    for wait in waits:
        clock.now += wait
        with contextlib.suppress(RateError):
            limit.take("a")
            passed += 1
    assert passed <= burst + rate * sum(waits) + 1e-6
