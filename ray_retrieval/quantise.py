"""The backbone of an exported graph in 8 bits, and what that costs by the metric of the field.

Static quantisation after the training: what each layer of the backbone gives is rounded to 256 values between
the least and the largest that it gives for some images (the calibration), and its weights to 128 values an
output channel. What stands behind the backbone, the hash layer or pooling and whitening, stays in float32: it
is little work, and its rounding would go straight into the descriptors.

Weights have 7 bits, not 8: processors without instructions for products of bytes (x86 before VNNI) add pairs
of products up in 16 bits, where those of 8 may overflow. Machines that have such instructions never show it.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ray_retrieval import parity
from ray_retrieval.data.mixed import MixedImages, groups_of
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing, prepare
from ray_retrieval.descriptors import Codes, Descriptors, Local, Vectors, assembled
from ray_retrieval.engines import Exported, onnx_runtime, open_onnx
from ray_retrieval.errors import DataError, ModelError, RecipeError, StoreError
from ray_retrieval.graphs import INPUT, Array, Graph
from ray_retrieval.methods.base import Method
from ray_retrieval.metrics import hamming, retrieval
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.search.neighbours import FeatureSegment
from ray_retrieval.search.votes import LocalSearchConfig, search_votes

MAX_LOSS = 0.02
"""Of the metric, from 0 to 1, that 8 bits may cost unless told otherwise."""
CALIBRATION_IMAGES = 128
_CALIBRATION_PIXELS = 1 << 25
"""Of all of them together, at most but for eight images: they are held in memory, as floats for DELF."""
_MEASURED_IMAGES = 1000
_LEAST_MEASURED = 10
_QUERIES = 5
"""One of so many images asks for the others."""
_BATCH = 16
_OPERATIONS = ("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool")
_BACKBONES = ("method.backbone", "method.above")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Int8:
    """What 8 bits cost.

    Attributes:
        calibrated_on: images that the ranges come from, in words.
        layers: operations of the backbone that compute in 8 bits.
        measured_on: images that the loss was measured on, in words; None without labels.
        metric: its name; None without labels.
        policy: what it is, in a sentence.
        model: its value where the model describes queries and database, in float32.
        int8: where the file describes both.
        int8_queries: where the file describes the queries, and the model the database.
        loss: by how much the lower of these two is below that of the model; negative where it is above.
        max_loss: the most that was allowed.
        agreement: how near its descriptors are to the model's: the share of equal bits of codes, the mean
            cosine of vectors; None of local features.
    """

    calibrated_on: str
    layers: int
    measured_on: str | None = None
    metric: str | None = None
    policy: str | None = None
    model: float | None = None
    int8: float | None = None
    int8_queries: float | None = None
    loss: float | None = None
    max_loss: float | None = None
    agreement: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check(form: str, images: ImageTable | None, max_loss: float | None) -> None:
    """Raise RecipeError for a quantisation that cannot be had."""
    if form != "onnx":
        raise RecipeError(f"8 bits are for the format onnx, not {form}", mend="leave out --int8")
    if images is None:
        raise RecipeError(
            "8 bits are chosen by what the network makes of images, and there are none",
            mend="give some of the database's with --images",
        )
    if max_loss is not None and not images.has_labels:
        raise RecipeError(
            "a loss is measured with labels, and the images have none",
            where=images.name,
            mend="give images with labels (folders of classes, say), or leave out --max-loss",
        )


def quantise(source: Path, target: Path, graph: Graph, images: ImageTable, *, max_loss: float | None) -> Int8:
    """Write a file of ONNX whose backbone computes in 8 bits.

    Args:
        source: a file of the graph, in float32.
        target: what is written.
        graph: of the model, in evaluation mode, on the processor.
        images: to calibrate on; the others of them are measured on, where they have labels.
        max_loss: of the metric; unset: `MAX_LOSS`.

    Raises:
        DataError: if no image can be decoded.
        ModelError: if nothing of the backbone can be found in the file, its answers are not finite, or the
            loss is above `max_loss`.
    """
    limit = min(CALIBRATION_IMAGES, max(8, _CALIBRATION_PIXELS // graph.preprocessing.size**2))
    some = parity.table_samples(images, graph.preprocessing, limit=limit)
    samples = parity.fed(graph, some)
    layers = _write(source, target, samples)
    made = Int8(f"{len(samples.images)} of {len(images)} images of {images.name}", layers)
    exported = Exported(graph.method, open_onnx(target))
    rows = _measured_rows(images, parity.spread(len(images), limit))
    if len(rows) < _LEAST_MEASURED:
        _refuse_nonsense(exported.describe, samples, target)
        return made
    found = _measure(graph.method, exported, images.take(rows), len(images))
    allowed = MAX_LOSS if max_loss is None else max_loss
    made = Int8(**{**asdict(made), **found, "max_loss": allowed})
    assert made.loss is not None
    if not made.loss <= allowed:
        raise ModelError(
            f"8 bits cost {made.loss:.4f} of {made.metric}, more than {allowed:g}: {made.model:.4f} by the "
            f"model, {made.int8:.4f} by the file, {made.int8_queries:.4f} with queries by the file alone",
            where=images.name,
            mend="calibrate on more images like the database's, allow more with --max-loss, or leave out "
            "--int8",
        )
    return made


def _write(source: Path, target: Path, samples: parity.Samples) -> int:
    """Quantise a file; returns how many operations compute in 8 bits."""
    onnx_runtime()
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    chosen = [
        node.name
        for node in onnx.load(source).graph.node
        if node.op_type in _OPERATIONS and _of_the_backbone(node)
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


def _of_the_backbone(node: Any) -> bool:
    scopes = [entry.value for entry in node.metadata_props if entry.key == _SCOPES]
    return any(name in scope for scope in scopes for name in _BACKBONES)


class _Reader:
    """Images for the calibration, one at a time, as `onnxruntime` asks for them."""

    def __init__(self, samples: parity.Samples) -> None:
        self._images = iter(samples.images)

    def get_next(self) -> dict[str, Array] | None:
        image = next(self._images, None)
        return None if image is None else {INPUT: np.asarray(image)[None]}


def _refuse_nonsense(
    describe: Callable[[torch.Tensor], Descriptors], samples: parity.Samples, target: Path
) -> None:
    """Raise ModelError where the file gives what is no number."""
    first = samples.images[0]
    found = describe(torch.from_numpy(np.asarray(first)[None]).to(torch.uint8))
    if not isinstance(found, Codes) and not np.isfinite(found.data).all():
        raise ModelError("gives values that are not finite in 8 bits", where=target.name)


def _measured_rows(images: ImageTable, calibrated: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows with a label that were not calibrated on, evenly spread; all of them where there are few."""
    if not images.has_labels:
        return np.zeros(0, np.int64)
    labelled = np.setdiff1d(np.arange(len(images)), images.unlabelled)
    others = np.setdiff1d(labelled, calibrated)
    rows = others if len(others) >= _MEASURED_IMAGES else labelled
    return rows[parity.spread(len(rows), _MEASURED_IMAGES)]


def _measure(method: Method, exported: Exported, images: ImageTable, total: int) -> dict[str, Any]:
    """The field's metric by the model and by the file, on the images that can be decoded."""
    parts: list[tuple[npt.NDArray[np.int64], Descriptors, Descriptors]] = []
    kept: list[int] = []
    for rows, batch in _batches(images, method.preprocessing):
        for places, some in groups_of(batch):
            with torch.inference_mode():
                pair = method.describe(some), exported.describe(some)
            parts.append((len(kept) + places, *pair))
        kept += rows
    if not kept:
        raise DataError("none of the images can be decoded", where=images.name)
    form = method.config.form
    mine = assembled(form, len(kept), [(places, one) for places, one, _ in parts])
    theirs = assembled(form, len(kept), [(places, other) for places, _, other in parts])
    labels = images.take(np.array(kept, np.int64)).labels
    asks = np.arange(len(kept)) % _QUERIES == 0
    queries, database = np.flatnonzero(asks), np.flatnonzero(~asks)

    def metric(asking: Descriptors, asked: Descriptors) -> Metric:
        return field_metric(asking.take(queries), labels[queries], asked.take(database), labels[database])

    own, both, alone = metric(mine, mine), metric(theirs, theirs), metric(theirs, mine)
    return {
        "measured_on": f"{len(queries)} queries and a database of {len(database)}, of {total} images of "
        f"{images.name}",
        "metric": own.name,
        "policy": own.policy,
        "model": own.value,
        "int8": both.value,
        "int8_queries": alone.value,
        "loss": own.value - min(both.value, alone.value),
        "agreement": _agreement(mine, theirs),
    }


def field_metric(
    queries: Descriptors,
    query_labels: npt.NDArray[Any],
    database: Descriptors,
    database_labels: npt.NDArray[Any],
) -> Metric:
    """What the field compares such descriptors by: MAP of codes, recall@1 of vectors and local features."""
    if isinstance(queries, Codes) and isinstance(database, Codes):
        return hamming.mean_average_precision(
            queries.data, query_labels, database.data, database_labels, ties="expected", bits=queries.bits
        )
    if isinstance(queries, Vectors) and isinstance(database, Vectors):
        found = retrieval.evaluate(queries.data, query_labels, database.data, database_labels, ks=(1,))
        return found["recall@1"]
    assert isinstance(queries, Local)
    assert isinstance(database, Local)
    segment = FeatureSegment(database.offsets, database.data, 0, 0)
    hits = search_votes([segment], queries, 1, LocalSearchConfig(), images=len(database))
    rows = hits.rows[:, 0]
    same = _share_a_label(query_labels, database_labels[np.maximum(rows, 0)]) & (rows >= 0)
    policy = (
        "share of all queries whose image with the most votes of local features, all of them compared and "
        "without geometric verification, has a label of theirs; a query without votes counts 0"
    )
    return Metric("recall@1", float(same.mean()), policy)


def _share_a_label(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether labels [n] or [n, classes] meet row by row: bool [n]."""
    if one.ndim == 1:
        return np.asarray(one == other)
    return np.asarray((one.astype(bool) & other.astype(bool)).any(axis=1))


def _agreement(one: Descriptors, other: Descriptors) -> float | None:
    if isinstance(one, Codes) and isinstance(other, Codes):
        turned = int(np.unpackbits(one.data ^ other.data).sum())
        return 1 - turned / (len(one) * one.bits)
    if isinstance(one, Vectors) and isinstance(other, Vectors):
        return float(np.einsum("nd,nd->n", one.data, other.data, dtype=np.float64).mean())
    return None


def _batches(
    images: ImageTable, preprocessing: Preprocessing
) -> "Iterator[tuple[list[int], torch.Tensor | MixedImages]]":
    """Rows and prepared images of a table; what cannot be decoded is left out."""
    for start in range(0, len(images), _BATCH):
        rows, prepared = [], []
        for row in range(start, min(start + _BATCH, len(images))):
            try:
                prepared.append(prepare(images.image_bytes(row), preprocessing, images.box(row)))
            except StoreError:
                raise
            except DataError:
                continue
            rows.append(row)
        if rows:
            square = preprocessing.square
            yield rows, torch.from_numpy(np.stack(prepared)) if square else MixedImages(prepared)
