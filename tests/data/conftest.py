"""Images that the tests make."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ray_retrieval.data.table import ImageTable

MakeImage = Callable[..., bytes]
MakeTable = Callable[..., ImageTable]


def smooth(width: int, height: int, seed: int) -> np.ndarray:
    """uint8 [h, w, 3]: soft random blobs, so that JPEG and resizing leave them nearly as they are."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_image() -> MakeImage:
    """make_image(width, height, seed, kind="PNG", mode="RGB", **options) -> bytes."""

    def make(
        width: int = 24, height: int = 24, seed: int = 0, kind: str = "PNG", mode: str = "RGB", **options: Any
    ) -> bytes:
        return encode(Image.fromarray(smooth(width, height, seed)).convert(mode), kind, **options)

    return make


@pytest.fixture(scope="session")
def make_table(make_image: MakeImage) -> MakeTable:
    """make_table(labels, name="images", seed=0) -> a table of inline PNG images, all different."""

    def make(
        labels: Any, name: str = "images", seed: int = 0, class_names: list[str] | None = None
    ) -> ImageTable:
        data = [make_image(8, 8, seed + row) for row in range(len(labels))]
        images = pa.StructArray.from_arrays(
            [pa.array(data, pa.large_binary()), pa.nulls(len(data), pa.string())], names=["bytes", "path"]
        )
        ids = [f"{name}-{row}" for row in range(len(labels))]
        return ImageTable(
            pa.table({"id": pa.array(ids, pa.string()), "image": images, "label": labels}),
            name=name,
            class_names=class_names,
        )

    return make


@pytest.fixture
def photo_folder(tmp_path: Path, make_image: MakeImage) -> Path:
    """A folder of three classes, twelve images each."""
    for number, name in enumerate(("cat", "dog", "owl")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for row in range(12):
            data = make_image(20, 16, seed=100 * number + row)
            (tmp_path / "photos" / name / f"{row:02d}.png").write_bytes(data)
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images, where there is one."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data here")
    return folder
