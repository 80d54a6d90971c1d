"""Finished runs, found and read from what they left."""

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from ray_retrieval.charts import as_number
from ray_retrieval.config import validate
from ray_retrieval.errors import ArtefactError, RetrievalError
from ray_retrieval.recipe import Recipe
from ray_retrieval.run_folder import RUN
from ray_retrieval.storage import Folder, fingerprint, is_uri, missing, split_query
from ray_retrieval.tuning.ledger import STUDY

_DEPTH = 3
"""Levels of folders below a given one in which runs are looked for: a study of sizes and seeds has two."""


_SIZES = {"bits": "bits", "dimension": "dimensions"}
"""What a method's configuration calls the size of its descriptors, and the unit that it counts in."""


def find_runs(runs: Sequence[str | Path | Folder]) -> tuple[list[Folder], list[str]]:
    """The folders of finished runs, each once, and a note for each unfinished one found along the way.

    Args:
        runs: folders of runs, or folders that contain such folders.

    Raises:
        ArtefactError: naming a folder that neither is nor contains a finished run.
    """
    found: dict[str, Folder] = {}
    notes: dict[str, None] = {}
    for given in runs:
        folder = Folder(given)
        inside = [folder] if folder.exists("metrics.json") else _inside(folder, _DEPTH)
        finished = [run for run in inside if run.exists("metrics.json")]
        if not finished:
            raise _no_run(folder, begun=inside)
        found |= {run.uri: run for run in finished}
        notes |= {
            f"{run} is left out: the run is not finished": None for run in inside if run not in finished
        }
    return list(found.values()), list(notes)


def _inside(folder: Folder, depth: int) -> list[Folder]:
    """Runs in a folder, begun or finished; what lies inside a run is not looked at.

    Of the trials of a search only those that were measured: the others are finished without it.
    """
    if folder.exists(RUN) or folder.exists("metrics.json"):
        return [folder]
    if depth == 0:
        return []
    names = [entry.base_name for entry in folder.entries() if entry.type == fs.FileType.Directory]
    runs = [run for name in sorted(names, key=_counted) for run in _inside(folder / name, depth - 1)]
    return [run for run in runs if run.exists("metrics.json")] if folder.exists(STUDY) else runs


def _counted(name: str) -> list[tuple[int, str]]:
    """A key that sorts 16bits before 128bits."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _no_run(folder: Folder, begun: list[Folder]) -> ArtefactError:
    if begun:
        return ArtefactError(
            "the run is not finished: metrics.json is missing",
            where=begun[0],
            mend="run its recipe again: it goes on where it stopped",
        )
    mend = "give the output folder of a run, or one that contains such"
    return missing(folder, "metrics.json", "finished run", mend=mend)


def read_run(folder: Folder) -> dict[str, Any]:
    """What a finished run says of itself and of its selected model.

    Returns:
        {"folder", "name", "method", "size", "unit", "seed", "selected", "epoch", "metrics", "pr_curve",
        "dataset", "notes", "published", "configuration", "family"}; the last two are fingerprints of what
        makes the model, without the seed, and without seed and size.

    Raises:
        ArtefactError: if a file is missing or is not what a run writes.
    """
    metrics = folder.read_json("metrics.json")
    try:
        recipe = yaml.safe_load(folder.read_bytes("recipe.yaml"))
        model = metrics["models"][metrics["selected"]]
        curve = model["pr_curve"] or {}
        unit, made = next(key for key in _SIZES if key in recipe["method"]), _validated(recipe)
        return {
            "folder": folder.uri,
            "name": str(recipe["name"]),
            "method": recipe["method"]["name"],
            # A dimension that the recipe does not state is that of the network.
            "size": recipe["method"][unit] if made is None else made.method.form.size,
            "unit": _SIZES[unit],
            "seed": recipe["seed"],
            "selected": metrics["selected"],
            "epoch": model["epoch"],
            "metrics": model["test"],
            "pr_curve": {key: [finite(value) for value in values] for key, values in curve.items()},
            "dataset": metrics["dataset"],
            "notes": model.get("notes") or [],
            "published": metrics.get("published") or [],
            "configuration": _configuration(recipe, made, without=("seed",)),
            "family": _configuration(recipe, made, without=("seed", *_SIZES)),
        }
    except (KeyError, StopIteration, TypeError, AttributeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArtefactError(
            f"recipe.yaml and metrics.json are not those of a finished run: {type(error).__name__} {error}",
            where=folder,
            mend="run its recipe again",
        ) from None


def _validated(recipe: Any) -> Recipe | None:
    """The recipe of a run; None of one that another release has written."""
    try:
        return validate(Recipe, recipe)
    except RetrievalError:
        return None


def _configuration(recipe: dict[str, Any], made: Recipe | None, *, without: tuple[str, ...]) -> str:
    """A fingerprint of what makes the model, but for the seed (and the size).

    Args:
        recipe: as the run has written it.
        made: the same, validated; without it, the run is like none but itself.
        without: keys that are left out.
    """
    values = recipe if made is None else made.of_the_model()
    method = {key: value for key, value in values["method"].items() if key not in without}
    return fingerprint(
        {**{key: value for key, value in values.items() if key not in without}, "method": method}
    )


def common_folder(folders: Sequence[Folder]) -> Folder:
    """The innermost folder that contains all the given ones.

    Raises:
        ArtefactError: if they have only the root of a file system in common, or not even that.
    """
    bases, options = zip(*(split_query(folder.uri) for folder in folders), strict=True)
    levels = zip(*(base.split("/")[:-1] for base in bases), strict=False)
    same = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
    if len(same) < (3 if is_uri(bases[0]) else 2):
        raise ArtefactError(
            "no folder contains all of these", where=", ".join(bases), mend="choose other ones"
        )
    return Folder("/".join(same) + options[0])


def finite(value: Any) -> float | None:
    """The number, or None where it is undefined."""
    number = as_number(value)
    return value if math.isfinite(number) else None
