"""How commands print JSON, tables and places."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

_NO_LIMIT = 1 << 20
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def print_json(value: Any) -> None:
    """Print a plain value as one line of JSON on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def console(**options: Any) -> Console:
    """A console on stdout, as wide as the terminal; without one, lines are as long as what they say."""
    return Console(width=None if sys.stdout.isatty() else _NO_LIMIT, **options)


def short(path: str) -> str:
    """A path as one would type it here."""
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)
