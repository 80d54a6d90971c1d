import base64
import functools
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_retrieval.errors import ArtefactError
from ray_retrieval.pictures import Example, Shown
from ray_retrieval.report import EPOCH_ROWS, render, write
from ray_retrieval.storage import Folder

VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use", "rect"}


class Page(HTMLParser):
    """What a browser would make of a page: elements with attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.elements if attribute in attributes]


def encoded(side: int, kind: str = "PNG", seed: int = 0) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return data.getvalue()


def history(epochs: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "lr": 0.001,
            "loss": 2.5 / epoch,
            "terms": {"similarity": 2.0 / epoch, "quantisation": 0.5 / epoch},
            "seconds": 1.5,
            "images_per_second": 1234.0,
            **({"validation": {"map": 1 - 0.5 / epoch}} if epoch % 2 == 0 else {}),
        }
        for epoch in range(1, epochs + 1)
    ]


def model(epoch: int, value: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "validation": {"map": value + 0.01},
        "test": [
            {
                "name": "map@all",
                "value": value,
                "policy": "mean over queries; ties by row; divisor: all relevant",
            },
            {
                "name": "precision@100",
                "value": value / 2,
                "policy": "share of the first 100 hits that are relevant",
            },
        ],
        "pr_curve": {"radius": [0, 1, 2, 3], "recall": [0.1, 0.4, 0.7, 1.0], "precision": [1, 0.9, 0.6, 0.1]},
    }


def metrics() -> dict[str, Any]:
    return {
        "selected": "best",
        "models": {"best": model(2, 0.8642), "last": model(4, 0.8531)},
        "dataset": {
            "name": "digits",
            "train": 1000,
            "validation_queries": 100,
            "queries": 200,
            "database": 59000,
            "errors": 3,
            "notes": ["7 training images are in the database"],
        },
    }


def timings() -> dict[str, Any]:
    return {
        "stages": {"data": 0.4, "train": 75.0, "encode": 3700.0},
        "versions": {"ray_retrieval": "0.1.0", "torch": "2.9.1"},
        "machine": "2 cores, x86_64, no GPU",
    }


def examples() -> list[Example]:
    hits = [Shown(encoded(8, seed=i), f"hit-{i}", ["seven"], f"{i} bits", i % 2 == 0) for i in range(4)]
    return [Example(Shown(encoded(8, seed=9), "query-1", ["seven"], None, None), hits)]


def page(**changes: Any) -> str:
    parts: dict[str, Any] = {
        "name": "first run",
        "recipe_text": "name: first run\nmethod:\n  bits: 48\n",
        "history": history(),
        "metrics": metrics(),
        "timings": timings(),
        "examples": examples(),
    }
    return render(**{**parts, **changes})


@functools.cache
def standard() -> str:
    return page()


def headings(html: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", html)


def test_page_holds_every_metric_with_its_policy_for_both_models() -> None:
    text = Page(standard()).text
    for expected in ("Best on validation", "epoch 2 · selected", "Last", "epoch 4"):
        assert expected in text
    for trained in metrics()["models"].values():
        for metric in trained["test"]:
            assert metric["name"] in text
            assert metric["policy"] in text
            assert f"{metric['value']:.4f}" in text
        assert f"{trained['validation']['map']:.4f}" in text


def test_verdict_is_the_first_metric_of_the_selected_model() -> None:
    for selected, value, words in (
        ("best", "0.8642", "best on validation, epoch 2"),
        ("last", "0.8531", "last, epoch 4"),
    ):
        html = page(metrics={**metrics(), "selected": selected})
        assert f'<p class="value">{value}</p>' in html
        assert f"map@all on the test queries · {words}" in html


def test_without_validation_queries_the_model_is_the_last_one() -> None:
    measured = {**model(4, 0.8642), "validation": {"map": None}}
    found = page(metrics={**metrics(), "models": {"best": measured}})
    assert "map@all on the test queries · last, epoch 4" in Page(found).text
    assert "undefined" not in Page(found).text
    assert "Validation split" not in found


def test_policies_that_differ_between_models_are_both_named() -> None:
    changed = metrics()
    changed["models"]["last"]["test"][0]["policy"] = "another tie rule"
    text = Page(page(metrics=changed)).text
    assert "Best on validation: mean over queries" in text
    assert "Last: another tie rule" in text


def test_notes_on_the_numbers_name_the_model_unless_they_are_about_all() -> None:
    changed = metrics()
    changed["models"]["best"]["notes"] = ["2 queries have no relevant image", "ties matter"]
    changed["models"]["last"]["notes"] = ["2 queries have no relevant image"]
    notes = re.findall(r"<li>([^<]*)</li>", page(metrics=changed))
    assert "2 queries have no relevant image" in notes
    assert "Best on validation: ties matter" in notes
    assert "On these numbers" not in standard()


def test_page_shows_data_notes_errors_recipe_times_and_versions() -> None:
    text = Page(standard()).text
    for expected in (
        "first run",
        "59,000",
        "3 of the images could not be decoded",
        "7 training images are in the database",
        "method:\n  bits: 48",
        "0.4 s",
        "1 min 15 s",
        "1 h 02 min",
        "2.9.1",
        "2 cores, x86_64, no GPU",
    ):
        assert expected in text


def test_page_is_well_formed_and_asks_for_nothing_outside_itself() -> None:
    html = standard()
    parsed = Page(html)
    assert parsed.open == []
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert all(source.startswith("data:image/") for source in parsed.values("src"))
    assert all(target.startswith("#") for target in parsed.values("href") + parsed.values("xlink:href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert {"script", "link", "iframe", "object", "base", "form"}.isdisjoint(
        tag for tag, _ in parsed.elements
    )


def test_ids_are_unique_and_every_reference_has_its_target() -> None:
    html = standard()
    ids = Page(html).values("id")
    assert len(ids) == len(set(ids))
    named = [
        name.lstrip("#") for attribute in ("href", "xlink:href") for name in Page(html).values(attribute)
    ]
    named += Page(html).values("aria-labelledby") + Page(html).values("headers")
    named += re.findall(r"url\(#([^)]*)\)", html)
    assert set(named) <= set(ids)


def test_images_and_charts_have_words_and_tables_have_headers() -> None:
    parsed = Page(standard())
    assert all(image["alt"] for image in parsed.all("img"))
    charts = [attributes for attributes in parsed.all("div") if attributes.get("role") == "img"]
    assert len(charts) == len(parsed.all("svg")) == 4
    assert all(chart["aria-label"] for chart in charts)
    assert any(
        "first 2.5 in epoch 1, last 0.625 in epoch 4" in (chart["aria-label"] or "") for chart in charts
    )
    assert all(header.get("scope") in ("row", "col", "rowgroup") for header in parsed.all("th"))


def test_charts_take_their_colours_and_fonts_from_the_page() -> None:
    charts = re.findall(r"<svg.*?</svg>", standard(), flags=re.DOTALL)
    for chart in charts:
        assert "var(--line-0)" in chart
        assert not re.search(r"#[0-9a-f]{6}", re.sub(r"url\(#\w+\)|\"#\w+\"", "", chart))
        assert "<text" in chart
        assert "<style" not in chart


HOSTILE = [
    """<script>alert(1)</script>"><img src=x onerror=alert(1)></style></pre><h1>owned""",
    "' onmouseover='alert(1) {{ 7 * 7 }}{% raw %}",
    r"$\frac{1 &lt;b&gt;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_users_is_shown_and_never_obeyed(text: str) -> None:
    changed = metrics()
    changed["dataset"].update(name=text, notes=[text])
    changed["models"]["best"]["test"][0].update(name=text, policy=text)
    changed["models"][text] = model(3, 0.5)
    timed = {"stages": {text: 1.0}, "versions": {text: text}, "machine": text}
    entries = [{**entry, "terms": {text: 1.0, "b": 2.0}, "validation": {text: 0.5}} for entry in history()]
    broken = Shown(b"broken", text, [text], "3 bits", True)
    asked = [
        Example(Shown(encoded(8), text, [text]), [broken, Shown(encoded(8), text, [text], "4 bits", None)])
    ]
    parts = {"name": text, "recipe_text": text, "history": entries, "timings": timed}
    parsed = Page(page(metrics=changed, examples=asked, **parts))
    plain = Page(standard())
    assert parsed.open == []
    assert len(parsed.all("h1")) == 1
    assert {tag for tag, _ in parsed.elements} <= {tag for tag, _ in plain.elements} | {"br"}
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert all(source.startswith("data:image/") for source in parsed.values("src"))
    # Title, heading, data, note, metric, policy, model, curves, stage, version, machine, recipe, labels, id.
    assert parsed.text.count(text) >= 14
    assert any(text in alt for alt in parsed.values("alt"))


def test_browser_is_told_to_load_and_run_nothing() -> None:
    policies = [meta["content"] for meta in Page(standard()).all("meta") if meta.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_evaluated_model_without_history_or_curve_leaves_the_curves_out() -> None:
    only = {"selected": "last", "models": {"last": {**model(1, 0.5), "pr_curve": None, "validation": None}}}
    html = page(history=[], metrics=only, timings={}, recipe_text="", examples=[])
    assert headings(html) == ["Metrics"]
    assert "0.5000" in html
    assert Page(html).open == []
    assert set(re.findall(r'href="#(\w+)"', html)) == {"metrics"}


def test_precision_recall_curve_stands_without_a_history() -> None:
    html = page(history=[])
    assert "Curves" in headings(html)
    assert Page(html).values("role").count("img") == 1
    assert "Numbers by epoch" not in html


def test_history_without_validation_or_terms_or_rates_still_has_its_loss() -> None:
    html = page(history=[{"epoch": 1, "loss": 0.5}], metrics={"models": {}}, examples=[])
    assert re.findall(r"<h3 id=\"chart-\d\">([^<]*)", html) == ["Training loss"]


def test_undefined_precisions_are_left_out_of_the_curve() -> None:
    changed = metrics()
    changed["models"] = {
        "best": {**model(2, 0.8), "pr_curve": {"recall": [0, 0.5, 1], "precision": [None, math.nan, 0.1]}}
    }
    assert "precision 0.100 at recall 1.000" in page(metrics=changed)
    changed["models"]["best"]["pr_curve"] = {"recall": [0], "precision": [None]}
    assert "Precision and recall" not in page(metrics=changed)


def test_undefined_metric_is_called_undefined() -> None:
    changed = metrics()
    changed["models"]["best"]["test"][0]["value"] = None
    changed["models"]["last"]["test"][0]["value"] = math.nan
    html = page(metrics=changed)
    assert '<p class="value">undefined</p>' in html
    assert html.count(">undefined<") == 3


def test_loss_that_is_not_finite_is_said_and_drawn_around() -> None:
    entries = history(5)
    entries[2]["loss"], entries[3]["loss"] = math.nan, math.inf
    assert "not finite in 2 epochs, the first of them epoch 3" in Page(page(history=entries)).text
    all_lost = [{**entry, "loss": math.nan, "terms": {}} for entry in entries]
    assert "Training loss" not in page(history=all_lost)
    assert "not finite" in page(history=all_lost)


def test_epoch_that_a_resumed_run_repeated_counts_once_as_it_ended() -> None:
    entries = history(3)
    again = {**entries[1], "loss": 77.125}
    text = Page(page(history=[*entries, again])).text
    assert "77.125" in text
    assert re.search(r"Epochs\s*3\b", text)


def test_single_epoch_is_visible_as_a_dot() -> None:
    chart = re.findall(r"<svg.*?</svg>", page(history=history(1)), flags=re.DOTALL)[0]
    assert "<use" in chart


def test_published_results_stand_beside_the_measured_ones() -> None:
    row = {"metric": "map@all", "size": 48, "tolerance": 0.01}
    near = {**row, "source": "<i>A</i>", "published": 0.87, "measured": 0.8642, "difference": -0.0058}
    far = {**row, "source": "B", "published": 0.9, "measured": 0.8642, "difference": -0.0358}
    absent = {**row, "source": "C", "published": 0.9, "measured": None, "difference": None, "reached": None}
    rows = [{**near, "reached": True}, {**far, "reached": False}, absent]
    shown = page(metrics={**metrics(), "published": rows})
    table = shown[shown.index('id="published-title"') : shown.index('id="curves-title"')]
    lines = [re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", line)).split() for line in table.split("<tr>")[2:]]
    assert [line[-2:] for line in lines[:2]] == [["✓", "yes"], ["✕", "no"]]
    assert lines[0][-4:-2] == ["-0.0058", "0.01"]
    assert "not measured" in table
    assert "&lt;i&gt;A&lt;/i&gt;" in table
    assert 'id="published"' not in page()


def test_long_history_is_thinned_in_the_table_and_the_page_says_so() -> None:
    html = page(history=history(1000))
    assert "200 of 1000 epochs" in Page(html).text
    assert len(html) < 300_000


@pytest.mark.parametrize(("epochs", "every"), [(1, 1), (200, 20), (300, 20), (301, 2)])
def test_the_table_of_a_long_history_has_the_validations_and_the_last_epoch(epochs: int, every: int) -> None:
    numbers = range(1, epochs + 1)
    measured = {number for number in numbers if number % every == 0}
    html = page(
        history=[{"epoch": n, **({"validation": {"map": 0.5}} if n in measured else {})} for n in numbers]
    )
    table = html[html.index('aria-label="Numbers by epoch"') :]
    shown = [
        int(number) for number in re.findall(r'<th scope="row">(\d+)</th>', table[: table.index("</table>")])
    ]
    assert shown == sorted(shown)
    assert len(shown) <= EPOCH_ROWS
    assert {*measured, epochs} <= set(shown)


def test_hits_are_framed_by_shared_label_and_say_their_distance() -> None:
    html = standard()
    classes = [a["class"] for a in Page(html).all("div") if (a.get("class") or "").startswith("shown")]
    assert classes == ["shown query", "shown right", "shown wrong", "shown right", "shown wrong"]
    text = Page(html).text
    assert "2 of 4 right" in text
    assert re.search(r"✕wrong,\s+3 bits\b", text)


def test_hits_of_unknown_relevance_are_neither_right_nor_wrong() -> None:
    asked = [Example(Shown(encoded(8), "q", []), [Shown(encoded(8), "h", [], "5 bits", None)])]
    html = page(examples=asked)
    assert "shown unknown" in html
    assert "of 0 right" not in html


def test_broken_and_missing_images_are_placeholders_with_their_ids() -> None:
    truncated = encoded(64, "JPEG")[:200]
    hits = [
        Shown(data, f"lost-{i}", ["a"], f"{i} bits", True)
        for i, data in enumerate((None, b"", b"text", truncated))
    ]
    html = page(examples=[Example(Shown(None, "lost-query", []), hits)])
    assert Page(html).all("img") == []
    for id_ in ("lost-0", "lost-1", "lost-2", "lost-3", "lost-query"):
        assert f'<span class="missing">no image<br>{id_}</span>' in html


def thumbnails(html: str) -> list[tuple[dict[str, str | None], Image.Image]]:
    found: list[tuple[dict[str, str | None], Image.Image]] = []
    for image in Page(html).all("img"):
        data = base64.b64decode((image["src"] or "").split(",", 1)[1])
        found.append((image, Image.open(io.BytesIO(data))))
    return found


def test_small_images_are_kept_to_the_pixel_and_enlarged_without_smoothing() -> None:
    original = encoded(32)
    [(attributes, thumbnail)] = thumbnails(page(examples=[Example(Shown(original, "q", []), [])]))
    assert attributes["class"] == "pixelated"
    np.testing.assert_array_equal(np.asarray(thumbnail), np.asarray(Image.open(io.BytesIO(original))))


def test_large_images_become_small_jpegs() -> None:
    [(attributes, thumbnail)] = thumbnails(page(examples=[Example(Shown(encoded(600), "q", []), [])]))
    assert "class" not in attributes
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (128, 128))


def test_page_stays_small_even_with_pictures_of_noise() -> None:
    image = encoded(300, "JPEG")
    asked = [Example(Shown(image, "q", ["a"]), [Shown(image, "h", ["a"], "1 bit", True)] * 10)] * 12
    html = page(examples=asked)
    assert len(html) < 1_500_000
    assert len(thumbnails(html)) == 132


def test_same_run_gives_the_same_page() -> None:
    assert page() == standard()


def test_file_names_that_are_no_valid_text_can_be_written() -> None:
    page(examples=[Example(Shown(None, "caf\udce9.png", []), [])]).encode()


def run_folder(path: Path) -> Folder:
    folder = Folder(path)
    folder.write_json("metrics.json", metrics())
    folder.write_json("timings.json", timings())
    folder.write_text("recipe.yaml", "name: night-7\nmethod: {bits: 48}\n")
    folder.write_text("history.jsonl", "".join(json.dumps(entry) + "\n" for entry in history()))
    return folder


def test_report_is_written_beside_the_run_and_named_by_its_recipe(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    place = write(folder, examples())
    assert place == str(tmp_path / "run" / "report.html")
    html = Path(place).read_text(encoding="utf-8")
    assert "<h1>night-7</h1>" in html
    assert headings(html) == ["Metrics", "Curves", "Example queries", "Data", "Time and versions", "Recipe"]
    assert folder.names() == ["history.jsonl", "metrics.json", "recipe.yaml", "report.html", "timings.json"]
    assert len(list((tmp_path / "run").iterdir())) == 5


def test_trainings_before_the_last_one_are_part_of_the_time(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / "stages/tuning").write_json("timings.json", {"stages": {"train": 7200.0}})
    (folder / "stages/attention").write_json("timings.json", {"stages": {"train": 60.0}})
    folder.write_text("recipe.yaml", "stages: [{name: tuning}, {name: attention}]")
    told = Page(Path(write(folder, [])).read_text(encoding="utf-8")).text
    assert 0 < told.index("train of tuning") < told.index("train of attention")
    assert told.count("3 h 04 min") == 1  # 7200 + 60 + 0.4 + 75 + 3700 s


def test_report_needs_nothing_but_the_metrics(tmp_path: Path) -> None:
    Folder(tmp_path / "bare").write_json(
        "metrics.json", {"selected": "last", "models": {"last": {**model(3, 0.5)}}}
    )
    html = Path(write(Folder(tmp_path / "bare"), [])).read_text(encoding="utf-8")
    assert "<h1>bare</h1>" in html
    assert headings(html) == ["Metrics", "Curves"]


@pytest.mark.parametrize("recipe", ["[1, 2", "- a\n- b\n", "bits: 48\n", ""])
def test_recipe_without_a_name_gives_the_folders_name(tmp_path: Path, recipe: str) -> None:
    folder = run_folder(tmp_path / "nightly")
    folder.write_text("recipe.yaml", recipe)
    assert "<h1>nightly</h1>" in Path(write(folder, [])).read_text(encoding="utf-8")


def test_missing_metrics_and_damaged_history_are_named_and_the_old_report_stays(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    before = Path(write(folder, [])).read_bytes()
    folder.write_text("history.jsonl", json.dumps(history()[0]) + '\n{"epoch": 2, "lo')
    with pytest.raises(ArtefactError, match=r"history\.jsonl: line 2 is not valid JSON"):
        write(folder, [])
    folder.remove("metrics.json")
    folder.remove("history.jsonl")
    with pytest.raises(ArtefactError, match=r"metrics\.json: the file is missing"):
        write(folder, [])
    assert (tmp_path / "report.html").read_bytes() == before
    assert folder.names() == ["recipe.yaml", "report.html", "timings.json"]


def test_interrupted_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path)
    before = Path(write(folder, [])).read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(folder, examples())
    assert (tmp_path / "report.html").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 5


def test_import_is_light() -> None:
    heavy = "{'torch', 'ray', 'matplotlib'}"
    program = (
        f"import sys, ray_retrieval.report, ray_retrieval.pictures; print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_what_a_method_observes_is_drawn() -> None:
    entries = [{**entry, "observed": {"memory_age": 3.5, "drift": 0.2}} for entry in history()]
    shown = page(history=entries)
    assert "Memory age" in shown
    assert "Drift" in shown
    assert "Memory age" not in page()
