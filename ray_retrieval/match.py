"""Do two photographs show the same thing? Their local features compared, and where they agree.

    found = match("runs/delf/model", "a.jpg", "b.jpg")
    found.same_scene, found.inliers, found.geometry.matrix

Two images give the same here as in the geometric verification of a search, where the query is the first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ray_retrieval.cores import cores
from ray_retrieval.data.table import open_images
from ray_retrieval.descriptors import Descriptors, Form, Local
from ray_retrieval.errors import ModelError, QueryError
from ray_retrieval.search.geometry import Geometry
from ray_retrieval.search.verify import VerifyConfig, compare
from ray_retrieval.storage import Folder


class Encodes(Protocol):
    """What is needed of an `Encoder`."""

    def encode(self, images: list[bytes]) -> tuple[Descriptors, dict[int, str]]:
        """Descriptors of encoded images, and the reason for each that cannot be decoded."""
        ...


@dataclass(frozen=True)
class Photograph:
    """An image and what the model has found in it.

    Attributes:
        name: its path or address.
        data: the bytes of its file.
        features: of this one image.
    """

    name: str
    data: bytes
    features: Local

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright."""
        width, height = self.features.sizes[0].tolist()
        return width, height


@dataclass(frozen=True)
class Match:
    """What two photographs have in common.

    Attributes:
        first: one photograph.
        second: the other; the model maps into it.
        config: how they were compared.
        pairs: int64 [k, 2]: features of the first and of the second that are alike, the most similar first.
        geometry: the model that most pairs agree on; None where there is none.
    """

    first: Photograph
    second: Photograph
    config: VerifyConfig
    pairs: npt.NDArray[np.int64]
    geometry: Geometry | None

    @property
    def inliers(self) -> int:
        """Pairs that agree on where things are."""
        return 0 if self.geometry is None else int(np.count_nonzero(self.geometry.inliers))

    @property
    def significance(self) -> float:
        """-log10 of the chance of so many inliers at random; see `search.geometry`."""
        return 0.0 if self.geometry is None else self.geometry.significance

    @property
    def same_scene(self) -> bool:
        """Whether there are enough inliers to mean something."""
        return self.inliers >= self.config.min_inliers

    @property
    def verdict(self) -> str:
        return "same scene" if self.same_scene else "no match found"

    def locations(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """float32 [inliers, 2] in each photograph: x and y in pixels of what agrees, most similar first."""
        chosen = self.pairs[:0] if self.geometry is None else self.pairs[self.geometry.inliers]
        first, second = self.first.features.locations, self.second.features.locations
        return first[chosen[:, 0]], second[chosen[:, 1]]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the locations of the inliers and the matrix of the model."""
        images = [
            {
                "image": photograph.name,
                "size": list(photograph.size),
                "features": len(photograph.features.data),
            }
            for photograph in (self.first, self.second)
        ]
        places = zip(*(points.tolist() for points in self.locations()), strict=True)
        return {
            "verdict": self.verdict,
            "same_scene": self.same_scene,
            "inliers": self.inliers,
            "putatives": len(self.pairs),
            "significance": self.significance,
            "model": self.config.geometry.model,
            "matrix": None if self.geometry is None else self.geometry.matrix.tolist(),
            "images": images,
            "pairs": [list(pair) for pair in places],
        }


def match(
    model: str | Path | Folder,
    first: str | Path,
    second: str | Path,
    config: VerifyConfig | None = None,
    *,
    threads: int | None = None,
) -> Match:
    """Compare two photographs by the local features of a model.

    Args:
        model: the directory of a model that makes local features.
        first: an image: a path or an address.
        second: another; the threshold of the geometry is measured there.
        config: how to compare them.
        threads: processor threads; unset: all.

    Raises:
        ArtefactError: if `model` is no model directory or is damaged.
        DataError: if there is no such image.
        ModelError: if the model makes no local features.
        QueryError: if what is given is more than one image, or cannot be decoded.
    """
    from ray_retrieval.model import Encoder  # and PyTorch, which a server's gateway does without

    names = (str(first), str(second))
    files = [_read(name) for name in names]
    encoder = Encoder(model, threads=threads or cores())
    try:
        a, b = (photograph(encoder, name, data) for name, data in zip(names, files, strict=True))
    finally:
        encoder.close()
    return compared(a, b, config or VerifyConfig())


def photograph(encoder: Encodes, name: str, data: bytes) -> Photograph:
    """An image with its local features.

    Raises:
        ModelError: if the model makes no local features.
        QueryError: if it cannot be decoded.
    """
    # By itself: what a network makes of an image may differ in the last bits in another batch.
    features, failures = encoder.encode([data])
    for reason in failures.values():
        raise QueryError(reason, where=name)
    if not isinstance(features, Local):
        raise ModelError(
            f"images are matched by local features, the model makes {Form.of(features)}",
            mend="use a model of the method delf",
        )
    return Photograph(name, data, features)


def compared(first: Photograph, second: Photograph, config: VerifyConfig) -> Match:
    """What two photographs of one model have in common."""
    return Match(first, second, config, *compare(first.features, second.features, config))


def _read(name: str) -> bytes:
    table = open_images(name)
    if len(table) != 1:
        raise QueryError(
            f"{len(table)} images, one is matched with one", where=name, mend="name an image file"
        )
    return table.image_bytes(0)
