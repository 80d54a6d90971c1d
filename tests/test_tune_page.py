"""The report of a search: charts, importance, and the page as it is read."""

import re
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import spearmanr
from tuning_parts import SPACE, config, recipes

from ray_retrieval.cli.tables import print_trials
from ray_retrieval.storage import Folder
from ray_retrieval.tuning import charts, importance, page
from ray_retrieval.tuning.config import Range
from ray_retrieval.tuning.ledger import Trial

MAP = {"map": "max"}


def trials(count=9):
    """The value grows with the rate and not with the bits; one trial was stopped, one failed."""
    found = []
    for number, rate in enumerate(np.geomspace(1e-3, 1.0, count)):
        parameters = {"train.optimizer.lr": float(rate), "method.bits": (8, 16, 32)[number % 3]}
        value = 0.1 * number
        found.append(
            Trial(
                number,
                parameters,
                "finished",
                {"map": value},
                [(1, value)],
                epochs=9,
                seconds=3,
                selected=value,
            )
        )
    found[1].state, found[1].epochs, found[1].error = "stopped", 1, "stopped by asha after epoch 1"
    failed = Trial(
        count, {"train.optimizer.lr": 0.5, "method.bits": 8}, "failed", error="lost <b>&</b>", failures=2
    )
    return [*found, failed]


def test_the_field_that_matters_has_the_largest_share():
    pytest.importorskip("optuna")
    found = importance.importance(config(), MAP, trials())
    assert next(iter(found.shares)) == "train.optimizer.lr"
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.by.startswith("Functional analysis of variance")
    assert "over 9 trials" in found.by
    assert found == importance.importance(config(), MAP, trials())


def test_what_importance_counts_is_told():
    early = importance.importance(config(), MAP, trials()).by
    assert early.endswith("over 9 trials, 1 of which ended early and count with the best they had by then")
    whole = [trial for trial in trials() if trial.state == "finished"]
    assert importance.importance(config(), MAP, whole).by.endswith("over 8 trials")


def test_without_optuna_ranks_tell(monkeypatch):
    monkeypatch.setattr(importance, "find_spec", lambda name: None)
    found = importance.importance(config(), MAP, trials())
    assert found.by.startswith("Share of the variance of the values' ranks")
    assert found.shares["train.optimizer.lr"] == pytest.approx(1)
    assert found.shares["method.bits"] < 0.3


def test_ranks_are_those_of_spearman_and_of_the_correlation_ratio():
    generator = np.random.default_rng(0)
    numbers, values = generator.normal(size=30), generator.normal(size=30)
    expected = spearmanr(numbers, values).statistic ** 2
    assert importance.by_ranks(Range(uniform=(-9, 9)), list(numbers), values) == pytest.approx(expected)
    # Ranks 1 2 | 3 4: means 1.5 and 3.5 about 2.5, whose variance is 1 of 1.25.
    listed = Range(choice=("a", "b"))
    assert importance.by_ranks(listed, ["a", "a", "b", "b"], np.array([1.0, 2, 3, 4])) == pytest.approx(0.8)
    assert importance.by_ranks(Range(uniform=(0, 1)), [0.5] * 4, np.arange(4.0)) == 0


def test_too_few_or_equal_values_have_no_importance():
    assert importance.importance(config(), MAP, trials()[:3]) is None
    equal = trials()
    for trial in equal[:-1]:
        trial.values = {"map": 0.5}
    assert importance.importance(config(), MAP, equal) is None


def test_parallel_coordinates_have_a_line_for_every_trial_with_a_value():
    found = trials()
    chart = charts.parallel_coordinates(config(), MAP, found, [found[8]])
    lines = re.findall(r'<polyline points="([^"]*)"[^>]*stroke-width="([^"]*)"', chart.svg)
    trial_lines = [points for points, width in lines if width in ("1.4", "2.6")]
    assert len(trial_lines) == 9
    assert all(len(points.split()) == 3 for points in trial_lines), "learning rate, bits and map"
    strong = [points for points, width in lines if width == "2.6"]
    rate, bits, value = (float(point.split(",")[1]) for point in strong[0].split())
    top = min(float(point.split(",")[1]) for points in trial_lines for point in points.split())
    assert rate == value == top, "the highest of both"
    assert bits > top, "32 is the middle of the highest third of its axis"
    assert chart.svg.count("stroke-dasharray") == 1, "the one that was stopped"
    assert chart.summary == "9 trials; the best one, 0008, has train.optimizer.lr 1, method.bits 32."
    assert charts.parallel_coordinates(config(), MAP, found[9:], []) is None


def test_the_line_of_the_progress_never_falls():
    found = trials()
    chart = charts.progress_chart("map", "max", found[::-1])
    heights = [
        float(y)
        for y in re.findall(r",([\d.]+)", re.findall(r'points="([^"]*)"[^>]*width="2"', chart.svg)[0])
    ]
    assert heights == sorted(heights, reverse=True)
    assert chart.svg.count("<circle") == 9
    assert chart.svg.count('fill="var(--paper)"') == 1
    assert charts.progress_chart("map", "max", found[9:]) is None


def test_the_best_of_each_size_is_told():
    chart = charts.size_chart("method.bits", "map", "max", trials())
    assert chart.summary == "8 bits: 0.6; 16 bits: 0.7; 32 bits: 0.8."
    one = [trial for trial in trials() if trial.parameters["method.bits"] == 8]
    assert charts.size_chart("method.bits", "map", "max", one) is None


def test_trials_that_leave_the_size_to_the_network_are_not_in_the_chart_of_sizes(tmp_path):
    found = trials()
    for trial in found[:3]:
        trial.parameters["method.bits"] = None
    chart = charts.size_chart("method.bits", "map", "max", found)
    assert chart.svg.count("<circle") == 6
    space = {**SPACE, "method.bits": {"choice": [None, 8, 16, 32]}}
    assert charts.parallel_coordinates(config(space=space), MAP, found, []).svg.count(">None<") == 1


def test_the_best_so_far_is_one_that_can_be_kept():
    found = trials()
    found[8].state = "stopped"
    assert charts.progress_chart("map", "max", found).summary.endswith("to 0.7 at best.")


def test_labels_are_escaped_and_cut():
    space = {"method.a<b>&": {"choice": ["<script>", "x" * 50]}}
    named = Trial(0, {"method.a<b>&": "<script>"}, "finished", {"map": 0.5})
    svg = charts.parallel_coordinates(config(space=space), MAP, [named], []).svg
    assert "<script>" not in svg
    assert "a&lt;b&gt;&amp;" in svg
    assert "x" * 20 not in svg
    assert charts.short("method.bits", ["method.bits", "train.x"]) == "bits"
    assert charts.short("method.bits", ["method.bits", "train.bits"]) == "method.bits"


def test_the_page_says_everything_and_fetches_nothing(tmp_path):
    found = trials()
    made = recipes(tmp_path)({})
    folder = Folder(tmp_path / "search")
    folder.write_text("recipe.yaml", "name: best\n")
    folder.write_text("trials/0008/history.jsonl", '{"epoch": 1, "loss": 1.0, "validation": {"map": 0.8}}\n')
    test = [{"name": "map@all", "value": 0.75, "policy": "mean over 9 queries"}]
    folder.write_json("metrics.json", {"selected": "best", "models": {"best": {"test": test}}})
    uri = page.write(folder, made, MAP, found, [found[8]])
    text = (tmp_path / "search" / "report.html").read_text()
    assert uri.endswith("report.html")
    for said in (
        "0.8000",
        "trial 0008",
        "map@all",
        "0.7500",
        "What mattered",
        "map by bits",
        "stopped by asha",
    ):
        assert said in text, said
    assert "lost &lt;b&gt;&amp;&lt;/b&gt; (2 times)" in text
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert text.count('<tr><th scope="row"') == len(found)


@pytest.mark.parametrize(("select", "epoch"), [("best", 2), ("last", 3)])
def test_the_model_that_the_chosen_trial_keeps_is_marked_in_its_training(tmp_path, select, epoch):
    made = recipes(tmp_path)({"train.select": select})
    history = [{"epoch": n, "loss": 1.0, "validation": {"map": v}} for n, v in ((1, 0.5), (2, 0.8), (3, 0.8))]
    text = page.render(made, MAP, trials(), trials()[8:9], history=history, metrics=None, text="")
    assert f"The dot is the selected model, epoch {epoch}." in text


def test_a_page_of_several_objectives_has_their_front(tmp_path):
    both = {"map": "max", "bits": "min"}
    made = recipes(tmp_path, metric=("map", "bits"), scheduler="none")({})
    found = trials()[:3]
    for trial in found:
        trial.state, trial.error = "finished", None
        trial.values["bits"] = float(trial.parameters["method.bits"])
    text = page.render(made, both, found, found[::-1], history=[], metrics=None, text="")
    assert "map against bits" in text
    assert "no other one is at least as good in everything" in text
    assert "Test metrics" not in text


def test_a_page_without_any_value_is_still_a_page(tmp_path):
    made = recipes(tmp_path)({})
    text = page.render(made, MAP, trials()[9:], [], history=[], metrics=None, text="")
    assert "lost" in text
    assert "error.txt" in text
    assert SPACE.keys() <= set(re.findall(r'<th scope="col">([^<]*)</th>', text))


def test_the_table_on_the_terminal_has_every_trial(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = trials()
    tuned = {
        "objectives": MAP,
        "best": [asdict(found[8])],
        "trials": [asdict(trial) for trial in found],
        "metrics": None,
    }
    print_trials(tuned)
    lines = capsys.readouterr().out.splitlines()
    assert any("0008 *" in line and "0.8000" in line and "finished" in line for line in lines)
    assert any("0009" in line and "failed: lost <b>&</b>" in line for line in lines)
