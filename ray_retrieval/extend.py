"""Images into an index that is there: encoded by the model that made it, then added as new rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_retrieval.cluster import connect
from ray_retrieval.data.table import ImageTable
from ray_retrieval.encode import EncodeConfig, EncodeJob, encode_alone
from ray_retrieval.lock import writing_alone
from ray_retrieval.model_folder import NAME_MODEL, model_of
from ray_retrieval.search.embeddings import DESCRIPTION
from ray_retrieval.search.manifest import read_current
from ray_retrieval.storage import Folder


def are_embeddings(place: str) -> bool:
    """Whether there is an embeddings directory, rather than images."""
    return Folder(place).exists(DESCRIPTION)


@contextmanager
def encoded(
    index: str | Folder,
    images: ImageTable,
    *,
    model: str | None = None,
    out: str | None = None,
    config: EncodeConfig | None = None,
    advance: Callable[[int, str], None] = lambda _count, _remark: None,
) -> Iterator[Folder]:
    """The embeddings of images, by the model of an index, for as long as the block lasts.

    They lie beside the index until the block ends without an error; so what was encoded is kept where
    something went wrong, and the same again goes on from there.

    Args:
        index: an index directory.
        images: to encode.
        model: the directory of the model; default: it is looked for beside the index.
        out: where the embeddings go, to stay there.
        config: how to encode.
        advance: called with the number of images done.

    Raises:
        ArtefactError: if the index is missing, or its model is not found.
        ConflictError: if the same images are being added already.
        DataError: if no image can be decoded.
    """
    where = Folder(index)
    read_current(where)  # What is missing is told before anything is encoded.
    found = Folder(model) if model is not None else model_of(where, mend=NAME_MODEL)
    kept = Folder(out) if out is not None else where.parent / f"adding-{images.fingerprint[:16]}"
    with writing_alone(kept, "add"):
        with connect():
            encode_alone([EncodeJob(found, images, kept)], config or EncodeConfig(), advance)
        yield kept
        if out is None:
            kept.remove()
