"""How commands print JSON, tables, places and other commands."""

import json
import shlex
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


def command(*words: str) -> str:
    """A command of this program with its arguments, as a shell takes them."""
    return shlex.join(["ray-retrieval", *words])


def short(path: str) -> str:
    """A path as one would type it here."""
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)
