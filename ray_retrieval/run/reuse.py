"""A trained model under another recipe: its weights, the recipe's settings."""

from ray_retrieval import model
from ray_retrieval.errors import ModelError
from ray_retrieval.methods import AnyMethodConfig, build
from ray_retrieval.storage import Folder


def reuse(source: str, config: AnyMethodConfig, out: Folder) -> None:
    """Write a model directory of the weights in `source`, as `config` has them describe images.

    Size and scales of the images may differ from those of the training; the network may not.

    Args:
        source: a model directory.
        config: the method's configuration.
        out: where to.

    Raises:
        ArtefactError: if `source` is no model or is damaged.
        ModelError: if its weights are not all those of the method as it is configured.
    """
    found = model.load(source)
    method = build(config, classes=found.description["classes"], pretrained=False)
    try:
        method.load_state_dict(found.method.state_dict())
    except RuntimeError as error:
        raise ModelError(
            f"the weights do not fit the recipe's method: {' '.join(str(error).split())}",
            where=source,
            mend="give the method as the model's recipe has it",
        ) from None
    model.save(
        out,
        config=config.model_dump(mode="json"),
        weights=found.method.state_dict(),
        classes=found.description["classes"],
        class_names=found.class_names,
        precision=found.description["precision"],
        training={**found.description["training"], "start": found.fingerprint},
        metrics=found.description["metrics"],
    )
