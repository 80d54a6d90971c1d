"""What is known of a model from its folder, without its network: no PyTorch, and FAISS for an index alone."""

from typing import Any

from ray_retrieval.errors import ArtefactError
from ray_retrieval.storage import Folder, fingerprint, read_description

DESCRIPTION, WEIGHTS = "model.json", "model.safetensors"
NAME_MODEL = "name the model's folder as `model`"
"""What to do where the model of an index is not beside it."""


def read_model_description(folder: Folder) -> tuple[dict[str, Any], str]:
    """What `model.json` says, and the model's fingerprint, without loading the weights."""
    description = read_description(folder, DESCRIPTION, kind="model", version=1)
    return description, fingerprint(description)


def model_of(
    index: Folder, *, mend: str = "put the folder of the model that made it beside the index"
) -> Folder:
    """The model that made an index, where it lies beside it as a run leaves them.

    Args:
        index: an index directory.
        mend: what to do where there is none, for the error.

    Raises:
        ArtefactError: if no folder beside the index holds a model of that fingerprint.
    """
    from ray_retrieval.search import Index  # with FAISS, which takes its time: a training needs none of it
    from ray_retrieval.search.importing import made_elsewhere

    fingerprint = Index.open(index).model
    if made_elsewhere(fingerprint):
        raise ArtefactError(
            f"what it holds was made elsewhere ({fingerprint}): no model is known to describe an image with",
            where=index,
            mend="search with `vectors`, or build it anew with the `model` that made them, if one did",
        )
    parent = index.parent
    found = []
    for name in parent.names():
        try:
            if not (parent / name).exists(DESCRIPTION):
                continue
            beside = read_model_description(parent / name)[1]
        except ArtefactError as error:
            found.append(f"{name} cannot be used, {error.problem}")
            continue
        if beside == fingerprint:
            return parent / name
        found.append(f"{name} is {beside}")
    listed = ", ".join(found) or "there is none"
    raise ArtefactError(
        f"the index was made by model {fingerprint}; beside it {listed}",
        where=index,
        mend=mend,
    )
