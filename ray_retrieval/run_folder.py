"""The folder of a run: the file that makes it one, what else a run writes there, and what it begins with."""

import os
from collections.abc import Set
from typing import Any

from ray_retrieval.errors import ArtefactError, RecipeError
from ray_retrieval.model_folder import read_model_description
from ray_retrieval.recipe import Recipe, dump
from ray_retrieval.storage import Folder, is_described, is_uri, read_description, write_description

RUN, RECIPE = "run.json", "recipe.yaml"
"""The file that only runs write, the first of all; and the resolved recipe."""
PREPARED = ("split", "errors", "data.json", "timings.json")
"""What is found out before anything is trained."""
WRITTEN = frozenset(
    {
        RUN,
        RECIPE,
        *PREPARED,
        "stages",
        "training.json",
        "checkpoints",
        "checkpoints-here",
        "history.jsonl",
        "steps.jsonl",
        "tensorboard",
        "profile",
        "error.txt",
        "model",
        "model-best",
        "model-last",
        "embeddings",
        "index",
        "metrics.json",
        "mAP.txt",
        "report.html",
    }
)
"""Everything that a run, or a trial of a search, writes into its folder, by its name there."""
_KIND, _VERSION = "run", 1


def mark(folder: Folder) -> None:
    """Make a folder that of a run."""
    write_description(folder, RUN, kind=_KIND, version=_VERSION, body={})


def begin(folder: Folder, recipe: Recipe) -> None:
    """Make a folder that of a run of a recipe, which is written down as it was resolved."""
    mark(folder)
    folder.write_text(RECIPE, dump(recipe))


def refuse_foreign(folder: Folder, *, fresh: bool = False) -> None:
    """Refuse a folder that is not empty and holds no run: nothing there is written over, or deleted.

    Args:
        folder: the output folder of a recipe.
        fresh: whether it is about to be deleted; then a run of any version is one.

    Raises:
        RecipeError: naming some of what is there.
        ArtefactError: if the run is of another version of the format.
    """
    if not folder.exists(RUN):
        if names := folder.names():
            listed = ", ".join([*names[:3], *(["…"] if len(names) > 3 else [])])
            raise _foreign(folder, f"something that is no run ({listed})", fresh=fresh)
    elif not fresh:
        read_description(folder, RUN, kind=_KIND, version=_VERSION)
    elif not is_described(folder, RUN, kind=_KIND):
        raise _foreign(folder, f"a {RUN} that no run wrote", fresh=fresh)


def start_of(recipe: Recipe) -> str | None:
    """Fingerprint of what the first training of a recipe begins with: a model, or a file of weights.

    Returns:
        None where there is neither, or the file is not there.

    Raises:
        ArtefactError: if the model is not there.
    """
    first = (recipe.stage_recipes() or [recipe])[0]
    if first.train.start is not None:
        return read_model_description(Folder(first.train.start))[1]
    return checksum_of_weights(first.method)


def checksum_of_weights(method: Any) -> str | None:
    """Of the file that a method's configuration names as weights; None where there is none."""
    weights = weights_file(method)
    if weights is None:
        return None
    try:
        place = Folder(weights)
        if not place.is_file():
            return None
        return Folder(place.local_path()).checksum()
    except ArtefactError:
        return None


def weights_file(method: Any) -> str | None:
    """The path or URI of the weights that a method's configuration names; None where these are no file."""
    weights: str | None = getattr(getattr(method, "backbone", None), "weights", None)
    return None if weights in ("none", "imagenet") else weights


def _foreign(folder: Folder, what: str, *, fresh: bool) -> RecipeError:
    return RecipeError(
        f"the output folder holds {what}{', so `fresh` does not delete it' if fresh else ''}",
        where=folder,
        mend="choose another output=…",
    )


def deleted(folder: Folder, location: str, written: Set[str] = WRITTEN) -> bool:
    """Whether a path or URI leads to something that is deleted with what was written into a folder."""
    if folder.is_local and not is_uri(location):
        folder, location = Folder(os.path.realpath(folder.path)), os.path.realpath(Folder(location).path)
    path = folder.path_inside(location)
    return path is not None and path.split("/")[0] in written
