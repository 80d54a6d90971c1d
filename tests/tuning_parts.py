"""Searches that tests make for themselves."""

from ray_retrieval.recipe import template
from ray_retrieval.storage import Folder
from ray_retrieval.tuning.config import TuneConfig
from ray_retrieval.tuning.ledger import Ledger
from ray_retrieval.tuning.trials import Trials, identity

RECIPE = """
name: small
output: {output}
data: {{name: digits}}
method: {{name: greedyhash, bits: 16, backbone: {{name: small, weights: none}}, image: {{size: 16}}}}
train: {{epochs: 9, batch_size: 16, precision: float32}}
"""

SPACE = {"train.optimizer.lr": {"loguniform": [1e-3, 1.0]}, "method.bits": {"choice": [8, 16, 32]}}


def config(**settings):
    return TuneConfig(**{"space": SPACE, **settings})


def recipes(folder, **tune):
    """A function that makes recipes of parameters, of a file in the folder."""
    file = folder / "recipe-file.yaml"
    file.write_text(RECIPE.format(output=folder / "search"))
    block = config(**tune).model_dump(mode="json", exclude_none=True)
    return template(file, [f"tune={block}"])


def begun(folder, *, retry=False, said=lambda _trial: None, **tune):
    """The trials of a search in a folder, which goes on where one there stopped."""
    make = recipes(folder, **tune)
    recipe = make({})
    ledger = Ledger(Folder(recipe.output), identity(recipe))
    ledger.check()
    with ledger.beginning():
        pass
    return Trials(recipe, make, ledger, retry=retry, said=said)
