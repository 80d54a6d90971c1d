"""The command line: one sub-command per verb. Parsing and printing only."""

import sys
import traceback
from typing import Annotated, Any

import typer

import ray_retrieval
from ray_retrieval.cli import datasets, export, images, queries, recipes, serve
from ray_retrieval.cli.index import index_app
from ray_retrieval.cli.options import with_options
from ray_retrieval.cli.submit import submit_app
from ray_retrieval.errors import RetrievalError

_INTERRUPTED = 130  # what Typer makes of Ctrl-C
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Click's base of what is wrong with a command line, which Typer does not export."""

app = typer.Typer(
    name="ray-retrieval",
    help="Image retrieval by published methods, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    recipes.run,
    recipes.train,
    recipes.tune,
    recipes.evaluate,
    recipes.compare,
    datasets.datasets,
    images.encode,
    images.embed,
    queries.search,
    queries.predict,
    queries.match,
    export.export,
    serve.serve,
):
    app.command()(verb)
app.add_typer(index_app, name="index")
app.add_typer(datasets.gldv2_app, name="gldv2")
app.add_typer(submit_app, name="submit")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ray_retrieval {ray_retrieval.__version__}")
        raise typer.Exit


@app.callback(epilog="--debug, anywhere on the line, shows the traceback of an error.")
def verbs(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Image retrieval by published methods, on Ray."""


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 the user can mend it, 130 interrupted, 1 a bug."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(args=arguments, prog_name="ray-retrieval", standalone_mode=False)
    except (RetrievalError, _UsageError) as error:
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exc()
        said = _misuse(error) if isinstance(error, _UsageError) else with_options(str(error), arguments)
        if said:
            typer.echo(f"error: {said}", err=True)
        sys.exit(2)
    except typer.Abort:
        typer.echo("aborted", err=True)
        sys.exit(1)
    if code == _INTERRUPTED:
        same = "without --fresh the same command" if "--fresh" in arguments else "the same command"
        typer.echo(f"interrupted; {same} goes on where this one stopped", err=True)
    sys.exit(code)


def _misuse(error: Any) -> str:
    """What is wrong with a command line, in one line; nothing of one without words, which prints the help."""
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{said} (see {error.ctx.command_path} --help)" if said and error.ctx else said
