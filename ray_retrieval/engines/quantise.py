"""The backbone of an exported graph in 8 bits.

Static quantisation after the training: what each layer of the backbone gives is rounded to 256 values between
the least and the largest that it gives for some images (the calibration), and its weights to 128 values an
output channel. What stands behind the backbone, the hash layer or pooling and whitening, stays in float32: it
is little work, and its rounding would go straight into the descriptors.

Weights have 7 bits, not 8: processors without instructions for products of bytes (x86 before VNNI) add pairs
of products up in 16 bits, where those of 8 may overflow. Machines that have such instructions never show it.
"""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.data.table import ImageTable
from ray_retrieval.engines import Exported, int8_loss, onnx_runtime, open_onnx, parity
from ray_retrieval.engines.graphs import INPUT, Array, Graph
from ray_retrieval.errors import DataError, ModelError, RecipeError

MAX_LOSS = 0.02
"""Of the metric, from 0 to 1, that 8 bits may cost unless told otherwise."""
CALIBRATION_IMAGES = 128
_CALIBRATION_PIXELS = 1 << 25
"""Of all of them together, at most but for eight images: they are held in memory, as floats for DELF."""
LEAST_AGREEMENT = 0.8
"""Below that a file is refused where no labels tell what it costs; by chance half of the bits are equal."""
_COMPARED_IMAGES = 32
_OPERATIONS = ("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Int8:
    """What 8 bits cost.

    Attributes:
        calibrated_on: images that the ranges come from, in words.
        layers: operations of the backbone that compute in 8 bits.
        agreement: how near the file's answers are to those in float32: the share of equal bits of codes, the
            mean cosine of vectors, or of local features at one scale.
        compared_on: images that this was measured on, in words.
        measured_on: images that the loss was measured on, in words; None without labels.
        metric: its name; None without labels.
        policy: what it is, in a sentence.
        model: its value where the model describes queries and database, in float32.
        int8: where the file describes both.
        int8_queries: where the file describes the queries, and the model the database.
        loss: by how much the lower of these two is below that of the model; negative where it is above.
        max_loss: the most that was allowed.
    """

    calibrated_on: str
    layers: int
    agreement: float
    compared_on: str
    measured_on: str | None = None
    metric: str | None = None
    policy: str | None = None
    model: float | None = None
    int8: float | None = None
    int8_queries: float | None = None
    loss: float | None = None
    max_loss: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check(images: ImageTable, max_loss: float | None) -> None:
    """Raise RecipeError where a loss is bounded that cannot be measured on the images."""
    labelled = len(int8_loss.labelled_rows(images))
    if max_loss is not None and labelled < int8_loss.LEAST_MEASURED:
        raise RecipeError(
            f"a loss is measured on {int8_loss.LEAST_MEASURED} images with labels or more, and "
            f"{labelled or 'none'} of the images have any",
            where=images.name,
            mend="give images with labels (folders of classes, say), or leave out `max_loss`",
        )


def quantise(
    source: Path,
    target: Path,
    graph: Graph,
    images: ImageTable,
    *,
    measured: ImageTable | None,
    max_loss: float | None,
) -> Int8:
    """Write a file of ONNX whose backbone computes in 8 bits.

    Args:
        source: a file of the graph, in float32.
        target: what is written.
        graph: of the model, in evaluation mode, on the processor.
        images: to calibrate on.
        measured: images with labels to measure the loss on; unset: those of `images` that have any, without
            the calibrated ones where enough others are left.
        max_loss: of the metric; unset: `MAX_LOSS`.

    Raises:
        DataError: if no image can be decoded, or too few to measure a loss that `max_loss` bounds.
        ModelError: if nothing of the backbone can be found in the file, the loss is above `max_loss`, or,
            where it cannot be measured, the answers are too far from those in float32.
    """
    limit = min(CALIBRATION_IMAGES, max(8, _CALIBRATION_PIXELS // graph.preprocessing.size**2))
    calibrated = parity.spread(len(images), limit)
    samples = parity.fed(graph, parity.table_samples(images, graph.preprocessing, limit=limit))
    layers = _write(source, target, samples, graph.method.backbones)
    near, compared_on = _compare(source, target, graph, images, calibrated)
    made = Int8(f"{len(samples.images)} of {len(images)} images of {images.name}", layers, near, compared_on)
    exported = Exported(graph.method, open_onnx(target))
    none = np.zeros(0, np.int64)
    asked, seen = (images, calibrated) if measured is None else (measured, none)
    found = int8_loss.measure(graph.method, exported, asked, seen)
    if found is None:
        if max_loss is not None:
            raise DataError("too few images can be decoded to measure the loss", where=asked.name)
        _refuse_far(made, target)
        return made
    allowed = MAX_LOSS if max_loss is None else max_loss
    made = Int8(**{**asdict(made), **found, "max_loss": allowed})
    assert made.loss is not None
    if not made.loss <= allowed:
        raise ModelError(
            f"8 bits cost {made.loss:.4f} of {made.metric}, more than {allowed:g}: {made.model:.4f} by the "
            f"model, {made.int8:.4f} by the file, {made.int8_queries:.4f} with queries by the file alone",
            where=asked.name,
            mend="calibrate on more images like the database's, allow more as `max_loss`, or leave out "
            "`int8`",
        )
    return made


def _compare(
    source: Path, target: Path, graph: Graph, images: ImageTable, calibrated: npt.NDArray[np.int64]
) -> tuple[float, str]:
    """How near the two files are, and on which images: on others than the calibrated ones if there are 10."""
    others = np.setdiff1d(np.arange(len(images)), calibrated)
    enough = len(others) >= int8_loss.LEAST_MEASURED
    some = images.take(others if enough else calibrated)
    samples = parity.fed(graph, parity.table_samples(some, graph.preprocessing, limit=_COMPARED_IMAGES))
    near = int8_loss.agreement(open_onnx(source), open_onnx(target), graph, samples)
    return near, f"{len(samples.images)} images {'not ' * enough}calibrated on"


def _refuse_far(made: Int8, target: Path) -> None:
    """Raise ModelError where no labels tell what 8 bits cost and the answers are far from float32."""
    if not made.agreement >= LEAST_AGREEMENT:  # so that NaN is refused
        raise ModelError(
            f"in 8 bits it agrees by {made.agreement:.4f} with float32 ({made.compared_on}), less than "
            f"{LEAST_AGREEMENT:g}",
            where=target.name,
            mend="calibrate on more images like the database's, give images with labels to measure what it "
            "costs, or leave out `int8`",
        )


def _write(source: Path, target: Path, samples: parity.Samples, parts: tuple[str, ...]) -> int:
    """Quantise these parts of the method in a file; returns how many operations compute in 8 bits."""
    onnx_runtime()
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    chosen = [
        node.name
        for node in onnx.load(source).graph.node
        if node.op_type in _OPERATIONS and _is_in(node, parts)
    ]
    # Statistics of batches are folded into convolutions first.
    simple = target.with_suffix(".simple.onnx")
    quant_pre_process(source, simple, skip_symbolic_shape=True)
    nodes = {node.name for node in onnx.load(simple, load_external_data=False).graph.node}
    chosen = [name for name in chosen if name in nodes]
    if not chosen:
        raise ModelError("nothing of the backbone is found in the file", where=source.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_static(
            simple,
            target,
            _Reader(samples),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATIONS),
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=chosen,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
    simple.unlink()
    return len(chosen)


def _is_in(node: Any, parts: tuple[str, ...]) -> bool:
    """Whether an operation is of these modules of the method."""
    scopes = [entry.value for entry in node.metadata_props if entry.key == _SCOPES]
    return any(f"method.{part}" in scope for scope in scopes for part in parts)


class _Reader:
    """Images for the calibration, one at a time, as `onnxruntime` asks for them."""

    def __init__(self, samples: parity.Samples) -> None:
        self._images = iter(samples.images)

    def get_next(self) -> dict[str, Array] | None:
        image = next(self._images, None)
        return None if image is None else {INPUT: np.asarray(image)[None]}
