"""Runs side by side, from files that the tests write."""

import json
import re
import statistics
import xml.etree.ElementTree as ET

import pytest
from PIL import Image
from samples import write_run

from ray_retrieval import compare_page
from ray_retrieval.compare import acceptance, compare
from ray_retrieval.compare_page import _link
from ray_retrieval.errors import ArtefactError, RetrievalError
from ray_retrieval.recipe import PublishedConfig
from ray_retrieval.results import common_folder
from ray_retrieval.run_folder import mark
from ray_retrieval.storage import Folder


def test_published_results_are_reached_within_their_tolerance():
    published = [
        PublishedConfig(source="a", metric="map@5000", values={48: 0.7301}),
        PublishedConfig(source="b", metric="map@5000", values={48: 0.7301}, tolerance=0),
        PublishedConfig(source="c", metric="map@all", values={48: 0.5}),
        PublishedConfig(source="d", metric="map@5000", values={32: 0.1}),
    ]
    # 0.7201 is 0.7301 − 0.01 on paper, and a little less in binary.
    rows = acceptance(published, 48, [{"name": "map@5000", "value": 0.7201}])
    assert [(row["source"], row["reached"]) for row in rows] == [("a", True), ("b", False), ("c", None)]
    assert rows[0]["difference"] == pytest.approx(-0.01)
    assert rows[2]["measured"] is None
    assert acceptance(published[:1], 48, [{"name": "map@5000", "value": 0.7200}])[0]["reached"] is False


def test_results_of_another_benchmark_are_not_held_against_a_run():
    values = {"source": "a paper", "metric": "map@all", "values": {48: 0.5}}
    of_one, of_any = PublishedConfig(benchmark="CIFAR-10 (I)", **values), PublishedConfig(**values)
    test = [{"name": "map@all", "value": 0.9}]
    assert len(acceptance([of_one, of_any], 48, test, benchmark="CIFAR-10 (I)")) == 2
    assert len(acceptance([of_one, of_any], 48, test, benchmark="lists")) == 1


def test_each_run_is_there_with_its_selected_models_numbers(tmp_path):
    folders = [write_run(tmp_path / f"{bits}", bits / 100, bits=bits) for bits in (16, 32)]
    found = compare(folders)
    assert found["title"] == "study"
    assert [run["label"] for run in found["runs"]] == ["study-16bits", "study-32bits"]
    assert [run["size"] for run in found["runs"]] == [16, 32]
    assert [run["folder"] for run in found["runs"]] == [str(folder) for folder in folders]
    assert found["runs"][1]["metrics"][0]["value"] == 0.32
    assert "of 32 bits" in found["runs"][1]["metrics"][0]["policy"]
    assert found["runs"][0]["pr_curve"]["precision"] == [None, 0.16, 0.1]
    assert found["notes"] == []
    assert found["seeds"] == []


def test_bits_stand_beside_what_is_published(tmp_path):
    for bits, value in ((128, 0.8), (16, 0.68), (32, 0.6)):
        write_run(tmp_path / "study" / f"{bits}bits", value, bits=bits)
    found = compare([tmp_path / "study"])
    assert [run["size"] for run in found["runs"]] == [16, 32, 128]
    measured, published = found["by_size"]["rows"]
    assert (found["by_size"]["sizes"], found["by_size"]["unit"]) == ([16, 32, 128], "bits")
    assert [measured["cells"][bits]["value"] for bits in ("16", "32", "128")] == [0.68, 0.6, 0.8]
    assert {bits: cell["value"] for bits, cell in published["cells"].items()} == {"16": 0.6873, "32": 0.7184}
    assert [(row["size"], row["reached"]) for row in found["published"]] == [(16, True), (32, False)]


def test_a_size_that_a_recipe_leaves_to_the_network_is_the_networks(tmp_path):
    small = {"name": "small", "weights": "none"}
    write_run(tmp_path / "a", 0.5, method={"name": "xbm", "dimension": 64, "backbone": small})
    write_run(tmp_path / "b", 0.6, method={"name": "gem", "backbone": small})
    found = compare([tmp_path])
    assert [(run["size"], run["unit"]) for run in found["runs"]] == [(64, "dimensions"), (128, "dimensions")]
    assert found["by_size"]["sizes"] == [64, 128]


def test_seeds_of_one_configuration_are_averaged(tmp_path):
    values = [0.66, 0.69, 0.70]
    for seed, value in enumerate(values):
        write_run(tmp_path / f"seed{seed}", value, seed=seed)
    write_run(tmp_path / "other", 0.1, bits=32)
    found = compare([tmp_path])
    (group,) = found["seeds"]
    assert (group["size"], group["seeds"]) == (16, [0, 1, 2])
    assert group["metrics"][0]["mean"] == pytest.approx(sum(values) / 3)
    assert group["metrics"][0]["deviation"] == pytest.approx(statistics.stdev(values))
    row = next(row for row in found["published"] if row["size"] == 16)
    assert row["measured"] == pytest.approx(sum(values) / 3)
    assert row["reached"] is True  # though the first seed alone has not
    labels = [run["label"] for run in found["runs"]]
    assert len(set(labels)) == 4
    assert "study-16bits · seed 1" in labels


def test_a_repeated_seed_counts_once_and_is_named(tmp_path):
    for folder, value, seed in (("a", 0.6, 0), ("b", 0.9, 0), ("c", 0.8, 1)):
        write_run(tmp_path / folder, value, seed=seed)
    found = compare([tmp_path])
    assert [run["label"] for run in found["runs"]] == ["a", "b", "c"]
    assert found["notes"] == ["b repeats the configuration and seed of a"]
    assert found["seeds"][0]["metrics"][0]["mean"] == pytest.approx(0.7)
    write_run(tmp_path / "d", 0.5, bits=32)
    cells = compare([tmp_path])["by_size"]["rows"][0]["cells"]
    assert cells["16"] == {"value": pytest.approx(0.7), "deviation": pytest.approx(0.02**0.5), "runs": 2}


def test_configurations_of_one_name_are_told_apart(tmp_path):
    for rate, value in ((0.01, 0.6), (0.02, 0.8)):
        train = {"optimizer": {"lr": rate}}
        for seed in (0, 1):
            write_run(tmp_path / f"lr{rate}" / f"seed{seed}", value, seed=seed, train=train)
    for seed in (0, 1):
        write_run(tmp_path / "wide" / f"seed{seed}", 0.7, bits=32, seed=seed)
    found = compare([tmp_path])
    means = {group["label"]: group["metrics"][0]["mean"] for group in found["seeds"]}
    first, second = "study-16bits (lr0.01/seed0)", "study-16bits (lr0.02/seed0)"
    assert means == {first: 0.6, second: 0.8, "study-32bits": 0.7}
    assert [row["run"] for row in found["published"]] == [first, second, "study-32bits"]
    of_sizes = [row["label"] for row in found["by_size"]["rows"] if row["measured"]]
    assert of_sizes == [first, second, "study-32bits"]


def test_the_table_of_seeds_has_every_metric_of_every_method(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"codes{seed}", seed=seed)
        write_run(tmp_path / f"others{seed}", bits=32, seed=seed, metrics={"recall@1": 0.8125})
    page = compare_page.render(compare([tmp_path]))
    over_seeds = page[page.index('id="seeds-title"') : page.index('id="metrics-title"')]
    assert '<th scope="col">recall@1</th>' in over_seeds
    assert "0.8125 ± 0.0000" in over_seeds


def test_seeds_that_were_trained_on_other_images_are_noted(tmp_path):
    for seed, images in ((0, 1000), (1, 1000), (2, 990)):
        write_run(tmp_path / f"{seed}", seed=seed, facts={"train": images})
    write_run(tmp_path / "wide", bits=32, facts={"train": 500})  # of another configuration, which is no fault
    (note,) = compare([tmp_path])["notes"]
    numbers = "1,000 (study-16bits · seed 0, study-16bits · seed 1); 990 (study-16bits · seed 2)"
    assert note == f"study-16bits was trained on different numbers of images: {numbers}"


def test_a_run_given_twice_counts_once(tmp_path):
    run = write_run(tmp_path / "run")
    assert len(compare([run, tmp_path, run])["runs"]) == 1


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"facts": {"queries": 10_000}},
            r"number of queries differs: 9 \(study-16bits\); 10,000 \(study-32bits\)",
        ),
        ({"facts": {"database": 7}}, "size of the database differs: 50 .* 7 "),
        ({"facts": {"errors": 7}}, "number of test images that cannot be decoded differs: 0 .* 7 .*not comp"),
        ({"facts": {"name": "coco"}}, r"benchmark differs: digits .* coco \(study-32bits\)"),
        ({"metrics": {"map@all": 0.5, "map@7": 0.4}}, r"map@7 \(only in study-32bits\)"),
    ],
)
def test_runs_that_cannot_be_compared_are_compared_with_a_note(tmp_path, changes, note):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", bits=32, **changes)
    found = compare([tmp_path])
    assert any(re.search(note, line) for line in found["notes"])
    assert "Mind when comparing" in compare_page.render(found)


def test_what_is_no_finished_run_is_named(tmp_path):
    write_run(tmp_path / "study" / "done")
    begun = tmp_path / "study" / "begun"
    mark(Folder(begun))
    (tmp_path / "study" / "recipe.yaml").write_text("name: of the user")
    (tmp_path / "empty").mkdir()
    (tmp_path / "study" / "file.txt").write_text("no folder")
    with pytest.raises(ArtefactError, match=r"begun: the run is not finished"):
        compare([begun])
    with pytest.raises(ArtefactError, match=r"empty: no finished run here"):
        compare([tmp_path / "study", tmp_path / "empty"])
    with pytest.raises(ArtefactError, match=r"nowhere: no finished run here: no such folder"):
        compare([tmp_path / "nowhere"])
    found = compare([tmp_path / "study"])
    assert len(found["runs"]) == 1
    assert found["notes"] == [f"{begun} is left out: the run is not finished"]


def test_trials_of_a_search_that_were_not_measured_are_no_unfinished_runs(tmp_path):
    search = tmp_path / "runs" / "search"
    write_run(tmp_path / "runs" / "run")
    write_run(search / "trials" / "0001", bits=32)
    for name in ("images", "trials/0000"):
        mark(Folder(search / name))
    (search / "study.json").write_text("{}")
    found = compare([tmp_path / "runs"])
    assert [run["size"] for run in found["runs"]] == [16, 32]
    assert found["notes"] == []


@pytest.mark.parametrize("text", ["{}", '{"selected": "best", "models": {}}', "[]"])
def test_metrics_of_something_else_are_refused(tmp_path, text):
    run = write_run(tmp_path / "run")
    (run / "metrics.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"run: .*not those of a finished run"):
        compare([run])


def test_the_page_is_whole_in_itself_and_links_to_reports_inside(tmp_path):
    for bits in (16, 32):
        (write_run(tmp_path / f"{bits} bits", 0.7, bits=bits) / "report.html").write_text("report")
    outside = write_run(tmp_path.parent / f"{tmp_path.name}-outside", name="<b>&$x$", bits=64)
    (outside / "report.html").write_text("report")
    found = compare([tmp_path, outside])
    assert compare_page.write(found, Folder(tmp_path)) == str(tmp_path / "comparison.html")
    assert json.loads((tmp_path / "comparison.json").read_text()) == found
    page = (tmp_path / "comparison.html").read_text()
    links = re.findall(r'href="([^"#]+)"', page)
    assert links == ["16%20bits/report.html", "32%20bits/report.html"]
    assert "&lt;b&gt;&amp;$x$" in page
    assert "<b>&$x$" not in page
    assert "http://" not in page
    assert page.count("<svg") == 1
    assert "default-src 'none'" in page
    legend = page[page.index('class="legend"') : page.index("</figcaption>")]
    assert legend.count("<li>") == 3
    # The policies differ in the number of bits alone.
    assert page.count("by Hamming distance of the run&#39;s bits") == 2


def test_a_page_on_a_store_links_to_reports_inside(monkeypatch):
    monkeypatch.setattr(Folder, "exists", lambda *_: True)
    page = Folder("s3://bucket/study?region=eu-west-1")
    links = [
        _link(Folder(f"s3://bucket/{run}?region=eu-west-1"), page) for run in ("study/16 bits", "studyb")
    ]
    assert links == ["16%20bits/report.html", None]


def test_more_runs_than_colours_stay_apart(tmp_path):
    for seed in range(8):
        write_run(tmp_path / f"{seed}", 0.1 * (seed + 1), seed=seed)
    page = compare_page.render(compare([tmp_path]))
    legend = re.findall(r'<i style="border-color: ([^;]+); border-top-style: (\w+)"', page)
    assert len(legend) == len(set(legend)) == 8


def test_the_figure_has_every_run_by_name(tmp_path):
    write_run(tmp_path / "a", name="$a$ & <b>")
    write_run(tmp_path / "b", bits=32)
    found = compare([tmp_path])
    compare_page.save_figure(found, tmp_path / "curves.svg")
    words = "".join(ET.parse(tmp_path / "curves.svg").getroot().itertext())
    assert "$a$ & <b>" in words
    assert "study-32bits" in words
    compare_page.save_figure(found, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000
    with pytest.raises(RetrievalError, match=r"a figure cannot be saved as 'gif'"):
        compare_page.save_figure(found, tmp_path / "curves.gif")


def test_the_common_folder_is_the_innermost_one(tmp_path):
    def common(*paths):
        return common_folder([Folder(path) for path in paths]).uri

    assert common("/r/x/16bits", "/r/x/32bits") == "/r/x"
    assert common("/r/x/16bits/seed0", "/r/x/32bits/seed0") == "/r/x"
    assert common("/r/x") == "/r"
    assert common("/r/x1", "/r/x") == "/r"
    assert common("/r/x", "/r/x/inside") == "/r"
    with pytest.raises(ArtefactError, match="no folder contains all"):
        common("/a", "/b/c")
