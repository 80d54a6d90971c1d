"""What Tune is handed and what it tells, without Ray: trials that vanish, records that cannot be written."""

import json
from dataclasses import asdict

import pytest
from tuning_parts import begun

from ray_retrieval.errors import ArtefactError
from ray_retrieval.tuning.handout import Handout
from ray_retrieval.tuning.reports import Report


def told(epoch, value, **settings):
    return json.dumps(asdict(Report(epoch, {"map": value}, **settings)))


def states(trials):
    return [trial.state for trial in trials._ledger.in_order()]


@pytest.fixture
def trials(tmp_path):
    return begun(tmp_path, trials=3, max_failures=1)


def test_trials_are_handed_out_as_there_is_room(trials):
    room, ended = [2], []
    handout = Handout(trials, lambda: room[0], ended.append)
    assert [handout.next("a", set()), handout.next("b", {"a"}), handout.next("c", {"a", "b"})] == [0, 1, None]
    assert not handout.over
    room[0] = 3  # the cluster has grown
    assert handout.next("c", {"a", "b"}) == 2
    for number, name in enumerate("abc"):
        assert not handout.reported(name, told(9, 0.1 * number, last=True))
        handout.ended(name, {"report": "the last one"})
    assert (states(trials), ended, handout.over) == (["finished"] * 3, [1, 1, 1], True)


def test_a_trial_of_which_tune_says_nothing_more_is_tried_again(trials):
    handout = Handout(trials, lambda: 1, lambda _count: None)
    assert handout.next("a", set()) == 0
    assert handout.next("b", {"a"}) is None
    assert handout.next("b", set()) == 0, "Tune has dropped the first one, which is tried again"
    handout.ended("b", {})
    first = trials._ledger.trials[0]
    assert (first.state, first.failures) == ("finished", 1)
    assert handout.next("c", set()) == 1


LOST = "the process of the trial was lost"


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("", LOST),
        ("killed due to the node running low on memory", f"{LOST}: its node ran low on memory"),
        ("Traceback (most recent)\n …\nImportError: x\n", f"{LOST}: ImportError: x"),
    ],
)
def test_lost_processes(trials, reason, error):
    handout = Handout(trials, lambda: 1, lambda _count: None)
    handout.next("a", set())
    handout.lost("a", reason)
    first = trials._ledger.trials[0]
    assert (first.error, first.failures, first.losses) == (error, 1, 0)


@pytest.mark.parametrize("node_lost", [True, False])
def test_a_lost_process_is_taken_for_a_lost_node_if_that_goes_too(trials, monkeypatch, node_lost):
    there, now = {"far"}, [0.0]
    handout = Handout(trials, lambda: 1, lambda _count: None, alive=there.__contains__)
    handout.next("a", set())
    monkeypatch.setattr("ray_retrieval.tuning.handout.time.monotonic", lambda: now[0])
    handout.lost("a", "The actor died unexpectedly", "far")
    assert (handout.next("b", set()), handout.over, states(trials)) == (None, False, ["running"])
    now[0] = 29.0
    assert handout.next("b", set()) is None, "the loss of a node is noticed after that of its processes"
    if node_lost:
        there.clear()
    else:
        now[0] = 31.0
    assert handout.next("b", set()) == 0
    first = trials._ledger.trials[0]
    assert (first.failures, first.losses) == ((0, 1) if node_lost else (1, 0))
    assert first.error == ("the node of the trial was lost" if node_lost else LOST)


def test_failures_that_trials_tell(trials):
    handout = Handout(trials, lambda: 1, lambda _count: None)
    handout.next("a", set())
    handout.ended("a", {"failure": json.dumps({"error": "the loss is not finite", "final": True})})
    first = trials._ledger.trials[0]
    assert (first.state, first.error, first.final) == ("failed", "the loss is not finite", True)


@pytest.mark.parametrize("deed", ["next", "reported", "ended", "lost"])
def test_records_that_cannot_be_written_end_the_search_and_say_why(trials, monkeypatch, deed):
    handout = Handout(trials, lambda: 2, lambda _count: None)
    assert handout.next("a", set()) == 0

    def full():
        raise ArtefactError("the store refuses: No space left on device")

    monkeypatch.setattr(trials._ledger, "write", full)
    deeds = {
        "next": lambda: handout.next("b", {"a"}),
        "reported": lambda: handout.reported("a", told(1, 0.5)),
        "ended": lambda: handout.ended("a", {}),
        "lost": lambda: handout.lost("a", ""),
    }
    deeds[deed]()
    assert "No space left" in str(handout.error)
    assert handout.over
    monkeypatch.undo()
    # Nothing is said of trials that are ended by this.
    before = states(trials)
    assert handout.reported("a", told(2, 0.5))
    handout.ended("a", {})
    handout.lost("a", "")
    assert (handout.next("c", set()), states(trials)) == (None, before)
