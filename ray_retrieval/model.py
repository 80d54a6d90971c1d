"""The model artefact, and the one encoder that every verb uses.

`model/` holds `model.json` (method, preprocessing, provenance, metrics) and `model.safetensors`. Its
fingerprint is a hash of both, so embeddings and indices can say exactly which model made them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from ray_retrieval.compute import Precision, autocast, pick_device, place, warn_of_slow_bf16
from ray_retrieval.config import validate
from ray_retrieval.data.decode import upright_size
from ray_retrieval.data.mixed import Images, MixedImages, Positions, groups_of
from ray_retrieval.data.sizes import inside
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing, prepare
from ray_retrieval.descriptors import DescriptorKind, Descriptors, Form, Local, assembled
from ray_retrieval.errors import DataError, ModelError, RecipeError, StoreError
from ray_retrieval.layers.batch_norm import fold_batch_norm
from ray_retrieval.methods import METHODS, build
from ray_retrieval.methods.base import Method
from ray_retrieval.model_folder import DESCRIPTION, WEIGHTS, read_model_description
from ray_retrieval.storage import Folder, check_file, file_entry, write_description

if TYPE_CHECKING:
    from ray_retrieval.engines import Export

_REASON = 300
"""Characters of what torch says of weights that do not fit: it may name every tensor."""
_BYTES = (bytes, bytearray, memoryview)
"""Types of the bytes of a file."""
Box = Callable[[int], "Sequence[float] | None"]
"""What counts of each image, by its row; see `data.table.ImageTable.box`."""


def _no_box(_row: int) -> None:
    return None


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
        method: the network, in evaluation mode.
        description: what `model.json` says.
        fingerprint: hash of description and weights.
    """

    method: Method
    description: dict[str, Any]
    fingerprint: str

    @property
    def preprocessing(self) -> Preprocessing:
        return self.method.preprocessing

    @property
    def form(self) -> Form:
        """What it makes of an image."""
        return Form.from_json(self.description)

    @property
    def class_names(self) -> list[str] | None:
        return self.description["class_names"]  # type: ignore[no-any-return]


def save(
    folder: Folder,
    *,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    classes: int,
    class_names: list[str] | None,
    precision: Precision,
    training: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write a model directory; the description comes last and makes it complete.

    Args:
        folder: where to.
        config: the method's configuration as plain values.
        weights: parameters and buffers.
        classes: number of classes of the training data.
        class_names: their names, where they have any.
        precision: `bf16` or `float32`: the arithmetic that it was trained in, and describes images in.
        training: provenance: recipe and data fingerprints, epochs, steps.
        metrics: what was measured on validation queries.
    """
    folder.write_bytes(WEIGHTS, safetensors.torch.save({k: v.contiguous() for k, v in weights.items()}))
    body = {
        "method": config,
        **validate(METHODS[config["name"]][0], config).form.as_json(),
        "precision": precision,
        "classes": classes,
        "class_names": class_names,
        "training": training,
        "metrics": metrics,
        "weights": file_entry(folder, WEIGHTS),
    }
    write_description(folder, DESCRIPTION, kind="model", version=1, body=body)


def load(uri: str | Path | Folder) -> Model:
    """The model of a directory, in evaluation mode.

    Raises:
        ArtefactError: if the directory is no model or its weights are damaged.
        ModelError: if the weights do not fit the method that the description names.
    """
    folder = Folder(uri)
    description, identity = read_model_description(folder)
    check_file(folder, description["weights"], content=True)
    config = description["method"]
    if config.get("name") not in METHODS:
        raise ModelError(
            f"made by the method {config.get('name')!r}, known are: {', '.join(METHODS)}", where=folder
        )
    typed = validate(METHODS[config["name"]][0], config, where=folder.uri_of(DESCRIPTION))
    method = build(typed, classes=description["classes"], pretrained=False)
    try:
        method.load_state_dict(safetensors.torch.load(folder.read_bytes(WEIGHTS)))
    except (RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split("\n", 1)[-1].split())  # torch's first line names the class alone
        raise ModelError(
            f"the weights do not fit: {reason[:_REASON]}",
            where=folder,
            mend="use the release that trained it, or train it again",
        ) from None
    return Model(method.eval(), description, identity)


def start_from(method: Method, uri: str | Folder) -> list[str]:
    """Give a method the weights of a model wherever both have them, name and shape.

    Returns:
        The names of the method's tensors that the model did not give.

    Raises:
        ArtefactError: if the directory is no model or its weights are damaged.
        ModelError: if it has not the whole backbone, as with another method or backbone.
    """
    folder = Folder(uri)
    description, _ = read_model_description(folder)
    check_file(folder, description["weights"], content=True)
    given = safetensors.torch.load(folder.read_bytes(WEIGHTS))
    own = method.state_dict()
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    lacking = [name for name in own if name not in fitting]
    missing = sum(name.startswith("backbone.") for name in lacking)
    if missing:
        of = description["method"]
        raise ModelError(
            f"a model of {of['name']} on {of.get('backbone', {}).get('name')}: {missing} tensors of the "
            "recipe's backbone are not in it",
            where=folder,
            mend="start from a model of the same method and backbone",
        )
    method.load_state_dict({**own, **fitting})
    method.started_from(lacking)
    return lacking


class Encoder:
    """Turns the bytes of images into descriptors; the same in encoding, evaluation and serving.

    Args:
        model: a model directory.
        threads: processor threads for decoding and for the network.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        batch_size: images a forward pass.
        engine: what computes descriptors: `torch`, or `onnx` or `onnx-int8`, which run an export of the model
            that lies in its folder or beside it, on the processor. Classes are the model's own in any case.

    Attributes:
        one_size: whether images of any size are described at the same height and width.

    Raises:
        ArtefactError: if the directory is no model or is damaged, or there is no export of this very model
            for the engine.
        RecipeError: if the engine is unknown, not installed, or not for the device, or the device not there.
    """

    def __init__(
        self,
        model: str | Path | Folder,
        *,
        threads: int = 1,
        device: str = "auto",
        batch_size: int = 64,
        engine: str = "torch",
    ) -> None:
        torch.set_num_threads(threads)
        export = None if engine == "torch" else _export(Folder(model), engine, device)
        loaded = load(model)
        self.device, self.batch_size = pick_device("cpu" if export else device), batch_size
        # In another precision than the model's own, bits near zero would turn.
        self.precision: Precision = loaded.description["precision"]
        if export is None:
            warn_of_slow_bf16(self.precision, self.device)
        self.method = loaded.method
        fold_batch_norm(self.method)
        place(self.method, self.device)
        self.fingerprint, self.form, self.class_names = loaded.fingerprint, loaded.form, loaded.class_names
        self.classes = int(loaded.description["classes"])
        self.preprocessing = loaded.preprocessing
        self.one_size = loaded.preprocessing.square
        self._exported = None if export is None else export.open(self.method)
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def encode(
        self, images: bytes | Sequence[bytes], box: Sequence[float] | None = None
    ) -> tuple[Descriptors, dict[int, str]]:
        """Descriptors of encoded images.

        Decoding of the next batch runs beside the forward pass of the current one.

        Args:
            images: the bytes of JPEG, PNG, WebP, BMP, GIF or TIFF files, one or several.
            box: what counts of each, as `data.table.ImageTable.box`; None: all of it.

        Returns:
            Descriptors with one row an image, and the reason for each image that cannot be decoded, by its
            position; such a row is all zero, or an empty set. Local features lie where they are in the whole
            image.

        Raises:
            DataError: if something else than the bytes of files is given, such as their paths.
        """
        files = _files(images)
        return self._encode(len(files), files.__getitem__, lambda _row: box)

    def encode_table(self, table: ImageTable) -> tuple[Descriptors, dict[int, str]]:
        """`encode` of a table's images, read as they are needed; a missing file is a failure too.

        Raises:
            StoreError: if a store does not answer, which says nothing about its images.
        """
        return self._encode(len(table), table.image_bytes, table.box)

    def class_probabilities(
        self, images: bytes | Sequence[bytes]
    ) -> tuple["np.ndarray[Any, np.dtype[np.float32]] | None", dict[int, str]]:
        """What the model's class head says of encoded images.

        Args:
            images: as for `encode`.

        Returns:
            float32 [n, classes], or None where the method has no class head; and the reason for each image
            that cannot be decoded, by its position; such a row is all zero.

        Raises:
            DataError: as `encode`.
        """
        files = _files(images)
        failures: dict[int, str] = {}
        probabilities = np.zeros((len(files), self.classes), np.float32)
        # As the classes were learned, which may be otherwise than descriptors are made.
        as_trained = self.method.config.training_image
        batches = self._batches(len(files), files.__getitem__, _no_box, failures, as_trained)
        for rows, batch, _ in batches:
            for positions, some in groups_of(batch):
                with torch.inference_mode(), autocast(self.precision, self.device):
                    found = self.method.class_probabilities(some.to(self.device, non_blocking=True))
                if found is None:
                    return None, failures
                probabilities[rows[positions]] = found.float().cpu().numpy()
        return probabilities, failures

    def describe(self, images: Images) -> Descriptors:
        """Descriptors of prepared images: uint8 [n, 3, size, size], or of several sizes.

        Local features are in pixels of the images as they are given.
        """
        return assembled(self.form, len(images), self._described(images))

    def _described(self, images: Images) -> Iterator[tuple[Positions, Descriptors]]:
        for positions, some in groups_of(images):
            if self._exported is not None:
                yield positions, self._exported.describe(some)
                continue
            with torch.inference_mode(), autocast(self.precision, self.device):
                yield positions, self.method.describe(some.to(self.device, non_blocking=True))

    def close(self) -> None:
        """Stop the decoding threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _encode(
        self, count: int, read: Callable[[int], bytes], box: Box
    ) -> tuple[Descriptors, dict[int, str]]:
        failures: dict[int, str] = {}
        parts = [
            (rows, _in_the_whole(self.describe(batch), places))
            for rows, batch, places in self._batches(count, read, box, failures, self.preprocessing)
        ]
        return assembled(self.form, count, parts), failures

    def _batches(
        self,
        count: int,
        read: Callable[[int], bytes],
        box: Box,
        failures: dict[int, str],
        preprocessing: Preprocessing,
    ) -> Iterator[tuple[Positions, Images, list["_Place"]]]:
        """Positions, prepared images, and where these are; those that fail go into `failures`."""
        pending = self._decode(read, box, preprocessing, 0, count)
        for start in range(0, count, self.batch_size):
            decoded = [future.result() for future in pending]
            pending = self._decode(read, box, preprocessing, start + self.batch_size, count)
            good = []
            for offset, found in enumerate(decoded):
                if isinstance(found, str):
                    failures[start + offset] = found
                else:
                    good.append((start + offset, *found))
            if good:
                rows, images, places = zip(*good, strict=True)
                square = preprocessing.square
                batch = torch.from_numpy(np.stack(images)) if square else MixedImages(list(images))
                yield np.array(rows, np.int64), batch, list(places)

    def _decode(
        self, read: Callable[[int], bytes], box: Box, preprocessing: Preprocessing, start: int, count: int
    ) -> list[Any]:
        rows = range(start, min(start + self.batch_size, count))
        return [self._decoders.submit(self._prepare, read, box, preprocessing, row) for row in rows]

    def _prepare(
        self, read: Callable[[int], bytes], box: Box, preprocessing: Preprocessing, row: int
    ) -> "tuple[np.ndarray[Any, np.dtype[np.uint8]], _Place] | str":
        try:
            data, part = read(row), box(row)
            pixels = prepare(data, preprocessing, part)
            local = self.form.kind is DescriptorKind.LOCAL
            return pixels, _place(data, part) if local else _NOWHERE
        except StoreError:
            raise
        except DataError as error:
            return error.problem


def _files(images: Any) -> list[bytes]:
    """The bytes of image files, one or several, as a list.

    Raises:
        DataError: if something else is given, such as paths or pixels.
    """
    alone = isinstance(images, (*_BYTES, str)) or not isinstance(images, Iterable)
    files = [images] if alone else list(images)
    for number, file in enumerate(files):
        if not isinstance(file, _BYTES):
            raise DataError(
                f"an image is the bytes of its file here, got {type(file).__name__}",
                where=f"image {number}",
                mend="read each with Path(…).read_bytes(), or give open_images(…) to encode_table",
            )
    return files


def _export(model: Folder, engine: str, device: str) -> "Export":
    """What stands in for a model, looked for before anything is loaded; errors as of `Encoder`."""
    from ray_retrieval.engines import check_engine, find_export

    check_engine(engine)
    if device not in ("auto", "cpu"):
        raise RecipeError(
            f"the engine {engine} runs on the processor, not on {device}",
            mend="use the engine torch, or the device cpu",
        )
    return find_export(model, read_model_description(model)[1], engine)


@dataclass(frozen=True)
class _Place:
    """What a prepared image is of its file: width and height of that, and the box that counts, in pixels."""

    size: tuple[int, int]
    box: tuple[int, int, int, int]


_NOWHERE = _Place((0, 0), (0, 0, 0, 0))
"""Of images whose descriptors lie nowhere."""


def _place(data: bytes, box: "Sequence[float] | None") -> _Place:
    size = upright_size(data)
    return _Place(size, (0, 0, *size) if box is None else inside(box, size))


def _in_the_whole(found: Descriptors, places: list[_Place]) -> Descriptors:
    """Local features with their places in the images as they are in their files; others as given."""
    if not isinstance(found, Local):
        return found
    corners = np.array([place.box for place in places], np.float64).reshape(-1, 4)
    # Pixels of the file a pixel of the prepared image, along x and y.
    steps = (corners[:, 2:] - corners[:, :2]) / found.sizes
    of = np.repeat(np.arange(len(found)), found.counts)
    locations = (found.locations + 0.5) * steps[of] - 0.5 + corners[of, :2]
    scales = found.scales / np.sqrt(steps.prod(axis=1))[of]
    return replace(
        found,
        locations=locations.astype(np.float32),
        scales=scales.astype(np.float32),
        sizes=np.array([place.size for place in places], np.int32).reshape(-1, 2),
    )
