"""The commands that describe images: `encode` and `embed`. Parsing and printing only."""

from typing import Annotated

import typer

from ray_retrieval.cli.options import (
    EngineOption,
    ModelArgument,
    Root,
    check_root,
    of_descriptors,
    with_engine,
)
from ray_retrieval.cli.printing import AsJson, print_json, short
from ray_retrieval.commands import command
from ray_retrieval.progress import Display
from ray_retrieval.words import counted


def encode(
    model: ModelArgument,
    images: Annotated[
        str, typer.Argument(metavar="IMAGES", help="A folder, list (.txt), CSV or Parquet of images.")
    ],
    out: Annotated[str, typer.Option("--out", help="Where the embeddings go.")],
    root: Root = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An encode setting, e.g. batch_size=32."),
    ] = None,
    engine: EngineOption = None,
    as_json: AsJson = False,
) -> None:
    """Encode images into an embeddings directory; run again, it goes on where it stopped."""
    from ray_retrieval.cluster import connect
    from ray_retrieval.data.table import open_images
    from ray_retrieval.encode import EncodeConfig, EncodeJob
    from ray_retrieval.encode import encode as run_encode
    from ray_retrieval.model_folder import read_model_description
    from ray_retrieval.recipe import from_settings
    from ray_retrieval.search.embeddings import ERRORS, Embeddings
    from ray_retrieval.storage import Folder

    config = from_settings(EncodeConfig, with_engine(settings, engine))
    read_model_description(Folder(model))
    check_root(root, [images])
    table = open_images(images, root=root)
    with connect(), Display().task("encode", len(table), "images") as advance:
        run_encode([EncodeJob(Folder(model), table, Folder(out))], config, advance=advance)
    made = Embeddings.open(out)
    if as_json:
        print_json({"folder": out, "rows": made.rows, "errors": made.error_count, "model": made.model})
        return
    typer.echo(f"encoded {counted(made.rows, 'image')} into {out}")
    if made.error_count:
        errors = short(made.folder.uri_of(ERRORS))
        typer.echo(f"left out {made.error_count:,} that cannot be decoded: {errors}")
    typer.echo(f"next    {command('index', 'build', out, '--out', 'INDEX')}")


def embed(
    model: ModelArgument,
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Images, folders, lists (.txt), CSV or Parquet of images."),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", callback=of_descriptors, help="A file for them: .npy or .parquet."),
    ] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Print or save the vectors or codes of images, in this process; for whole databases see encode."""
    from ray_retrieval import embed as embedding
    from ray_retrieval.data.table import open_images

    check_root(root, images)
    tables = [open_images(place, root=root) for place in images]
    total = sum(map(len, tables))
    with Display(quiet=total == 1).task("embed", total, "images") as advance:
        made = embedding.embed(model, tables, progress=lambda count: advance(count, ""))
    if out is not None:
        embedding.save(made, out)
    if as_json:
        print_json(made.as_json() if out is None else {**made.summary(), "file": out})
        return
    for identifier, reason in made.failures:
        typer.echo(f"left out {identifier}: {reason}", err=True)
    if out is None:
        for identifier, row in zip(made.ids, made.rows_in_words(), strict=True):
            typer.echo(f"{identifier}: {row}")
    else:
        typer.echo(f"saved   {counted(len(made.ids), 'image')} as {made.form} in {out}")
