"""What is measured of a run: its models on the test queries, by the embeddings that this takes."""

from typing import Any

from ray_retrieval import search
from ray_retrieval.compare import acceptance
from ray_retrieval.cores import cores
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.encode import EncodeJob
from ray_retrieval.evaluate import evaluate
from ray_retrieval.finder import local_index
from ray_retrieval.model_folder import DESCRIPTION, model_of, read_model_description
from ray_retrieval.progress import Display
from ray_retrieval.recipe import Recipe
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.storage import Folder


def embeddings(run: Folder, role: str, model: str = "model") -> Folder:
    """Where the embeddings of a role of the benchmark go, by a model directory of the run."""
    return run / "embeddings" / f"{role}{model.removeprefix('model')}"


def queries_of(benchmark: Benchmark) -> str:
    """The role whose embeddings hold the queries: images that are queries and database are encoded once."""
    return "database" if benchmark.queries is benchmark.database else "queries"


def encode_jobs(recipe: Recipe, run: Folder, benchmark: Benchmark) -> list[EncodeJob]:
    """Queries and database by every model that is measured, and the queries by the one that verifies hits."""
    jobs = [
        EncodeJob(run / model, getattr(benchmark, role), embeddings(run, role, model))
        for model in _models(recipe, run)
        for role in dict.fromkeys((queries_of(benchmark), "database"))
    ]
    if (local := _local_queries(recipe, run)) is not None:
        jobs.append(EncodeJob(local[0], benchmark.queries, local[1]))
    return jobs


def measure(recipe: Recipe, run: Folder, benchmark: Benchmark, display: Display) -> dict[str, Any]:
    """What `metrics.json` says: every model on the test queries, and how they compare with published results.

    Args:
        recipe: of the run.
        run: with the embeddings, and of local features the index.
        benchmark: whose they are.
        display: where progress is shown.
    """
    models: dict[str, Any] = {}
    selected, role = recipe.train.select, queries_of(benchmark)
    errors, local = 0, _local_queries(recipe, run)
    for name in _models(recipe, run):
        queries = Embeddings.open(embeddings(run, role, name))
        database = Embeddings.open(embeddings(run, "database", name))
        description, _ = read_model_description(run / name)
        errors = database.error_count + (0 if role == "database" else queries.error_count)
        # With re-ranking each query counts four times; see `evaluate`.
        times = (len(benchmark.gallery_draws) or 1) * (4 if recipe.evaluate.rerank else 1)
        index = None
        if queries.form.kind is DescriptorKind.LOCAL:
            index = search.Index.open(run / "index", threads=cores(), model=queries.model)
        with display.task("evaluate", times * queries.rows, "queries") as advance:
            measured = evaluate(
                queries,
                database,
                recipe.evaluate,
                benchmark,
                threads=cores(),
                progress=lambda count, tick=advance: tick(count, ""),  # type: ignore[misc]
                index=index,
                features=None if local is None else Embeddings.open(local[1]),
            )
        models[selected if name == "model" else name.removeprefix("model-")] = {
            "epoch": description["training"]["epoch"],
            "validation": description["metrics"]["validation"],
            **measured,
            "notes": [*measured["notes"], *_notes_on_model(description["training"], queries.engine)],
        }
    return {
        "selected": selected,
        "models": models,
        "dataset": _facts(benchmark, errors),
        "published": acceptance(
            recipe.published,
            recipe.method.form.size,
            models[selected]["test"],
            benchmark=benchmark.name,
        ),
    }


def _models(recipe: Recipe, run: Folder) -> list[str]:
    """The model directories to measure: the selected one, and the other where it differs.

    Local features are measured by the index, which is the selected model's.
    """
    others = [name for name in ("model-best", "model-last") if run.exists(f"{name}/{DESCRIPTION}")]
    local = recipe.method.form.kind is DescriptorKind.LOCAL
    return ["model", *(others if recipe.evaluate.both and not local else [])]


def _local_queries(recipe: Recipe, run: Folder) -> tuple[Folder, Folder] | None:
    """The model of the index by which vectors are verified, and where its features of the queries go."""
    index = local_index(recipe.evaluate.rerank)
    if index is None:
        return None
    made_by = model_of(Folder(index))
    return made_by, embeddings(run, f"queries-{read_model_description(made_by)[1]}")


def _notes_on_model(training: dict[str, Any], engine: str) -> list[str]:
    """What a reader has to know of a model that a search has stopped, or that an export stood in for.

    Args:
        training: as `model.json` says it.
        engine: what computed the descriptors.
    """
    notes = []
    if training.get("unfinished"):
        stopped = f"the training was stopped after epoch {training['of_epochs']}"
        notes.append(f"{stopped}: what the method learns at its end, such as a whitening, the model lacks")
    if engine != "torch":
        notes.append(f"the descriptors were computed by {engine}, an export of the model")
    return notes


def _facts(benchmark: Benchmark, errors: int) -> dict[str, Any]:
    roles = ("train", "validation_queries", "validation_database", "queries", "database")
    return {
        "name": benchmark.name,
        **{role: len(getattr(benchmark, role)) for role in roles},
        "errors": errors,
        "notes": benchmark.notes,
    }
