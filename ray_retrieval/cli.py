"""The command line: one sub-command per verb. Parsing and printing only."""

import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ray_retrieval
from ray_retrieval.cli_engine import EngineOption, with_engine
from ray_retrieval.cli_index import index_app
from ray_retrieval.cli_serve import serve
from ray_retrieval.cli_submit import submit_app
from ray_retrieval.cli_vectors import Bits, Column, Ids, ModelName, Normalise, answers_to, refuse_settings
from ray_retrieval.errors import RetrievalError
from ray_retrieval.printing import AsJson, print_json
from ray_retrieval.progress import Display

app = typer.Typer(
    name="ray-retrieval",
    help="Image retrieval by published methods, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(index_app, name="index")
gldv2_app = typer.Typer(help="Fetch and build Google Landmarks v2, to learn from.", no_args_is_help=True)
app.add_typer(gldv2_app, name="gldv2")
app.add_typer(submit_app, name="submit")

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, or the name of a ready-made one, such as quickstart."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that replace the recipe's, e.g. train.epochs=10."
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left in the output folder.")]
_INTERRUPTED = 130  # what Typer makes of Ctrl-C
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Click's base of what is wrong with a command line, which Typer does not export."""
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="The model that made the index; it is looked for beside the index."),
]


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


@app.command()
def run(
    recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False
) -> None:
    """Train, encode, index, evaluate and report: the main job."""
    from ray_retrieval.recipe import load_study
    from ray_retrieval.run import Run
    from ray_retrieval.study import Study

    recipes = load_study(recipe, overrides)
    if len(recipes) > 1:
        study = Study(recipes, fresh=fresh, display=Display())
        _show_comparison(study.all(), study.folder.uri, as_json)
        return
    finished = Run(recipes[0], fresh=fresh, display=Display()).all()
    if as_json:
        print_json({**finished.metrics, "folder": finished.folder.uri, "report": finished.report})
        return
    _print_metrics(finished.metrics)
    typer.echo(f"report  {_short(finished.report)}")
    typer.echo(f"next    ray-retrieval serve {_short(finished.folder.uri_of('index'))}")


@app.command()
def train(
    recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False
) -> None:
    """Train the recipe's model only."""
    from ray_retrieval.cluster import connect
    from ray_retrieval.model_folder import read_model_description
    from ray_retrieval.recipe import load_study
    from ray_retrieval.run import Run
    from ray_retrieval.study import Study
    from ray_retrieval.tables import print_models

    recipes = load_study(recipe, overrides)
    next_command = shlex.join(["ray-retrieval", "run", recipe, *(overrides or [])])
    if len(recipes) > 1:
        models = Study(recipes, fresh=fresh, display=Display()).train()
        if as_json:
            print_json({"models": models})
            return
        print_models([{**model, "folder": _short(model["folder"])} for model in models])
        typer.echo(f"next    {next_command}")
        return
    job = Run(recipes[0], fresh=fresh, display=Display())
    benchmark = job.prepare()
    with connect():
        job.train(benchmark)
    description, fingerprint = read_model_description(job.folder / "model")
    if as_json:
        print_json({**description, "fingerprint": fingerprint, "folder": job.folder.uri_of("model")})
        return
    validation = description["metrics"]["validation"].items()
    measured = ", ".join(f"validation {name} {_number(value)}" for name, value in validation)
    typer.echo(f"model   {_short(job.folder.uri_of('model'))} ({fingerprint}), {measured}")
    typer.echo(f"next    {next_command}")


@app.command()
def tune(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Fresh = False,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="Try trials again that failed for good, once what they say is mended."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search for hyperparameters as the recipe's `tune` block says; run again, it goes on."""
    from ray_retrieval.recipe import template
    from ray_retrieval.tables import print_trials
    from ray_retrieval.tune import Search

    search = Search(template(recipe, overrides), fresh=fresh, retry=retry, display=Display())
    tuned = search.all()
    if as_json:
        print_json(tuned.as_json())
        return
    print_trials(tuned.as_json())
    typer.echo(f"model   {_short(tuned.folder.uri_of('model'))}, of trial {tuned.best[0].name}")
    typer.echo(f"report  {_short(tuned.report)}")
    best = tuned.folder / tuned.best[0].folder
    if tuned.metrics is None:
        typer.echo(f"next    ray-retrieval run {_short(best.uri_of('recipe.yaml'))}")
        return
    typer.echo(f"next    ray-retrieval serve {_short(best.uri_of('index'))}")


@app.command()
def evaluate(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure the recipe's trained model on its test queries."""
    from ray_retrieval.cluster import connect
    from ray_retrieval.recipe import load_study
    from ray_retrieval.run import Run
    from ray_retrieval.study import Study

    recipes = load_study(recipe, overrides)
    if len(recipes) > 1:
        study = Study(recipes, display=Display())
        _show_comparison(study.evaluate(), study.folder.uri, as_json)
        return
    job = Run(recipes[0], display=Display())
    job.require_model()
    benchmark = job.prepare()
    with connect():
        job.encode(benchmark)
    metrics = job.evaluate(benchmark)
    if as_json:
        print_json(metrics)
    else:
        _print_metrics(metrics)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of finished runs, or folders of such folders."),
    ],
    out: Annotated[
        str | None, typer.Option("--out", help="Where comparison.json and comparison.html go.")
    ] = None,
    figure: Annotated[
        str | None, typer.Option(help="Save the precision-recall curves (.svg, .png, .pdf).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: their metrics, precision-recall curves and published results side by side."""
    from ray_retrieval import compare_page
    from ray_retrieval.compare import compare as compare_runs
    from ray_retrieval.storage import Folder

    if figure is not None:
        compare_page.check_suffix(figure)
    comparison = compare_runs(runs)
    if figure is not None:
        compare_page.save_figure(comparison, figure)
    if out is not None:
        compare_page.write(comparison, Folder(out))
    _show_comparison(comparison, out, as_json)
    if figure is not None and not as_json:
        typer.echo(f"figure  {figure}")


@app.command()
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
    from ray_retrieval.data.datasets import survey
    from ray_retrieval.recipe import from_settings
    from ray_retrieval.tables import print_datasets, print_survey

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
    root: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where everything goes.")],
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

    numbers = parse_range(tars) if tars is not None else ()
    fetch(root, numbers, remove_tars=remove_tars, say=Display().say)
    typer.echo(f"next    ray-retrieval gldv2 build {root} --out OUT")


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
    from ray_retrieval.cores import cores
    from ray_retrieval.data.datasets.gldv2_build import build
    from ray_retrieval.data.datasets.gldv2_plan import Gldv2BuildConfig, plan
    from ray_retrieval.recipe import from_settings

    planned = plan(source, from_settings(Gldv2BuildConfig, settings or []))
    # Reading small files is waiting for the disk, mostly.
    threads = 4 * cores()
    with Display().task("build", len(planned.ids), "images") as advance:
        made = build(planned, out, threads=threads, advance=lambda count: advance(count, ""))
    if as_json:
        print_json({"folder": out, **{key: made[key] for key in ("images", "classes", "missing")}})
        return
    for part, facts in made["parts"].items():
        typer.echo(f"{part:<10}  {facts['images']:,} images of {facts['classes']:,} classes")
    if made["missing"]:
        typer.echo(f"missing     {made['missing']:,} images: {out}/missing.csv")
    typer.echo(f"next        data: {{name: gldv2, root: {out}}}")


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
    typer.echo(f"ok      {files} files")


@app.command()
def encode(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory.")],
    images: Annotated[
        str, typer.Argument(metavar="IMAGES", help="A folder, list (.txt), CSV or Parquet of images.")
    ],
    out: Annotated[str, typer.Option("--out", help="Where the embeddings go.")],
    root: Annotated[
        str | None, typer.Option(help="The folder that paths in a list or CSV start from.")
    ] = None,
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
    from ray_retrieval.search.embeddings import Embeddings
    from ray_retrieval.storage import Folder

    config = from_settings(EncodeConfig, with_engine(settings, engine))
    read_model_description(Folder(model))
    table = open_images(images, root=root)
    with connect(), Display().task("encode", len(table), "images") as advance:
        run_encode([EncodeJob(Folder(model), table, Folder(out))], config, advance=advance)
    made = Embeddings.open(out)
    if as_json:
        print_json({"folder": out, "rows": made.rows, "errors": made.error_count, "model": made.model})
        return
    typer.echo(f"encoded {made.rows:,} images into {out}")
    if made.error_count:
        typer.echo(f"left out {made.error_count:,} that cannot be decoded: {out}/errors.parquet")
    typer.echo(f"next    ray-retrieval index build {out} --out INDEX")


@app.command()
def embed(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory.")],
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Images, folders, lists (.txt), CSV or Parquet of images."),
    ],
    out: Annotated[str | None, typer.Option("--out", help="A file for them: .npy or .parquet.")] = None,
    root: Annotated[
        str | None, typer.Option(help="The folder that paths in a list or CSV start from.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print or save the vectors or codes of images, in this process; for whole databases see encode."""
    from ray_retrieval import embed as embedding
    from ray_retrieval.data.table import open_images

    if out is not None:
        embedding.check_suffix(out)
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
        typer.echo(f"saved   {len(made.ids):,} {made.form} in {out}")


@app.command()
def search(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="An index directory.")],
    images: Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Query images.")] = None,
    vectors: Annotated[
        str | None,
        typer.Option(
            help="A file of codes or vectors as queries instead: .npy, .parquet, as for index build."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Hits for each query.")] = 10,
    picture: Annotated[
        str | None, typer.Option(help="Save a picture of queries and hits (.png, .jpg).")
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
    settings: Annotated[
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
    from ray_retrieval.errors import RecipeError
    from ray_retrieval.query import Searcher
    from ray_retrieval.recipe import from_settings, rerank_steps
    from ray_retrieval.search.effort import Effort
    from ray_retrieval.tables import print_answers

    if picture is not None:
        pictures.check_suffix(picture)
    steps = rerank_steps(rerank or [])
    effort = from_settings(Effort, settings) if settings else None
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
            index, vectors, k, where=where, rerank=steps, gpu=gpu, effort=effort, **told
        )
        print_answers("vector", names, answers, form, as_json)
        return
    refuse_settings(told)
    queries = images or []
    searcher = Searcher(index, model, rerank=steps, gpu=gpu, engine=engine or "torch", effort=effort)
    unmeasured = searcher.index.manifest.otherwise_encoded(engine or "torch")
    if unmeasured is not None:
        typer.echo(f"warning {unmeasured}", err=True)
    answers = searcher.answers(queries, k, box=box, where=where)
    if picture is not None:
        examples = [
            searcher.example(image, answer.hits) for image, answer in zip(queries, answers, strict=True)
        ]
        pictures.save(pictures.grid(examples), picture)
    print_answers("image", [str(image) for image in queries], answers, searcher.index.form, as_json)
    if picture is not None and not as_json:
        typer.echo(f"picture {picture}")


@app.command()
def predict(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="An index directory.")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image asked about.")],
    picture: Annotated[
        str | None, typer.Option(help="Save a picture of the image and its nearest (.png, .jpg).")
    ] = None,
    model: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """Find the nearest image of an index, and the class that the model's class head gives."""
    from ray_retrieval import pictures
    from ray_retrieval.query import Searcher
    from ray_retrieval.tables import print_prediction

    if picture is not None:
        pictures.check_suffix(picture)
    searcher = Searcher(index, model)
    prediction = searcher.predict(image)
    if picture is not None:
        pictures.save(pictures.grid([searcher.example(image, [prediction.nearest])]), picture)
    if as_json:
        print_json({"image": str(image), **prediction.as_json(), "picture": picture})
        return
    far = prediction.nearest.in_words(searcher.index.form)
    print_prediction(prediction.as_json(), far)
    if picture is not None:
        typer.echo(f"picture  {picture}")


@app.command()
def match(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The directory of a model of local features.")
    ],
    first: Annotated[str, typer.Argument(metavar="IMAGE", help="A photograph.")],
    second: Annotated[str, typer.Argument(metavar="IMAGE", help="Another.")],
    picture: Annotated[
        str | None, typer.Option(help="Save both side by side with what agrees (.png, .jpg).")
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

    if picture is not None:
        pictures.check_suffix(picture)
    found = match_images(model, first, second, from_settings(VerifyConfig, settings or []))
    if picture is not None:
        pictures.save(match_picture.picture(found), picture)
    if as_json:
        print_json({**found.as_json(), "picture": picture})
        return
    typer.echo(f"{found.verdict}: {match_picture.in_words(found)}")
    if picture is not None:
        typer.echo(f"picture {picture}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory.")],
    out: Annotated[
        str | None,
        typer.Option("--out", help="Where it goes; unless told, into the model's folder, for --engine."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="onnx (needs the extra `export`) or torch (torch.export).")
    ] = "onnx",
    images: Annotated[
        str | None,
        typer.Option(
            help="Images to compare on: a folder, list, CSV or Parquet; else those of the recipe beside the "
            "model."
        ),
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="The folder that paths in a list or CSV start from.")
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Of onnx: the backbone in 8 bits, calibrated on the images; what it costs is measured where "
            "they have labels.",
        ),
    ] = False,
    max_loss: Annotated[
        float | None,
        typer.Option(help="How much of MAP or recall@1, from 0 to 1, 8 bits may cost; 0.02 unless told."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model as one file for other programs, compared with the model on images."""
    from ray_retrieval.data.table import open_images
    from ray_retrieval.errors import RecipeError
    from ray_retrieval.export import default_folder
    from ray_retrieval.export import export as run_export
    from ray_retrieval.storage import Folder
    from ray_retrieval.tables import print_export

    if root is not None and images is None:
        raise RecipeError("it is for the paths of --images", where="--root", mend="leave it out")
    table = None if images is None else open_images(images, root=root)
    target = default_folder(Folder(model), form, int8) if out is None else Folder(out)
    made = run_export(model, target, form=form, images=table, int8=int8, max_loss=max_loss)
    folder = out if out is not None else _short(target.uri)
    if as_json:
        print_json({"folder": folder, **made})
    else:
        print_export(made, folder)


app.command()(serve)


def _show_comparison(comparison: dict[str, Any], folder: str | None, as_json: bool) -> None:
    from ray_retrieval.tables import print_comparison

    if as_json:
        print_json(comparison)
        return
    print_comparison(comparison)
    if folder is not None:
        typer.echo(f"report  {_short(f'{folder}/comparison.html')}")


def _print_metrics(metrics: dict[str, Any]) -> None:
    """A short table of the models measured, and the policy of its main number."""
    from ray_retrieval.tables import print_published

    models = metrics["models"]
    table = Table(
        "metric",
        *(f"{name} (epoch {model['epoch']})" for name, model in models.items()),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    validated = dict.fromkeys(name for model in models.values() for name in model["validation"])
    for name in validated:
        table.add_row(f"validation {name}", *(_number(m["validation"].get(name)) for m in models.values()))
    first = next(iter(models.values()))["test"]
    for row, entry in enumerate(first):
        table.add_row(entry["name"], *(_number(model["test"][row]["value"]) for model in models.values()))
    console = Console(highlight=False)
    console.print(table)
    print_published(metrics["published"], console)
    console.print(f"{first[0]['name']}: {escape(first[0]['policy'])}.", style="dim")
    for note in next(iter(models.values()))["notes"]:
        console.print(f"note: {escape(note)}.", style="dim")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _short(path: str) -> str:
    """A path as one would type it here."""
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 the user can mend it, 130 interrupted, 1 a bug."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(args=arguments, prog_name="ray-retrieval", standalone_mode=False)
    except (RetrievalError, _UsageError) as error:
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exc()
        if said := _misuse(error) if isinstance(error, _UsageError) else str(error):
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


if __name__ == "__main__":
    main()
