"""Pictures with descriptors, and the filters that they pass."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from ray_retrieval.search.filters import Filter
from ray_retrieval.serve.backend import Box

Encode = Callable[[Image.Image], npt.NDArray[np.float32]]


@dataclass
class Gallery:
    """Pictures with descriptors.

    Attributes:
        kind: codes (the signs of the descriptors), vectors, or local: then `points` say where the scene's
            points lie in each picture, nan where they do not, and the inliers are those that two share.
        labels: class numbers.
        card: of the model.
    """

    name: str
    kind: str
    ids: list[str]
    files: list[bytes]
    labels: list[int]
    class_names: list[str]
    encode: Encode
    columns: dict[str, list[Any]] = field(default_factory=dict)
    points: list[npt.NDArray[np.float64]] = field(default_factory=list)
    card: dict[str, Any] = field(default_factory=dict)
    version: int = 3

    def __post_init__(self) -> None:
        self.described = np.stack([self.encode(opened(file)) for file in self.files])
        self.rows = {identifier: row for row, identifier in enumerate(self.ids)}
        self.model = (
            f"{abs(hash(self.name)) % 16**12:012x}" if not self.card else str(self.card["fingerprint"])
        )

    @property
    def size(self) -> int:
        """Bits of a code, or numbers of a vector."""
        return self.described.shape[1]

    def mask(self, where: str | None) -> npt.NDArray[np.bool_]:
        """Which rows pass a filter."""
        if not where:
            return np.ones(len(self.ids), bool)
        table = {"id": self.ids, "label": pa.array(self.labels, pa.int64()), **self.columns}
        batch = pa.RecordBatch.from_pydict(table)
        return Filter.parse(where).mask(batch, batch.schema, self.class_names)


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def cut(image: Image.Image, box: Box | None) -> Image.Image:
    return image if box is None else image.crop(tuple(round(side) for side in box))
