"""What commands are told of descriptors that were made elsewhere, and searching with such. Parsing only."""

from typing import Annotated, Any

import typer

Bits = Annotated[int | None, typer.Option(min=1, help="Of a code; default 8 for each byte.")]
Normalise = Annotated[
    bool, typer.Option("--normalise", help="Divide each vector by its length, which has to be 1.")
]
Column = Annotated[
    str | None,
    typer.Option(help="The column of a table, or array of a .npz file, that holds the descriptors."),
]
Ids = Annotated[
    str | None,
    typer.Option(
        help="A column, or a file of ids: text, one a line, .npy or .json. Default the column id; where "
        "there is none, rows are known by their numbers."
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(help="A column of class names or numbers, or a file of them as for --ids. Default: label."),
]
ModelName = Annotated[
    str, typer.Option(help="What made the descriptors, in your words; rows of another name do not mix.")
]


def holds_descriptors(place: str, column: str | None = None, index: str | None = None) -> bool:
    """Whether a path is that of descriptors in a file of others, or of an export, rather than of images.

    Args:
        place: a path or URI.
        column: that is said to hold descriptors, of a table.
        index: that the rows are for. To one of descriptors that were made elsewhere no images are added, so a
            table may then have both.
    """
    from ray_retrieval.search.export_files import is_export
    from ray_retrieval.search.importing import made_elsewhere
    from ray_retrieval.search.manifest import read_current
    from ray_retrieval.search.table_files import columns_of_descriptors, open_table
    from ray_retrieval.search.vector_files import SUFFIXES, suffix_of
    from ray_retrieval.storage import Folder

    if is_export(place):
        return True
    suffix = suffix_of(place)
    if suffix != ".parquet" or column is not None:
        return suffix in SUFFIXES
    schema = open_table(place).schema
    found = bool(columns_of_descriptors(schema))
    if {"image", "img"} & set(schema.names):
        return found and index is not None and made_elsewhere(read_current(Folder(index)).model)
    return found or "path" not in schema.names


def check_several(places: list[str]) -> None:
    """Raise RecipeError unless each of several places is a file of descriptors, or an export."""
    from ray_retrieval.errors import RecipeError
    from ray_retrieval.search.export_files import is_export
    from ray_retrieval.search.vector_files import SUFFIXES, suffix_of

    for place in places:
        if suffix_of(place) not in SUFFIXES and not is_export(place):
            raise RecipeError(
                "several places are files of descriptors, which this is none of",
                where=place,
                mend="add images from one place at a time, or list them in a file",
            )


def rows_to_index(places: list[str], *, model: str | None = None, **settings: Any) -> Any:
    """The rows of an embeddings directory, or of files of descriptors.

    Args:
        places: one embeddings directory, or paths or URIs of files.
        model: the directory of the model that made what is in the files, where one of this package did.
        settings: of `importing.ImportConfig`.

    Raises:
        RecipeError: if a setting is given for embeddings, or the model makes something else.
        RetrievalError: as `building.opened_rows` and `importing.imported`.
    """
    from ray_retrieval import search
    from ray_retrieval.descriptors import Form
    from ray_retrieval.errors import RecipeError
    from ray_retrieval.model_folder import read_model_description
    from ray_retrieval.search.building import opened_rows
    from ray_retrieval.storage import Folder

    one_folder = len(places) == 1 and not Folder(places[0]).is_file()
    if one_folder and not holds_descriptors(places[0], settings["column"]):
        refuse_settings({**settings, "model": model})
        return opened_rows(places[0])
    if model is None:
        return search.imported(places, **settings)
    if settings["model_name"]:
        raise RecipeError("a model has its own name", where="--model-name", mend="leave it or --model out")
    description, fingerprint = read_model_description(Folder(model))
    made = Form.from_json(description)
    settings["bits"] = settings["bits"] or description.get("bits")
    rows = search.imported(places, model=fingerprint, **settings)
    if made != rows.form:
        raise RecipeError(f"the model makes {made}, the files hold {rows.form}", where=model)
    return rows


def refuse_settings(settings: dict[str, Any], what: str = "files of descriptors") -> None:
    """Raise RecipeError if an option is given that is for something else, where there is none."""
    from ray_retrieval.errors import RecipeError

    given = [name for name, value in settings.items() if value]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise RecipeError(f"it is for {what}", where=option, mend="leave it out")


def answers_to(
    index: str,
    file: str,
    k: int,
    *,
    where: str | None,
    rerank: Any,
    gpu: bool,
    effort: Any,
    **settings: Any,
) -> tuple[list[str], list[Any], Any]:
    """What an index answers to the descriptors in a file.

    Args:
        index: the index directory.
        file: a path or URI.
        k: hits of each.
        where: a filter, see `search.filters`.
        rerank: steps of re-ranking.
        gpu: search on a GPU, see `Index.open`.
        effort: of an approximate search, see `Finder`.
        settings: of `importing.ImportConfig`.

    Returns:
        The ids of the queries, or their numbers; an answer each; and the form of the index.

    Raises:
        RetrievalError: as `importing.imported`, `finder.Finder`.
    """
    from ray_retrieval.finder import Finder
    from ray_retrieval.search.importing import queries_in

    finder = Finder(index, rerank=rerank, gpu=gpu, effort=effort)
    finder.check(k, where)
    ids, queries = queries_in(file, finder.index.form, finder.index.model, **settings)
    return ids, finder.find(queries, k, where=where), finder.index.form
