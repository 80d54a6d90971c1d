"""Which trials are stopped, against Ray Tune's schedulers and by hand."""

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.tuning.config import TuneConfig
from ray_retrieval.tuning.stopping import asha, median, stops


@st.composite
def courses(draw, *, sparse):
    """Reports of several trials in the order in which they come, (trial, epoch, value)."""
    count = draw(st.integers(1, 6))
    some = (
        st.sets(st.integers(1, 12), max_size=8)
        if sparse
        else st.integers(0, 12).map(lambda n: range(1, n + 1))
    )
    epochs = [sorted(draw(some)) for _ in range(count)]
    order = draw(st.permutations([number for number in range(count) for _ in epochs[number]]))
    value = st.integers(0, 20).map(lambda whole: whole / 20)
    return [(number, epochs[number].pop(0), draw(value)) for number in order]


def decisions(course, rule):
    """What our rule says after each report, a trial that was stopped reporting no more."""
    curves, said, stopped = {}, [], set()
    for number, epoch, value in course:
        if number not in stopped:
            curves.setdefault(number, []).append((epoch, value))
            said.append((number, epoch, rule(curves, number)))
            stopped |= {number} if said[-1][2] else set()
    return said


def scheduled(course, scheduler):
    """What a scheduler of Ray Tune's says."""
    controller = SimpleNamespace(get_live_trials=list)
    trials = {number: _Standin(str(number)) for number, _, _ in course}
    for trial in trials.values():
        scheduler.on_trial_add(controller, trial)
    said, stopped = [], set()
    for number, epoch, value in course:
        if number not in stopped:
            result = {"epoch": epoch, "map": value}
            stop = scheduler.on_trial_result(controller, trials[number], result) == "STOP"
            said.append((number, epoch, stop))
            stopped |= {number} if stop else set()
    return said


class _Standin:
    """What a scheduler wants of a trial."""

    def __init__(self, trial_id):
        self.trial_id = trial_id


@settings(max_examples=60, deadline=None)
@given(courses(sparse=False), st.integers(1, 3), st.integers(2, 4))
def test_asha_decides_like_ray_tune(course, grace, reduction):
    # With epochs left out they differ: Ray's may judge a trial at a rung below one that it has passed.
    from ray.tune.schedulers import ASHAScheduler

    ray = ASHAScheduler("epoch", "map", "max", max_t=1000, grace_period=grace, reduction_factor=reduction)
    ours = decisions(course, lambda curves, number: asha(curves, number, grace=grace, reduction=reduction))
    assert ours == scheduled(course, ray)


@settings(max_examples=60, deadline=None)
@given(courses(sparse=True), st.integers(1, 3))
def test_median_decides_like_ray_tune(course, grace):
    from ray.tune.schedulers import MedianStoppingRule

    ray = MedianStoppingRule("epoch", "map", "max", grace_period=grace, min_time_slice=float("inf"))
    ours = decisions(course, lambda curves, number: median(curves, number, grace=grace))
    assert ours == scheduled(course, ray)


def test_asha_keeps_the_best_third_of_those_that_came_as_far():
    curves = {0: [(1, 0.1)], 1: [(1, 0.2)], 2: [(1, 0.9)], 3: [(1, 0.5)], 4: [(2, 0.6)]}
    # Of 0.1, 0.2, 0.9, 0.5 the best third begins at 0.5: the percentile 66.7 of four values.
    assert not asha(curves, 4, grace=1, reduction=3)
    assert asha({**curves, 4: [(1, 0.49)]}, 4, grace=1, reduction=3)
    assert not asha({**curves, 4: [(1, 0.9), (2, 0.0)]}, 4, grace=1, reduction=3), "judged once a rung"
    assert not asha({**curves, 4: [(1, 0.0)]}, 4, grace=2, reduction=3), "not before the grace is over"


def test_the_first_trial_is_never_stopped():
    for rule in ("asha", "median"):
        config = TuneConfig(space={"method.bits": {"choice": [8]}}, scheduler=rule)
        assert not stops(config, {0: [(1, 0.0)]}, 0)


def test_median_needs_three_others():
    others = {number: [(1, 0.5), (2, 0.7)] for number in range(3)}
    assert median({**others, 3: [(2, 0.5)]}, 3, grace=1), "the means up to epoch 2 are 0.6"
    assert not median({**others, 3: [(2, 0.6)]}, 3, grace=1)
    assert not median({0: others[0], 1: others[1], 3: [(2, 0.0)]}, 3, grace=1)
    assert median({**others, 3: [(2, 0.65)]}, 3, grace=2), "what is before the grace is over is in no mean"


def test_a_rung_is_judged_by_the_first_value_at_or_after_it():
    curves = {0: [(2, 0.9), (4, 0.1)], 1: [(1, 0.5), (2, 0.1)]}
    assert asha({**curves, 2: [(2, 0.6)]}, 2, grace=1, reduction=3), "0.9 and 0.5 count, at rung 1"
    assert not asha({**curves, 2: [(2, 0.8)]}, 2, grace=1, reduction=3)
    assert not asha({**curves, 2: [(1, 0.8), (4, 0.2)]}, 2, grace=1, reduction=3), "0.1 counts, at rung 3"
    assert not asha({0: [(4, 0.9)], 1: [(2, 0.1)]}, 1, grace=1, reduction=3), "0.9 counts at rung 3 alone"


def test_without_a_scheduler_nothing_is_stopped():
    config = TuneConfig(space={"method.bits": {"choice": [8]}}, scheduler="none")
    curves = {number: [(1, 1.0)] for number in range(5)} | {9: [(1, 0.0)]}
    assert not stops(config, curves, 9)
