"""Drawn pictures with known contents: posters of one shape each, and views of scenes with known points."""

import io
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "moon", "wave")
_INKS = ((196, 70, 54), (226, 152, 45), (61, 122, 92), (42, 96, 160), (112, 72, 140), (40, 44, 52))
_PAPERS = ((246, 240, 226), (222, 232, 236), (250, 226, 214), (232, 238, 216), (54, 60, 76), (240, 240, 240))
_OVER = 3


def poster(number: int) -> Image.Image:
    """A picture of one shape; its class is `number % len(SHAPES)`."""
    random = np.random.default_rng(number)
    shape = number % len(SHAPES)
    width, height = [(120, 120), (132, 100), (100, 132)][int(random.integers(3))]
    ink, paper = (colours[int(random.integers(6))] for colours in (_INKS, _PAPERS))
    if sum(abs(a - b) for a, b in zip(ink, paper, strict=True)) < 120:
        paper = _PAPERS[0]
    image = Image.new("RGB", (width * _OVER, height * _OVER), paper)
    draw = ImageDraw.Draw(image)
    radius = float(random.uniform(0.24, 0.4)) * min(image.size)
    x, y = (side * float(random.uniform(0.42, 0.58)) for side in image.size)
    _draw(draw, SHAPES[shape], x, y, radius, float(random.uniform(0, 2 * math.pi)), ink, paper)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _draw(
    draw: ImageDraw.ImageDraw,
    shape: str,
    x: float,
    y: float,
    radius: float,
    turn: float,
    ink: tuple[int, int, int],
    paper: tuple[int, int, int],
) -> None:
    if shape in ("circle", "moon"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        if shape == "moon":
            x, y, radius = x + 0.45 * radius, y - 0.25 * radius, 0.85 * radius
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=paper)
    elif shape == "wave":
        for line in range(-2, 3):
            points = [
                (x + radius * (step / 20 - 1) * 1.3, y + radius * (line / 2.2 + 0.16 * math.sin(step / 2.6)))
                for step in range(41)
            ]
            draw.line(points, fill=ink, width=max(3, int(radius / 6)), joint="curve")
    else:
        corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (5, 0.42)}[shape]
        count = corners if inner == 1.0 else 2 * corners
        polygon = [
            (
                x
                + radius
                * (inner if inner < 1 and corner % 2 else 1)
                * math.cos(turn + 2 * math.pi * corner / count),
                y
                + radius
                * (inner if inner < 1 and corner % 2 else 1)
                * math.sin(turn + 2 * math.pi * corner / count),
            )
            for corner in range(count)
        ]
        draw.polygon(polygon, fill=ink)


@dataclass(frozen=True)
class View:
    """One look at a scene: the picture, and where each of the scene's points lies in it; outside: nan."""

    scene: int
    image: Image.Image
    points: npt.NDArray[np.float64]


@cache
def view(scene: int, look: int) -> View:
    """A part of a scene, seen turned and nearer or farther."""
    random = np.random.default_rng((scene, 7))
    side = 420
    drawn = Image.new("RGB", (side, side), _PAPERS[scene % 4])
    draw = ImageDraw.Draw(drawn)
    points = random.uniform(0.12, 0.88, (44, 2)) * side
    for number, (x, y) in enumerate(points):
        ink = _INKS[int(random.integers(6))]
        _draw(
            draw,
            SHAPES[number % 4],
            x,
            y,
            float(random.uniform(7, 26)),
            float(random.uniform(0, 6)),
            ink,
            ink,
        )
    random = np.random.default_rng((scene, look, 11))
    angle, scale = float(random.uniform(-0.3, 0.3)), float(random.uniform(0.75, 1.15))
    width, height = (220, 165) if look % 2 else (190, 200)
    centre = side / 2 + random.uniform(-45, 45, 2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / scale
    start = centre - turn @ (np.array([width, height]) / 2)  # scene = turn @ picture + start
    image = drawn.transform(
        (width, height),
        Image.Transform.AFFINE,
        (*turn[0], start[0], *turn[1], start[1]),
        Image.Resampling.BICUBIC,
    )
    seen = (points - start) @ np.linalg.inv(turn).T
    seen[((seen < 0) | (seen >= [width, height])).any(1)] = np.nan
    return View(scene, image, seen)


def png(image: Image.Image) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
