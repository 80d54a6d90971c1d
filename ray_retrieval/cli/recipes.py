"""The commands that take a recipe, and the one that compares what they leave. Parsing and printing only."""

from typing import Annotated, Any

import typer

from ray_retrieval.cli.options import Fresh, Overrides, RecipeArgument, of_a_figure
from ray_retrieval.cli.printing import AsJson, print_json, short
from ray_retrieval.commands import command
from ray_retrieval.progress import Display


def run(
    recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False
) -> None:
    """Train, encode, index, evaluate and report: the main job."""
    from ray_retrieval.cli.tables import print_metrics
    from ray_retrieval.recipe import load_study
    from ray_retrieval.run import Run
    from ray_retrieval.study import Study

    recipes = load_study(recipe, overrides)
    if len(recipes) > 1:
        study = Study(recipes, fresh=fresh, display=Display())
        _show_comparison(study.all(), study.folder.uri_of("comparison.html"), as_json)
        return
    finished = Run(recipes[0], fresh=fresh, display=Display()).all()
    if as_json:
        print_json({**finished.metrics, "folder": finished.folder.uri, "report": finished.report})
        return
    print_metrics(finished.metrics)
    typer.echo(f"report  {short(finished.report)}")
    typer.echo(f"next    {command('serve', short(finished.folder.uri_of('index')))}")


def train(
    recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False
) -> None:
    """Train the recipe's model only."""
    from ray_retrieval.cli.tables import number, print_models
    from ray_retrieval.recipe import load_study
    from ray_retrieval.run import Run
    from ray_retrieval.study import Study

    recipes = load_study(recipe, overrides)
    following = f"next    {command('run', recipe, *(overrides or []))}"
    if len(recipes) > 1:
        models = Study(recipes, fresh=fresh, display=Display()).train()
        if as_json:
            print_json({"models": models})
            return
        print_models([{**model, "folder": short(model["folder"])} for model in models])
        typer.echo(following)
        return
    model = Run(recipes[0], fresh=fresh, display=Display()).only_train()
    if as_json:
        print_json(model)
        return
    validation = model["metrics"]["validation"].items()
    measured = ", ".join(f"validation {name} {number(value)}" for name, value in validation)
    typer.echo(f"model   {short(model['folder'])} ({model['fingerprint']}), {measured}")
    typer.echo(following)


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
    from ray_retrieval.cli.tables import print_trials
    from ray_retrieval.recipe import template
    from ray_retrieval.tune import Search

    search = Search(template(recipe, overrides), fresh=fresh, retry=retry, display=Display())
    tuned = search.all()
    if as_json:
        print_json(tuned.as_json())
        return
    print_trials(tuned.as_json())
    typer.echo(f"model   {short(tuned.folder.uri_of('model'))}, of trial {tuned.best[0].name}")
    typer.echo(f"report  {short(tuned.report)}")
    best = tuned.folder / tuned.best[0].folder
    if tuned.metrics is None:
        typer.echo(f"next    {command('run', short(best.uri_of('recipe.yaml')))}")
        return
    typer.echo(f"next    {command('serve', short(best.uri_of('index')))}")


def evaluate(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure the recipe's trained model on its test queries."""
    from ray_retrieval.cli.tables import print_metrics
    from ray_retrieval.recipe import load_study
    from ray_retrieval.run import Run
    from ray_retrieval.study import Study

    recipes = load_study(recipe, overrides)
    if len(recipes) > 1:
        study = Study(recipes, display=Display())
        _show_comparison(study.evaluate(), study.folder.uri_of("comparison.html"), as_json)
        return
    metrics = Run(recipes[0], display=Display()).only_measure()
    if as_json:
        print_json(metrics)
    else:
        print_metrics(metrics)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of finished runs, or folders of such folders."),
    ],
    out: Annotated[
        str | None, typer.Option("--out", help="Where comparison.json and comparison.html go.")
    ] = None,
    figure: Annotated[
        str | None,
        typer.Option(callback=of_a_figure, help="Save the precision-recall curves (.svg, .png, .pdf)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: their metrics, precision-recall curves and published results side by side."""
    from ray_retrieval import compare_page
    from ray_retrieval.compare import compare as compare_runs
    from ray_retrieval.storage import Folder

    comparison = compare_runs(runs)
    if figure is not None:
        compare_page.save_figure(comparison, figure)
    page = None if out is None else compare_page.write(comparison, Folder(out))
    _show_comparison(comparison, page, as_json)
    if figure is not None and not as_json:
        typer.echo(f"figure  {figure}")


def _show_comparison(comparison: dict[str, Any], page: str | None, as_json: bool) -> None:
    from ray_retrieval.cli.tables import print_comparison

    if as_json:
        print_json(comparison)
        return
    print_comparison(comparison)
    if page is not None:
        typer.echo(f"report  {short(page)}")
