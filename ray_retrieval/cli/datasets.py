"""The command `datasets`, and those that fetch and build Google Landmarks v2. Parsing and printing only."""

from typing import Annotated, Any

import typer

from ray_retrieval.cli.printing import AsJson, print_json, short
from ray_retrieval.commands import command
from ray_retrieval.progress import Display
from ray_retrieval.words import counted

gldv2_app = typer.Typer(help="Fetch and build Google Landmarks v2, to learn from.", no_args_is_help=True)


def datasets(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A benchmark, e.g. coco or coco-clean; all by default."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Its settings, e.g. root=~/data/coco."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what benchmarks need, where it comes from, what is missing, and what their lists hold."""
    from ray_retrieval.cli.tables import print_datasets, print_survey
    from ray_retrieval.data.datasets import survey
    from ray_retrieval.recipe import from_settings

    if name is None:
        surveys = [survey.survey(config) for config in survey.every_config()]
    else:
        kind, fixed = survey.kind_and_settings(name)
        config: Any = from_settings(kind, [*fixed, *(settings or [])])
        surveys = [survey.survey(config)]
    if as_json:
        print_json(surveys if name is None else surveys[0])
    elif name is None:
        print_datasets(surveys)
    else:
        print_survey(surveys[0])


@gldv2_app.command("download")
def gldv2_download(
    root: Annotated[str, typer.Argument(metavar="FOLDER", help="Where everything goes: a local folder.")],
    tars: Annotated[
        str | None,
        typer.Option(help="Archives of images, about 1 GB each: 0-499 for all, or 7; none by default."),
    ] = None,
    remove_tars: Annotated[
        bool, typer.Option("--remove-tars", help="Remove each archive once all of it is unpacked.")
    ] = False,
) -> None:
    """Fetch the lists, and archives of images, which are checked and unpacked; run again, it goes on."""
    from ray_retrieval.data.datasets.gldv2_download import fetch, parse_range
    from ray_retrieval.errors import RecipeError

    if remove_tars and tars is None:
        raise RecipeError("it is for the archives of --tars", where="--remove-tars", mend="leave it out")
    numbers = parse_range(tars) if tars is not None else ()
    fetch(root, numbers, remove_tars=remove_tars, say=Display().say)
    typer.echo(f"next    {command('gldv2', 'build', root, '--out', 'OUT')}")


@gldv2_app.command("build")
def gldv2_build(
    source: Annotated[str, typer.Argument(metavar="FOLDER", help="Where the lists and train/ are.")],
    out: Annotated[str, typer.Option("--out", help="Where the shards go.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. subset=full min_images=4."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write photographs and labels as Parquet shards; run again, it goes on where it stopped."""
    import yaml

    from ray_retrieval.cores import readers
    from ray_retrieval.data.datasets.gldv2_build import build
    from ray_retrieval.data.datasets.gldv2_plan import Gldv2BuildConfig, plan
    from ray_retrieval.recipe import from_settings
    from ray_retrieval.storage import Folder

    planned = plan(source, from_settings(Gldv2BuildConfig, settings or []))
    with Display().task("build", len(planned.ids), "images") as advance:
        made = build(planned, out, threads=readers(), advance=lambda count: advance(count, ""))
    if as_json:
        print_json({"folder": out, **{key: made[key] for key in ("images", "classes", "missing")}})
        return
    folder = Folder(out)
    for part, facts in made["parts"].items():
        typer.echo(f"{part:<10}  {counted(facts['images'], 'image')} of {counted(facts['classes'], 'class')}")
    if made["missing"]:
        typer.echo(f"missing     {counted(made['missing'], 'image')}: {short(folder.uri_of('missing.csv'))}")
    # The leaves in braces, on one line.
    block = yaml.safe_dump(
        {"data": {"name": "gldv2", "root": out}},
        default_flow_style=None,
        allow_unicode=True,
        width=float("inf"),
    )
    typer.echo(f"next        {block.rstrip()}")


@gldv2_app.command("verify")
def gldv2_verify(
    out: Annotated[str, typer.Argument(metavar="FOLDER", help="A finished build.")], as_json: AsJson = False
) -> None:
    """Read every file of a build and compare its checksum."""
    from ray_retrieval.data.datasets.gldv2_build import verify

    files = verify(out)
    if as_json:
        print_json({"folder": out, "sound": True, "files": files})
        return
    typer.echo(f"ok      {counted(files, 'file')}")
