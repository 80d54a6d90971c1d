"""The option `--engine` of commands that describe images."""

from typing import Annotated

import typer

from ray_retrieval.errors import RecipeError

EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="ENGINE",
        help="What describes images: torch, unless told, or an export beside or in the model's folder: onnx, "
        "onnx-int8.",
    ),
]


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
