"""Whether another program computes the codes of a model: both run on the same images, bit against bit.

An engine adds up in another order than the model, so relaxed values differ by rounding, and a bit turns where
a value lies that close to zero. How much rounding does depends on the network: from 1e-6 of the largest value
for AlexNet to 5e-4 for an untrained ResNet-152. So it is measured, as the difference of the model in float32
from the same model in float64, and what it cannot explain is refused.
"""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ray_retrieval.compute import autocast
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing, prepare
from ray_retrieval.engines import Engine, Images
from ray_retrieval.errors import DataError, ModelError, StoreError
from ray_retrieval.methods.hashing import HashingMethod

_MARGIN = 8
"""An engine may be so many times as far from the model as the model is from itself in float64; found: 1.4."""
_LEAST = 16 * float(np.finfo(np.float32).eps)
"""What is allowed in any case, as a share of the largest relaxed value."""
_NAMED = 3  # images that an error names


@dataclass(frozen=True)
class Samples:
    """Prepared images to compare on.

    Attributes:
        images: uint8 [n, 3, size, size], at least one.
        names: what each image is called in messages.
        source: where they come from, in words.
        left_out: number of images that could not be decoded.
    """

    images: Images
    names: list[str]
    source: str
    left_out: int = 0


@dataclass(frozen=True)
class Parity:
    """How an engine's answers compare with the model's, both in float32.

    Attributes:
        source: where the images come from, in words.
        images: number of images.
        left_out: number of images that could not be decoded.
        batch_sizes: sizes of the batches that they were run in.
        max_absolute_error: largest difference of a relaxed value.
        rounding_error: largest difference of the model's relaxed values from those that it has in float64.
        allowed_error: what is taken for rounding: 8 times that, or a few units of float32 if that is more.
        bits: number of bits compared; an image that is run twice counts twice.
        differing_bits: bits that differ, all of them where the relaxed value is within `allowed_error` of 0.
        trained_in: the precision that the model was trained in and describes images in.
        differing_from_trained: bits in which the engine differs from the model in that precision.
    """

    source: str
    images: int
    left_out: int
    batch_sizes: list[int]
    max_absolute_error: float
    rounding_error: float
    allowed_error: float
    bits: int
    differing_bits: int
    trained_in: str
    differing_from_trained: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def synthetic_samples(size: int) -> Samples:
    """20 images of noise, of smooth gradients and of one colour, the same every time."""
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
    return Samples(images, names, f"{len(images)} synthetic images")


def table_samples(table: ImageTable, preprocessing: Preprocessing, *, limit: int = 64) -> Samples:
    """At most `limit` images of a table, evenly spaced over it.

    Raises:
        StoreError: if a store does not answer.
        DataError: if none of them can be decoded.
    """
    rows = np.unique(np.linspace(0, len(table) - 1, min(limit, len(table))).round().astype(np.int64))
    images, names, failure = [], [], "the table is empty"
    for row in rows:
        try:
            images.append(prepare(table.image_bytes(int(row)), preprocessing))
        except StoreError:
            raise
        except DataError as error:
            failure = error.problem
        else:
            names.append(f"image '{table.ids[row]}'")
    if not images:
        raise DataError(f"none of {len(rows)} images can be decoded, the last: {failure}", where=table.name)
    source = f"{len(rows)} of {len(table)} images of {table.name}"
    return Samples(np.stack(images), names, source, left_out=len(rows) - len(images))


def compare(
    engine: Engine, method: HashingMethod, samples: Samples, *, precision: str, where: object
) -> Parity:
    """Run an engine and the model on the same images.

    Args:
        engine: what was made of the model.
        method: the model, in evaluation mode, on the processor.
        samples: the images.
        precision: that of the model, `bf16` or `float32`.
        where: what is compared, for messages.

    Raises:
        ModelError: naming images and bits, if a relaxed value differs by more than `allowed_error`, or a bit
            whose value is farther from 0 than that, or if values are not finite or of another shape.
    """
    batches = _batches(len(samples.images))
    exact = copy.deepcopy(method).to(torch.float64)
    mine, theirs, trained, exactly = [], [], [], []
    for rows in batches:
        pixels = samples.images[rows]
        images = torch.from_numpy(pixels)
        with torch.inference_mode():
            mine.append((method.describe(images).data, method.relaxed(images).numpy()))
            exactly.append(exact.relaxed(images).numpy())
            if precision == "bf16":
                with autocast("bf16", images.device):
                    trained.append(method.describe(images).data)
        theirs.append(engine(pixels))
    codes, other_codes = _joined([c for c, _ in mine], [c for c, _ in theirs], where)
    relaxed, other_relaxed = _joined([r for _, r in mine], [r for _, r in theirs], where)
    if not np.isfinite(relaxed).all():
        raise ModelError("the model gives values that are not finite", where=where)
    names = [samples.names[row] for row in np.concatenate(batches)]
    rounding = float(np.abs(np.concatenate(exactly) - relaxed).max())
    allowed = max(_MARGIN * rounding, _LEAST * float(np.abs(relaxed).max()))
    errors = np.abs(other_relaxed.astype(np.float64) - relaxed)
    wrong = ~(errors <= allowed)  # so that NaN is wrong
    if wrong.any():
        raise _refusal(f"relaxed values differ by up to {errors.max():.3g}", wrong, allowed, names, where)
    turned = _unpacked(codes) != _unpacked(other_codes)
    unsure = np.zeros_like(turned)  # nothing excuses the bits that fill the last byte
    unsure[:, : relaxed.shape[1]] = np.abs(relaxed) <= allowed
    if (turned & ~unsure).any():
        raise _refusal("codes differ", turned & ~unsure, allowed, names, where)
    own = _unpacked(np.concatenate(trained) if trained else codes)
    return Parity(
        source=samples.source,
        images=len(samples.images),
        left_out=samples.left_out,
        batch_sizes=sorted({len(rows) for rows in batches}),
        max_absolute_error=float(errors.max()),
        rounding_error=rounding,
        allowed_error=allowed,
        bits=relaxed.size,
        differing_bits=int(turned.sum()),
        trained_in=precision,
        differing_from_trained=int((own != _unpacked(other_codes)).sum()),
    )


def _batches(count: int) -> list[npt.NDArray[np.int64]]:
    """Rows in batches of 1, 2 and 7, and then of 7; fewer than 10 rows are run more than once."""
    rows = np.resize(np.arange(count), max(count, 10))
    return np.split(rows, [1, 3, *range(10, len(rows), 7)])


def _joined(
    mine: list[npt.NDArray[Any]], theirs: list[npt.NDArray[Any]], where: object
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    for wanted, found in zip(mine, theirs, strict=True):
        if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
            raise ModelError(
                f"gives {found.dtype} {list(found.shape)}, the model {wanted.dtype} {list(wanted.shape)}",
                where=where,
            )
    return np.concatenate(mine), np.concatenate(theirs)


def _unpacked(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    return np.unpackbits(codes, axis=1).astype(np.bool_)


def _refusal(
    problem: str, wrong: npt.NDArray[np.bool_], allowed: float, names: list[str], where: object
) -> ModelError:
    rows = np.flatnonzero(wrong.any(axis=1))
    listed = []
    for row in rows[:_NAMED]:
        bits = np.flatnonzero(wrong[row])
        numbers = ", ".join(map(str, bits[:8])) + (", …" if len(bits) > 8 else "")
        listed.append(f"{names[row]} in bits {numbers}")
    if len(rows) > _NAMED:
        listed.append(f"{len(rows) - _NAMED} more")
    return ModelError(
        f"computes other codes than the model: {problem}, where rounding explains {allowed:.3g}: "
        f"{'; '.join(listed)}",
        where=where,
    )
