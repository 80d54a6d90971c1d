"""What the tests of serving share: images, a stand-in encoder without torch, and limits."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from ray_retrieval.data.decode import decode
from ray_retrieval.descriptors import Codes, Form, Vectors
from ray_retrieval.errors import DataError
from ray_retrieval.model_folder import read_model_description
from ray_retrieval.search import build
from ray_retrieval.search.embeddings import finish, part_table, write_part
from ray_retrieval.storage import Folder, write_description

BITS = 64


def picture(seed: int, *, side: int = 16, kind: str = "PNG") -> bytes:
    """An image file of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pixels(data: bytes) -> npt.NDArray[np.uint8]:
    """uint8 [h, w, 3] of an image file."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class AverageHash:
    """Encodes an image as which cells of an 8 x 8 grid are brighter than its mean."""

    def __init__(self, model: str, *, threads: int = 1, batch_size: int = 64, engine: str = "torch") -> None:
        _, self.fingerprint = read_model_description(Folder(model))
        self.one_size = False

    def encode(self, images: list[bytes], box: Any = None) -> tuple[Codes, dict[int, str]]:
        codes = np.zeros((len(images), BITS // 8), np.uint8)
        failures = {}
        for position, image in enumerate(images):
            try:
                grey = np.asarray(decode(image).convert("L").resize((8, 8)), np.float64)
            except DataError as error:
                failures[position] = error.problem
                continue
            codes[position] = np.packbits(grey.ravel() >= grey.mean())
        return Codes(codes, BITS), failures

    def close(self) -> None: ...


class NotedHash(AverageHash):
    """Codes that depend on the note of the model."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        self._turned = int(self.fingerprint[:2], 16)

    def encode(self, images: list[bytes], box: Any = None) -> tuple[Codes, dict[int, str]]:
        codes, failures = super().encode(images)
        return Codes(codes.data ^ self._turned, BITS), failures


class GreyVector:
    """Encodes an image as an 8 x 8 grid of grey values around their mean, scaled to length 1."""

    def __init__(self, model: str, *, threads: int = 1, batch_size: int = 64, engine: str = "torch") -> None:
        _, self.fingerprint = read_model_description(Folder(model))
        self.one_size = False

    def encode(self, images: list[bytes], box: Any = None) -> tuple[Vectors, dict[int, str]]:
        grids = [
            np.asarray(decode(image).convert("L").resize((8, 8)), np.float32).ravel() for image in images
        ]
        centred = np.stack([grid - grid.mean() for grid in grids])
        return Vectors(centred / np.linalg.norm(centred, axis=1, keepdims=True)), {}

    def close(self) -> None: ...


def write_model(folder: Folder, *, note: str = "") -> str:
    """A model directory that AverageHash accepts; its fingerprint, which depends on the note."""
    write_description(folder, "model.json", kind="model", version=1, body={"bits": BITS, "note": note})
    return read_model_description(folder)[1]


@dataclass(frozen=True)
class Served:
    """An index, the model that made it, and where both are served.

    Attributes:
        url: the server's; empty where it is not served.
        index: folder of the index.
        model: folder of the model.
        ids: of the indexed images, in row order; image i is `picture(i)`.
    """

    url: str
    index: str
    model: str
    ids: list[str]


def make_index(
    folder: Path,
    *,
    count: int = 300,
    shards: int = 3,
    encoder: type[AverageHash | GreyVector] = AverageHash,
    note: str = "",
    class_names: tuple[str, ...] = ("ant", "bee", "cow"),
) -> Served:
    """An index of noise images, some with ids that look like paths or addresses."""
    model = str(folder / "model")
    write_model(Folder(model), note=note)
    odd = ["../../etc/passwd", "/etc/passwd", "a b/ü?x=1#y%2F.png", "...", "x" * 200]
    ids = odd + [f"set {number % 3}/{number:04d}.png" for number in range(len(odd), count)]
    images = [picture(number) for number in range(count)]
    described, _ = encoder(model).encode(images)
    table = pa.table(
        {
            "id": ids,
            "image": pa.array(
                [{"bytes": image, "path": None} for image in images],
                pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]),
            ),
            "label": pa.array([number % 3 for number in range(count)], pa.int64()),
        }
    )
    embeddings = Folder(folder / "embeddings")
    part = write_part(embeddings, 0, part_table(table, described, first_row=0, skip={}), key="", errors=[])
    finish(
        embeddings,
        model=AverageHash(model).fingerprint,
        form=Form.of(described),
        classes=3,
        class_names=list(class_names),
        parts=[part],
        source="",
    )
    build(embeddings, str(folder / "index"), shards=shards)
    return Served("", str(folder / "index"), model, ids)
