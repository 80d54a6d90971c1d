"""What a search may try: configuration, draws, grids, proposals."""

import itertools
import math

import numpy as np
import pytest
from tuning_parts import SPACE, config, recipes

from ray_retrieval import recipe
from ray_retrieval.config import validate
from ray_retrieval.errors import RecipeError
from ray_retrieval.storage import Folder
from ray_retrieval.tuning import space
from ray_retrieval.tuning.config import SHARED, TuneConfig
from ray_retrieval.tuning.ledger import Trial
from ray_retrieval.tuning.proposals import propose
from ray_retrieval.tuning.trials import check

LISTS = {"method.bits": {"grid": [8, 16]}, "method.penalty": {"choice": [0.1, 1.0, 2.0]}}
MAP = {"map": "max"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": {"method.margin": {"unifrom": [0, 1]}}}, "unknown key .*did you mean 'uniform'"),
        ({"space": {"method.margin": {"uniform": [1, 0]}}}, "from a lower to a higher number"),
        ({"space": {"method.margin": {"loguniform": [0, 1]}}}, "positive numbers only"),
        ({"space": {"method.margin": {}}}, "state one of uniform, .* got none"),
        ({"space": {"method.margin": {"choice": [1], "grid": [1]}}}, "got choice and grid"),
        ({"space": {"data.root": {"choice": ["a"]}}}, "fields of 'method' and 'train'"),
        ({"space": {"method": {"choice": [{}]}}}, "fields of 'method' and 'train'"),
        ({"space": {"train.workers": {"choice": [1]}}}, "the same in all trials"),
        ({"space": {"train.validation.k": {"choice": [1, 9]}}}, "the same in all trials"),
        ({"searcher": "grid"}, "so 'train.optimizer.lr' needs a list"),
        ({"space": LISTS, "searcher": "optuna"}, "which optuna does not search"),
        ({"metric": ["map", "bits"]}, "'scheduler' is none where there are several metrics"),
        ({"metric": ["map", "bits"], "mode": ["max"], "scheduler": "none"}, "as many modes"),
        ({"metric": ["map", "map"], "scheduler": "none"}, "several different ones"),
        ({"search": "random"}, "unknown key 'search' .*did you mean 'searcher'"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        validate(TuneConfig, {"space": SPACE, **settings})


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("recall@1", "one of map, bits for"),
        ("bits", "needs something that is measured"),
        ("dimension", "one of map, bits for"),
    ],
)
def test_the_metric_is_one_of_the_validation(tmp_path, metric, message):
    with pytest.raises(RecipeError, match=message):
        recipes(tmp_path, metric=metric)({})


def test_what_trials_share_is_what_changes_no_model_and_how_models_are_compared():
    assert set(SHARED) == {*recipe._NOT_OF_THE_MODEL["train"], "start", "validation"}


def test_more_is_better_but_of_sizes():
    found = config(metric=("map", "bits"), scheduler="none").objectives("map")
    assert found == {"map": "max", "bits": "min"}
    assert config(mode="min").objectives("recall@1") == {"recall@1": "min"}


def test_numbers_that_yaml_reads_as_text_are_numbers():
    read = config(space={"train.optimizer.lr": {"choice": ["1e-3", "1.5E2", "sgd", "1-2"]}})
    assert read.space["train.optimizer.lr"].choice == (1e-3, 150.0, "sgd", "1-2")


def test_draws_are_within_their_ranges_and_depend_on_seed_and_number_only():
    ranges = {
        "method.a": {"uniform": [-1, 3]},
        "method.b": {"loguniform": [1e-4, 1e2]},
        "method.c": {"randint": [1, 4]},
        "method.d": {"choice": ["x", "y"]},
    }
    found = [space.drawn(config(space=ranges), number) for number in range(2000)]
    columns = {key: [one[key] for one in found] for key in ranges}
    assert -1 <= min(columns["method.a"]) < -0.98
    assert 2.98 < max(columns["method.a"]) <= 3
    logs = np.log10(columns["method.b"])
    assert (logs >= -4).all()
    assert (logs <= 2).all()
    assert abs(logs.mean() + 1) < 0.15, "uniform in the logarithm"
    assert set(columns["method.c"]) == {1, 2, 3, 4}, "both ends are included"
    assert set(columns["method.d"]) == {"x", "y"}
    assert space.drawn(config(space=ranges), 7) == found[7]
    assert space.drawn(config(space=ranges, seed=1), 7) != found[7]


def test_a_grid_is_every_combination_once():
    grid = config(space=LISTS, searcher="grid")
    found = [tuple(space.from_lists(grid, number).values()) for number in range(space.count(grid))]
    assert found == list(itertools.product([8, 16], [0.1, 1.0, 2.0]))
    assert space.count(config(space=LISTS, searcher="grid", trials=4)) == 4
    assert (space.count(config()), space.count(config(trials=3))) == (12, 3)


@pytest.mark.parametrize("searcher", ["grid", "random", "optuna"])
def test_the_order_of_the_fields_does_not_matter(searcher):
    lists = LISTS if searcher == "grid" else SPACE
    orders = [
        config(space=dict(order), searcher=searcher) for order in (lists.items(), list(lists.items())[::-1])
    ]
    if searcher == "optuna":
        pytest.importorskip("optuna")
    found = [[propose(order, MAP, [], number) for number in range(3)] for order in orders]
    assert found[0] == found[1]
    assert list(found[0][0]) == list(lists), "told in the recipe's own order"


def test_with_random_search_the_values_of_a_grid_come_in_turn():
    mixed = config(space={**SPACE, "method.penalty": {"grid": [1, 2, 3]}})
    assert [space.drawn(mixed, number)["method.penalty"] for number in range(5)] == [1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("tried", "message"),
    [
        ({"method.penlty": {"uniform": [0, 1]}}, "unknown key 'method.penlty'.*did you mean 'penalty'"),
        ({"method.bits": {"choice": [8, 0]}}, r"makes no recipe \(method.bits=0\).*greater than or equal to"),
        ({"train.batch_size": {"grid": [8, 1]}}, r"makes no recipe \(train.batch_size=1\)"),
        ({"train.epochs": {"choice": [2, 0]}}, r"makes no recipe \(train.epochs=0\): nothing is trained"),
        ({"method.bits": {"uniform": [8, 64]}}, r"makes no recipe \(method.bits=25.8.*valid integer"),
        ({"method.bits": {"loguniform": [4, 64]}}, r"makes no recipe \(method.bits=23.0.*valid integer"),
    ],
)
def test_what_makes_no_recipe_is_found_before_anything_starts(tmp_path, tried, message):
    make = recipes(tmp_path, space=tried)
    with pytest.raises(RecipeError, match=message):
        check(make({}), make)


def test_workers_that_have_no_images_are_found_before_anything_starts(tmp_path):
    make = recipes(tmp_path, workers=16)
    with pytest.raises(RecipeError, match="2 or more for each of 16 workers, got 16"):
        check(make({}), make)


def test_events_on_a_store_are_refused_before_anything_starts(tmp_path, monkeypatch):
    make = recipes(tmp_path)
    made = make({"train.tensorboard": True})
    check(made, make)
    monkeypatch.setattr(Folder, "is_local", property(lambda _folder: False))
    with pytest.raises(RecipeError, match="TensorBoard's events are written to a local folder"):
        check(made, make)


def test_many_combinations_are_checked_value_by_value():
    lists = {f"method.f{number}": {"choice": list(range(10))} for number in range(4)}
    checked = list(space.to_check(config(space=lists)))
    assert len(checked) == 41
    assert {(key, value) for one in checked for key, value in one.items()} == {
        (key, value) for key in lists for value in range(10)
    }


def test_references_follow_the_values_of_a_trial(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: n-${method.bits}\noutput: o\ndata: {name: digits}\n"
        "method: {name: greedyhash, bits: 16, image: {size: 16}}\n"
    )
    make = recipe.template(file, ["train.epochs=3"])
    made = make({"method.bits": 24, "train.optimizer.lr": 1.25e-05})
    assert (made.name, made.method.bits, made.train.optimizer.lr, made.train.epochs) == (
        "n-24",
        24,
        1.25e-05,
        3,
    )
    assert make({}).name == "n-16"


# Optuna


def told(values):
    """Finished trials of the space, by their learning rates."""
    return [
        Trial(number, {"train.optimizer.lr": lr, "method.bits": 16}, "finished", {"map": value})
        for number, (lr, value) in enumerate(values)
    ]


def test_optuna_proposes_alike_from_alike_trials_and_goes_where_they_are_best():
    pytest.importorskip("optuna")
    searched = config(searcher="optuna", trials=20)
    rates = [float(rate) for rate in np.geomspace(1e-3, 1.0, 19)]
    known = told([(rate, -abs(math.log(rate / 0.1))) for rate in rates])
    found = propose(searched, MAP, known, 19)
    assert found == propose(searched, MAP, reversed(known), 19)
    assert 0.02 < found["train.optimizer.lr"] < 0.5, "near 0.1, where the values are highest"
    assert found["method.bits"] in (8, 16, 32)


def test_optuna_takes_in_every_state_and_several_objectives():
    pytest.importorskip("optuna")
    parameters = {"train.optimizer.lr": 0.01, "method.bits": 8}
    states = [
        Trial(0, parameters, "finished", {"map": 0.5, "bits": 8.0}),
        Trial(1, parameters, "failed"),
        Trial(2, parameters, "running"),
    ]
    stopped = Trial(3, parameters, "stopped", {"map": 0.1}, curve=[(1, 0.1)])
    both = config(searcher="optuna", metric=("map", "bits"), scheduler="none")
    for number in range(3, 8):
        assert 1e-3 <= propose(both, both.objectives("map"), states, number)["train.optimizer.lr"] <= 1
    assert propose(config(searcher="optuna"), MAP, [*states, stopped], 4)["method.bits"] in (8, 16, 32)


def test_without_optuna_the_mend_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"Optuna is not installed.*ray_retrieval\[tune\]"):
        propose(config(searcher="optuna"), MAP, [], 0)
