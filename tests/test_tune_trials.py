"""The course of a search without Ray: what is next, what is stopped, what is written down, going on."""

import json
from pathlib import Path

import pytest
from tuning_parts import SPACE, begun, recipes

from ray_retrieval import recipe
from ray_retrieval.errors import ArtefactError, ClusterError, RecipeError
from ray_retrieval.storage import Folder
from ray_retrieval.tuning import ledger
from ray_retrieval.tuning.config import TuneConfig
from ray_retrieval.tuning.ledger import Ledger, Trial, front
from ray_retrieval.tuning.plan import Plan, plan
from ray_retrieval.tuning.trials import Report, identity, reports


def report(epoch, value, **settings):
    return Report(epoch, {"map": value}, **settings)


def run(trials, values, *, epochs=9):
    """Train the next trial in mind: its validation values by epoch; returns how it ended."""
    trial = trials.next()
    for epoch, value in enumerate(values, start=1):
        if trials.reported(trial.number, report(epoch, value, last=epoch == epochs)):
            return trials.completed(trial.number)
    return trials.completed(trial.number)


def lines(folder):
    text = (folder / "search" / "trials.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_trials_are_handed_out_followed_and_written_down(tmp_path):
    trials = begun(tmp_path, trials=2)
    first = trials.next()
    made = recipe.load(tmp_path / "search" / "trials" / "0000" / "recipe.yaml")
    assert made.method.bits == first.parameters["method.bits"]
    assert made.train.optimizer.lr == first.parameters["train.optimizer.lr"]
    assert (made.name, made.tune, Path(made.output).name) == ("small-0000", None, "0000")
    assert made.of_the_model() == trials.recipe(first).of_the_model()
    assert lines(tmp_path)[0]["state"] == "running"
    assert not trials.reported(0, report(1, 0.5))
    assert not trials.reported(0, report(2, 0.4))
    assert trials.completed(0).values == {"map": 0.5}, "of the best model, which is the one that is kept"
    run(trials, [0.6] * 9)
    assert (trials.next(), trials.left, trials.running) == (None, 0, 0)
    written = lines(tmp_path)
    assert [(line["number"], line["state"], line["epochs"]) for line in written] == [
        (0, "finished", 2),
        (1, "finished", 9),
    ]
    assert written[0]["curve"] == [[1, 0.5], [2, 0.4]]


def test_the_last_model_counts_where_it_is_selected(tmp_path):
    trials = begun(tmp_path, space={**SPACE, "train.select": {"choice": ["last"]}})
    assert run(trials, [0.5, 0.4]).values == {"map": 0.4}


def test_what_is_done_again_after_a_loss_counts_once_and_the_model_has_the_last_word(tmp_path):
    trials = begun(tmp_path)
    trials.next()
    for epoch, value in ((1, 0.1), (2, 0.3), (1, 0.1), (2, 0.3)):
        trials.reported(0, report(epoch, value))
    trials.reported(0, report(2, 0.25, last=True, kept=True))
    ended = trials.completed(0)
    assert ended.curve == [(1, 0.1), (2, 0.3)]
    assert ended.values == {"map": 0.25}


def test_poor_trials_are_stopped_and_the_last_epoch_never_stops_one(tmp_path):
    trials = begun(tmp_path, trials=4)
    assert run(trials, [0.5, 0.6, 0.9, 0.9]).state == "finished"
    poor = run(trials, [0.1, 0.9])
    assert (poor.state, poor.epochs, poor.error) == ("stopped", 1, "stopped by asha after epoch 1")
    late = trials.next()
    assert not trials.reported(late.number, report(9, 0.0, last=True))


def test_less_is_better_where_the_mode_says_so(tmp_path):
    trials = begun(tmp_path, mode="min")
    run(trials, [0.1, 0.1])
    assert run(trials, [0.5]).state == "stopped"
    assert run(trials, [0.05, 0.01]).state == "finished"


def test_failed_trials_are_tried_again_up_to_the_limit_unless_they_would_fail_alike(tmp_path):
    trials = begun(tmp_path, trials=2, max_failures=1)
    first = trials.next()
    trials.failed(first.number, "out of memory")
    again = trials.next()
    assert again.number == first.number
    trials.failed(again.number, "out of memory")
    other = trials.next()
    assert other.number == 1
    trials.failed(other.number, "the loss is not finite", final=True)
    assert trials.next() is None
    assert [(line["state"], line["failures"]) for line in lines(tmp_path)] == [("failed", 2), ("failed", 1)]
    # The next start of the command does not try them again either, unless it is allowed to.
    assert begun(tmp_path, trials=2, max_failures=1).next() is None
    assert begun(tmp_path, trials=2, max_failures=2).next().number == 0


def test_drawn_values_that_make_no_recipe_are_failed_trials(tmp_path):
    trials = begun(tmp_path, space={"train.batch_size": {"randint": [-40, 40]}}, trials=8)
    handed = []
    while (trial := trials.next()) is not None:
        handed.append(trial.number)
        trials.completed(trial.number)
    failed = [line for line in lines(tmp_path) if line["state"] == "failed"]
    assert 0 < len(failed) < 8
    assert len(handed) == 8 - len(failed)
    assert all("'train.batch_size'" in line["error"] and line["final"] for line in failed)


def test_a_killed_search_goes_on(tmp_path):
    trials = begun(tmp_path, trials=4)
    run(trials, [0.5] * 9)
    killed = trials.next()
    trials.reported(killed.number, report(1, 0.7))

    again = begun(tmp_path, trials=4)
    assert again.left == 3
    went_on = again.next()
    assert (went_on.number, went_on.curve) == (killed.number, [(1, 0.7)])
    again.completed(went_on.number)
    # What is stopped is decided with the curves from before.
    assert run(again, [0.1]).state == "stopped"
    assert run(again, [0.9] * 9).number == 3
    assert [line["state"] for line in lines(tmp_path)] == ["finished", "finished", "stopped", "finished"]
    assert begun(tmp_path, trials=6).left == 2, "more trials may be asked for later"


def test_parameters_do_not_depend_on_interruptions(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = begun(tmp_path / "whole", trials=4)
    for _ in range(4):
        run(whole, [0.5])
    for _ in range(4):
        run(begun(tmp_path / "cut", trials=4), [0.5])
    drawn = [[line["parameters"] for line in lines(tmp_path / name)] for name in ("whole", "cut")]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"space": {"method.bits": {"choice": [8, 16]}}}, "tune.space"),
        ({"searcher": "optuna"}, "tune.searcher: random → optuna"),
        ({"seed": 4}, "tune.seed: 0 → 4"),
    ],
)
def test_another_search_in_the_folder_is_refused(tmp_path, change, named):
    begun(tmp_path).next()
    with pytest.raises(RecipeError, match=f"holds another search .*{named}.*--fresh"):
        begun(tmp_path, **change)


def test_fields_that_are_searched_and_what_does_not_change_models_may_change(tmp_path):
    first = recipes(tmp_path)
    known = identity(first({}))
    assert known == identity(first({"method.bits": 32, "encode.workers": 2, "train.optimizer.lr": 0.5}))
    assert known == identity(recipes(tmp_path, trials=99, concurrent=1, workers=2, evaluate=False)({}))
    assert known != identity(first({"train.epochs": 2}))


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds something that is no search"):
        begun(tmp_path)
    with pytest.raises(RecipeError, match="--fresh does not delete it"):
        ledger.remove(Folder(tmp_path / "search"))
    (tmp_path / "search" / "mine.txt").unlink()
    begun(tmp_path).next()
    ledger.remove(Folder(tmp_path / "search"))
    assert not (tmp_path / "search").exists()


def test_a_damaged_line_is_named(tmp_path):
    begun(tmp_path).next()
    file = tmp_path / "search" / "trials.jsonl"
    file.write_text(file.read_text() + '{"number": 1}\n')
    with pytest.raises(ArtefactError, match="line 2 does not describe a trial"):
        Ledger(Folder(tmp_path / "search"), {})


def test_history_becomes_reports(tmp_path):
    made = recipes(tmp_path)({})
    history = [
        {"epoch": 1, "step": 10, "validation": {"map": 0.1}},
        {"epoch": 2, "step": 20},
        {"epoch": 9, "step": 90, "validation": {"map": 0.2}},
    ]
    assert reports(history, made) == [report(1, 0.1), report(9, 0.2, last=True)]
    by_steps = recipes(tmp_path)({"train.steps": 20})
    assert [found.last for found in reports(history, by_steps)] == [False, True]


# The best


def trial(number, state="finished", **values):
    return Trial(number, {}, state, values or None)


def test_the_front_has_no_trial_that_another_beats():
    both = {"map": "max", "bits": "min"}
    trials = [
        trial(0, map=0.5, bits=16),
        trial(1, map=0.7, bits=32),
        trial(2, map=0.6, bits=32),
        trial(3, map=0.5, bits=8),
        trial(4, "stopped", map=0.9, bits=8),
        trial(5, "failed"),
    ]
    assert [best.number for best in front(trials, both)] == [1, 3]
    assert [best.number for best in front(trials, {"map": "max"})] == [1]
    assert [best.number for best in front(trials, {"map": "min"})] == [0, 3], "ties in their order"
    assert [best.number for best in front(trials[4:], both)] == [4], "stopped, if none was trained to the end"
    assert front(trials[5:], both) == []


# Resources


def asked(resources, *, left=12, nodes=1, cores=4, **settings):
    searched = TuneConfig(space={"method.bits": {"choice": [8]}}, **settings)
    return plan(searched, resources, left=left, nodes=nodes, cores=cores)


def test_trials_take_the_room_that_there_is():
    assert asked({"CPU": 4}) == Plan(concurrent=4, here=True, threads=1)
    assert asked({"CPU": 4}, left=1) == Plan(concurrent=1, here=True, threads=4)
    assert asked({"CPU": 8}, nodes=2) == Plan(concurrent=8, here=True, threads=1)
    assert asked({"CPU": 8}, nodes=2, concurrent=4) == Plan(concurrent=4, here=True, threads=2)
    # A driver beside two workers: of 4 processors, one pair of workers only.
    assert asked({"CPU": 4}, workers=2).concurrent == 1
    assert asked({"CPU": 5}, workers=2).concurrent == 2
    assert asked({"CPU": 64, "GPU": 3}) == Plan(concurrent=3, here=False, threads=1)
    assert asked({"CPU": 64, "GPU": 3}, workers=2).concurrent == 1
    assert asked({"CPU": 4}).cpus == 1
    assert 0 < asked({"CPU": 64, "GPU": 3}).cpus < 1


@pytest.mark.parametrize(
    ("resources", "settings", "message"),
    [
        ({"CPU": 2}, {"concurrent": 3}, r"3 trials × \(1 worker × 1 CPU\) = 3 CPUs, but the cluster has 2"),
        ({"CPU": 2}, {"workers": 2}, r"1 trial × \(2 workers × 1 CPU \+ 0.01 .*\) = 2.01 CPUs, but .* has 2"),
        ({"CPU": 9, "GPU": 1}, {"concurrent": 2}, r"and 2 GPUs, but the cluster has 9 CPUs and 1 GPUs"),
    ],
)
def test_an_impossible_plan_is_refused_with_the_sum(resources, settings, message):
    with pytest.raises(ClusterError, match=message):
        asked(resources, **settings)
