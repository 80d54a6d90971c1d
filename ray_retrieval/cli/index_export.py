"""The command `index export`. Parsing and printing only."""

from typing import Annotated, Any

import typer

from ray_retrieval.cli.printing import AsJson, print_json
from ray_retrieval.progress import rows_written
from ray_retrieval.words import counted


def index_export(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="An index directory.")],
    out: Annotated[str, typer.Option("--out", help="A folder for the files.")],
    form: Annotated[
        str, typer.Option("--format", help="npy, faiss, hnsw, parquet, arrow, or lance (needs pylance).")
    ] = "parquet",
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate", help="With faiss: what the approximate search is made of, as one index."
        ),
    ] = False,
    version: Annotated[int | None, typer.Option(min=1, help="Of the index; the current one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an index as files of another format; build reads the folder again."""
    from ray_retrieval import search

    kind: Any = form  # which ones there are, `export` says
    rows = search.Index.open(index, version=version).rows
    with rows_written("export", rows) as progress:
        made = search.export(index, out, kind, approximate=approximate, version=version, progress=progress)
    if as_json:
        print_json({"folder": out, **made})
        return
    files = ", ".join(entry["file"] for entry in made["files"]) or "rows.lance"
    typer.echo(f"export  {counted(made['rows'], 'row')} in {out}: {files}; see export.json")
