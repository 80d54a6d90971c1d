"""A comparison of runs as a page, whole in itself, and as a figure."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

from ray_retrieval.charts import COLOURS, Line, names_in, pr_chart, pr_figure, pr_line, stroke_of
from ray_retrieval.compare import FACTS, value_of
from ray_retrieval.data.location import name_of
from ray_retrieval.errors import RetrievalError
from ray_retrieval.report import environment
from ray_retrieval.storage import Folder


def write(comparison: dict[str, Any], folder: Folder) -> str:
    """Write `comparison.json` and `comparison.html` into a folder; returns the page's URI."""
    folder.write_json("comparison.json", comparison)
    folder.write_text("comparison.html", render(comparison, folder))
    return str(folder / "comparison.html")


def render(comparison: dict[str, Any], folder: Folder | None = None) -> str:
    """The comparison as one HTML page, whole in itself.

    Args:
        comparison: what `compare` made.
        folder: where the page will lie; runs inside are linked to.
    """
    runs = comparison["runs"]
    chart = pr_chart(_lines(runs), wide=True)
    page = (
        environment()
        .get_template("comparison.html")
        .render(
            **comparison,
            chart=chart,
            legend=[
                {"label": label, "colour": f"var(--line-{number % COLOURS})", "stroke": stroke_of(number)}
                for number, label in enumerate(chart.legend if chart else [])
            ],
            metric_rows=_metric_rows(runs),
            seed_metrics=names_in(
                {metric["name"]: None for metric in group["metrics"]} for group in comparison["seeds"]
            ),
            run_notes=[f"{run['label']}: {note}" for run in runs for note in run["notes"]],
            links=[_link(Folder(run["folder"]), folder) for run in runs],
            facts={key: {run["dataset"].get(key) for run in runs} for key in FACTS},
        )
    )
    return page.encode("utf-8", "replace").decode()


def save_figure(comparison: dict[str, Any], path: str | Path) -> None:
    """Write the precision-recall curves of all runs as a figure, .svg, .png or .pdf by the suffix of `path`.

    Raises:
        RetrievalError: if the suffix is another, no run has a curve, or the file cannot be written.
    """
    kind = check_suffix(path)
    lines = _lines(comparison["runs"])
    if not lines:
        raise RetrievalError("none of the runs has a precision-recall curve", where=path)
    Folder(str(path)).parent.write_bytes(name_of(str(path)), pr_figure(lines, kind))


def check_suffix(path: str | Path) -> str:
    """The kind of figure that the suffix of `path` names: svg, png or pdf.

    Raises:
        RetrievalError: if the suffix is another.
    """
    name = name_of(str(path))
    kind = Path(name).suffix.lower().removeprefix(".")
    if kind not in ("svg", "png", "pdf"):
        raise RetrievalError(
            f"a figure cannot be saved as '{kind or name}'",
            where=path,
            mend="end the name in .svg, .png or .pdf",
        )
    return kind


def _lines(runs: list[dict[str, Any]]) -> list[Line]:
    lines = [pr_line(run["label"], run["pr_curve"], mark=True) for run in runs]
    return [line for line in lines if line is not None]


def _metric_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each metric with the runs' values, and its policies."""
    rows = []
    for name in names_in({metric["name"]: None for metric in run["metrics"]} for run in runs):
        values = [value_of(run, name) for run in runs]
        best = max((value for value in values if value is not None), default=None)
        rows.append({"name": name, "cells": values, "best": best, "policies": policies_of(name, runs)})
    return rows


def policies_of(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """The policy of a metric; several, each with its runs, where the runs' differ in more than size."""
    policies: dict[str, list[str]] = {}
    for run in runs:
        for metric in run["metrics"]:
            if metric["name"] == name:
                policy = str(metric.get("policy", ""))
                policy = policy.replace(f"of {run['size']} bits", "of the run's bits")
                policies.setdefault(policy, []).append(run["label"])
    if len(policies) == 1:
        return [*policies]
    return [f"{', '.join(labels)}: {policy}" for policy, labels in policies.items()]


def _link(run: Folder, page: Folder | None) -> str | None:
    """The run's report as seen from the page, where it lies inside the page's folder."""
    inside = page.path_inside(run.uri_of("report.html")) if page is not None else None
    return quote(inside) if inside is not None and run.exists("report.html") else None
