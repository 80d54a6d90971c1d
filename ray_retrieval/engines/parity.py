"""Whether another program computes the descriptors of a model: both run on the same images.

An engine adds up in another order than the model, so values differ by rounding, and a bit of a code turns
where its relaxed value lies that close to zero. How much rounding does depends on the network: from 1e-6 of
the largest value for AlexNet to 5e-4 for an untrained ResNet-152. So it is measured, as the difference of the
model in float32 from the same model in float64, and what it cannot explain is refused.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ray_retrieval.compute import autocast
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing, prepare
from ray_retrieval.engines.graphs import Array, CodeGraph, Engine, Graph, LevelGraph, answers, graph_of
from ray_retrieval.errors import DataError, ModelError, StoreError
from ray_retrieval.layers.pyramid import resized
from ray_retrieval.methods.base import Method

_MARGIN = 8
"""An engine may be so many times as far from the model as the model is from itself in float64; found: 1.4."""
_LEAST = 16 * float(np.finfo(np.float32).eps)
"""What is allowed in any case, as a share of the largest value."""
_NAMED = 3  # images that an error names
_MOST = 64
"""Images to compare on, at most."""
_PIXELS = 64 * 256 * 256
"""Of all of them together, at most but for eight images: each is run three times, once in float64."""


@dataclass(frozen=True)
class Samples:
    """Prepared images to compare on.

    Attributes:
        images: uint8 [3, h, w] each, at least one.
        names: what each image is called in messages.
        source: where they come from, in words.
        left_out: number of images that could not be decoded.
    """

    images: Sequence[Array]
    names: list[str]
    source: str
    left_out: int = 0


@dataclass(frozen=True)
class Difference:
    """How an engine's values of one output compare with the model's, both in float32.

    Attributes:
        max_absolute_error: largest difference of a value.
        rounding_error: largest difference of the model's values from those that it has in float64.
        allowed_error: what is taken for rounding: 8 times that, or a few units of float32 if that is more.
    """

    max_absolute_error: float
    rounding_error: float
    allowed_error: float


@dataclass(frozen=True)
class Parity:
    """How an engine's answers compare with the model's.

    Attributes:
        source: where the images come from, in words.
        images: number of images.
        left_out: number of images that could not be decoded.
        batch_sizes: sizes of the batches that they were run in.
        sides: heights and widths that were run.
        outputs: how each output of the graph that has float values compares.
        trained_in: the precision that the model was trained in and describes images in.
        bits: of codes, number of bits compared; an image that is run twice counts twice.
        differing_bits: of codes, bits that differ, all of them where the relaxed value is within its
            `allowed_error` of 0.
        differing_from_trained: of codes, bits in which the engine differs from the model in its precision.
        cosine_to_trained: of vectors, the least cosine to the model's in that precision.
    """

    source: str
    images: int
    left_out: int
    batch_sizes: list[int]
    sides: list[list[int]]
    outputs: dict[str, Difference]
    trained_in: str
    bits: int | None = None
    differing_bits: int | None = None
    differing_from_trained: int | None = None
    cosine_to_trained: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def synthetic_samples(preprocessing: Preprocessing) -> Samples:
    """20 images of noise, of smooth gradients and of one colour, the same every time.

    Where the model's images have several sizes, these have three: squares, upright and lying ones.
    """
    size = preprocessing.size
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (8, 3, size, size))
    ramp = np.linspace(0, 1, size)
    across, down = ramp[None, :], ramp[:, None]
    corners = generator.integers(0, 256, (8, 4, 3, 1, 1))
    smooth = (
        corners[:, 0] * across * down
        + corners[:, 1] * across * (1 - down)
        + corners[:, 2] * (1 - across) * down
        + corners[:, 3] * (1 - across) * (1 - down)
    )
    plain = np.broadcast_to(np.array([0, 85, 170, 255])[:, None, None, None], (4, 3, size, size))
    images = np.concatenate([noise, smooth, plain]).astype(np.uint8)
    names = [f"synthetic image {row}" for row in range(len(images))]
    source = f"{len(images)} synthetic images"
    if preprocessing.square:
        return Samples(list(images), names, source)
    short = max(1, 3 * size // 4)
    shapes = [(size, size), (size, short), (short, size)]
    cut = [image[:, : shapes[row % 3][0], : shapes[row % 3][1]] for row, image in enumerate(images)]
    most = max(8, _PIXELS // size**2)
    return Samples(cut[:most], names[:most], source)


def table_samples(table: ImageTable, preprocessing: Preprocessing, *, limit: int | None = None) -> Samples:
    """At most `limit` images of a table, evenly spaced over it; unset: 64, fewer where they are large.

    Raises:
        StoreError: if a store does not answer.
        DataError: if none of them can be decoded.
    """
    rows = spread(len(table), limit or min(_MOST, max(8, _PIXELS // preprocessing.size**2)))
    failures: list[str] = []
    found = list(decoded(table, rows, preprocessing, failures))
    if not found:
        failure = failures[-1] if failures else "the table is empty"
        raise DataError(f"none of {len(rows)} images can be decoded, the last: {failure}", where=table.name)
    images = [image for _, image in found]
    names = [f"image '{table.ids[row]}'" for row, _ in found]
    source = f"{len(rows)} of {len(table)} images of {table.name}"
    return Samples(images, names, source, left_out=len(rows) - len(images))


def decoded(
    table: ImageTable, rows: npt.NDArray[np.int64], preprocessing: Preprocessing, failures: list[str]
) -> Iterator[tuple[int, Array]]:
    """Rows of a table with their images, prepared as an encoder does: of each its box, where it has one.

    Args:
        table: the images.
        rows: int64 [n].
        preprocessing: of the model.
        failures: the reasons of images that cannot be decoded are added here.

    Raises:
        StoreError: if a store does not answer.
    """
    for row in map(int, rows):
        try:
            yield row, prepare(table.image_bytes(row), preprocessing, table.box(row))
        except StoreError:
            raise
        except DataError as error:
            failures.append(error.problem)


def spread(rows: int, limit: int) -> npt.NDArray[np.int64]:
    """int64 [m], ascending: at most `limit` of all rows, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, rows - 1, min(limit, rows)).round().astype(np.int64))


def fed(graph: Graph, samples: Samples) -> Samples:
    """The samples as the graph takes them; of local features, each at one of the scales of the pyramid.

    Raises:
        DataError: if all images are smaller than the graph takes.
    """
    least = graph.least_side if graph.any_size else 1
    rows = [row for row, image in enumerate(samples.images) if min(image.shape[1:]) >= least]
    if not rows:
        raise DataError(
            f"no image has {least} pixels along each side, as the graph needs", mend="give larger images"
        )
    images = [samples.images[row] for row in rows]
    if isinstance(graph, LevelGraph):
        config = graph.method.config.pyramid
        images = [
            _at_scale(image, config.scales[place % len(config.scales)], least)
            for place, image in enumerate(images)
        ]
    return Samples(images, [samples.names[row] for row in rows], samples.source, samples.left_out)


def _with_odd_sides(graph: Graph, samples: Samples) -> Samples:
    """And two images of noise with sides that the others may not have: the least, and odd ones."""
    if not graph.any_size:
        return samples
    least, generator = graph.least_side, np.random.default_rng(0)
    shapes = [(3, least, least + 1), (3, 2 * least + 1, 3 * least + 2)]
    noise = [generator.integers(0, 256, shape).astype(graph.input.dtype) for shape in shapes]
    names = [f"noise of {height} × {width} pixels" for _, height, width in shapes]
    return Samples([*samples.images, *noise], [*samples.names, *names], samples.source, samples.left_out)


def _at_scale(image: Array, scale: float, least: int) -> Array:
    """An image as float32 [3, h, w] at a scale, or as it is where it would be too small."""
    pixels = torch.from_numpy(np.asarray(image)).float()
    sides = round(pixels.shape[1] * scale), round(pixels.shape[2] * scale)
    if min(sides) < least:
        return pixels.numpy()
    return resized(pixels[None], sides)[0].numpy()


@dataclass
class _Answers:
    """What was given for one output, batch by batch."""

    model: list[Array] = field(default_factory=list)
    engine: list[Array] = field(default_factory=list)
    exact: list[Array] = field(default_factory=list)


def compare(engine: Engine, method: Method, samples: Samples, *, precision: str, where: object) -> Parity:
    """Run an engine and the model on the same images.

    Args:
        engine: what was made of the model's graph.
        method: the model, in evaluation mode, on the processor.
        samples: the images.
        precision: that of the model, `bf16` or `float32`.
        where: what is compared, for messages.

    Raises:
        ModelError: naming images and values, if a value differs by more than `allowed_error`, or a bit whose
            relaxed value is farther from 0 than that, or if values are not finite or of another shape.
        DataError: if all images are too small.
    """
    graph, exact = graph_of(method), graph_of(copy.deepcopy(method).to(torch.float64))
    names = [output.name for output in graph.outputs]
    given = fed(graph, samples)
    samples = _with_odd_sides(graph, given)
    batches = _batches([image.shape for image in samples.images])
    found = {name: _Answers() for name in names}
    trained: list[Array] = []
    for rows in batches:
        pixels = np.stack([samples.images[row] for row in rows])
        runs = (answers(graph, pixels), list(engine(pixels)), answers(exact, pixels))
        for name, mine, theirs, exactly in zip(names, *runs, strict=True):
            _check_shape(mine, theirs, where)
            for values, some in zip(vars(found[name]).values(), (mine, theirs, exactly), strict=True):
                values.append(some)
        if not isinstance(graph, LevelGraph):
            with torch.inference_mode(), autocast("bf16" if precision == "bf16" else "float32", _CPU):
                trained.append(np.asarray(method.describe(torch.from_numpy(pixels)).data))
    of_rows = [samples.names[row] for row in np.concatenate(batches)]
    differences = {
        name: _difference(name, found[name], of_rows, where) for name in names if name in graph.checked
    }
    about: dict[str, Any] = {}
    if isinstance(graph, CodeGraph):
        about = _bits(found, differences["relaxed"].allowed_error, of_rows, where)
        other = _unpacked(np.concatenate(found["codes"].engine))
        about["differing_from_trained"] = int((_unpacked(np.concatenate(trained)) != other).sum())
    elif trained:
        own, other = np.concatenate(trained), np.concatenate(found["vectors"].engine)
        about["cosine_to_trained"] = float(np.einsum("nd,nd->n", own, other, dtype=np.float64).min())
    return Parity(
        source=samples.source,
        images=len(given.images),
        left_out=samples.left_out,
        batch_sizes=sorted({len(rows) for rows in batches}),
        sides=[list(sides) for sides in sorted({image.shape[1:] for image in samples.images})],
        outputs=differences,
        trained_in=precision,
        **about,
    )


_CPU = torch.device("cpu")


def _batches(shapes: Sequence[tuple[int, ...]]) -> list[npt.NDArray[np.int64]]:
    """Rows of one shape each, in batches of 1, 2 and 7, and then of 7.

    Fewer than 10 rows of the shape that comes first are run more than once; those of others go by 7.
    """
    found: list[npt.NDArray[np.int64]] = []
    for shape in dict.fromkeys(shapes):
        rows = np.array([row for row, one in enumerate(shapes) if one == shape], np.int64)
        if not found:
            rows = np.resize(rows, max(len(rows), 10))
            found += np.split(rows, [1, 3, *range(10, len(rows), 7)])
        else:
            found += np.split(rows, range(7, len(rows), 7))
    return [rows for rows in found if len(rows)]


def _check_shape(wanted: Array, found: Array, where: object) -> None:
    if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
        raise ModelError(
            f"gives {found.dtype} {list(found.shape)}, the model {wanted.dtype} {list(wanted.shape)}",
            where=where,
        )


def _difference(name: str, found: _Answers, names: list[str], where: object) -> Difference:
    """Of one output; what rounding does not explain is refused."""
    if not all(np.isfinite(values).all() for values in found.model):
        raise ModelError("the model gives values that are not finite", where=where)
    rounding = _largest([e - m for e, m in zip(found.exact, found.model, strict=True)])
    largest = _largest(found.model)
    allowed = max(_MARGIN * rounding, _LEAST * largest)
    errors = [np.abs(t.astype(np.float64) - m) for t, m in zip(found.engine, found.model, strict=True)]
    most = _largest(errors)
    if not most <= allowed:  # so that NaN is refused
        wrong = [~(one <= allowed).reshape(len(one), -1) for one in errors]
        called = "relaxed values" if name == "relaxed" else name
        raise _refusal(f"{called} differ by up to {most:.3g}", wrong, allowed, names, where)
    return Difference(most, rounding, allowed)


def _largest(batches: Sequence[Array]) -> float:
    """The largest absolute value; NaN where one is NaN."""
    return float(np.max([np.abs(values).max(initial=0) for values in batches]))


def _bits(
    found: dict[str, _Answers], allowed: float, names: list[str], where: object
) -> dict[str, int | None]:
    """How many bits of codes were compared and differ; those of values far from zero are refused."""
    relaxed = np.concatenate(found["relaxed"].model)
    codes, other = (_unpacked(np.concatenate(some)) for some in (found["codes"].model, found["codes"].engine))
    turned = codes != other
    unsure = np.zeros_like(turned)  # nothing excuses the bits that fill the last byte
    unsure[:, : relaxed.shape[1]] = np.abs(relaxed) <= allowed
    if (turned & ~unsure).any():
        raise _refusal("codes differ", [turned & ~unsure], allowed, names, where)
    return {"bits": relaxed.size, "differing_bits": int(turned.sum())}


def _unpacked(codes: Array) -> npt.NDArray[np.bool_]:
    return np.unpackbits(codes, axis=1).astype(np.bool_)


def _refusal(
    problem: str, wrong: list[npt.NDArray[np.bool_]], allowed: float, names: list[str], where: object
) -> ModelError:
    """The error that names images and values; `wrong` is bool [n, values] of each batch."""
    places = [np.flatnonzero(row) for batch in wrong for row in batch]
    rows = [row for row, numbers in enumerate(places) if len(numbers)]
    listed = []
    for row in rows[:_NAMED]:
        numbers = ", ".join(map(str, places[row][:8])) + (", …" if len(places[row]) > 8 else "")
        listed.append(f"{names[row]} at {numbers}")
    if len(rows) > _NAMED:
        listed.append(f"{len(rows) - _NAMED} more")
    return ModelError(
        f"computes other descriptors than the model: {problem}, where rounding explains {allowed:.3g}: "
        f"{'; '.join(listed)}",
        where=where,
    )
