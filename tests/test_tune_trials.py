"""The course of a search without Ray: what is next, what is stopped, what is written down, going on."""

import json
from pathlib import Path

import pytest
from tuning_parts import SPACE, begun, recipes

from ray_retrieval import recipe, run_folder
from ray_retrieval.errors import ArtefactError, ClusterError, DataError, RecipeError
from ray_retrieval.progress import Display
from ray_retrieval.run.training import Training
from ray_retrieval.run_folder import refuse_foreign
from ray_retrieval.storage import Folder
from ray_retrieval.train import train
from ray_retrieval.tuning.config import TuneConfig
from ray_retrieval.tuning.ledger import Ledger, Trial, front
from ray_retrieval.tuning.plan import Plan, plan
from ray_retrieval.tuning.reports import Report, reports
from ray_retrieval.tuning.trials import identity


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
    refuse_foreign(Folder(made.output))  # it is a run's, which `run` goes on with
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


def test_the_model_that_a_trial_starts_from_need_not_be_where_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "read_model_description", lambda folder: ({}, f"print of {folder}"))
    trials = begun(tmp_path, space={**SPACE, "train.batch_size": {"choice": [8]}})
    make = trials._make
    trials._make = lambda values: make({**values, "train.start": "/somewhere/model"})
    trials.next()
    noted = Folder(tmp_path / "search/trials/0000").read_json("training.json")
    assert noted == {"start": "print of /somewhere/model"}
    training = Training(trials.recipe(trials._ledger.trials[0]), train, Display(quiet=True))
    assert training.start_fingerprint() == "print of /somewhere/model"


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


def test_a_trial_that_went_on_after_its_last_epoch_keeps_its_curve(tmp_path):
    """The model that it keeps is of an earlier epoch, by which others must not be judged at the last one."""
    said = []
    trials = begun(tmp_path, said=lambda trial: said.append(trial.state))
    trials.next()
    trials.reported(0, report(1, 0.9))
    trials.reported(0, report(9, 0.9, last=True, kept=True))
    ended = trials.completed(0)
    assert (ended.curve, ended.epochs, ended.values) == ([(1, 0.9)], 9, {"map": 0.9})
    assert said == ["running", "finished"], "once each"


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


def test_lost_nodes_are_counted_apart_and_not_for_ever(tmp_path):
    trials = begun(tmp_path, trials=1, max_failures=0)
    for _ in range(6):
        trials.failed(trials.next().number, "the node was lost", node_lost=True)
    assert trials.next() is None
    assert [(line["failures"], line["losses"]) for line in lines(tmp_path)] == [(0, 6)]


def test_what_failed_for_good_is_tried_again_when_asked_for(tmp_path):
    trials = begun(tmp_path, trials=3, max_failures=0)
    run(trials, [0.5] * 9)
    trials.failed(trials.next().number, "an image is missing", final=True)
    trials.failed(trials.next().number, "weights are missing")
    assert begun(tmp_path, trials=3, max_failures=0).left == 0
    again = begun(tmp_path, trials=3, max_failures=0, retry=True)
    assert [again.next().number, again.next().number, again.next()] == [1, 2, None]


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
    with pytest.raises(RecipeError, match=f"holds another search .*{named}.*`fresh`"):
        begun(tmp_path, **change)


def test_fields_that_are_searched_and_what_does_not_change_models_may_change(tmp_path):
    first = recipes(tmp_path)
    known = identity(first({}))
    assert known == identity(first({"method.bits": 32, "encode.workers": 2, "train.optimizer.lr": 0.5}))
    assert known == identity(recipes(tmp_path, trials=99, concurrent=1, workers=2, evaluate=False)({}))
    assert known != identity(first({"train.epochs": 2}))


@pytest.mark.parametrize("name", ["mine.txt", "data/photo.jpg", "images/photo.jpg", "study.json"])
def test_folders_of_others_are_left_alone(tmp_path, name):
    mine = tmp_path / "search" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"mine": true}')
    with pytest.raises((RecipeError, ArtefactError), match=r"that is no search|does not describe"):
        begun(tmp_path)
    with pytest.raises(RecipeError, match="`fresh` does not delete it"):
        Ledger(Folder(tmp_path / "search"), {}).begin_anew()
    assert mine.read_text() == '{"mine": true}'
    mine.unlink()
    if mine.parent.name != "search":
        mine.parent.rmdir()


def test_what_no_search_writes_stays_in_a_folder_that_remains_a_searchs(tmp_path):
    begun(tmp_path, seed=3).next()
    folder = Folder(tmp_path / "search")
    for name in ("model/model.json", "report.html", "tune/state.json", "letter.txt", "photos/a.jpg"):
        folder.write_text(name, "…")
    Ledger(folder, {"seed": 4}, fresh=True).begin_anew()
    assert list(folder.files()) == ["letter.txt", "photos/a.jpg", "study.json"]
    Ledger(folder, {"seed": 4}).check()


def test_other_images_and_another_start_are_refused_with_every_start(tmp_path):
    trials = begun(tmp_path)
    trials._ledger.keep_beginning("others", "another")  # nothing has been trained yet
    trials._ledger.keep_beginning("those", None)
    trials.next()
    trials._ledger.keep_beginning("those", "model")
    for _ in range(2):
        again = begun(tmp_path)
        with pytest.raises(RecipeError, match="images are not those that the search was begun with"):
            again._ledger.keep_beginning("others", "model")
        with pytest.raises(RecipeError, match="weights to start from are not those that the search was"):
            again._ledger.keep_beginning("those", "another")
        for start in ("model", None):  # which may be gone once nothing is left to train
            again._ledger.keep_beginning("those", start)


def begin(search):
    with search.beginning():
        search.folder.write_text("images/recipe.yaml", "of this start")
        raise DataError("no such images")


def test_nothing_is_left_of_a_search_that_could_not_begin(tmp_path):
    made = recipes(tmp_path)({})
    search = Ledger(Folder(made.output), identity(made))
    for there in (False, True):
        if there:
            with search.beginning():
                search.folder.write_text("images/data.json", "of the first start")
        with pytest.raises(DataError):
            begin(search)
        assert search.folder.exists() == there
        assert search.folder.exists("images/data.json") == there


def test_a_fresh_ledger_knows_nothing_of_the_folder(tmp_path):
    begun(tmp_path).next()
    assert Ledger(Folder(tmp_path / "search"), {}, fresh=True).trials == {}


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


GIB = 1 << 30


def asked(*nodes, left=12, images=0, **settings):
    searched = TuneConfig(space={"method.bits": {"choice": [8]}}, **settings)
    return plan(searched, list(nodes), left=left, images=images)


def test_trials_take_the_room_that_there_is():
    assert asked({"CPU": 4}) == Plan(concurrent=4, here=True)
    assert asked({"CPU": 4}, left=1) == Plan(concurrent=1, here=True)
    assert asked({"CPU": 4}, {"CPU": 4}) == Plan(concurrent=8, here=True)
    assert asked({"memory": 9 * GIB}, {"CPU": 2}) == Plan(concurrent=2, here=True), "a head without work"
    # A driver beside two workers: of 4 processors, one pair of workers only.
    assert asked({"CPU": 4}, workers=2).concurrent == 1
    assert asked({"CPU": 5}, workers=2).concurrent == 2
    assert asked({"CPU": 64, "GPU": 3}) == Plan(concurrent=3, here=False)
    assert asked({"CPU": 64, "GPU": 3}, workers=2).concurrent == 1
    assert asked({"CPU": 4}).cpus == 1
    assert 0 < asked({"CPU": 64, "GPU": 3}).cpus < 1


def test_memory_counts_unless_the_recipe_says_how_many():
    small = {"CPU": 8, "memory": 7 * GIB}
    assert asked(small, images=2 * GIB).concurrent == 2
    assert asked(small, {"CPU": 1, "memory": 7 * GIB}, images=2 * GIB).concurrent == 3
    assert asked(small, images=9 * GIB).concurrent == 1, "one at least"
    assert asked(small, images=2 * GIB, concurrent=8).concurrent == 8


def test_threads_are_never_more_than_a_node_has_for_all_trials_on_it():
    assert Plan(concurrent=1, here=True).threads(cpus=4, cores=2) == 2
    assert Plan(concurrent=2, here=True).threads(cpus=8, cores=8) == 4
    assert Plan(concurrent=9, here=True).threads(cpus=4, cores=8) == 2, "four fit on the node"
    assert Plan(concurrent=9, here=True).threads(cpus=0.5, cores=1) == 1


@pytest.mark.parametrize(
    ("resources", "settings", "message"),
    [
        (
            {"CPU": 2},
            {"concurrent": 3},
            r"concurrent: 3 trials × \(1 worker × 1 CPU\) = 3 CPUs, but the cluster has 2 .*set it to 2 or",
        ),
        (
            {"CPU": 2},
            {"workers": 2},
            r"workers: 1 trial × \(2 workers × 1 CPU \+ 0.01 .*\) = 2.01 CPUs, but .* has 2 .*set it to 1 or",
        ),
        ({"CPU": 9, "GPU": 1}, {"concurrent": 2}, r"and 2 GPUs, but the cluster has 9 CPUs and 1 GPUs"),
        ({"memory": GIB}, {}, r"= 1 CPUs, but the cluster has 0 CPUs"),
    ],
)
def test_an_impossible_plan_is_refused_with_the_sum(resources, settings, message):
    with pytest.raises(ClusterError, match=message):
        asked(resources, **settings)
