"""The report of a run: one HTML page with its curves, numbers and example queries, whole in itself."""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from PIL import Image

from ray_retrieval.errors import ArtefactError
from ray_retrieval.pictures import SMALL, Example, Shown, opened
from ray_retrieval.storage import Folder

__all__ = ["Example", "Shown", "render", "write"]

PICTURE_BYTES = 1_000_000
"""What all thumbnails together may take, encoded, so that the page can be sent by mail."""
THUMBNAILS = ((128, 85), (112, 78), (96, 72), (80, 65), (64, 60), (48, 50))
"""Sides in pixels and JPEG qualities, tried in this order until the thumbnails fit."""
EPOCH_ROWS = 200
"""Rows of the table of epochs; a longer history is thinned evenly."""
FEW = 12
"""Up to this many epochs each gets a marker, or a single one would not be seen."""
FONT_SIZE = 11.5
"""Of the charts, in their own units: 11 to 15 pixels on the page, by its width."""
COLOURS = 6
"""Line colours that the style sheet names, as --line-0 and so on."""

MODEL_LABELS = {"best": "Best on validation", "last": "Last"}


@dataclass(frozen=True)
class Line:
    """One line of a chart; `x` and `y` are of equal length, values that are not finite leave a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dots: Sequence[int] = ()
    """Positions that are drawn as a dot."""


@dataclass(frozen=True)
class Chart:
    """A chart as the page shows it; the legend is text of the page, so that it is escaped and legible."""

    title: str
    svg: Markup
    summary: str
    legend: list[str] = field(default_factory=list)
    note: str = ""


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
    template = _environment().get_template("report.html")
    page = template.render(
        name=name,
        dataset=metrics.get("dataset") or {},
        models=models,
        selected=next((model for model in models if model.selected), None),
        test_rows=_test_rows(models),
        validation_rows=_validation_rows(models),
        metric_notes=_metric_notes(models),
        charts=_charts(history, models),
        line_colours=COLOURS,
        history=history[:: max(1, math.ceil(len(history) / EPOCH_ROWS))],
        epochs=len(history),
        validation_names=_names(entry.get("validation") for entry in history),
        speed=_mean([entry.get("images_per_second") for entry in history]),
        diverged=[entry["epoch"] for entry in history if not math.isfinite(_number(entry.get("loss", 0)))],
        examples=_with_thumbnails(examples),
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
    page = render(
        name=_run_name(recipe_text) or run.path.rsplit("/", 1)[-1],
        recipe_text=recipe_text,
        history=_read_history(run),
        metrics=run.read_json("metrics.json"),
        timings=run.read_json("timings.json") if run.exists("timings.json") else {},
        examples=examples,
    )
    run.write_text("report.html", page)
    return str(run / "report.html")


def _run_name(recipe_text: str) -> str:
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError:
        return ""
    return str(recipe.get("name") or "") if isinstance(recipe, dict) else ""


def _read_history(run: Folder) -> list[dict[str, Any]]:
    if not run.exists("history.jsonl"):
        return []
    entries = []
    for number, line in enumerate(run.read_bytes("history.jsonl").decode().splitlines(), start=1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise ArtefactError(
                    f"line {number} is not valid JSON: {error}",
                    where=f"{run}/history.jsonl",
                    mend="remove the line",
                ) from None
    return entries


def _epochs(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The history in order, one entry per epoch: what a resumed run did again counts as it ended."""
    by_epoch = {int(entry["epoch"]): entry for entry in history}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


# Numbers


def _models(metrics: dict[str, Any]) -> list[Model]:
    models = metrics.get("models") or {}
    chosen = metrics.get("selected") if metrics.get("selected") in models else next(iter(models), None)
    return [
        Model(
            label=MODEL_LABELS.get(key, key),
            selected=key == chosen,
            epoch=model.get("epoch"),
            test={metric["name"]: metric for metric in model.get("test") or []},
            validation=model.get("validation") or {},
            pr_curve=model.get("pr_curve") or {},
            notes=model.get("notes") or [],
        )
        for key, model in models.items()
    ]


def _test_rows(models: list[Model]) -> list[Row]:
    rows = []
    for name in _names(model.test for model in models):
        found = [(model, model.test[name]) for model in models if name in model.test]
        policies = list(dict.fromkeys(str(metric.get("policy", "")) for _, metric in found))
        if len(policies) > 1:
            policies = [f"{model.label}: {metric.get('policy', '')}" for model, metric in found]
        rows.append(Row(name, [model.test.get(name, {}).get("value") for model in models], policies))
    return rows


def _validation_rows(models: list[Model]) -> list[Row]:
    names = _names(model.validation for model in models)
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
    stages = [(name, _number(seconds)) for name, seconds in (timings.get("stages") or {}).items()]
    timed = [(name, seconds) for name, seconds in stages if math.isfinite(seconds)]
    total = sum(seconds for _, seconds in timed) or 1.0
    return [(name, seconds, seconds / total) for name, seconds in timed]


def _names(mappings: Any) -> list[str]:
    """All keys of the mappings, each once, in the order met."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping or {}))


def _number(value: Any) -> float:
    """A float; what is undefined (None, or no number) is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _mean(values: list[Any]) -> float | None:
    finite = [number for number in map(_number, values) if math.isfinite(number)]
    return sum(finite) / len(finite) if finite else None


# Charts


def _charts(history: list[dict[str, Any]], models: list[Model]) -> list[Chart]:
    found = (
        _loss_chart(history),
        _validation_chart(history, models),
        _pr_chart(models),
        _rate_chart(history),
    )
    return [chart for chart in found if chart is not None]


def _loss_chart(history: list[dict[str, Any]]) -> Chart | None:
    total = _over_epochs(history, "loss")
    if total is None:
        return None
    terms = [_over_epochs(history, name, "terms") for name in _names(entry.get("terms") for entry in history)]
    # A single term is the loss itself.
    lines = [total] + [term for term in terms if term is not None and len(terms) > 1]
    title = "Training loss"
    legend = [line.label for line in lines] if len(lines) > 1 else []
    return Chart(title, _draw(title, lines, epochs=_span(history)), _trend(total), legend)


def _validation_chart(history: list[dict[str, Any]], models: list[Model]) -> Chart | None:
    chosen = next((model.epoch for model in models if model.selected), None)
    lines = []
    for name in _names(entry.get("validation") for entry in history):
        line = _over_epochs(history, name, "validation")
        if line is not None:
            dots = [i for i, x in enumerate(line.x) if x == chosen and math.isfinite(line.y[i])]
            lines.append(Line(name, line.x, line.y, dots))
    if not lines:
        return None
    title = "Validation"
    note = f"The dot is the selected model, epoch {chosen}." if any(line.dots for line in lines) else ""
    svg = _draw(title, lines, epochs=_span(history))
    return Chart(title, svg, _trend(lines[0]), [line.label for line in lines], note)


def _rate_chart(history: list[dict[str, Any]]) -> Chart | None:
    line = _over_epochs(history, "lr")
    if line is None:
        return None
    title = "Learning rate"
    return Chart(title, _draw(title, [line], epochs=_span(history), from_zero=True), _trend(line))


def _pr_chart(models: list[Model]) -> Chart | None:
    # The selected model first: it takes the first colour and the full stroke.
    ordered = sorted(models, key=lambda model: not model.selected)
    lines = [line for line in map(_pr_line, ordered) if line is not None]
    if not lines:
        return None
    title = "Precision and recall"
    first = lines[0]
    summary = (
        f"{first.label}: precision {first.y[0]:.3f} at recall {first.x[0]:.3f}, "
        f"precision {first.y[-1]:.3f} at recall {first.x[-1]:.3f}."
    )
    note = "One point per Hamming radius, mean over the test queries"
    note += "; the dot is radius 2." if first.dots else "."
    return Chart(title, _draw(title, lines, epochs=None), summary, [line.label for line in lines], note)


def _pr_line(model: Model) -> Line | None:
    """Precision over recall where both are defined; the dot marks radius 2, as papers report it."""
    curve = model.pr_curve
    recalls = [_number(value) for value in curve.get("recall") or []]
    precisions = [_number(value) for value in curve.get("precision") or []]
    radii = curve.get("radius") or range(len(recalls))
    points = [
        point
        for point in zip(recalls, precisions, radii, strict=False)
        if math.isfinite(point[0]) and math.isfinite(point[1])
    ]
    if not points:
        return None
    dots = [place for place, point in enumerate(points) if model.selected and point[2] == 2]
    return Line(model.label, [point[0] for point in points], [point[1] for point in points], dots)


def _over_epochs(history: list[dict[str, Any]], key: str, group: str | None = None) -> Line | None:
    """A value of the epochs that have it, or one of a group of values; None where none is finite."""
    pairs = []
    for entry in history:
        value = ((entry.get(group) or {}) if group else entry).get(key)
        if value is not None:
            pairs.append((entry["epoch"], _number(value)))
    if not any(math.isfinite(y) for _, y in pairs):
        return None
    return Line(key, [x for x, _ in pairs], [y for _, y in pairs])


def _trend(line: Line) -> str:
    """What the line shows, in a sentence, for those who cannot see it."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    telling = {
        "first": points[0],
        "last": points[-1],
        "lowest": min(points, key=lambda point: point[1]),
        "highest": max(points, key=lambda point: point[1]),
    }
    parts = [f"{which} {y:.4g} in epoch {x:g}" for which, (x, y) in telling.items()]
    return f"{line.label}: {', '.join(parts)}."


def _draw(
    title: str, lines: list[Line], *, epochs: tuple[int, int] | None, from_zero: bool = False
) -> Markup:
    """The lines as SVG whose colours and fonts are those of the page around it.

    Args:
        title: sets the ids inside the SVG, which have to differ between the charts of a page.
        lines: at least one; the first is drawn strongest and on top.
        epochs: first and last epoch of the horizontal axis; None for precision over recall.
        from_zero: the vertical axis begins at 0.
    """
    # Not at the top: matplotlib takes most of a second, and the command line imports this module.
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # No text of the user goes in here, because matplotlib would read `$` as mathematics.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure = Figure(figsize=(380 / 72, 224 / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        for number, line in reversed(list(enumerate(lines))):
            y = [value if math.isfinite(value) else math.nan for value in line.y]
            colour, stroke = _placeholder(number), ("-", (0, (5, 2)), (0, (1.5, 1.5)))[number % 3]
            marker = "o" if epochs and len(y) <= FEW else ""
            width = 2.2 if number == 0 else 1.6
            axes.plot(
                line.x, y, color=colour, linestyle=stroke, linewidth=width, marker=marker, markersize=3.5
            )
            for i in line.dots:
                axes.plot(line.x[i], y[i], color=colour, marker="o", markersize=8)

        if epochs:
            room = max(0.5, 0.02 * (epochs[1] - epochs[0]))
            axes.set(xlim=(epochs[0] - room, epochs[1] + room), xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(5))
        else:
            axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y" if epochs else "both", color=_RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.spines["bottom"].set_color(_AXIS)
        axes.tick_params(length=0, pad=4, labelsize=FONT_SIZE, labelcolor=_TEXT)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
            axis.label.set(fontsize=FONT_SIZE, color=_TEXT)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(drawn.getvalue().decode())


def _span(history: list[dict[str, Any]]) -> tuple[int, int]:
    return history[0]["epoch"], history[-1]["epoch"]


_RULE, _AXIS, _TEXT = "#0b0001", "#0b0002", "#0b0003"
"""Colours that stand for the page's own until the drawing is done, because matplotlib knows no variables."""


def _placeholder(line: int) -> str:
    return f"#0a000{line % COLOURS + 1}"


def _embedded(svg: str) -> Markup:
    """An SVG file as part of an HTML page: no prologue, no foreign ids, the page's colours."""
    svg = svg[svg.index("<svg") :]
    # Its style element would hold for the whole page; the page's own style sheet says the same for charts.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"#0a000(\d)", lambda match: f"var(--line-{int(match[1]) - 1})", svg)
    for colour, name in ((_RULE, "rule"), (_AXIS, "axis"), (_TEXT, "faint")):
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(re.sub(r">\s+<", "><", svg))


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


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ray_retrieval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(score=_score, duration=_duration, count=_count, plain=_plain)
    return environment


def _score(value: Any) -> str:
    number = _number(value)
    return f"{number:.4f}" if math.isfinite(number) else "undefined"


def _plain(value: Any) -> str:
    """A number of any size, in few digits."""
    return "" if value is None else f"{_number(value):.5g}"


def _count(value: Any) -> str:
    number = _number(value)
    return f"{number:,.0f}" if math.isfinite(number) else "unknown"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
