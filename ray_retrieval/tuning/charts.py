"""Charts of a search as SVG that takes its colours from the page around it."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from markupsafe import Markup, escape

from ray_retrieval.charts import FONT_SIZE, Chart
from ray_retrieval.tuning.config import SIZES, Range, TuneConfig
from ray_retrieval.tuning.ledger import Trial

Objectives = dict[str, Literal["max", "min"]]

_WIDE, _NARROW = (720, 330), (380, 224)
_LETTERS = 20
"""Of a label; longer ones are cut in the middle."""
_HOLLOW = " Hollow: stopped or failed before the end."


def plain(value: Any) -> str:
    """A value of a field in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parallel_coordinates(
    config: TuneConfig, objectives: Objectives, trials: list[Trial], best: list[Trial]
) -> Chart | None:
    """A line for every trial across an axis for every field and objective; the best ones are drawn strong."""
    shown = [trial for trial in trials if trial.values is not None]
    if not shown:
        return None
    axes = [_Axis.of_field(key, values) for key, values in config.space.items()]
    axes += [_Axis.of_values(name, [t.values[name] for t in shown if t.values]) for name in objectives]
    width, height = _WIDE
    top, bottom, side = 34.0, height - 24.0, 62.0
    step = (width - 2 * side) / max(1, len(axes) - 1)
    drawing = _Drawing(width, height)
    winners = {trial.number for trial in best}
    ordered = sorted(shown, key=lambda trial: (trial.number in winners, trial.state == "finished"))
    for trial in ordered:
        places = [
            (side + step * number, bottom - (bottom - top) * axis.place(axis.value_of(trial)))
            for number, axis in enumerate(axes)
        ]
        if trial.number in winners:
            drawing.path(places, "var(--line-1)", width=2.6)
        else:
            dashed = trial.state != "finished"
            drawing.path(places, "var(--line-0)", width=1.4, opacity=0.55, dashed=dashed)
    for number, axis in enumerate(axes):
        x = side + step * number
        drawing.line(x, top, x, bottom, "var(--axis)")
        drawing.text(x, top - 18, cut(axis.label), "middle", strong=True)
        for place, label in axis.ticks():
            drawing.text(x + 5, bottom - (bottom - top) * place + 4, cut(label, 12), "start", halo=True)
    leader = best[0] if best else shown[0]
    chosen = ", ".join(f"{key} {plain(value)}" for key, value in leader.parameters.items())
    summary = f"{len(shown)} trials; the best one, {leader.name}, has {chosen}."
    note = "Strong: the best trial" + ("s, of which none is better in all. " if len(best) > 1 else ". ")
    note += "Dashed: stopped or failed before the end." if any(t.state != "finished" for t in shown) else ""
    return Chart("Trials across the space", drawing.svg(), summary, note=note.strip())


def progress_chart(name: str, mode: str, trials: list[Trial]) -> Chart | None:
    """The value of each trial, and the best so far."""
    points = [(float(t.number), t.values[name]) for t in trials if t.values is not None]
    if not points:
        return None
    better = max if mode == "max" else min
    hollow = _unfinished(trials)
    # The model that is kept is of a trial that came to its end, if one did.
    counted = [point for point, apart in zip(points, hollow, strict=True) if not apart] or points
    line: list[tuple[float, float]] = []
    so_far = counted[0][1]
    for x, y in counted:
        so_far = better(so_far, y)
        line += [(x, line[-1][1])] if line else []
        line.append((x, so_far))
    svg = _scatter(points, line, x_label="trial", hollow=hollow)
    summary = f"{name} from {points[0][1]:.4g} in the first trial to {so_far:.4g} at best."
    note = "The line is the best so far." + (_HOLLOW if any(hollow) else "")
    return Chart(f"{name} by trial", svg, summary, note=note)


def size_chart(key: str, name: str, mode: str, trials: list[Trial]) -> Chart | None:
    """The values of the trials by the size of their descriptors, with a line through the best of each size.

    Args:
        key: the dotted key of the size, `method.bits` or `method.dimension`.
        name: the objective.
        mode: whether more or less of it is better.
        trials: all; those that leave the size to the network are not shown.
    """
    trials = [trial for trial in trials if trial.parameters[key] is not None]
    points = [(float(t.parameters[key]), t.values[name]) for t in trials if t.values is not None]
    sizes = sorted({x for x, _ in points})
    if len(sizes) < 2:
        return None
    better = max if mode == "max" else min
    line = [(size, better(y for x, y in points if x == size)) for size in sizes]
    unit = key.rpartition(".")[2]
    summary = "; ".join(f"{size:g} {unit}: {value:.4g}" for size, value in line) + "."
    hollow = _unfinished(trials)
    svg = _scatter(points, line, x_label=unit, x_ticks=sizes, hollow=hollow)
    note = "The line joins the best trial of each size." + (_HOLLOW if any(hollow) else "")
    return Chart(f"{name} by {unit}", svg, summary, note=note)


def front_chart(objectives: Objectives, trials: list[Trial], best: list[Trial]) -> Chart | None:
    """Two objectives against each other; the line joins the trials of which no other is better in both."""
    if len(objectives) != 2:
        return None
    y_name, x_name = sorted(objectives, key=lambda name: name in SIZES)
    points = [(t.values[x_name], t.values[y_name]) for t in trials if t.values is not None]
    line = sorted((t.values[x_name], t.values[y_name]) for t in best if t.values is not None)
    if not line:
        return None
    summary = "Pareto front: " + "; ".join(f"{x_name} {x:.4g} {y_name} {y:.4g}" for x, y in line) + "."
    svg = _scatter(points, line, x_label=x_name)
    note = "The line joins the trials of which no other is better in both."
    return Chart(f"{y_name} against {x_name}", svg, summary, note=note)


def importance_chart(shares: dict[str, float], by: str) -> Chart:
    """A bar for each field."""
    width, row = _NARROW[0], 26
    drawing = _Drawing(width, row * len(shares) + 8)
    largest = max([*shares.values(), 1e-12])
    for number, (key, share) in enumerate(shares.items()):
        y = 4 + row * number
        drawing.text(0, y + 16, cut(short(key, shares)), "start")
        drawing.rectangle(132, y + 4, max(1.0, 190 * share / largest), row - 10, "var(--line-0)")
        drawing.text(132 + max(1.0, 190 * share / largest) + 6, y + 16, f"{share:.2f}", "start")
    summary = "; ".join(f"{key} {share:.2f}" for key, share in shares.items()) + "."
    return Chart("What mattered", drawing.svg(), summary, note=f"{by}.")


def short(key: str, others: Sequence[str] | dict[str, Any]) -> str:
    """The last part of a dotted key, where no other key ends alike; else all of it."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in others) == 1 else key


def cut(text: str, letters: int = _LETTERS) -> str:
    """A label without its middle, where it is too long."""
    if len(text) <= letters:
        return text
    return f"{text[: letters // 2 - 1]}…{text[-(letters // 2) :]}"


class _Axis:
    """One axis of the parallel coordinates."""

    def __init__(
        self,
        key: str,
        label: str,
        *,
        low: float,
        high: float,
        logarithmic: bool,
        listed: tuple[Any, ...] | None,
    ) -> None:
        self.key, self.label, self.listed = key, label, listed
        self._logarithmic = logarithmic
        self._low, self._high = low, high

    @staticmethod
    def of_field(key: str, values: Range) -> "_Axis":
        label = key.rpartition(".")[2]
        if values.listed is not None:
            return _Axis(key, label, low=0, high=1, logarithmic=False, listed=values.listed)
        assert values.bounds is not None
        low, high = values.bounds
        return _Axis(key, label, low=low, high=high, logarithmic=values.logarithmic, listed=None)

    @staticmethod
    def of_values(name: str, values: list[float]) -> "_Axis":
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5, high + 0.5
        return _Axis("", name, low=low, high=high, logarithmic=False, listed=None)

    def value_of(self, trial: Trial) -> Any:
        return trial.parameters[self.key] if self.key else (trial.values or {})[self.label]

    def place(self, value: Any) -> float:
        """Where a value stands, from 0 at the bottom to 1."""
        if self.listed is not None:
            return (self.listed.index(value) + 0.5) / len(self.listed)
        if self._logarithmic:
            return math.log(value / self._low) / math.log(self._high / self._low)
        return float((value - self._low) / (self._high - self._low))

    def ticks(self) -> list[tuple[float, str]]:
        if self.listed is not None:
            every = math.ceil(len(self.listed) / 10)
            return [(self.place(value), plain(value)) for value in self.listed[::every]]
        middle = math.sqrt(self._low * self._high) if self._logarithmic else (self._low + self._high) / 2
        return [(self.place(value), plain(float(value))) for value in (self._low, middle, self._high)]


def _unfinished(trials: list[Trial]) -> list[bool]:
    """Of the trials that have a value, which have not come to their end."""
    return [trial.state != "finished" for trial in trials if trial.values is not None]


def _scatter(
    points: Sequence[tuple[float, float]],
    line: Sequence[tuple[float, float]],
    *,
    x_label: str,
    x_ticks: Sequence[float] | None = None,
    hollow: Sequence[bool] = (),
) -> Markup:
    """Points with a line, x at the bottom; `hollow` says which points are, and is empty where none is."""
    width, height = _NARROW
    left, right, top, bottom = 52.0, width - 12.0, 10.0, height - 38.0
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = _padded(min(xs), max(xs))
    y_low, y_high = _padded(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * (x - x_low) / (x_high - x_low),
            bottom - (bottom - top) * (y - y_low) / (y_high - y_low),
        )

    drawing = _Drawing(width, height)
    for value in _round_ticks(y_low, y_high):
        y = at(x_low, value)[1]
        drawing.line(left, y, right, y, "var(--rule)")
        drawing.text(left - 6, y + 4, f"{value:.4g}", "end")
    drawing.line(left, bottom, right, bottom, "var(--axis)")
    whole = all(float(x).is_integer() for x in xs)
    ticks = x_ticks or [tick for tick in _round_ticks(x_low, x_high) if not whole or tick.is_integer()]
    for value in ticks:
        drawing.text(at(value, y_low)[0], bottom + 15, f"{value:.4g}", "middle")
    drawing.text((left + right) / 2, height - 6, x_label, "middle")
    drawing.path([at(*point) for point in line], "var(--line-1)", width=2)
    for number, (x, y) in enumerate(points):
        drawing.dot(*at(x, y), "var(--line-0)", hollow=bool(hollow) and hollow[number])
    return drawing.svg()


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def _round_ticks(low: float, high: float) -> list[float]:
    """About four round numbers in a span."""
    raw = (high - low) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(size - raw))
    first = math.ceil(low / step)
    return [float(f"{(first + number) * step:.12g}") for number in range(int(high / step) - first + 1)]


class _Drawing:
    """An SVG under construction; text is escaped."""

    def __init__(self, width: float, height: float) -> None:
        self._size = (width, height)
        self._parts: list[Markup] = []

    def path(
        self,
        places: Sequence[tuple[float, float]],
        colour: str,
        *,
        width: float,
        opacity: float = 1,
        dashed: bool = False,
    ) -> None:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = Markup(' stroke-dasharray="5 3"') if dashed else Markup("")
        self._parts.append(
            Markup(
                '<polyline points="{}" fill="none" stroke="{}" stroke-width="{}" stroke-opacity="{}"{}/>'
            ).format(points, colour, width, opacity, dashes)
        )

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: str) -> None:
        self.path([(x, y), (to_x, to_y)], colour, width=1)

    def dot(self, x: float, y: float, colour: str, *, hollow: bool) -> None:
        fill = "var(--paper)" if hollow else colour
        self._parts.append(
            Markup(
                '<circle cx="{:.1f}" cy="{:.1f}" r="3.4" fill="{}" stroke="{}" stroke-width="1.4"/>'
            ).format(x, y, fill, colour)
        )

    def rectangle(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._parts.append(
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2" fill="{}"/>').format(
                x, y, width, height, colour
            )
        )

    def text(
        self, x: float, y: float, text: str, anchor: str, *, strong: bool = False, halo: bool = False
    ) -> None:
        fill, weight = ("var(--ink)", 600) if strong else ("var(--faint)", 400)
        around = (
            Markup(' paint-order="stroke" stroke="var(--paper)" stroke-width="3"') if halo else Markup("")
        )
        self._parts.append(
            Markup(
                '<text x="{:.1f}" y="{:.1f}" text-anchor="{}" font-size="{}" '
                'font-weight="{}" fill="{}"{}>{}</text>'
            ).format(x, y, anchor, FONT_SIZE, weight, fill, around, escape(text))
        )

    def svg(self) -> Markup:
        width, height = self._size
        return Markup('<svg viewBox="0 0 {} {}" aria-hidden="true">{}</svg>').format(
            width, height, Markup("").join(self._parts)
        )
