"""Queries and their hits in one picture: right hits are framed green, wrong ones red, unjudged ones grey."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ray_retrieval.data.location import name_of
from ray_retrieval.errors import DataError, RetrievalError
from ray_retrieval.storage import Folder

Colour = tuple[int, int, int]

RIGHT: Colour = (26, 127, 55)
WRONG: Colour = (207, 34, 46)
UNKNOWN: Colour = (140, 149, 159)
PAPER: Colour = (255, 255, 255)
BLANK: Colour = (238, 240, 243)
INK: Colour = (31, 35, 40)
FAINT: Colour = (89, 99, 110)

SIDE = 128
"""Side of an image in pixels: a multiple of 8, 16, 32 and 64, so that small images grow by whole factors."""
FRAME = 4
GAP = 14
MARGIN = 28
QUERY_GAP = 40
EXAMPLE_GAP = 30
FONT_SIZE = 15
LINE = 20
"""Height of a line of text; each image has two below it."""
TILE = SIDE + 2 * FRAME
CELL = TILE + 4 + 2 * LINE

SMALL = 64
"""Images of at most this side are enlarged pixel by pixel: smoothing would hide what the model was given."""


@dataclass(frozen=True)
class Shown:
    """An image as it is shown.

    Attributes:
        image: the encoded file (JPEG, PNG, …); None where it is not at hand.
        id: the image's id.
        labels: names of its classes, or of the list of the ground truth that it is in; empty where unknown.
        far: how far it is from the query, in words; None for a query.
        right: whether it is relevant to the query; None for a query, where that is unknown, or where the
            ground truth says that the image counts neither way.
    """

    image: bytes | None
    id: str
    labels: list[str]
    far: str | None = None
    right: bool | None = None


@dataclass(frozen=True)
class Example:
    """A query and its hits, nearest first."""

    query: Shown
    hits: list[Shown]


def opened(data: bytes | None, side: int) -> Image.Image | None:
    """The image as RGB, made to fit a square of `side` pixels; None where it cannot be decoded.

    Small images keep their own size, see `SMALL`; others are shrunk, never enlarged.
    """
    # Not at the top: what is read along with it loads torch, which drawing does not need.
    from ray_retrieval.data.decode import decode

    if data is None:
        return None
    try:
        image = decode(data, target=side)
    except DataError:
        return None
    if max(image.size) <= min(side, SMALL):
        return image
    scale = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def cropped(data: bytes, box: Sequence[float]) -> bytes:
    """What of an image is in a box, as a JPEG file; the file as it is where it cannot be decoded.

    Args:
        data: the image file.
        box: left, top, right, bottom in pixels of the upright image.
    """
    # As in `opened`.
    from ray_retrieval.data.decode import decode

    try:
        image = decode(data)
    except DataError:
        return data
    left, top, right, bottom = (round(place) for place in box)
    inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        return data
    encoded = io.BytesIO()
    image.crop(inside).save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def grid(examples: list[Example]) -> Image.Image:
    """Draw one query per row, its hits to the right; distance and labels stand below each image.

    An image that is missing or cannot be decoded is drawn as a grey tile with its id.

    Args:
        examples: the queries with their hits, nearest first.

    Raises:
        RetrievalError: without an example.
    """
    if not examples:
        raise RetrievalError("no query to draw", mend="give at least one query with its hits")
    columns = max(len(example.hits) for example in examples)
    width = 2 * MARGIN + TILE + (QUERY_GAP - GAP if columns else 0) + columns * (TILE + GAP)
    height = 2 * MARGIN + len(examples) * (CELL + EXAMPLE_GAP) - EXAMPLE_GAP
    canvas = Image.new("RGB", (width, height), PAPER)

    for number, example in enumerate(examples):
        top = MARGIN + number * (CELL + EXAMPLE_GAP)
        _place(canvas, MARGIN, top, example.query, is_query=True)
        first = MARGIN + TILE + QUERY_GAP
        if example.hits:
            rule = first - QUERY_GAP // 2
            ImageDraw.Draw(canvas).line((rule, top, rule, top + CELL - 1), fill=BLANK, width=2)
        for place, hit in enumerate(example.hits):
            _place(canvas, first + place * (TILE + GAP), top, hit, is_query=False)
    return canvas


def check_suffix(path: str | Path) -> None:
    """Raise RetrievalError if the suffix is none of .png, .jpg, .jpeg."""
    name = name_of(str(path))
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise RetrievalError(
            f"a picture cannot be saved as '{suffix or name}'",
            where=path,
            mend="end the name in .png or .jpg",
        )


def save(image: Image.Image, path: str | Path) -> None:
    """Write the picture as PNG or JPEG, by the suffix of `path`; the file appears whole or not at all.

    Raises:
        RetrievalError: if the suffix is none of .png, .jpg, .jpeg, or the file cannot be written.
    """
    check_suffix(path)
    folder, name = Folder(str(path)).parent, name_of(str(path))
    encoded = io.BytesIO()
    if os.path.splitext(name)[1].lower() == ".png":
        image.save(encoded, "PNG", optimize=True)
    else:
        # Full colour resolution: the frames and the text are thin and coloured.
        image.convert("RGB").save(encoded, "JPEG", quality=92, subsampling=0)
    folder.write_bytes(name, encoded.getvalue())


def _place(canvas: Image.Image, left: int, top: int, shown: Shown, *, is_query: bool) -> None:
    """Draw a framed image and the two lines below it, its upper left corner at (left, top)."""
    draw = ImageDraw.Draw(canvas)
    colour = {True: RIGHT, False: WRONG, None: UNKNOWN}[shown.right]
    draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=INK if is_query else colour)
    corner = (left + FRAME, top + FRAME)
    draw.rectangle((*corner, corner[0] + SIDE - 1, corner[1] + SIDE - 1), fill=BLANK)
    image = opened(shown.image, SIDE)
    if image is None:
        _write_id(draw, corner, shown.id)
    else:
        image = _enlarged(image)
        canvas.paste(image, (corner[0] + (SIDE - image.width) // 2, corner[1] + (SIDE - image.height) // 2))
    if not is_query and shown.right is not None:
        badge, mask = _badge(shown.right)
        canvas.paste(badge, (left, top), mask)

    font = _font(FONT_SIZE)
    first, ink = ("query", INK) if is_query else (shown.far or "", INK)
    text_top = top + TILE + 4
    draw.text((left, text_top), _shortened(first, font, TILE), fill=ink, font=font)
    draw.text((left, text_top + LINE), _shortened(", ".join(shown.labels), font, TILE), fill=FAINT, font=font)


def _enlarged(image: Image.Image) -> Image.Image:
    if max(image.size) <= SMALL:
        factor = SIDE // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _badge(right: bool) -> tuple[Image.Image, Image.Image]:
    """A tick or a cross for eyes that do not tell green from red, and its mask."""
    side, finer = 24, 4  # drawn larger and shrunk: PIL draws lines without smoothing
    badge = Image.new("RGB", (side * finer, side * finer), RIGHT if right else WRONG)
    draw = ImageDraw.Draw(badge)
    strokes = [[(6, 12), (10, 16), (18, 7)]] if right else [[(7, 7), (16, 16)], [(16, 7), (7, 16)]]
    for stroke in strokes:
        draw.line([(x * finer, y * finer) for x, y in stroke], PAPER, width=10, joint="curve")
    mask = Image.new("L", badge.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle(
        (0, 0, side * finer - 1, side * finer - 1), radius=28, fill=255, corners=(False, False, True, False)
    )
    return badge.resize((side, side), Image.Resampling.BOX), mask.resize((side, side), Image.Resampling.BOX)


def _write_id(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    """Write an id into an empty tile, broken where it has to be."""
    font = _font(FONT_SIZE - 2)
    room, lines, rest = SIDE - 16, list[str](), "no image: " + _one_line(text)
    while rest and len(lines) < 5:
        fits = max(1, next((n for n in range(len(rest), 0, -1) if font.getlength(rest[:n]) <= room), 1))
        breaks = [rest.rfind(mark, 0, fits) + 1 for mark in " /_-"] if fits < len(rest) else []
        cut = max(breaks, default=0) or fits
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    draw.multiline_text((corner[0] + 8, corner[1] + 28), "\n".join(lines), fill=FAINT, font=font, spacing=3)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    text = _one_line(text)
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…"


def _one_line(text: str) -> str:
    return " ".join(text[:200].split())


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
