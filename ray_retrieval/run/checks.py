"""What is refused before a run starts.

A folder that is another's; a method, a benchmark and a way to measure that do not go together.
"""

from collections.abc import Sequence, Set

from ray_retrieval import recipe as recipes
from ray_retrieval.config import validate
from ray_retrieval.cores import cores
from ray_retrieval.data.benchmark import Benchmark, places_in
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.engines import find_export
from ray_retrieval.errors import ArtefactError, RecipeError, RetrievalError
from ray_retrieval.finder import local_index
from ray_retrieval.model_folder import DESCRIPTION, model_of, read_model_description
from ray_retrieval.recipe import Recipe
from ray_retrieval.run_folder import RECIPE, WRITTEN, deleted, refuse_foreign
from ray_retrieval.search import Index
from ray_retrieval.search.embeddings import check_columns
from ray_retrieval.search.rerank.verification import matched
from ray_retrieval.storage import Folder


def refuse_another_run(recipe: Recipe, folder: Folder) -> None:
    """An output folder belongs to one model; only what does not change it may differ.

    Raises:
        RecipeError: if the folder holds a run of a recipe that gives another model, naming what differs, or
            something that is no run.
        ArtefactError: if the run is of another version of the format.
    """
    refuse_foreign(folder)
    if not folder.exists(RECIPE):
        return
    values = recipes.read_values(folder.uri_of(RECIPE))
    try:
        old = validate(Recipe, values).of_the_model()
    except RetrievalError:
        old = {}  # written by another release: its keys are not ours
    changed = recipes.differences(old, recipe.of_the_model())
    if changed:
        raise RecipeError(
            f"the folder holds a run of another recipe ({recipes.in_few_words(changed)})",
            where=folder,
            mend="choose another output=… or delete that run with `fresh`",
        )


def refuse_deleted(recipe: Recipe, folders: Sequence[Folder], written: Set[str] = WRITTEN) -> None:
    """Raise RecipeError if a run needs something that is to be deleted before it starts.

    Args:
        recipe: of the run.
        folders: of the runs that are to be deleted.
        written: what is deleted in them, by its name there.
    """
    needed = {"train.start": recipe.train.start, "evaluate.rerank": local_index(recipe.evaluate.rerank)}
    for where, location in needed.items():
        for folder in folders:
            if location is not None and deleted(folder, location, written):
                raise RecipeError(
                    f"`fresh` would delete {location}, which the recipe needs, with what is in {folder}",
                    where=where,
                    mend="choose another output=…, or copy it to another place first",
                )


def refuse_codes(recipe: Recipe, benchmark: Benchmark) -> None:
    """The metrics of codes leave no query out of its own results, and know no ground truth.

    Lists that have their queries in the database go on: published numbers count each as its own hit.

    Raises:
        RecipeError: if the benchmark needs that, in the test or in the validation.
    """
    if recipe.method.form.kind is not DescriptorKind.CODES:
        return
    if benchmark.ground_truth is not None:
        raise RecipeError(
            f"{benchmark.name} is measured with vectors, and {recipe.method.name} makes codes",
            where="data",
            mend="take a method that makes vectors, such as gem",
        )
    pairs = {
        "queries": (benchmark.queries, benchmark.database),
        "validation queries": (benchmark.validation_queries, benchmark.validation_database),
    }
    for role, (queries, database) in pairs.items():
        published = role == "queries" and benchmark.counts_queries
        if queries is database:
            found = "searched in themselves"
        elif not published and (places_in(queries, database) >= 0).any():
            found = "images of the database that they search"
        else:
            continue
        raise RecipeError(
            f"the {role} of {benchmark.name} are {found}, and "
            f"{recipe.method.name} makes codes, whose measures would count each as its own hit",
            where="data",
            mend="take a method that makes vectors, such as xbm, or give queries apart",
        )


def refuse_unmeasurable(recipe: Recipe, benchmark: Benchmark) -> None:
    """What would end the measurement of a model is found before it is trained.

    Raises:
        DataError: if queries or database have a column of a name that embeddings need.
        RecipeError: if the model is one that describes no image, its kind is not measured by the benchmark,
            or what verifies its hits is not there.
    """
    for table in (benchmark.queries, benchmark.database):
        check_columns(table.column_names, recipe.method.form, where=table.name)
    recipe.method.check_described()
    if benchmark.gallery_draws and recipe.method.form.kind is DescriptorKind.LOCAL:
        raise RecipeError(
            f"the gallery of {benchmark.name} is drawn several times, which takes one index a draw of the "
            f"local features that {recipe.method.name} makes",
            where="data",
            mend="take a method that makes vectors, or another benchmark",
        )
    _refuse_local_index(recipe, benchmark)


def refuse_engine(recipe: Recipe, folder: Folder) -> None:
    """What encodes must be there before anything is trained.

    Args:
        recipe: of the run.
        folder: of the run.

    Raises:
        ArtefactError: if the run's model has no export for the recipe's engine.
        RecipeError: if there is no model yet, of which there could be an export; or the engine's package is
            not installed.
    """
    engine, model = recipe.encode.engine, folder / "model"
    if engine == "torch":
        return
    if not model.exists(DESCRIPTION):
        raise RecipeError(
            f"{engine} runs an export of a model, and this run has none yet",
            where="encode.engine",
            mend=f"leave it out; then export its model and encode by: ray-retrieval encode --engine {engine}",
        )
    find_export(model, read_model_description(model)[1], engine)


def _refuse_local_index(recipe: Recipe, benchmark: Benchmark) -> None:
    """Raise RecipeError if vectors cannot be verified by the index that the steps of re-ranking name."""
    path = local_index(recipe.evaluate.rerank)
    if path is None:
        return
    try:
        index = Index.open(Folder(path), threads=cores())
        if index.form.kind is not DescriptorKind.LOCAL:
            raise ArtefactError(f"it holds {index.form}, not local features", where=path)
        model_of(index.folder)
        matched(index, benchmark.database.ids)
    except ArtefactError as error:
        raise RecipeError(
            f"'local' names {error.where or path}: {error.problem}",
            where="evaluate.rerank",
            mend="name an index of local features of the same images, beside the model that made it",
        ) from None
