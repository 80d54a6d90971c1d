"""What a search keeps of its trials: models of those that were stopped, and the best one's."""

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.loop import read_outcome
from ray_retrieval.model_folder import DESCRIPTION, WEIGHTS
from ray_retrieval.recipe import Recipe
from ray_retrieval.storage import Folder
from ray_retrieval.train import save_models
from ray_retrieval.tuning.here import newest_checkpoint


def keep_best_so_far(recipe: Recipe, benchmark: Benchmark) -> None:
    """Write `model/` of a trial that was stopped, from its newest checkpoint.

    Its `training` says `unfinished`; what a method learns of a trained network, such as whitening, it lacks.
    Running the trial's recipe trains it to the end.
    """
    run = Folder(recipe.output)
    if run.exists(f"model/{DESCRIPTION}"):
        return
    with newest_checkpoint(run) as folder:
        outcome = None if folder is None else read_outcome(folder)
    if outcome is not None:
        provenance = {
            "key": "unfinished",
            "data": benchmark.name,
            "images": benchmark.train.name,
            "seed": recipe.seed,
            "unfinished": True,
        }
        save_models(outcome, recipe.method, recipe.train, benchmark, run, provenance)


def copy_model(trial: Folder, search: Folder) -> None:
    """Copy a trial's model, its description last and no exports, and its recipe into the search's folder."""
    source, target = trial / "model", search / "model"
    same = target.exists(DESCRIPTION) and source.read_bytes(DESCRIPTION) == target.read_bytes(DESCRIPTION)
    if not same:
        target.remove()
        for name in (WEIGHTS, DESCRIPTION):
            with target.writing(name) as written:
                for chunk in source.chunks(name):
                    written.write(chunk)
    search.write_bytes("recipe.yaml", trial.read_bytes("recipe.yaml"))
