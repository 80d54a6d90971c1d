"""Views of a photograph: random homographies and photometric changes, with the exact geometry.

All that is drawn for a view follows from a seed, the photograph's name and the view's number: neither the
order of the work, nor the number of threads, nor other photographs matter.

Coordinates are (x, y) in pixels, the centre of the top left pixel at (0, 0), as OpenCV and HPatches have it.
A homography is float64 [3, 3] and maps (x, y, 1) of the upright photograph to a multiple of (x', y', 1) of
the view; its last element is 1, and the whole photograph has a positive third coordinate.
"""

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from pydantic import Field, model_validator

from ray_retrieval.config import Config

FloatArray = npt.NDArray[np.float64]
Quality = Annotated[int, Field(ge=1, le=95)]

_GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Luma of red, green and blue, ITU-R BT.601."""
_HALF = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
"""From pixel centres at whole numbers to pixel edges at whole numbers, as PIL counts."""


class Geometry(Config):
    """How far a view's geometry is from the photograph's."""

    rotation: float = Field(default=25.0, ge=0, le=180)
    """Largest rotation in the plane of the picture, either way, in degrees."""
    scale: float = Field(default=0.6, gt=0, le=1)
    """Least share of the photograph's sides that a view shows; drawn evenly between it and the largest that
    lies inside the photograph, or that largest one where it is less."""
    perspective: float = Field(default=0.2, ge=0, le=0.3)
    """How far each corner moves inwards at most, as a share of the sides. Below 1/3 the corners stay convex
    and the horizon stays outside the photograph."""


class Photometry(Config):
    """How far a view's colours are from the photograph's."""

    brightness: float = Field(default=0.3, ge=0, le=3)
    """Brightness is multiplied by 1/(1 + this) to 1 + this, evenly on a logarithmic scale."""
    contrast: float = Field(default=0.3, ge=0, le=3)
    """Contrast about the mean, in the same way."""
    saturation: float = Field(default=0.3, ge=0, le=3)
    """Distance of colours from grey, in the same way."""
    gamma: float = Field(default=0.3, ge=0, le=3)
    """Exponent of all values, in the same way."""
    blur: float = Field(default=1.0, ge=0, le=10)
    """Largest standard deviation of the blur, in pixels of the view."""
    noise: float = Field(default=6.0, ge=0, le=100)
    """Largest standard deviation of the noise, in grey levels of 255."""
    quality: tuple[Quality, Quality] = (60, 95)
    """Lowest and highest quality of the JPEG file."""

    @model_validator(mode="after")
    def _ordered(self) -> "Photometry":
        if self.quality[0] > self.quality[1]:
            raise ValueError(
                f"the lowest quality, {self.quality[0]}, is above the highest, {self.quality[1]}"
            )
        return self


@dataclass(frozen=True)
class View:
    """A rendered view: the bytes of its JPEG file, and the homography from photograph to view."""

    data: bytes
    homography: FloatArray


def render(
    photograph: Image.Image,
    name: str,
    *,
    views: int,
    size: int,
    seed: int,
    geometry: Geometry,
    photometry: Photometry,
) -> Iterator[View]:
    """The views 0 … `views` - 1 of a photograph, one after another.

    A view has the photograph's aspect ratio; every one of its pixels comes from inside the photograph.

    Args:
        photograph: upright, RGB.
        name: with the seed and the view's number it decides what is drawn.
        views: how many.
        size: the longer side of a view in pixels; less where the photograph is smaller.
        seed: of all draws.
        geometry: bounds of the homographies.
        photometry: bounds of the changes of colour.
    """
    full = photograph.size
    shrink = min(1.0, size / max(full))
    shown = _scaled(full, shrink)
    # No view needs more pixels than the closest one, and resizing a small picture is quick.
    working = _resized(photograph, min(1.0, shrink / geometry.scale))
    for number in range(views):
        generator = _generator(seed, name, number)
        to_photograph, share = _draw_geometry(generator, full, shown, geometry)
        source = _resized(working, full[0] * shrink / (share * working.width))
        to_source = np.diag([source.width / full[0], source.height / full[1], 1]) @ to_photograph
        # PIL asks where each pixel of the result comes from.
        coefficients = (to_source / to_source[2, 2]).ravel()[:8].tolist()
        picture = source.transform(
            shown, Image.Transform.PERSPECTIVE, coefficients, resample=Image.Resampling.BICUBIC
        )
        homography = np.linalg.inv(_HALF) @ np.linalg.inv(to_photograph) @ _HALF
        yield View(_developed(generator, picture, photometry), homography / homography[2, 2])


def _generator(seed: int, name: str, view: int) -> np.random.Generator:
    key = hashlib.sha256(f"{seed}|{view}|{name}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def _draw_geometry(
    generator: np.random.Generator, full: tuple[int, int], shown: tuple[int, int], geometry: Geometry
) -> tuple[FloatArray, float]:
    """From view to photograph, float64 [3, 3] with pixel edges at whole numbers, and the share that it shows.

    A convex quadrilateral with one corner near each of the photograph's is taken for the photograph; the view
    is a turned rectangle within it.
    """
    uniform = generator.random(12)
    width, height = full
    angle = math.radians(geometry.rotation) * (2 * uniform[8] - 1)
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    # The sides of the box about the turned rectangle, in units of the rectangle's share of the photograph.
    box = np.array([width * cosine + height * sine, width * sine + height * cosine])
    largest = float(min(1.0, (np.array(full) / box).min()))
    least = min(geometry.scale, largest)
    share = least + (largest - least) * uniform[9]
    centre = share * box / 2 + (np.array(full) - share * box) * uniform[10:12]
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    window = np.eye(3)
    window[:2, :2] = turn * share @ np.diag([width / shown[0], height / shown[1]])
    window[:2, 2] = centre - window[:2, :2] @ (np.array(shown) / 2)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float64)
    inwards = 1 - 2 * corners
    moved = corners + geometry.perspective * uniform[:8].reshape(4, 2) * inwards
    quadrilateral = _homography(corners * full, moved * full)
    return quadrilateral @ window, float(share)


def _homography(source: FloatArray, target: FloatArray) -> FloatArray:
    """float64 [3, 3] that maps four points to four others, float64 [4, 2] each; its last element is 1.

    Reference: Hartley and Zisserman, Multiple View Geometry, 2nd edition, eq. 4.2, with h33 = 1.
    """
    equations, values = np.zeros((8, 8)), np.zeros(8)
    for row, ((x, y), (u, v)) in enumerate(zip(source, target, strict=True)):
        equations[2 * row] = [x, y, 1, 0, 0, 0, -u * x, -u * y]
        equations[2 * row + 1] = [0, 0, 0, x, y, 1, -v * x, -v * y]
        values[2 * row : 2 * row + 2] = u, v
    return np.append(np.linalg.solve(equations, values), 1).reshape(3, 3)


def _scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _resized(image: Image.Image, factor: float) -> Image.Image:
    """The image at a share of its size, without aliasing; never larger."""
    size = _scaled(image.size, min(1.0, factor))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _developed(generator: np.random.Generator, picture: Image.Image, photometry: Photometry) -> bytes:
    """The JPEG file of a picture after its photometric changes."""
    uniform = generator.random(7)
    bounds = (photometry.brightness, photometry.contrast, photometry.saturation, photometry.gamma)
    factors = [(1 + bound) ** (2 * drawn - 1) for bound, drawn in zip(bounds, uniform[:4], strict=True)]
    brightness, contrast, saturation, gamma = (np.float32(factor) for factor in factors)
    if photometry.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(float(photometry.blur * uniform[4])))
    # A table of 256 values is quicker than as many powers as there are pixels.
    values = ((np.arange(256, dtype=np.float32) / 255) ** gamma * 255)[np.asarray(picture)]
    values = brightness * ((values - values.mean()) * contrast + values.mean())
    grey = (values @ _GREY)[..., None]
    values = grey + (values - grey) * saturation
    if photometry.noise:
        deviation = np.float32(photometry.noise * uniform[5])
        values += deviation * generator.standard_normal(values.shape, dtype=np.float32)
    pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    low, high = photometry.quality
    quality = low + math.floor((high - low + 1) * uniform[6])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
