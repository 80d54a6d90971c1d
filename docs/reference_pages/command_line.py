"""The reference of the command line, from the program's own parser."""

from typing import Any, get_args

import typer.main

from ray_retrieval.cli import app
from reference_pages import markdown

_HEAD = """# Command line

Made from the program's own parser; `ray-retrieval VERB --help` says the same. `--debug`, anywhere on the
line, shows the traceback of an error. Exit codes: 0 done; 2 what you can mend, in one line on stderr; 130
interrupted; 1 a mistake of ours. `--json` prints one object for programs.
"""


def page() -> str:
    """Every command with its arguments and options."""
    root = typer.main.get_command(app)
    return "\n".join([_HEAD, *(_section(path, command) for path, command in commands(root))])


def commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """All commands that do something, with the words that call them."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(path, command)]
    return [found for name, child in inner.items() for found in commands(child, (*path, name))]


def shown_as(path: tuple[str, ...]) -> tuple[str, ...]:
    """The words that one types: `submit -- VERB` starts a job."""
    return path[:-1] if path == ("submit", "start") else path


def _section(path: tuple[str, ...], command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    shown = shown_as(path)
    separator = ["--"] if shown != path else []
    usage = " ".join(["ray-retrieval", *shown, "[OPTIONS]", *separator, *map(_argument, arguments)])
    parts = [f"## {' '.join(shown)}", markdown.docstring(command.help), f"```text\n{usage}\n```"]
    rows = [row for row in map(_row, command.params) if row]
    if rows:
        parts.append(markdown.table(["argument or option", "default", "what"], rows))
    return "\n\n".join(parts) + "\n"


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _row(parameter: Any) -> list[str] | None:
    if getattr(parameter, "hidden", False) or parameter.name == "help":
        return None
    if parameter.param_type_name == "argument":
        name = f"`{_argument(parameter)}`"
    else:
        value = "" if parameter.is_flag else f" {parameter.metavar or _value_of(parameter)}"
        name = ", ".join(f"`{option}{value}`" for option in [*parameter.opts, *parameter.secondary_opts])
    repeated = " Can be given several times." if parameter.multiple else ""
    return [name, _default(parameter), markdown.prose(parameter.help or "") + repeated]


def _value_of(parameter: Any) -> str:
    annotation = parameter.type_descriptor.annotation
    kinds = get_args(annotation) or (annotation,)
    return " ".join("NUMBER" if kind in (int, float) else "TEXT" for kind in kinds)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "needed"
    value = parameter.default
    if value is None or value is False or value == [] or callable(value):
        return ""
    return f"`{value}`"
