"""Which photographs of Google Landmarks v2 are learned from, under which labels, and in which order.

Everything depends on the ids, the settings and the seed: not on the order of the files' lines, nor on what
has been downloaded. Nothing here holds a Python object for each of the 4 million rows.

Reference: github.com/tensorflow/models, delf, build_image_dataset.py, for the labels and the split.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.data import location
from ray_retrieval.data.splits import ranked
from ray_retrieval.data.table import IntArray
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder

PARTS = ("train", "validation")
CATEGORIES = "train_label_to_category.csv"
_BLOCK = 1 << 24  # a line of train_clean.csv lists all photographs of a landmark: some 200 kB
_ID = r"^[0-9a-f]{16}$"
_MEND = "the file is not the published one: get it anew"


class Gldv2BuildConfig(Config):
    """What of the collection is built into shards, and how it is parted."""

    subset: Literal["clean", "full"] = "clean"
    """1,580,470 photographs of 81,313 landmarks that were found to match others; or all 4,132,914 of
    203,094."""
    validation: float = Field(default=0.2, ge=0, lt=1)
    """Share of each class to validate on, rounded down, but at least one image."""
    lone: Literal["train", "validation"] = "train"
    """Where the only image of a class goes. What has no training image cannot be learned; the port has them
    in the validation."""
    min_images: int = Field(default=1, ge=1)
    """Classes of fewer images are left out."""
    max_classes: int | None = Field(default=None, ge=2)
    """Only so many classes, those of the most images."""
    shards: int = Field(default=128, ge=1, le=99_999)
    """Files of each part."""
    seed: int = Field(default=0, ge=0)
    """Of the split and the order."""

    @property
    def source(self) -> str:
        """The file that lists the photographs."""
        return "train_clean.csv" if self.subset == "clean" else "train.csv"


@dataclass(frozen=True)
class Plan:
    """Photographs, their labels and their parts.

    Attributes:
        source: the folder of the collection.
        origin: what the plan follows: the settings, and the checksums of the files that were read.
        ids: 16 bytes of text [n], ascending.
        labels: int64 [n], 0…C−1.
        landmarks: int64 [C]: the landmark of each label, ascending.
        parts: part → int64 rows, in the order in which they are written.
        names: of the landmark of each label: its category where that is known, else its number.
        repeated: photographs left out as they stood in the file before.
        shards: files of each part.
    """

    source: str
    origin: dict[str, Any]
    ids: npt.NDArray[np.bytes_]
    labels: IntArray
    landmarks: IntArray
    parts: dict[str, IntArray]
    names: list[str]
    repeated: int
    shards: int

    def paths(self, rows: IntArray) -> list[str]:
        """Where photographs, rows int64 [m], lie in the collection's folder: `train/0/1/2/0123….jpg`."""
        names = [name.decode() for name in self.ids[rows].tolist()]
        return [f"train/{name[0]}/{name[1]}/{name[2]}/{name}.jpg" for name in names]


def plan(source: str, config: Gldv2BuildConfig) -> Plan:
    """Labels, parts and order of the photographs that the metadata lists, whether they are there or not.

    Args:
        source: the folder of the metadata, a path or URI.
        config: the settings.

    Raises:
        DataError: if the file is missing or damaged, or too few classes are left.
    """
    source = location.expand(source)
    file = location.join(source, config.source)
    given, landmark = _clean(file) if config.subset == "clean" else _full(file)
    ids, first = np.unique(given, return_index=True)
    landmark = landmark[first]
    kept = _kept(landmark, config)
    ids, landmark = ids[kept], landmark[kept]
    landmarks, numbers = np.unique(landmark, return_inverse=True)
    if len(landmarks) < 2:
        raise DataError(
            f"two classes are needed, {len(landmarks)} are left of those in the file",
            where=file,
            mend="ask for fewer min_images",
        )
    labels = numbers.astype(np.int64)
    return Plan(
        source=source,
        origin={**config.model_dump(mode="json"), **_checksums(source, (config.source, CATEGORIES))},
        ids=ids,
        labels=labels,
        landmarks=landmarks,
        parts=_parts(labels, config),
        names=_class_names(location.join(source, CATEGORIES), landmarks),
        repeated=len(given) - len(first),
        shards=config.shards,
    )


def _checksums(source: str, names: Iterable[str]) -> dict[str, str]:
    folder = Folder(source)
    return {name: folder.checksum(name) for name in names if folder.exists(name)}


def _class_names(file: str, landmarks: IntArray) -> list[str]:
    """A name for each landmark; one that several share has the number behind it."""
    numbers = [str(landmark) for landmark in landmarks.tolist()]
    if not location.exists(file):
        return numbers
    table = pa.Table.from_batches(
        list(_read(file, {"landmark_id": pa.int64(), "category": pa.string()})),
        pa.schema([("landmark_id", pa.int64()), ("category", pa.string())]),
    )
    places = pc.index_in(pa.array(landmarks), value_set=table["landmark_id"].combine_chunks())
    told = [_name(category) for category in table["category"].take(places).to_pylist()]
    counts = dict(zip(*np.unique([name for name in told if name], return_counts=True), strict=True))
    return [
        number if not name else name if counts[name] == 1 else f"{name} ({number})"
        for name, number in zip(told, numbers, strict=True)
    ]


def _name(category: str | None) -> str:
    """`http://commons.wikimedia.org/wiki/Category:Eiffel_Tower` is `Eiffel Tower`."""
    return "" if category is None else category.rpartition("Category:")[2].replace("_", " ").strip()


def _parts(labels: IntArray, config: Gldv2BuildConfig) -> dict[str, IntArray]:
    counts = np.bincount(labels)
    held = np.maximum(1, np.floor(config.validation * counts).astype(np.int64))
    held[counts == 1] = config.lone == "validation"
    if not config.validation:
        held[:] = 0
    validates = ranked(labels, config.seed) < held[labels]
    order = np.argsort(
        np.random.Generator(np.random.Philox([config.seed, 1])).random(len(labels)), kind="stable"
    )
    return {"train": order[~validates[order]], "validation": order[validates[order]]}


def _kept(landmark: IntArray, config: Gldv2BuildConfig) -> npt.NDArray[np.bool_]:
    """Which rows are of a class that is large enough, and among the largest: bool [n]."""
    names, labels, counts = np.unique(landmark, return_inverse=True, return_counts=True)
    kept = counts >= config.min_images
    if config.max_classes is not None:
        # Of classes of one size the lower number comes first.
        kept[np.lexsort((names, -counts))[config.max_classes :]] = False
    chosen: npt.NDArray[np.bool_] = kept[labels]
    return chosen


def _clean(file: str) -> tuple[npt.NDArray[np.bytes_], IntArray]:
    """Id and landmark of each photograph of `train_clean.csv`: a landmark and its photographs a line."""
    ids, landmarks = [], []
    for batch in _read(file, {"landmark_id": pa.int64(), "images": pa.string()}):
        lists = pc.split_pattern(pc.utf8_trim_whitespace(batch["images"]), " ")
        ids.append(_checked(lists.flatten(), file))
        landmarks.append(np.repeat(_numbers(batch), np.asarray(pc.list_value_length(lists))))
    return _joined(ids, landmarks, file)


def _full(file: str) -> tuple[npt.NDArray[np.bytes_], IntArray]:
    """Id and landmark of each photograph of `train.csv`: one a line."""
    ids, landmarks = [], []
    for batch in _read(file, {"id": pa.string(), "landmark_id": pa.int64()}):
        ids.append(_checked(batch["id"], file))
        landmarks.append(_numbers(batch))
    return _joined(ids, landmarks, file)


def _read(file: str, columns: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """The columns of a CSV file, piece by piece.

    Raises:
        DataError: if the file is missing or damaged, a column is missing, or a value is.
    """
    if not location.exists(file):
        raise DataError("the file is missing", where=file, mend="`ray-retrieval gldv2 download` fetches it")
    try:
        with location.open_file(file) as source:
            reader = pyarrow.csv.open_csv(
                source,
                read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=columns, include_columns=list(columns)
                ),
            )
            for batch in reader:
                if any(column.null_count for column in batch.columns):
                    raise DataError("a line has an empty place", where=file, mend=_MEND)
                yield batch
    except (pa.ArrowInvalid, KeyError) as error:
        reason = str(error).strip("'\"").splitlines()[0]
        raise DataError(f"not the CSV file that is expected: {reason}", where=file, mend=_MEND) from None


def _checked(ids: pa.Array, file: str) -> npt.NDArray[np.bytes_]:
    """The ids as 16 bytes each; they become paths, so nothing else passes."""
    wrong = ids.filter(pc.invert(pc.match_substring_regex(ids, _ID)))
    if len(wrong):
        raise DataError(
            f"an id is 16 hexadecimal digits, got '{wrong[0]}'",
            where=file,
            mend=_MEND,
        )
    text: Any = ids.cast(pa.binary()).cast(pa.binary(16))
    return np.frombuffer(text.buffers()[1], "S16", len(text), text.offset * 16)


def _numbers(batch: pa.RecordBatch) -> IntArray:
    return np.asarray(batch["landmark_id"], dtype=np.int64)


def _joined(
    ids: list[npt.NDArray[np.bytes_]], landmarks: list[IntArray], file: str
) -> tuple[npt.NDArray[np.bytes_], IntArray]:
    if not sum(map(len, ids)):
        raise DataError("the file lists no photograph", where=file, mend=_MEND)
    return np.concatenate(ids), np.concatenate(landmarks)
