"""The model artefact, and the one encoder that every verb uses.

`model/` holds `model.json` (method, preprocessing, provenance, metrics) and `model.safetensors`. Its
fingerprint is a hash of both, so embeddings and indices can say exactly which model made them.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from ray_retrieval.compute import Precision, autocast, pick_device, place
from ray_retrieval.config import validate
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing, prepare
from ray_retrieval.descriptors import Codes
from ray_retrieval.errors import DataError, ModelError
from ray_retrieval.methods import METHODS, build
from ray_retrieval.methods.base import Method
from ray_retrieval.storage import (
    Folder,
    check_file,
    file_entry,
    fingerprint,
    read_description,
    write_description,
)

DESCRIPTION, WEIGHTS = "model.json", "model.safetensors"


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
    def bits(self) -> int:
        return int(self.description["bits"])

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
        training: provenance: recipe and data fingerprints, epochs, steps.
        metrics: what was measured on validation queries.
    """
    folder.write_bytes(WEIGHTS, safetensors.torch.save({k: v.contiguous() for k, v in weights.items()}))
    body = {
        "method": config,
        "kind": METHODS[config["name"]][1].kind.value,
        "bits": config["bits"],
        "classes": classes,
        "class_names": class_names,
        "training": training,
        "metrics": metrics,
        "weights": file_entry(folder, WEIGHTS),
    }
    write_description(folder, DESCRIPTION, kind="model", version=1, body=body)


def read_model_description(folder: Folder) -> tuple[dict[str, Any], str]:
    """What `model.json` says, and the model's fingerprint, without loading the weights."""
    description = read_description(folder, DESCRIPTION, kind="model", version=1)
    return description, fingerprint(description)


def load(uri: str | Folder) -> Model:
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
    typed = validate(METHODS[config["name"]][0], config, where=f"{folder}/{DESCRIPTION}")
    method = build(typed, classes=description["classes"], pretrained=False)
    try:
        method.load_state_dict(safetensors.torch.load(folder.read_bytes(WEIGHTS)))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(f"the weights do not fit: {str(error).splitlines()[0]}", where=folder) from None
    return Model(method.eval(), description, identity)


class Encoder:
    """Turns the bytes of images into descriptors; the same in encoding, evaluation and serving.

    Args:
        model: a model directory.
        threads: processor threads for decoding and for the network.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        precision: `auto` computes in bfloat16 where the hardware has it.
        batch_size: images a forward pass.

    Raises:
        ArtefactError: if the directory is no model or is damaged.
    """

    def __init__(
        self,
        model: str | Folder,
        *,
        threads: int = 1,
        device: str = "auto",
        precision: Precision = "auto",
        batch_size: int = 64,
    ) -> None:
        torch.set_num_threads(threads)
        loaded = load(model)
        self.device, self.precision, self.batch_size = pick_device(device), precision, batch_size
        self.method = loaded.method
        place(self.method, self.device)
        self.fingerprint, self.bits, self.class_names = loaded.fingerprint, loaded.bits, loaded.class_names
        self.preprocessing = loaded.preprocessing
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def encode(self, images: list[bytes]) -> tuple[Codes, dict[int, str]]:
        """Descriptors of encoded images.

        Decoding of the next batch runs beside the forward pass of the current one.

        Args:
            images: the bytes of JPEG, PNG, WebP, BMP, GIF or TIFF files.

        Returns:
            Codes with one row an image, and the reason for each image that cannot be decoded, by its
            position; such a row is all zero.
        """
        starts = range(0, len(images), self.batch_size)
        failures: dict[int, str] = {}
        codes = np.zeros((len(images), (self.bits + 7) // 8), np.uint8)
        pending = self._decode(images, 0)
        for start in starts:
            decoded = [future.result() for future in pending]
            pending = self._decode(images, start + self.batch_size)
            good = [offset for offset, image in enumerate(decoded) if isinstance(image, np.ndarray)]
            failures |= {
                start + offset: image for offset, image in enumerate(decoded) if isinstance(image, str)
            }
            if good:
                batch = np.stack([decoded[offset] for offset in good])
                codes[[start + offset for offset in good]] = self.describe(torch.from_numpy(batch)).data
        return Codes(codes, self.bits), failures

    def encode_table(self, table: ImageTable) -> tuple[Codes, dict[int, str]]:
        """`encode` of a table's images; one that cannot be read fails like one that cannot be decoded."""
        images: list[bytes] = []
        unread: dict[int, str] = {}
        for row in range(len(table)):
            try:
                images.append(table.image_bytes(row))
            except DataError as error:
                images.append(b"")
                unread[row] = error.problem
        codes, failures = self.encode(images)
        return codes, {**failures, **unread}

    def describe(self, images: torch.Tensor) -> Codes:
        """Descriptors of prepared images, uint8 [n, 3, size, size]."""
        with torch.inference_mode(), autocast(self.precision, self.device):
            return self.method.describe(images.to(self.device, non_blocking=True))

    def close(self) -> None:
        """Stop the decoding threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _decode(self, images: list[bytes], start: int) -> list[Any]:
        part = images[start : start + self.batch_size]
        return [self._decoders.submit(self._prepare, image) for image in part]

    def _prepare(self, image: bytes) -> "np.ndarray[Any, np.dtype[np.uint8]] | str":
        try:
            return prepare(image, self.preprocessing)
        except DataError as error:
            return error.problem
