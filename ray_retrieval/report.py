"""The report of a run: one HTML page with its curves, numbers and example queries, whole in itself."""

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml
from PIL import Image

from ray_retrieval.charts import (
    COLOURS,
    Chart,
    as_number,
    loss_chart,
    names_in,
    observed_charts,
    pr_chart,
    pr_line,
    rate_chart,
    validation_chart,
)
from ray_retrieval.history import read_history
from ray_retrieval.pictures import SMALL, Example, Shown, opened
from ray_retrieval.storage import Folder

PICTURE_BYTES = 1_000_000
"""What all thumbnails together may take, encoded, so that the page can be sent by mail."""
THUMBNAILS = ((128, 85), (112, 78), (96, 72), (80, 65), (64, 60), (48, 50))
"""Sides in pixels and JPEG qualities, tried in this order until the thumbnails fit."""
EPOCH_ROWS = 200
"""Rows of the table of epochs, at most; a longer history is thinned."""

MODEL_LABELS = {"best": "Best on validation", "last": "Last"}


@dataclass(frozen=True)
class Model:
    """One trained model of the run with its numbers."""

    label: str
    selected: bool
    epoch: int | None
    test: dict[str, dict[str, Any]]
    """Metrics by name, each with its `value` and `policy`."""
    validation: dict[str, Any]
    pr_curve: dict[str, Any]
    notes: list[str]
    """What a reader of the numbers has to know."""


@dataclass(frozen=True)
class Row:
    """A metric: its value for every model, and its policy, several where the models' differ."""

    name: str
    values: list[Any]
    policies: list[str]


def render(
    *,
    name: str,
    recipe_text: str,
    history: list[dict[str, Any]],
    metrics: dict[str, Any],
    timings: dict[str, Any],
    examples: list[Example],
) -> str:
    """The page as HTML; what is empty or missing has no section.

    Args:
        name: of the run, the title of the page.
        recipe_text: the resolved recipe as it was written.
        history: one entry per epoch, as in `history.jsonl`.
        metrics: the content of `metrics.json`.
        timings: the content of `timings.json`.
        examples: queries with their hits, nearest first.
    """
    history = _epochs(history)
    models = _models(metrics)
    template = environment().get_template("report.html")
    page = template.render(
        name=name,
        dataset=metrics.get("dataset") or {},
        models=models,
        selected=next((model for model in models if model.selected), None),
        test_rows=_test_rows(models),
        validation_rows=_validation_rows(models),
        metric_notes=_metric_notes(models),
        published=metrics.get("published") or [],
        charts=_charts(history, models),
        line_colours=COLOURS,
        history=_thinned(history),
        epochs=len(history),
        validation_names=names_in(entry.get("validation") for entry in history),
        speed=_mean([entry.get("images_per_second") for entry in history]),
        diverged=[entry["epoch"] for entry in history if not math.isfinite(as_number(entry.get("loss", 0)))],
        examples=_with_thumbnails(examples),
        unjudged=any(hit.right is None for example in examples for hit in example.hits),
        recipe=recipe_text.strip("\n"),
        stages=_stages(timings),
        total_seconds=sum(seconds for _, seconds, _ in _stages(timings)),
        versions=timings.get("versions") or {},
        machine=timings.get("machine") or "",
    )
    # A file name that is no valid text reaches us as lone surrogates, which no file can hold.
    return page.encode("utf-8", "replace").decode()


def write(run: Folder, examples: list[Example]) -> str:
    """Write `report.html` into a run's folder from what the run left there; returns its URI.

    The page is called what the recipe calls the run, else like the folder.

    Raises:
        ArtefactError: if `metrics.json` is missing, or a file of the run cannot be read.
    """
    recipe_text = run.read_bytes("recipe.yaml").decode() if run.exists("recipe.yaml") else ""
    recipe = _values_of(recipe_text)
    page = render(
        name=str(recipe.get("name") or "") or run.path.rsplit("/", 1)[-1],
        recipe_text=recipe_text,
        history=read_history(run),
        metrics=run.read_json("metrics.json"),
        timings=_read_timings(run, recipe.get("stages") or []),
        examples=examples,
    )
    run.write_text("report.html", page)
    return str(run / "report.html")


def _values_of(recipe_text: str) -> dict[str, Any]:
    """What a recipe says; nothing where it is none."""
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _read_timings(run: Folder, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """What the run took, and before it the trainings that its own goes on from, in their order."""
    timings: dict[str, Any] = run.read_json("timings.json") if run.exists("timings.json") else {}
    earlier = {}
    for training in (stage["name"] for stage in stages):
        folder = run / f"stages/{training}"
        if folder.exists("timings.json"):
            for stage, seconds in (folder.read_json("timings.json").get("stages") or {}).items():
                earlier[f"{stage} of {training}"] = seconds
    return {**timings, "stages": earlier | (timings.get("stages") or {})}


def _epochs(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The history in order, one entry per epoch: what a resumed run did again counts as it ended."""
    by_epoch = {int(entry["epoch"]): entry for entry in history}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`EPOCH_ROWS` entries at most, in order: the last one and those with a validation before others."""
    last = len(history) - 1
    first = [place for place, entry in enumerate(history) if entry.get("validation") or place == last]
    others = sorted(set(range(len(history))) - set(first))
    kept = _evenly(first, EPOCH_ROWS)
    kept += _evenly(others, EPOCH_ROWS - len(kept))
    return [history[place] for place in sorted(kept)]


def _evenly(places: list[int], most: int) -> list[int]:
    """At most so many of some places, evenly spaced from the last one back."""
    count = min(len(places), most)
    return [places[-1 - number * len(places) // count] for number in range(count)]


# Numbers


def _models(metrics: dict[str, Any]) -> list[Model]:
    models = metrics.get("models") or {}
    chosen = metrics.get("selected") if metrics.get("selected") in models else next(iter(models), None)
    return [
        Model(
            label=MODEL_LABELS.get(key if key != "best" or _validated(model) else "last", key),
            selected=key == chosen,
            epoch=model.get("epoch"),
            test={metric["name"]: metric for metric in model.get("test") or []},
            validation=_validated(model),
            pr_curve=model.get("pr_curve") or {},
            notes=model.get("notes") or [],
        )
        for key, model in models.items()
    ]


def _validated(model: dict[str, Any]) -> dict[str, Any]:
    """What was measured on validation queries; nothing without any, where the best model is the last one."""
    measured = model.get("validation") or {}
    return {name: value for name, value in measured.items() if value is not None}


def _test_rows(models: list[Model]) -> list[Row]:
    rows = []
    for name in names_in(model.test for model in models):
        found = [(model, model.test[name]) for model in models if name in model.test]
        policies = list(dict.fromkeys(str(metric.get("policy", "")) for _, metric in found))
        if len(policies) > 1:
            policies = [f"{model.label}: {metric.get('policy', '')}" for model, metric in found]
        rows.append(Row(name, [model.test.get(name, {}).get("value") for model in models], policies))
    return rows


def _validation_rows(models: list[Model]) -> list[Row]:
    names = names_in(model.validation for model in models)
    return [Row(name, [model.validation.get(name) for model in models], []) for name in names]


def _metric_notes(models: list[Model]) -> list[str]:
    """The notes on the numbers, each once, with the model that it is about where it is not about all."""
    notes = []
    for note in dict.fromkeys(note for model in models for note in model.notes):
        concerned = [model.label for model in models if note in model.notes]
        notes.append(note if len(concerned) == len(models) else f"{', '.join(concerned)}: {note}")
    return notes


def _stages(timings: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Name, seconds and share (0…1) of each stage that was timed."""
    stages = [(name, as_number(seconds)) for name, seconds in (timings.get("stages") or {}).items()]
    timed = [(name, seconds) for name, seconds in stages if math.isfinite(seconds)]
    total = sum(seconds for _, seconds in timed) or 1.0
    return [(name, seconds, seconds / total) for name, seconds in timed]


def _mean(values: list[Any]) -> float | None:
    finite = [number for number in map(as_number, values) if math.isfinite(number)]
    return sum(finite) / len(finite) if finite else None


def _charts(history: list[dict[str, Any]], models: list[Model]) -> list[Chart]:
    chosen = next((model.epoch for model in models if model.selected), None)
    # The selected model first: it takes the first colour and the full stroke.
    ordered = sorted(models, key=lambda model: not model.selected)
    curves = [pr_line(model.label, model.pr_curve, mark=model.selected) for model in ordered]
    found = (
        loss_chart(history),
        validation_chart(history, chosen),
        pr_chart([curve for curve in curves if curve is not None]),
        rate_chart(history),
        *observed_charts(history),
    )
    return [chart for chart in found if chart is not None]


# Examples


def _with_thumbnails(examples: list[Example]) -> list[dict[str, Any]]:
    """The examples as the template shows them, their thumbnails as large as the page may carry."""
    everything = [shown for example in examples for shown in (example.query, *example.hits)]
    # Hits repeat between queries: each file is opened once.
    images = {shown.image: opened(shown.image, THUMBNAILS[0][0]) for shown in everything if shown.image}
    for side, quality in THUMBNAILS:
        uris = {data: _data_uri(image, side, quality) for data, image in images.items() if image is not None}
        if sum(len(uris.get(shown.image or b"", "")) for shown in everything) <= PICTURE_BYTES:
            break

    def view(shown: Shown) -> dict[str, Any]:
        image = images.get(shown.image or b"")
        return {
            "shown": shown,
            "uri": uris.get(shown.image or b""),
            "small": image is not None and max(image.size) <= SMALL,
            "labels": ", ".join(shown.labels),
        }

    return [
        {
            "query": view(example.query),
            "hits": [view(hit) for hit in example.hits],
            "judged": sum(hit.right is not None for hit in example.hits),
            "right": sum(bool(hit.right) for hit in example.hits),
        }
        for example in examples
    ]


def _data_uri(image: Image.Image, side: int, quality: int) -> str:
    encoded = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(encoded, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(encoded, "JPEG", quality=quality, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"


# Words


def environment() -> jinja2.Environment:
    """Where the pages of results are rendered: templates with the filters that show numbers."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("ray_retrieval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(score=_score, duration=_duration, count=_count, plain=_plain)
    return made


def _score(value: Any) -> str:
    number = as_number(value)
    return f"{number:.4f}" if math.isfinite(number) else "undefined"


def _plain(value: Any) -> str:
    """A number of any size, in few digits."""
    return "" if value is None else f"{as_number(value):.5g}"


def _count(value: Any) -> str:
    number = as_number(value)
    return f"{number:,.0f}" if math.isfinite(number) else "unknown"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
