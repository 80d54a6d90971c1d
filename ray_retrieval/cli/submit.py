"""The `submit` commands: other commands as jobs of a cluster. Parsing and printing only."""

import sys
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from typer.core import TyperGroup

from ray_retrieval.cli.printing import AsJson, console, print_json
from ray_retrieval.progress import Display

LEFT_RUNNING = 3
"""The exit code of a command that stopped following its job, which goes on."""

_START = "start"


class SubmitGroup(TyperGroup):
    """Commands about jobs; anything else is a job to start, so that `submit -- VERB …` does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [_START, *args]
        return list(super().parse_args(ctx, args))


submit_app = typer.Typer(
    cls=SubmitGroup,
    help="Run a command as a job of a Ray cluster: ray-retrieval submit -- VERB ARGS…",
    epilog=f"`submit -- VERB …` is short for `submit {_START} -- VERB …`, which has the options.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard; RAY_API_SERVER_ADDRESS, RAY_ADDRESS or http://127.0.0.1:8265.",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's name, as `submit list` has it.")]


@submit_app.command(
    _START,
    # What follows the verb is the job's.
    context_settings={"allow_interspersed_args": False},
)
def start(
    arguments: Annotated[
        list[str], typer.Argument(metavar="VERB [ARGS]...", help="A command of ray-retrieval.")
    ],
    address: Address = None,
    name: Annotated[
        str | None, typer.Option(help="What the job is called; a suffix makes it unlike any other.")
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the job's name and return, while it runs.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE]",
            help="Give the job an environment variable. Whoever can open the dashboard can read it: "
            "for stores, better give the nodes a role.",
        ),
    ] = None,
    pip: Annotated[
        list[str] | None,
        typer.Option(metavar="REQUIREMENT", help="Install this for the job, on every node it uses."),
    ] = None,
    cpus: Annotated[
        int, typer.Option(min=0, help="Have the cluster grow to so many free processors first.")
    ] = 0,
    gpus: Annotated[int, typer.Option(min=0, help="The same for GPUs, with a processor beside each.")] = 0,
    patience: Annotated[
        int | None, typer.Option(min=1, help="How many seconds it may take to grow; 1800 unless told.")
    ] = None,
    python: Annotated[str, typer.Option(help="The cluster's Python.")] = "python",
    as_json: AsJson = False,
) -> None:
    """Start a job and show what it writes; the exit code is the job's.

    The package and the recipe travel with it. Ctrl-C asks whether the job shall go on; exit code 3 says that
    it does and is followed no more.
    """
    from ray_retrieval.cluster import AWAIT, Needs
    from ray_retrieval.cluster.jobs import JobServer
    from ray_retrieval.errors import RecipeError
    from ray_retrieval.submit import follow, prepare, variables

    _check_usage(arguments)
    if patience is not None and not (cpus or gpus):
        raise RecipeError("it is for --cpus and --gpus", where="--patience", mend="leave it out")
    submission = prepare(arguments, name=name)
    environment = variables(env or [])
    if cpus or gpus:
        environment[AWAIT] = str(Needs(cpus, gpus, patience or Needs.seconds))
    display = Display()
    for warning in submission.warnings:
        display.say(f"warning {warning}")
    server = JobServer(address)
    # Said before: who interrupts the upload has to know what to look for.
    display.say(f"submit  {submission.name} to {server.address}")
    with submission.staged() as folder:
        server.submit(
            submission.entrypoint(python) + (" --debug" if "--debug" in sys.argv else ""),
            name=submission.name,
            command=submission.command,
            folder=folder,
            variables=environment,
            pip=pip or [],
        )
    job = submission.name
    if no_wait:
        _print({"job": job, "address": server.address}, as_json, line=job)
        return
    display.say("follow  Ctrl-C asks whether it shall go on")
    try:
        code = follow(server, job, lambda text: typer.echo(text, nl=False, err=as_json))
    except KeyboardInterrupt:
        code = _interrupted(server, job, display)
    if as_json:
        print_json({"job": job, "address": server.address, "exit_code": code})
    raise typer.Exit(code)


@submit_app.command("list")
def list_jobs(address: Address = None, as_json: AsJson = False) -> None:
    """The cluster's jobs, the newest first."""
    from ray_retrieval.cluster.jobs import JobServer

    jobs = JobServer(address).jobs()
    if as_json:
        print_json({"jobs": [_described(job) for job in jobs]})
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("job", "status", "started", "command"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        table.add_row(job.name, job.status, _clock(job.started_ms), job.command)
    console(highlight=False, markup=False).print(table)


@submit_app.command()
def status(job: JobName, address: Address = None, as_json: AsJson = False) -> None:
    """How a job stands."""
    from ray_retrieval.cluster.jobs import JobServer

    found = _described(JobServer(address).job(job))
    if as_json:
        print_json(found)
        return
    for key, value in found.items():
        if value not in (None, ""):
            typer.echo(f"{key:<10} {value}")


@submit_app.command()
def logs(
    job: JobName,
    address: Address = None,
    go_on: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends; the exit code is the job's.")
    ] = False,
) -> None:
    """What a job has written."""
    from ray_retrieval.cluster.jobs import JobServer
    from ray_retrieval.submit import follow

    server = JobServer(address)
    if not go_on:
        typer.echo(server.logs(job), nl=False)
        return
    server.job(job)
    try:
        code = follow(server, job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        code = LEFT_RUNNING
    raise typer.Exit(code)


@submit_app.command()
def stop(job: JobName, address: Address = None, as_json: AsJson = False) -> None:
    """End a job. The same command submitted again goes on where it stopped."""
    from ray_retrieval.cluster.jobs import JobServer

    stopped = JobServer(address).stop(job)
    _print({"job": job, "stopped": stopped}, as_json, line=f"{job}: {'stopped' if stopped else 'had ended'}")


def _check_usage(arguments: list[str]) -> None:
    """Refuse here what the command line there would: unknown verbs, options and missing arguments."""
    from ray_retrieval.cli import app

    command: Any = typer.main.get_command(app)
    context, rest = command.context_class(command, info_name="ray-retrieval"), list(arguments)
    while hasattr(command, "resolve_command"):
        if not rest:
            break
        name, command, rest = command.resolve_command(context, rest)
        context = command.context_class(command, parent=context, info_name=name)
    command.parse_args(context, rest)


def _interrupted(server: Any, job: str, display: Display) -> int:
    """Leave the job running, or not: asked where somebody can answer."""
    leave = True
    if sys.stdin.isatty():
        try:
            leave = typer.confirm(f"\nshall {job} go on?", default=True, err=True)
        except (typer.Abort, KeyboardInterrupt):
            typer.echo("", err=True)
    if leave:
        display.say(f"{job} goes on; ray-retrieval submit logs {job} --follow")
        return LEFT_RUNNING
    server.stop(job)
    return 130


def _described(job: Any) -> dict[str, Any]:
    return {
        "job": job.name,
        "status": job.status,
        "command": job.command,
        "exit_code": job.exit_code,
        "started": _clock(job.started_ms),
        "ended": _clock(job.ended_ms),
        "message": job.message,
    }


def _clock(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000).astimezone().isoformat(sep=" ", timespec="seconds")


def _print(value: dict[str, Any], as_json: bool, *, line: str) -> None:
    if as_json:
        print_json(value)
    else:
        typer.echo(line)
