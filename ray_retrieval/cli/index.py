"""The `index` commands: building, changing, describing and checking an index. Parsing and printing only."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ray_retrieval.cli.index_export import index_export
from ray_retrieval.cli.options import ModelOption, Root, check_root
from ray_retrieval.cli.printing import AsJson, console, print_json
from ray_retrieval.cli.vectors import (
    Bits,
    Column,
    Ids,
    Labels,
    ModelName,
    Normalise,
    check_several,
    holds_descriptors,
    refuse_settings,
    rows_to_index,
)
from ray_retrieval.commands import command
from ray_retrieval.progress import Display, rows_written
from ray_retrieval.words import counted

index_app = typer.Typer(help="Build, change, describe and check an index.", no_args_is_help=True)
index_app.command("export")(index_export)

IndexArgument = Annotated[str, typer.Argument(metavar="INDEX", help="An index directory.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Keep = Annotated[int, typer.Option(min=1, help="How many versions stay, the newest ones.")]
KeepImages = Annotated[bool, typer.Option(help="Keep the bytes of images that came as bytes.")]
Shards = Annotated[
    int | None,
    typer.Option(min=1, help="Parts that different processes can search; one for every 10 million images."),
]
Workers = Annotated[
    int,
    typer.Option(min=1, help="Ray tasks that write the parts, one each; 1: threads of this process."),
]


@index_app.command("build")
def index_build(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="EMBEDDINGS|FILE...",
            help="An embeddings directory; or codes or vectors that were made elsewhere: .npy, .npz, "
            ".parquet, .arrow, .feather, .faiss, or an exported index.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", help="Where the index goes.")],
    shards: Shards = None,
    workers: Workers = 1,
    keep_images: KeepImages = True,
    how: Annotated[
        str | None,
        typer.Option(
            "--search",
            help="Of codes and vectors: exact (the default) or auto (by their number); of vectors a FAISS "
            "factory string, of codes BIVF1024 (1,024 cells). Of local features: auto (the default), votes, "
            "exact, asmk or global.",
        ),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(help="Of the exact hits, the share to be found at least; fewer, and nothing is built."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What the search that auto chooses may take beside the shards: 2GB.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of that search, e.g. nprobe=32."),
    ] = None,
    bits: Bits = None,
    normalise: Normalise = False,
    column: Column = None,
    ids: Ids = None,
    labels: Labels = None,
    model_name: ModelName = "",
    model: Annotated[
        str | None, typer.Option("--model", help="The model that made what is in the files, if one here did.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Build an index of codes, vectors or local features."""
    from ray_retrieval import search
    from ray_retrieval.cluster.pool import pool_of
    from ray_retrieval.cores import cores
    from ray_retrieval.descriptors import DescriptorKind
    from ray_retrieval.recipe import from_settings
    from ray_retrieval.search.approximate import ApproximateConfig
    from ray_retrieval.search.importing import made_elsewhere
    from ray_retrieval.search.votes import LocalSearchConfig

    asked = {"recall_target": recall, "memory": memory}
    given = [*(f"{key}={value}" for key, value in asked.items() if value is not None), *(settings or [])]
    local, approximate = None, None
    source = rows_to_index(
        places,
        bits=bits,
        normalise=normalise,
        column=column,
        ids=ids,
        labels=labels,
        model_name=model_name,
        model=model,
    )
    if source.form.kind is DescriptorKind.LOCAL:
        local = from_settings(LocalSearchConfig, [*([f"shortlist={how}"] if how else []), *given])
    else:
        approximate = from_settings(ApproximateConfig, [f"search={how or 'exact'}", *given])
    with rows_written("index", len(source)) as progress, pool_of(workers, cores()) as pool:
        search.build(
            source,
            out,
            shards=shards,
            keep_images=keep_images,
            approximate=approximate,
            local=local,
            pool=pool,
            progress=progress,
        )
    _describe(out, as_json)
    if not as_json:
        queries = ["--vectors", "FILE"] if made_elsewhere(source.model) else ["IMAGE", "--model", "MODEL"]
        typer.echo(f"next    {command('search', out, *queries)}")


def _count(text: str) -> int:
    from ray_retrieval.config import read_count

    try:
        return read_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@index_app.command("plan")
def index_plan(
    places: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EMBEDDINGS|FILE...]", help="What would be built, as for build."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(parser=_count, metavar="COUNT", help="Or: so many images, such as 1e9,")
    ] = None,
    bits: Annotated[int | None, typer.Option(min=1, help="with codes of so many bits,")] = None,
    dimension: Annotated[int | None, typer.Option(min=1, help="or vectors of that dimension.")] = None,
    shards: Shards = None,
    how: Annotated[
        str, typer.Option("--search", help="The search that is asked for, as for build; default auto.")
    ] = "auto",
    recall: Annotated[float | None, typer.Option(help="As for build.")] = None,
    memory: Annotated[str | None, typer.Option(help="That `auto` may take, such as 4GB.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for build: train_rows=1000000.")
    ] = None,
    column: Column = None,
    normalise: Normalise = False,
    as_json: AsJson = False,
) -> None:
    """Say what an index would take on disk and in memory, for each kind of search, before it is built."""
    from ray_retrieval.descriptors import DescriptorKind
    from ray_retrieval.recipe import from_settings
    from ray_retrieval.search.approximate import ApproximateConfig
    from ray_retrieval.search.building import ROWS_PER_SHARD
    from ray_retrieval.search.planning import plan
    from ray_retrieval.search.votes import LocalSearchConfig

    form, count, features, known = _to_plan(
        places or [], rows, bits, dimension, column=column, normalise=normalise
    )
    asked = {"recall_target": recall, "memory": memory}
    given = [*(f"{key}={value}" for key, value in asked.items() if value is not None), *(settings or [])]
    local, config = None, None
    if form.kind is DescriptorKind.LOCAL:
        local = from_settings(LocalSearchConfig, [f"shortlist={how}", *given])
    else:
        config = from_settings(ApproximateConfig, [f"search={how}", *given])
    written = shards or -(-count // ROWS_PER_SHARD)
    found = plan(form, count, features=features, shards=written, config=config, local=local)
    if as_json:
        kinds = [kind.as_json() for kind in found]
        print_json({**form.as_json(), "rows": count, "known_bytes": known, "kinds": kinds})
        return
    table = Table("search", "mapped", "private", "bytes a row", "", box=SIMPLE_HEAD, pad_edge=False)
    for numbers in table.columns[1:4]:
        numbers.justify = "right"
    mark = "auto" if how == "auto" else "asked for"
    for kind in found:
        sizes = (f"{size / 1e6:,.1f} MB" for size in (kind.mapped, kind.private))
        table.add_row(kind.kind, *sizes, f"{kind.bytes_per_row:,.1f}", mark if kind.auto else "")
    console(highlight=False, markup=False).print(table)
    typer.echo(
        f"{counted(count, 'image')}; bytes a row are megabytes a million. "
        "Mapped files are shared by all processes."
    )
    for kind in found:
        if kind.auto and kind.train_rows:
            typer.echo(
                f"{kind.kind} is trained on {counted(kind.train_rows, 'image')} drawn at random, "
                f"{kind.training / 1e6:,.1f} MB of memory while it is built"
            )
    if not any(kind.auto for kind in found):
        why = "nothing that it takes fits the memory" if how == "auto" else "what it takes is not known here"
        typer.echo(f"{how}: {why}")
    if known is not None:
        typer.echo(f"ids, labels, paths and other columns: about {known / 1e6:,.1f} MB more, mapped")


@index_app.command("add")
def index_add(
    index: IndexArgument,
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES|EMBEDDINGS|FILE...",
            help="A folder, list (.txt), CSV or Parquet of images; an embeddings directory; or one or more "
            "files of codes or vectors, as for build.",
        ),
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the images whose ids are in the index already.")
    ] = False,
    skip_duplicates: Annotated[
        bool,
        typer.Option("--skip-duplicates", help="Leave out images that the index holds byte for byte."),
    ] = False,
    model: ModelOption = None,
    root: Root = None,
    out: Annotated[
        str | None, typer.Option("--embeddings", help="Keep the embeddings of the images here.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="How to encode images, e.g. batch_size=32."),
    ] = None,
    bits: Bits = None,
    normalise: Normalise = False,
    column: Column = None,
    ids: Ids = None,
    labels: Labels = None,
    model_name: ModelName = "",
    shards: Shards = None,
    workers: Workers = 1,
    keep_images: KeepImages = True,
    as_json: AsJson = False,
) -> None:
    """Add images to an index, as a new version of it; run again, it goes on where it stopped."""
    from ray_retrieval import extend, search
    from ray_retrieval.cluster.pool import pool_of
    from ray_retrieval.cores import cores
    from ray_retrieval.data.table import open_images
    from ray_retrieval.encode import EncodeConfig
    from ray_retrieval.recipe import from_settings
    from ray_retrieval.search.building import opened_rows
    from ray_retrieval.search.embeddings import Embeddings

    def add(rows: Any) -> Any:
        with rows_written("add", len(rows)) as progress, pool_of(workers, cores()) as pool:
            return search.add(
                index,
                rows,
                replace=replace,
                skip_duplicates=skip_duplicates,
                shards=shards,
                keep_images=keep_images,
                pool=pool,
                progress=progress,
            )

    told = {"bits": bits, "normalise": normalise, "column": column, "ids": ids, "labels": labels}
    if len(places) > 1:
        check_several(places)
    if len(places) > 1 or extend.are_embeddings(places[0]) or holds_descriptors(places[0], column, index):
        refuse_settings({"root": root, "embeddings": out, "set": settings}, "images")
        if extend.are_embeddings(places[0]):
            refuse_settings({"model": model}, "images and files of descriptors")
        rows = rows_to_index(places, **told, model_name=model_name, model=model)
        _report(index, add(rows), as_json)
        return
    refuse_settings({**told, "model_name": model_name})
    images = places[0]
    config = from_settings(EncodeConfig, settings or [])
    check_root(root, [images])
    table = open_images(images, root=root)
    with (
        Display().task("encode", len(table), "images") as advance,
        extend.encoded(index, table, model=model, out=out, config=config, advance=advance) as made,
    ):
        change, left_out = add(opened_rows(made)), Embeddings.open(made).errors
    for identifier, reason in left_out:
        typer.echo(f"left out {identifier}: {reason}", err=True)
    _report(index, change, as_json, left_out=len(left_out))


@index_app.command("remove")
def index_remove(
    index: IndexArgument,
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of images.")] = None,
    file: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="A file of ids, one a line.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="All images like these instead, e.g. 'label = dog and price < 20'.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove images from an index, as a new version of it."""
    from ray_retrieval import search
    from ray_retrieval.cores import cores

    named = [*(ids or []), *(_lines(file) if file is not None else [])]
    change = search.remove(index, named, where=where, dry_run=dry_run, threads=cores())
    _report(index, change, as_json, dry_run=dry_run)


@index_app.command("compact")
def index_compact(
    index: IndexArgument,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Write all anew in so many parts; parts that are as they should be stay."),
    ] = None,
    workers: Workers = 1,
    keep: Keep = 2,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write what is left of an index anew, and delete what no version needs."""
    from ray_retrieval import search
    from ray_retrieval.cluster.pool import pool_of
    from ray_retrieval.cores import cores

    rows = 0 if dry_run else search.Index.open(index).rows
    with rows_written("compact", rows) as progress, pool_of(workers, cores()) as pool:
        change = search.compact(
            index, shards=shards, keep=keep, dry_run=dry_run, pool=pool, progress=progress
        )
    _report(index, change, as_json, dry_run=dry_run)


@index_app.command("rollback")
def index_rollback(
    index: IndexArgument,
    to: Annotated[
        int | None, typer.Option(min=1, help="The version to bring back; the one before the current.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a new version of what an earlier one held."""
    from ray_retrieval import search

    _report(index, search.rollback(index, to), as_json)


@index_app.command("versions")
def index_versions(index: IndexArgument, as_json: AsJson = False) -> None:
    """List the versions of an index, the newest first; that one is searched."""
    from ray_retrieval import search

    found = search.versions(index)
    if as_json:
        print_json({"index": index, "versions": found})
        return
    table = Table("version", "made by", "rows", "deleted", "shards", "bytes", box=SIMPLE_HEAD, pad_edge=False)
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for version in found:
        numbers = (f"{version[name]:,}" for name in ("rows", "deleted", "shards", "bytes"))
        table.add_row(str(version["version"]), version["operation"], *numbers)
    console(highlight=False, markup=False).print(table)


@index_app.command("prune")
def index_prune(
    index: IndexArgument, keep: Keep = 2, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Delete old versions of an index, and files that no version needs."""
    from ray_retrieval import search

    pruned = search.prune(index, keep, dry_run=dry_run)
    if as_json:
        print_json({"index": index, "dry_run": dry_run, **pruned.as_json()})
    else:
        typer.echo(_pruned_in_words(pruned, dry_run))


@index_app.command("info")
def index_info(index: IndexArgument, as_json: AsJson = False) -> None:
    """Describe an index."""
    _describe(index, as_json)


@index_app.command("verify")
def index_verify(index: IndexArgument, as_json: AsJson = False) -> None:
    """Read every file of an index and compare checksums, row ranges and the self-test's answers."""
    from ray_retrieval.search import Index

    checks = Index.open(index).verify()
    if as_json:
        print_json({"index": index, "sound": True, "checks": checks})
        return
    for check in checks:
        typer.echo(f"ok      {check}")


def _to_plan(
    places: list[str], rows: int | None, bits: int | None, dimension: int | None, **settings: Any
) -> tuple[Any, int, int, int | None]:
    """Form, rows, local features, and bytes of what else is known, of rows to index or of numbers."""
    from ray_retrieval.descriptors import DescriptorKind, Form
    from ray_retrieval.errors import QueryError
    from ray_retrieval.search.planning import known_bytes
    from ray_retrieval.search.sources import EmbeddedRows

    numbers = sum(given is not None for given in (bits, dimension))
    wanted = dimension is None if places else numbers == 1
    if bool(places) == (rows is not None) or not wanted:
        raise QueryError(
            "what is to be planned is not said",
            where="index plan",
            mend="give embeddings or files, or --rows with --bits or --dimension",
        )
    if not places:
        assert rows is not None
        refuse_settings(settings)
        kind = DescriptorKind.CODES if bits else DescriptorKind.VECTORS
        return Form(kind, bits or dimension or 0), rows, 0, None
    source = rows_to_index(places, bits=bits, ids=None, labels=None, model_name="", **settings)
    features = source.embeddings.features if isinstance(source, EmbeddedRows) else 0
    return source.form, len(source), features, known_bytes(source)


def _describe(uri: str, as_json: bool) -> None:
    from ray_retrieval.search import Index

    info = Index.open(uri).info()
    if as_json:
        print_json(info)
        return
    for key, value in info.items():
        typer.echo(f"{key:<12} {value}")


def _report(index: str, change: Any, as_json: bool, *, dry_run: bool = False, left_out: int = 0) -> None:
    """Say what a change did, or would do."""
    manifest, pruned = change.manifest, change.pruned
    if as_json:
        print_json(
            {
                "index": index,
                "dry_run": dry_run,
                "changed": change.changed,
                "version": manifest.number,
                "operation": manifest.operation,
                "rows": manifest.rows,
                "added": change.added,
                "removed": change.removed,
                "skipped": change.skipped,
                "dropped": change.dropped,
                "left_out": left_out,
                "missed": change.missed,
                "pruned": None if pruned is None else pruned.as_json(),
            }
        )
        return
    for count, what in (
        (change.added, "added"),
        (change.removed, "would be removed" if dry_run else "removed"),
        (change.skipped, "skipped: in the index already"),
        (change.dropped, "removed before: no place in the files any more"),
        (left_out, "left out: cannot be decoded"),
    ):
        if count:
            typer.echo(f"{counted(count, 'image')} {what}")
    if change.changed and not dry_run:
        typer.echo(f"version {manifest.number}: {manifest.operation}; {counted(manifest.rows, 'image')}")
        typer.echo(f"undo    {command('index', 'rollback', index)}")
    elif not dry_run:
        typer.echo(f"version {manifest.number} stays: there is nothing to change")
    if change.missed is not None:
        typer.echo(f"warning {change.missed}", err=True)
    if pruned is not None:
        typer.echo(_pruned_in_words(pruned, dry_run))


def _pruned_in_words(pruned: Any, dry_run: bool) -> str:
    listed = ", ".join(map(str, sorted(pruned.versions))) or "none"
    spared = counted(pruned.spared, "recent file")
    left = f"; {spared} left alone, as somebody may be writing there" if pruned.spared else ""
    verb = "would delete" if dry_run else "deleted"
    return f"{verb} versions: {listed}; {counted(pruned.files, 'file')}, {pruned.bytes / 1e6:,.1f} MB{left}"


def _lines(file: Path) -> list[str]:
    from ray_retrieval.errors import DataError
    from ray_retrieval.search.vector_files import lines_of

    try:
        return [line for line in lines_of(file.read_bytes()) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise DataError(f"the ids cannot be read: {reason}", where=file, mend="give a text file") from None
