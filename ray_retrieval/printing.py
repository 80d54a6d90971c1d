"""What all commands have in common that print JSON."""

import json
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def print_json(value: Any) -> None:
    """Print a plain value as one line of JSON on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))
