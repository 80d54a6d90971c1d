"""How commands print JSON and places."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def print_json(value: Any) -> None:
    """Print a plain value as one line of JSON on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def short(path: str) -> str:
    """A path as one would type it here."""
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)
