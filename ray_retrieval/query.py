"""Images in, nearest images of an index and their labels out."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_retrieval.answers import Answer, Hit, example
from ray_retrieval.cores import cores
from ray_retrieval.data import location
from ray_retrieval.data.decode import MAX_BYTES
from ray_retrieval.descriptors import DescriptorKind, Descriptors, Local
from ray_retrieval.errors import DataError, QueryError
from ray_retrieval.finder import Finder
from ray_retrieval.model import Encoder
from ray_retrieval.model_folder import NAME_MODEL, model_of
from ray_retrieval.pictures import Example, Shown
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.filters import Filter
from ray_retrieval.search.rerank import AnyRerankConfig
from ray_retrieval.storage import Folder, is_uri

Image = str | Path | bytes
"""A file, by its path or URI, or its bytes."""


@dataclass(frozen=True)
class ClassGuess:
    """One class that a model's class head names.

    Attributes:
        number: of the class.
        name: its name, or its number where it has none.
        probability: 0…1.
    """

    number: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What an index and its model say of one image.

    Attributes:
        nearest: the nearest image of the index, the first in the index's order among several as near.
        classes: the likeliest classes, likeliest first; None for a model without a class head.
        notes: what a reader has to know.
    """

    nearest: Hit
    classes: list[ClassGuess] | None
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Searcher(Finder):
    """An index with the model that made it: `Searcher("runs/quickstart/index").search(["photo.jpg"])`.

    Args:
        index: an index directory.
        model: the directory of the model that made it; unset: it is looked for beside the index.
        threads: processor threads; unset: all.
        rerank: steps of re-ranking; what they need of the whole index is made here. None: geometric
            verification for an index of local features, and nothing for others.
        gpu: search on a GPU, see `Index.open`.
        engine: what computes the queries' descriptors, as for `model.Encoder`.
        effort: of an approximate search, see `Finder`.

    Raises:
        ArtefactError: if index or model is missing, damaged, or they do not belong together, or a step is not
            for what the index holds.
    """

    def __init__(
        self,
        index: str | Path | Folder,
        model: str | Path | Folder | None = None,
        *,
        threads: int | None = None,
        rerank: Sequence[AnyRerankConfig] | None = None,
        gpu: bool = False,
        engine: str = "torch",
        effort: Effort | None = None,
    ) -> None:
        threads = threads or cores()
        found = Folder(model) if model is not None else model_of(Folder(index), mend=NAME_MODEL)
        self.encoder = Encoder(found, threads=threads, engine=engine)
        super().__init__(
            index, threads=threads, rerank=rerank, model=self.encoder.fingerprint, gpu=gpu, effort=effort
        )
        local = self._verified_by
        self._local = None
        if local is not None:
            self._local = Encoder(model_of(Folder(local)), threads=threads, engine=engine)

    def encode(self, images: Image | Sequence[Image], box: Sequence[float] | None = None) -> Descriptors:
        """Descriptors of images given as files or as bytes.

        Args:
            images: one or several: files, or their bytes.
            box: left, top, right, bottom in pixels of the upright image: all that counts of each.

        Raises:
            QueryError: naming the first image that is missing or cannot be decoded, or if one is given in
                another form.
        """
        images = _several(images)
        found, failures = self.encoder.encode([_read(image) for image in images], box)
        _refuse(images, failures)
        return found

    def search(
        self,
        images: Image | Sequence[Image],
        k: int = 10,
        *,
        box: Sequence[float] | None = None,
        where: str | Filter | None = None,
    ) -> list[list[Hit]]:
        """The k nearest images of the index for every image given.

        Args:
            images: one or several: files, or their bytes.
            k: hits of each.
            box: left, top, right, bottom in pixels of the upright image: all that counts of each.
            where: which images of the index may be hits, such as `label in (cat, dog)`; see `search.filters`.

        Raises:
            QueryError: if k < 1, an image is missing or cannot be decoded, nothing of it is in the box, or
                the filter is not one for this index, or for these steps of re-ranking.
        """
        return [answer.hits for answer in self.answers(images, k, box=box, where=where)]

    def answers(
        self,
        images: Image | Sequence[Image],
        k: int = 10,
        *,
        box: Sequence[float] | None = None,
        where: str | Filter | None = None,
    ) -> list[Answer]:
        """What `search` returns for every image given, with what a reader has to know of it.

        Args:
            images: one or several: files, or their bytes.
            k: hits of each.
            box: as for `search`.
            where: as for `search`.

        Raises:
            QueryError: as `search`.
        """
        self.check(k, where)
        images = _several(images)
        queries, features = self.encode(images, box), None
        if self._local is not None:
            given, failures = self._local.encode([_read(image) for image in images], box)
            _refuse(images, failures)
            assert isinstance(given, Local)
            features = given
        return self.find(queries, k, where=where, features=features)

    def predict(self, image: Image, *, classes: int = 5) -> Prediction:
        """The nearest image of the index, and what the model's class head says where it has one.

        Args:
            image: a file, or its bytes.
            classes: how many of the likeliest classes.

        Raises:
            QueryError: if the image is missing or cannot be decoded, or nothing in the index is like it.
        """
        answer = self.answers([image], k=_AS_NEAR)[0]
        hits = answer.hits
        if not hits:
            raise QueryError(answer.notes[0], where="the image" if isinstance(image, bytes) else image)
        probabilities, failures = self.encoder.class_probabilities([_read(image)])
        _refuse([image], failures)
        guesses = None
        if probabilities is not None:
            order = np.argsort(-probabilities[0], kind="stable")[:classes]
            names = self.encoder.class_names
            guesses = [
                ClassGuess(int(n), names[n] if names else str(n), float(probabilities[0, n])) for n in order
            ]
        itself = [hit for hit in hits if self._as_near(hit) and _same_file(image, hit.path)]
        notes = [*answer.notes, *(f"the image itself is in the index, as {hit.id}" for hit in itself)]
        return Prediction(hits[0], guesses, notes)

    def _as_near(self, hit: Hit) -> bool:
        """Whether a hit may be the image that is asked about; scores of local features do not tell."""
        return self.index.form.kind is DescriptorKind.LOCAL or hit.similarity > _SAME

    def example(self, image: Image, hits: list[Hit]) -> Example:
        """A query image and its hits as `pictures.grid` shows them.

        A file in a folder that is called like one of the index's classes counts as of that class.
        """
        if isinstance(image, bytes):
            return example(self.index, Shown(image, "query", []), hits)
        folder = Path(image).expanduser().absolute().parent.name
        labels = [folder] if folder in (self.index.class_names or []) else []
        return example(self.index, Shown(_read(image), Path(image).name, labels), hits)


_SAME = 0.999
"""Similarity of a descriptor to one made of the same pixels, perhaps in another batch."""
_AS_NEAR = 100
"""Hits among which the query itself is looked for: many images may share its code."""


def _several(images: Any) -> list[Image]:
    alone = isinstance(images, str | bytes) or not isinstance(images, Iterable)
    return [images] if alone else list(images)


def _refuse(images: Sequence[Image], failures: dict[int, str]) -> None:
    """Raise QueryError for the first image that failed."""
    for position, reason in sorted(failures.items()):
        image = images[position]
        raise QueryError(reason, where=f"image {position}" if isinstance(image, bytes) else image)


def _same_file(image: Image, path: str | None) -> bool:
    """Whether an image of the index is the file that is asked about."""
    if isinstance(image, bytes) or path is None:
        return False
    if is_uri(str(image)) or is_uri(path):
        return location.expand(str(image)) == path
    return Path(image).expanduser().resolve() == Path(path).resolve()


def _read(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str | Path):
        raise QueryError(
            f"an image is a path, a URI or the bytes of a file, got {type(image).__name__}",
            mend="save it as a file, or give the bytes of one",
        )
    if is_uri(str(image)):
        try:
            return location.read_bytes(location.expand(str(image)), MAX_BYTES)
        except DataError as error:
            raise QueryError(error.problem, where=error.where, mend=error.mend) from None
    path = Path(image).expanduser()
    if not path.is_file():
        raise QueryError("no such image file", where=path, mend="check the path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise QueryError(f"cannot be read: {error.strerror}", where=path) from None
