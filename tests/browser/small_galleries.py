"""Galleries that the browser's tests search."""

from typing import Any

import numpy as np
from galleries import Galleries
from gallery import Gallery
from pictures import SHAPES, png, poster, view
from PIL import Image

POSTERS, SCENES, LOOKS = 180, 6, 6


def _grid(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB").resize((4, 4), Image.Resampling.BOX), np.float32).ravel() / 255


def signs(image: Image.Image) -> Any:
    """48 numbers whose signs are a code: which parts are brighter than the whole."""
    grid = _grid(image)
    return np.where(grid >= np.median(grid), 1, -1).astype(np.float32)


def unit(image: Image.Image) -> Any:
    """A unit vector of 48 numbers."""
    grid = _grid(image) - 0.5
    return (grid / max(float(np.linalg.norm(grid)), 1e-6)).astype(np.float32)


def card(method: str, fingerprint: str) -> dict[str, Any]:
    return {
        "method": method,
        "settings": {"backbone": {"name": "mobilenet_v2", "weights": "imagenet"}, "image": {"size": 96}},
        "training": {"dataset": "posters", "images": 180},
        "validation": {"map": 0.881},
        "fingerprint": fingerprint,
        "measured": [
            {
                "name": "map@all",
                "value": 0.8731,
                "policy": "mean over 60 queries of the average precision over all 180 rows, divided by the "
                "relevant rows found there; a query that finds none counts 0",
            },
            {"name": "recall@1", "value": 0.95, "policy": "1 where the first row is relevant, else 0"},
        ],
    }


def galleries() -> Galleries:
    """Posters as codes and as vectors, and views of scenes with local features."""
    ids = [f"posters/<no. {number:03}>?&#.png" for number in range(POSTERS)]
    files = [png(poster(number)) for number in range(POSTERS)]
    labels = [number % len(SHAPES) for number in range(POSTERS)]
    columns: dict[str, list[Any]] = {
        "price": [float(5 + number % 40) for number in range(POSTERS)],
        "shelf": ["left" if number % 3 else "right" for number in range(POSTERS)],
    }
    codes = Gallery(
        "posters",
        "codes",
        ids,
        files,
        labels,
        list(SHAPES),
        signs,
        columns,
        card=card("greedyhash", "5f1d2c3b4a59"),
    )
    vectors = Gallery(
        "colours",
        "vectors",
        ids,
        files,
        labels,
        list(SHAPES),
        unit,
        columns,
        card=card("xbm", "9e8d7c6b5a40"),
    )
    views = [view(scene, look) for scene in range(SCENES) for look in range(LOOKS)]
    count = len(views[0].points)
    points = [np.full((SCENES * count, 2), np.nan) for _ in views]
    for spread, one in zip(points, views, strict=True):
        spread[one.scene * count : (one.scene + 1) * count] = one.points
    scenes = Gallery(
        "scenes",
        "local",
        [f"scene {one.scene}/view {number}" for number, one in enumerate(views)],
        [png(one.image) for one in views],
        [one.scene for one in views],
        [f"scene {scene}" for scene in range(SCENES)],
        unit,
        points=points,
        card=card("delf", "0a1b2c3d4e5f"),
    )
    return Galleries(codes, vectors, scenes)
