"""Two photographs side by side, with lines between what agrees in both."""

import colorsys

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ray_retrieval.data.decode import decode
from ray_retrieval.match import Match, Photograph
from ray_retrieval.pictures import BLANK, FAINT, FONT_SIZE, GAP, INK, LINE, MARGIN, PAPER, Colour

SIDE = 560
"""Longer side of a photograph as it is shown, in pixels."""
_FINER = 2
"""Lines are drawn larger and shrunk: PIL draws them without smoothing."""
_WIDTH, _RADIUS = 1.3, 2.6
_OPACITY = 170
_FEW = 60
"""Up to so many lines all are as opaque; more are fainter, so that the photographs can be seen."""


def picture(match: Match) -> Image.Image:
    """The verdict above both photographs, and a line for each inlier, coloured by where it starts."""
    shown = [_shown(one) for one in (match.first, match.second)]
    top = MARGIN + 2 * LINE + GAP
    left = (MARGIN, MARGIN + shown[0].width + GAP)
    height = max(image.height for image in shown)
    canvas = Image.new("RGB", (left[1] + shown[1].width + MARGIN, top + height + MARGIN), PAPER)
    for image, corner in zip(shown, left, strict=True):
        canvas.paste(image, (corner, top))

    draw = ImageDraw.Draw(canvas)
    big, small = (ImageFont.load_default(size=size) for size in (FONT_SIZE + 3, FONT_SIZE - 1))
    draw.text((MARGIN, MARGIN - 4), match.verdict, fill=INK, font=big)
    draw.text((MARGIN, MARGIN + LINE), in_words(match), fill=FAINT, font=small)

    ends = [
        _on_canvas(points, one, image.size, (corner, top))
        for points, one, image, corner in zip(
            match.locations(), (match.first, match.second), shown, left, strict=True
        )
    ]
    lines = _lines(canvas.size, *ends)
    canvas.paste(lines.convert("RGB"), (0, 0), lines.getchannel("A"))
    return canvas


def in_words(match: Match) -> str:
    """`42 inliers of 310 pairs · significance 61.2 · affine`."""
    counted = f"{match.inliers} inliers of {len(match.pairs)} pairs"
    return f"{counted} · significance {match.significance:.1f} · {match.config.geometry.model}"


def _shown(photograph: Photograph) -> Image.Image:
    image = decode(photograph.data, target=SIDE)
    width, height = photograph.size
    scale = SIDE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    found = Image.new("RGB", size, BLANK)
    found.paste(image.resize(size, Image.Resampling.LANCZOS))
    return found


def _on_canvas(
    points: npt.NDArray[np.float32], photograph: Photograph, size: tuple[int, int], corner: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """float64 [k, 2]: where pixels of a photograph lie on the picture; their centres are at whole numbers."""
    factors = np.array(size) / np.array(photograph.size)
    placed: npt.NDArray[np.float64] = (points.astype(np.float64) + 0.5) * factors + np.array(corner)
    return placed


def _lines(
    size: tuple[int, int], starts: npt.NDArray[np.float64], ends: npt.NDArray[np.float64]
) -> Image.Image:
    """RGBA picture of a line with two dots for each pair of points, transparent elsewhere."""
    drawn = Image.new("RGBA", (size[0] * _FINER, size[1] * _FINER), (*PAPER, 0))
    draw = ImageDraw.Draw(drawn)
    opacity = round(_OPACITY * min(1.0, max(0.35, _FEW / max(1, len(starts)))))
    colours = [_colour(place) for place in _shares(starts)]
    pairs = [
        ((_FINER * start[0], _FINER * start[1]), (_FINER * end[0], _FINER * end[1]))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    for pair, colour in zip(pairs, colours, strict=True):
        draw.line(pair, fill=(*colour, opacity), width=round(_WIDTH * _FINER))
    for pair, colour in zip(pairs, colours, strict=True):
        for x, y in pair:
            radius = _RADIUS * _FINER
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*colour, 255))
    return drawn.resize(size, Image.Resampling.BOX)


def _shares(points: npt.NDArray[np.float64]) -> list[float]:
    """0…1 for each point, from the left to the right."""
    if not len(points):
        return []
    across = points[:, 0]
    return ((across - across.min()) / max(1e-9, float(np.ptp(across)))).tolist()  # type: ignore[no-any-return]


def _colour(share: float) -> Colour:
    """From red by yellow and green to blue, bright enough to be seen on a dark photograph."""
    red, green, blue = colorsys.hsv_to_rgb(0.66 * share, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
