"""The commands that ask with images: `search`, `predict` and `match`. Parsing and printing only."""

from typing import Annotated

import typer

from ray_retrieval.cli.options import EngineOption, ModelOption, of_a_picture, with_options
from ray_retrieval.cli.printing import AsJson, print_json
from ray_retrieval.cli.vectors import Bits, Column, Ids, ModelName, Normalise, answers_to, refuse_settings


def search(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="An index directory.")],
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Query images.")] = None,
    vectors: Annotated[
        str | None,
        typer.Option(
            help="A file of codes or vectors as queries instead: .npy, .parquet, as for index build."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Hits for each query.")] = 10,
    picture: Annotated[
        str | None,
        typer.Option(callback=of_a_picture, help="Save a picture of queries and hits (.png, .jpg)."),
    ] = None,
    model: ModelOption = None,
    box: Annotated[
        tuple[float, float, float, float] | None,
        typer.Option(help="Left, top, right, bottom in pixels: the part of the query images that is meant."),
    ] = None,
    rerank: Annotated[
        list[str] | None,
        typer.Option(
            help="A step of re-ranking: k_reciprocal, query_expansion, database_augmentation, diffusion, "
            "superglobal, geometric_verification, or one with settings, e.g. '{name: k_reciprocal, k1: 10}'. "
            "Local features are verified geometrically unless it is none."
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Only among images like these, e.g. 'label in (cat, dog) and price < 20'."),
    ] = None,
    bits: Bits = None,
    normalise: Normalise = False,
    column: Column = None,
    ids: Ids = None,
    model_name: ModelName = "",
    effort: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of an approximate search, e.g. nprobe=64."),
    ] = None,
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="Compare all images on a GPU; the hits are those of the exact search."),
    ] = False,
    engine: EngineOption = None,
    as_json: AsJson = False,
) -> None:
    """Find the nearest images of an index."""
    from ray_retrieval import pictures
    from ray_retrieval.cli.tables import print_answers
    from ray_retrieval.errors import RecipeError
    from ray_retrieval.query import Searcher
    from ray_retrieval.recipe import from_settings, rerank_steps
    from ray_retrieval.search.effort import Effort

    steps = rerank_steps(rerank or [])
    harder = from_settings(Effort, effort) if effort else None
    told = {"bits": bits, "normalise": normalise, "column": column, "ids": ids, "model_name": model_name}
    if bool(images) == (vectors is not None):
        raise RecipeError(
            "queries are images, or --vectors FILE: one of the two",
            where="search",
            mend="e.g. ray-retrieval search INDEX IMAGE",
        )
    if vectors is not None:
        of_images = (("--picture", picture), ("--box", box), ("--model", model), ("--engine", engine))
        for option, value in of_images:
            if value is not None:
                raise RecipeError("it is for query images", where=option, mend="leave it out")
        names, answers, form = answers_to(
            index, vectors, k, where=where, rerank=steps, gpu=gpu, effort=harder, **told
        )
        print_answers("vector", names, answers, form, as_json)
        return
    refuse_settings(told)
    queries = images or []
    searcher = Searcher(index, model, rerank=steps, gpu=gpu, engine=engine or "torch", effort=harder)
    unmeasured = searcher.index.manifest.otherwise_encoded(engine or "torch")
    if unmeasured is not None:
        typer.echo(f"warning {with_options(unmeasured, ['search'])}", err=True)
    answers = searcher.answers(queries, k, box=box, where=where)
    if picture is not None:
        examples = [
            searcher.example(image, answer.hits) for image, answer in zip(queries, answers, strict=True)
        ]
        pictures.save(pictures.grid(examples), picture)
    print_answers("image", queries, answers, searcher.index.form, as_json)
    if picture is not None and not as_json:
        typer.echo(f"picture {picture}")


def predict(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="An index directory.")],
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The image asked about.")],
    picture: Annotated[
        str | None,
        typer.Option(callback=of_a_picture, help="Save a picture of the image and its nearest (.png, .jpg)."),
    ] = None,
    model: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """Find the nearest image of an index, and the class that the model's class head gives."""
    from ray_retrieval import pictures
    from ray_retrieval.cli.tables import print_prediction
    from ray_retrieval.query import Searcher

    searcher = Searcher(index, model)
    prediction = searcher.predict(image)
    if picture is not None:
        pictures.save(pictures.grid([searcher.example(image, [prediction.nearest])]), picture)
    if as_json:
        print_json({"image": image, **prediction.as_json(), "picture": picture})
        return
    far = prediction.nearest.in_words(searcher.index.form)
    print_prediction(prediction.as_json(), far)
    if picture is not None:
        typer.echo(f"picture  {picture}")


def match(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The directory of a model of local features.")
    ],
    first: Annotated[str, typer.Argument(metavar="IMAGE", help="A photograph.")],
    second: Annotated[str, typer.Argument(metavar="IMAGE", help="Another.")],
    picture: Annotated[
        str | None,
        typer.Option(callback=of_a_picture, help="Save both side by side with what agrees (.png, .jpg)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="How to compare them, e.g. geometry.model=homography."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether two photographs show the same thing, and where they agree."""
    from ray_retrieval import match_picture, pictures
    from ray_retrieval.match import match as match_images
    from ray_retrieval.recipe import from_settings
    from ray_retrieval.search.verify import VerifyConfig

    found = match_images(model, first, second, from_settings(VerifyConfig, settings or []))
    if picture is not None:
        pictures.save(match_picture.picture(found), picture)
    if as_json:
        print_json({**found.as_json(), "picture": picture})
        return
    typer.echo(f"{found.verdict}: {match_picture.in_words(found)}")
    if picture is not None:
        typer.echo(f"picture {picture}")
