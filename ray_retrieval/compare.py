"""Several finished runs side by side, and held against published results.

`compare` makes one plain object of them; `compare_page` writes it as `comparison.json` and `comparison.html`.
"""

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ray_retrieval.charts import names_in
from ray_retrieval.errors import ArtefactError
from ray_retrieval.recipe import PublishedConfig
from ray_retrieval.results import common_folder, find_runs, finite, read_run
from ray_retrieval.storage import Folder

_ROUNDING = 1e-9
"""So that 0.6773 reaches 0.6873 − 0.01, which in binary is a little more."""
FACTS = {
    "name": "benchmark",
    "queries": "number of queries",
    "database": "size of the database",
    "errors": "number of test images that cannot be decoded",
}
"""What has to be the same in two runs for their numbers to say anything about each other."""


def acceptance(
    published: Iterable[PublishedConfig],
    size: int,
    test: list[dict[str, Any]],
    *,
    benchmark: str | None = None,
) -> list[dict[str, Any]]:
    """One model's results against published ones.

    Args:
        published: what is reported, by size; what says nothing of this size gives no row.
        size: bits of the model's codes, or dimension of its vectors.
        test: its metrics, each with `name` and `value`.
        benchmark: what they were measured on; results of another one give no row. None: of any.

    Returns:
        For each result {"source", "metric", "size", "published", "tolerance", "measured", "difference",
        "reached"}; the last three are None where the metric was not measured.
    """
    measured = {metric["name"]: metric["value"] for metric in test}
    return [
        _verdict(
            {
                "source": row.source,
                "metric": row.metric,
                "size": size,
                "published": row.values[size],
                "tolerance": row.tolerance,
            },
            measured.get(row.metric),
        )
        for row in published
        if size in row.values and (benchmark is None or row.benchmark in (None, benchmark))
    ]


def compare(runs: Sequence[str | Path | Folder]) -> dict[str, Any]:
    """The results of several runs as one plain object.

    Args:
        runs: folders of finished runs, or folders that contain such folders. A run given twice counts once.

    Returns:
        {"format", "version", "title", "runs", "by_size", "seeds", "published", "notes"}:
        `runs`: for each its label, folder, name, method, size and its unit, seed, selected model and epoch,
        metrics with their policies, precision-recall curve, facts of the data set, and notes;
        `by_size`: the first metric by bits or dimension, a row for each configuration and each published
        result; None where all runs have the same;
        `seeds`: mean and sample standard deviation of the metrics of configurations with several seeds;
        `published`: as `acceptance`, with the run's label; over several seeds it is their mean that counts;
        `notes`: what stands between a reader and a fair comparison.

    Raises:
        ArtefactError: naming a folder that holds no finished run.
    """
    folders, notes = find_runs(runs)
    read = [read_run(folder) for folder in folders]
    for entry, label in zip(read, _labels(read), strict=True):
        entry["label"] = label
    groups = _groups(read, "configuration")
    repeated = [
        f"{b['label']} repeats the configuration and seed of {a['label']}" for a, b in _repeats(groups)
    ]
    named = _with_names(groups, by_size=True)
    uneven = [
        f"{name} was trained on different numbers of images: {different}"
        for group, name in named
        if (different := _different(group, "train"))
    ]
    several = [pair for pair in named if len({entry["seed"] for entry in pair[0]}) > 1]
    comparison = {
        "format": "ray_retrieval/comparison",
        "version": 1,
        "title": _common_name(read),
        "by_size": _by_size(read),
        "seeds": [_over_seeds(group, name) for group, name in several],
        "published": [row for pair in named for row in _against_published(*pair)],
        "notes": [*notes, *repeated, *uneven, *_differences(read)],
    }
    hidden = ("configuration", "family", "published")
    comparison["runs"] = [{k: v for k, v in entry.items() if k not in hidden} for entry in read]
    return comparison


# Naming


def _labels(runs: list[dict[str, Any]]) -> list[str]:
    """What each run is called: its name, and where names repeat, what tells the runs apart."""
    shown = {"size": "{size} {unit}", "seed": "seed {seed}"}
    for keys in ((), ("size",), ("seed",), ("size", "seed")):
        labels = [" · ".join([run["name"], *(shown[key].format(**run) for key in keys)]) for run in runs]
        if len(set(labels)) == len(labels):
            return labels
    try:
        parent = common_folder([Folder(run["folder"]) for run in runs])
    except ArtefactError:
        return [run["folder"] for run in runs]
    return [parent.path_inside(run["folder"]) or run["folder"] for run in runs]


# Comparing


def _groups(runs: list[dict[str, Any]], key: str) -> list[list[dict[str, Any]]]:
    return [[run for run in runs if run[key] == value] for value in dict.fromkeys(run[key] for run in runs)]


def _repeats(groups: list[list[dict[str, Any]]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = []
    for group in groups:
        first: dict[Any, dict[str, Any]] = {}
        for run in group:
            if first.setdefault(run["seed"], run) is not run:
                pairs.append((first[run["seed"]], run))
    return pairs


def _once(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of one configuration without those that repeat a seed: the first one counts."""
    return list({run["seed"]: run for run in reversed(runs)}.values())[::-1]


def _over_seeds(group: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Mean and deviation of each metric over the seeds of one configuration; a repeated seed counts once."""
    runs = _once(group)
    metrics = []
    for metric in names_in({entry["name"]: None for entry in run["metrics"]} for run in runs):
        mean, deviation, count = _mean([value_of(run, metric) for run in runs])
        metrics.append({"name": metric, "mean": mean, "deviation": deviation, "runs": count})
    return {
        "label": name,
        "method": runs[0]["method"],
        "size": runs[0]["size"],
        "unit": runs[0]["unit"],
        "seeds": [run["seed"] for run in runs],
        "runs": [run["label"] for run in runs],
        "metrics": metrics,
    }


def _by_size(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    sizes = sorted({run["size"] or 0 for run in runs})
    units = {run["unit"] for run in runs}
    if len(sizes) < 2 or 0 in sizes or len(units) > 1 or not runs[0]["metrics"]:
        return None
    metric = runs[0]["metrics"][0]["name"]
    rows: list[dict[str, Any]] = []
    for family, label in _with_names(_groups(runs, "family")):
        cells = {}
        for number in sizes:
            of_size = _once([run for run in family if run["size"] == number])
            mean, deviation, count = _mean([value_of(run, metric) for run in of_size])
            if count:
                cells[str(number)] = {"value": mean, "deviation": deviation, "runs": count}
        rows.append({"label": label, "measured": True, "cells": cells})
    sources: dict[str, dict[str, Any]] = {}
    for row in (row for run in runs for row in run["published"] if row["metric"] == metric):
        sources.setdefault(row["source"], {})[str(row["size"])] = {"value": row["published"]}
    rows += [{"label": name, "measured": False, "cells": cells} for name, cells in sources.items()]
    return {"metric": metric, "sizes": sizes, "unit": units.pop(), "rows": rows}


def _against_published(group: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The published results of one configuration; over several seeds it is their mean that counts."""
    several = len({run["seed"] for run in group}) > 1
    means = {metric["name"]: metric for metric in _over_seeds(group, name)["metrics"]}
    rows = {}
    for row in (row for run in group for row in run["published"]):
        found = means.get(row["metric"], {"mean": None, "deviation": None})
        label = name if several else group[0]["label"]
        kept = {key: row[key] for key in ("source", "metric", "size", "published", "tolerance")}
        verdict = _verdict({"run": label, **kept}, found["mean"])
        rows[row["source"], row["metric"]] = {**verdict, "deviation": found["deviation"]}
    return list(rows.values())


def _verdict(row: dict[str, Any], measured: float | None) -> dict[str, Any]:
    difference = None if measured is None else measured - row["published"]
    reached = None if difference is None else difference >= -row["tolerance"] - _ROUNDING
    return {**row, "measured": measured, "difference": difference, "reached": reached}


def _differences(runs: list[dict[str, Any]]) -> list[str]:
    """Why numbers of these runs may say nothing about each other."""
    notes = []
    for key, words in FACTS.items():
        if different := _different(runs, key):
            notes.append(f"the {words} differs: {different}. Their numbers are not comparable")
    sets: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        sets.setdefault(tuple(metric["name"] for metric in run["metrics"]), []).append(run["label"])
    everywhere = set.intersection(*(set(names) for names in sets)) if sets else set()
    for names, labels in sets.items():
        extra = [name for name in names if name not in everywhere]
        if extra:
            notes.append(f"not measured in every run: {', '.join(extra)} (only in {', '.join(labels)})")
    return notes


def _different(runs: list[dict[str, Any]], key: str) -> str | None:
    """The values of a fact of the data set with the runs that have each; None where all have the same."""
    holders: dict[Any, list[str]] = {}
    for run in runs:
        holders.setdefault(run["dataset"].get(key), []).append(run["label"])
    parts = [f"{_plain(value)} ({', '.join(labels)})" for value, labels in holders.items()]
    return "; ".join(parts) if len(parts) > 1 else None


def _with_names(
    groups: list[list[dict[str, Any]]], *, by_size: bool = False
) -> list[tuple[list[dict[str, Any]], str]]:
    """Each group with what it is called; where several are called alike, with its first run's label too.

    Args:
        groups: of runs.
        by_size: whether a group has one size, which is told beside its name.
    """
    names = [(_common_name(group), group[0]["size"] if by_size else None) for group in groups]
    return [
        (group, name[0] if names.count(name) == 1 else f"{name[0]} ({group[0]['label']})")
        for group, name in zip(groups, names, strict=True)
    ]


def _common_name(runs: list[dict[str, Any]]) -> str:
    """The words that all names begin with, without the number in which they differ; else the methods."""
    names = [run["name"] for run in runs]
    if len(set(names)) == 1:
        return str(names[0])
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    prefix = "".join(letters[0] for letters in same)
    if any(name[len(prefix) : len(prefix) + 1].isalpha() for name in names):
        prefix = re.sub(r"[^\W\d_]*$", "", prefix)  # not half a word
    return prefix.rstrip("0123456789-_ .·") or ", ".join(dict.fromkeys(run["method"] for run in runs))


def value_of(run: dict[str, Any], name: str) -> float | None:
    """A metric of a run; None where it is undefined or was not measured."""
    return next((finite(metric["value"]) for metric in run["metrics"] if metric["name"] == name), None)


def _mean(values: list[float | None]) -> tuple[float | None, float | None, int]:
    """Mean, sample standard deviation (of two values or more) and number of the values that are there."""
    there = [value for value in values if value is not None]
    if not there:
        return None, None, 0
    return statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None, len(there)


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
