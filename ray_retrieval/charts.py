"""Curves of a training and of a measurement, drawn as SVG that takes its colours from the page around it."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

FEW = 12
"""Up to this many epochs each gets a marker, or a single one would not be seen."""
FONT_SIZE = 11.5
"""Of the charts, in their own units: 11 to 15 pixels on the page, by its width."""
COLOURS = 6
"""Line colours that the style sheet names, as --line-0 and so on."""


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


def loss_chart(history: list[dict[str, Any]]) -> Chart | None:
    """The loss and its terms over the epochs."""
    total = _over_epochs(history, "loss")
    if total is None:
        return None
    terms = [
        _over_epochs(history, name, "terms") for name in names_in(entry.get("terms") for entry in history)
    ]
    # A single term is the loss itself.
    lines = [total] + [term for term in terms if term is not None and len(terms) > 1]
    title = "Training loss"
    legend = [line.label for line in lines] if len(lines) > 1 else []
    return Chart(title, _draw(title, lines, epochs=_span(history)), _trend(total), legend)


def validation_chart(history: list[dict[str, Any]], chosen: int | None) -> Chart | None:
    """The validation metrics over the epochs; a dot marks the epoch that was chosen."""
    lines = []
    for name in names_in(entry.get("validation") for entry in history):
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


def observed_charts(history: list[dict[str, Any]]) -> list[Chart]:
    """What the method observed over the epochs, such as its memory's drift; each on a scale of its own."""
    charts = []
    for name in names_in(entry.get("observed") for entry in history):
        line = _over_epochs(history, name, "observed")
        if line is not None:
            title = name.replace("_", " ").capitalize()
            drawn = _draw(title, [line], epochs=_span(history), from_zero=True)
            charts.append(Chart(title, drawn, _trend(line)))
    return charts


def rate_chart(history: list[dict[str, Any]]) -> Chart | None:
    """The learning rate over the epochs."""
    line = _over_epochs(history, "lr")
    if line is None:
        return None
    title = "Learning rate"
    return Chart(title, _draw(title, [line], epochs=_span(history), from_zero=True), _trend(line))


def pr_chart(lines: list[Line], *, wide: bool = False) -> Chart | None:
    """Precision over recall; the first line is drawn strongest."""
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
    svg = _draw(title, lines, epochs=None, wide=wide)
    return Chart(title, svg, summary, [line.label for line in lines], note)


def pr_figure(lines: list[Line], kind: str) -> bytes:
    """Precision over recall with a legend, for a paper or a slide.

    Args:
        lines: at least one; the dots on them are radius 2.
        kind: `svg`, `png` or `pdf`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "figure"}):
        figure = Figure(figsize=(6.4, 4.4), dpi=200, layout="constrained")
        axes = figure.add_subplot()
        for number, line in enumerate(lines):
            colour, stroke = _PRINTED[number % COLOURS], _STROKES[stroke_of(number)]
            axes.plot(line.x, line.y, color=colour, linestyle=stroke, linewidth=1.8, label=str(number))
            for i in line.dots:
                axes.plot(line.x[i], line.y[i], color=colour, marker="o", markersize=5)
        axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        axes.grid(color="#e1e5ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["right", "top"]].set_visible(False)
        legend = axes.legend(fontsize=8, frameon=False)
        for text, line in zip(legend.get_texts(), lines, strict=True):
            text.set_parse_math(False)  # a `$` in a name is a dollar
            text.set_text(line.label)
        drawn = io.BytesIO()
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a letter that the font lacks is drawn as a box
            figure.savefig(drawn, format=kind, metadata=undated)
    return drawn.getvalue()


def pr_line(label: str, curve: dict[str, Any], *, mark: bool) -> Line | None:
    """Precision over recall where both are defined; the dot marks radius 2, as papers report it."""
    recalls = [as_number(value) for value in curve.get("recall") or []]
    precisions = [as_number(value) for value in curve.get("precision") or []]
    radii = curve.get("radius") or range(len(recalls))
    points = [
        point
        for point in zip(recalls, precisions, radii, strict=False)
        if math.isfinite(point[0]) and math.isfinite(point[1])
    ]
    if not points:
        return None
    dots = [place for place, point in enumerate(points) if mark and point[2] == 2]
    return Line(label, [point[0] for point in points], [point[1] for point in points], dots)


def _over_epochs(history: list[dict[str, Any]], key: str, group: str | None = None) -> Line | None:
    """A value of the epochs that have it, or one of a group of values; None where none is finite."""
    pairs = []
    for entry in history:
        value = ((entry.get(group) or {}) if group else entry).get(key)
        if value is not None:
            pairs.append((entry["epoch"], as_number(value)))
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
    title: str,
    lines: list[Line],
    *,
    epochs: tuple[int, int] | None,
    from_zero: bool = False,
    wide: bool = False,
) -> Markup:
    """The lines as SVG whose colours and fonts are those of the page around it.

    Args:
        title: sets the ids inside the SVG, which have to differ between the charts of a page.
        lines: at least one; the first is drawn strongest and on top.
        epochs: first and last epoch of the horizontal axis; None for precision over recall.
        from_zero: the vertical axis begins at 0.
        wide: for a chart that has the page's whole width.
    """
    # Not at the top: matplotlib takes most of a second, and the command line imports this module.
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # No text of the user goes in here, because matplotlib would read `$` as mathematics.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        size = (720, 360) if wide else (380, 224)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        for number, line in reversed(list(enumerate(lines))):
            y = [value if math.isfinite(value) else math.nan for value in line.y]
            colour = _placeholder(number)
            stroke = _STROKES[stroke_of(number)]
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


_PRINTED = ("#0067b3", "#c14f00", "#00795a", "#9a3f86", "#6a6a00", "#57606a")
"""The page's colours on white paper."""
_STROKES = {"solid": "-", "dashed": (0, (5, 2)), "dotted": (0, (1.5, 1.5))}


def stroke_of(line: int) -> str:
    """How a line is drawn, in the words of a style sheet; a colour that comes again has another stroke."""
    return list(_STROKES)[(line + line // COLOURS) % 3]


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


def names_in(mappings: Any) -> list[str]:
    """All keys of the mappings, each once, in the order met."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping or {}))


def as_number(value: Any) -> float:
    """A float; what is undefined (None, or no number) is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
