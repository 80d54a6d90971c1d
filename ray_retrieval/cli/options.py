"""Arguments and options that several commands have, and what they are called. Parsing only."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ray_retrieval.errors import RecipeError

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file or its URI, or the name of a ready-made one, such as quickstart.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that replace the recipe's, e.g. train.epochs=10."
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left in the output folder.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="The model that made the index; it is looked for beside the index."),
]
Root = Annotated[str | None, typer.Option(help="The folder that paths in a list or CSV start from.")]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="ENGINE",
        help="What describes images: torch, unless told, or an export beside or in the model's folder: onnx, "
        "onnx-int8.",
    ),
]


def check_root(root: str | None, places: list[str]) -> None:
    """Raise RecipeError if a `--root` is given and none of the places of images holds paths."""
    if root is not None:
        from ray_retrieval.data import readers

        readers.check_root(root, places, where="--root")


def with_engine(settings: list[str] | None, engine: str | None) -> list[str]:
    """The settings of a command, with its `--engine` as one of them.

    Raises:
        RecipeError: if the settings name an engine as well.
    """
    given = settings or []
    if engine is None:
        return given
    if any(setting.partition("=")[0].strip() == "engine" for setting in given):
        raise RecipeError("the engine is set by --set too", where="--engine", mend="leave one of them out")
    return [*given, f"engine={engine}"]


def of_a_picture(path: str | None) -> str | None:
    """The path of a picture to save, refused before any work if its suffix is of no kind of picture."""
    if path is not None:
        from ray_retrieval.pictures import check_suffix

        check_suffix(path)
    return path


def of_a_figure(path: str | None) -> str | None:
    """The path of a figure to save, refused before any work if its suffix is of no kind of figure."""
    if path is not None:
        from ray_retrieval.compare_page import check_suffix

        check_suffix(path)
    return path


def of_descriptors(path: str | None) -> str | None:
    """The path of descriptors to save, refused before any work if its suffix is of no kind of file."""
    if path is not None:
        from ray_retrieval.embed import check_suffix

        check_suffix(path)
    return path


def with_options(said: str, arguments: list[str]) -> str:
    """What is said, with parameters of the library, such as `max_loss`, as options.

    Those of the command itself, and those that one other command alone has: it is what the sentence names.

    Args:
        said: an error, or a warning.
        arguments: the command line; of it, the words that name the command are looked at.
    """
    from ray_retrieval.cli import app

    command: Any = typer.main.get_command(app)
    everywhere = list(_options(command))
    for word in arguments:
        command = getattr(command, "commands", {}).get(word, command)
    owners = Counter(name for options in everywhere for name in options)
    known = {name: option for options in everywhere for name, option in options.items() if owners[name] == 1}
    known |= next(_options(command))
    return re.sub(r"`(\w+)`", lambda name: known.get(name[1], name[0]), said)


def _options(command: Any) -> Iterator[dict[str, str]]:
    """Of a command, and then of each of those below it, the option of each parameter."""
    mine = [one for one in command.params if one.param_type_name == "option"]
    yield {one.name: max(one.opts, key=len) for one in mine}
    for inner in getattr(command, "commands", {}).values():
        yield from _options(inner)
