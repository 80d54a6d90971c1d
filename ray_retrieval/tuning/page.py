"""The report of a search: one HTML page, whole in itself."""

from dataclasses import asdict
from typing import Any

from ray_retrieval.charts import COLOURS, Chart, loss_chart, validation_chart
from ray_retrieval.history import read_history
from ray_retrieval.recipe import Recipe
from ray_retrieval.report import environment
from ray_retrieval.storage import Folder
from ray_retrieval.tuning import charts
from ray_retrieval.tuning.charts import Objectives, plain
from ray_retrieval.tuning.config import SIZES
from ray_retrieval.tuning.importance import importance
from ray_retrieval.tuning.ledger import Trial

__all__ = ["plain", "render", "write"]

_SIZE_KEYS = tuple(f"method.{name}" for name in SIZES)


def write(
    folder: Folder, recipe: Recipe, objectives: Objectives, trials: list[Trial], best: list[Trial]
) -> str:
    """Write `report.html` into the folder of a search; returns its URI."""
    history = read_history(folder / best[0].folder) if best else []
    metrics = folder.read_json("metrics.json") if folder.exists("metrics.json") else None
    text = folder.read_bytes("recipe.yaml").decode() if folder.exists("recipe.yaml") else ""
    folder.write_text(
        "report.html", render(recipe, objectives, trials, best, history=history, metrics=metrics, text=text)
    )
    return str(folder / "report.html")


def render(
    recipe: Recipe,
    objectives: Objectives,
    trials: list[Trial],
    best: list[Trial],
    *,
    history: list[dict[str, Any]],
    metrics: dict[str, Any] | None,
    text: str,
) -> str:
    """The page as HTML; what is empty or missing has no section.

    Args:
        recipe: with its `tune` block.
        objectives: what was looked for, and which way.
        trials: all.
        best: of which no other one is better, the chosen one first.
        history: of the chosen trial's training.
        metrics: of its model on the test queries.
        text: its recipe as it was written.
    """
    config = recipe.tune
    assert config is not None
    found = importance(config, objectives, trials)
    name, mode = next(iter(objectives.items()))
    states = {state: sum(trial.state == state for trial in trials) for state in _STATES}
    measured = [] if metrics is None else metrics["models"][metrics["selected"]]["test"]
    page = (
        environment()
        .get_template("tuning.html")
        .render(
            name=recipe.name,
            config=config,
            objectives=objectives,
            metric=name,
            states={word: states[state] for state, word in _STATES.items() if states[state]},
            trials=[_row(trial, best) for trial in trials],
            keys=list(config.space),
            best=[_row(trial, best) for trial in best],
            parallel=charts.parallel_coordinates(config, objectives, trials, best),
            charts=_found(
                charts.progress_chart(name, mode, trials),
                charts.front_chart(objectives, trials, best),
                *(charts.size_chart(key, name, mode, trials) for key in _SIZE_KEYS if key in config.space),
                None if found is None else charts.importance_chart(found.shares, found.by),
            ),
            training=_found(loss_chart(history), validation_chart(history, _best_epoch(history, recipe))),
            measured=measured,
            line_colours=COLOURS,
            recipe=text.strip("\n"),
            seconds=sum(trial.seconds for trial in trials),
        )
    )
    return page.encode("utf-8", "replace").decode()


_STATES = {"finished": "finished", "stopped": "stopped", "failed": "failed", "running": "not finished"}


def _row(trial: Trial, best: list[Trial]) -> dict[str, Any]:
    """A trial as the template shows it."""
    return {
        **asdict(trial),
        "name": trial.name,
        "parameters": {key: plain(value) for key, value in trial.parameters.items()},
        "is_best": trial in best,
    }


def _best_epoch(history: list[dict[str, Any]], recipe: Recipe) -> int | None:
    """The epoch whose model the chosen trial keeps."""
    measured = [record for record in history if record.get("validation")]
    if recipe.train.select == "last" or not measured:
        return history[-1]["epoch"] if history else None
    metric = recipe.train.validation.metric
    epoch: int = max(measured, key=lambda record: record["validation"][metric])["epoch"]
    return epoch


def _found(*candidates: Chart | None) -> list[Chart]:
    return [chart for chart in candidates if chart is not None]
