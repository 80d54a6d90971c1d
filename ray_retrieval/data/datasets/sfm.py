"""Photographs of landmarks with matching pairs: retrieval-SfM-120k, retrieval-SfM-30k and GL18.

    data: {name: sfm, root: data, test: roxford5k}

Two photographs match where a 3-D model was built from both (SfM), or where they show the same landmark
(GL18). The label of a photograph is its cluster: the 3-D model or the landmark. The column `positives`,
list<int64>, has for each row the rows of the same table that are its positives, as `ImageTable` describes
it; it is empty for photographs that are no query. GL18 also has `bbx`, list<double> or null: the box of its
file as it stands there. Its order and unit are not documented, and SOLAR does not use it.

Under the root, as cirtorch and SOLAR lay them out (the images of 30k are those of 120k):

    train/retrieval-SfM-120k/retrieval-SfM-120k.pkl, ims/ef/cd/ab/…abcdef
    train/retrieval-SfM-30k/retrieval-SfM-30k.pkl
    train/gl18/db_gl18.pkl, jpg/….jpg

The validation asks with all its query photographs in all its photographs, of other clusters than those that
are learned from. No photograph to test on belongs to it: `test` names one of the benchmarks of landmarks
(`landmarks`), below the same root. A model is then measured whether the photographs that it learned from are
there or not.

Reference: Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2018, section 4;
Ng et al., SOLAR, ECCV 2020, for GL18.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import model_validator

from ray_retrieval.config import Config
from ray_retrieval.data import location
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.columns import images_at
from ray_retrieval.data.datasets import landmarks
from ray_retrieval.data.datasets.landmarks import Distractors, LandmarksName
from ray_retrieval.data.datasets.lists import Listed
from ray_retrieval.data.pickles import read_pickle
from ray_retrieval.data.table import ImageTable, IntArray
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder

Variant = Literal["retrieval-SfM-120k", "retrieval-SfM-30k", "gl18"]
COUNTS: dict[str, dict[str, tuple[int, int]]] = {
    "retrieval-SfM-120k": {"train": (91_642, 181_697), "val": (6_403, 1_691)},
    "retrieval-SfM-30k": {},
    "gl18": {},
}
"""Published numbers of photographs and of pairs by part, as in tensorflow/models, delf, sfm120k.py; none is
known for certain of the others."""

_MAX_BYTES = 1 << 30
_MEND = "the file is not the published one: get it anew"


class SfmConfig(Config):
    """Landmarks with matching pairs, to learn from: retrieval-SfM and GL18."""

    name: Literal["sfm"] = "sfm"
    """The benchmark."""
    root: str = "data"
    """Folder that holds `train/`, as cirtorch and SOLAR lay it out; a path or URI. Of retrieval-SfM
    `train/retrieval-SfM-120k/` with `retrieval-SfM-120k.pkl` and `ims/`, of which 30k takes its images too;
    of GL18 `train/gl18/` with `db_gl18.pkl` and `jpg/`."""
    variant: Variant = "retrieval-SfM-120k"
    """Which collection."""
    test: LandmarksName | Literal["none"] = "none"
    """What to test on, below the same root; `none`: the validation's own photographs."""
    distractors: Distractors = None
    """Further photographs to test in, as of the benchmark to test on."""
    download: bool = False
    """Fetch what is missing of retrieval-SfM-120k: pairs, and the archive of all images, which is large; and
    of the benchmark to test on."""

    @model_validator(mode="after")
    def _distractors_need_a_test(self) -> "SfmConfig":
        if self.distractors and self.test == "none":
            raise ValueError("'distractors' are searched in a 'test', which is none")
        return self

    def needs(self) -> list[str]:
        """The file of pairs and the folder of images, below the root."""
        return [_pairs_file(self.variant), _images_folder(self.variant)]


@dataclass(frozen=True)
class Pairs:
    """Photographs and which of them match.

    Attributes:
        cids: the names of the photographs in the file.
        names: where they lie below the root.
        clusters: the 3-D model or landmark of each, as text.
        pairs: int64 [p, 2], each once, ascending: rows of a query and of one of its positives.
        boxes: of each photograph as the file has it, None where it has none; None in all variants but GL18.
    """

    cids: list[str]
    names: list[str]
    clusters: list[str]
    pairs: IntArray
    boxes: list[list[float] | None] | None = None

    def positives(self) -> pa.Array:
        """list<int64> [n]: the positives of each photograph, ascending."""
        counts = np.bincount(self.pairs[:, 0], minlength=len(self.names))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(self.pairs[:, 1], pa.int64()))


def load(config: SfmConfig, *, seed: int, splits: Folder) -> Benchmark:  # noqa: ARG001 the parts are published
    """The benchmark: training photographs, and validation queries and database.

    Without a test, queries and database are those of the validation. With one, photographs that are missing
    make the benchmark untrainable, and are no error.

    Raises:
        DataError: if a file or a photograph is missing or damaged, or a number is not the published one.
        StoreError: if something is to be downloaded and the server does not answer.
    """
    if config.download:
        _download(config)
    return landmarks.completed(
        _to_learn_from(config),
        config.test,
        config.root,
        config.distractors,
        title=config.variant,
        root=config.root,
        mend=f"`ray-retrieval datasets sfm-{config.variant}` says where they come from; data.root says "
        "where they are",
    )


def _to_learn_from(config: SfmConfig) -> Benchmark:
    """The benchmark with the validation for a test; without images where not even the pairs are there."""
    if config.test != "none" and not location.exists(_pairs_address(config)):
        none = landmarks.no_images(f"{config.variant}: train")
        return Benchmark(
            name=config.variant,
            train=none,
            validation_queries=none,
            validation_database=none,
            queries=none,
            database=none,
            untrainable=f"{_pairs_file(config.variant)} is missing",
        )
    parts = read(config)
    tables = {part: _table(found, config, part) for part, found in parts.items()}
    rows = np.unique(parts["val"].pairs[:, 0])
    queries = tables["val"].take(rows, name=f"{config.variant}: validation queries")
    names = [name for found in parts.values() for name in found.names]
    return Benchmark(
        name=config.variant,
        train=tables["train"],
        validation_queries=queries,
        validation_database=tables["val"],
        queries=queries,
        database=tables["val"],
        queries_in_database=True,
        untrainable=landmarks.missing_images(config.root, names),
        notes=[
            f"{config.variant} is learned from, with {len(parts['train'].pairs):,} different pairs of "
            f"{len(np.unique(parts['train'].pairs[:, 0])):,} queries",
        ],
    )


def read(config: SfmConfig) -> dict[str, Pairs]:
    """The parts `train` and `val`, whether the images are there or not.

    Raises:
        DataError: if the file is missing or damaged, or a number is not the published one.
    """
    file = _pairs_address(config)
    content = _content(config, file)
    if not isinstance(content, dict) or not {"train", "val"} <= set(content):
        raise DataError("a dictionary with 'train' and 'val' is expected", where=file, mend=_MEND)
    parts = {}
    for part in ("train", "val"):
        parts[part] = _parsed(content[part], config.variant, f"{file}: {part}")
        found = len(parts[part].names), len(content[part]["pidxs"])
        published = COUNTS[config.variant].get(part, found)
        if found != published:
            raise DataError(
                f"{part}: {published[0]:,} photographs and {published[1]:,} pairs are expected, there are "
                f"{found[0]:,} and {found[1]:,}",
                where=file,
                mend=_MEND,
            )
    return parts


def listed(config: SfmConfig) -> dict[str, Listed]:
    """What the file of pairs says of each part, whether the images are there or not.

    Raises:
        DataError: as `read`.
    """
    names = {"train": "train", "val": "validation"}
    return {
        names[part]: Listed(found.names, pa.array(_numbered(found.clusters)[0]), None)
        for part, found in read(config).items()
    }


def path_of(cid: str) -> str:
    """Where a photograph of retrieval-SfM lies below `ims/`: its last three pairs of letters, backwards.

    `…abcdef` is `ef/cd/ab/…abcdef`.
    """
    return f"{cid[-2:]}/{cid[-4:-2]}/{cid[-6:-4]}/{cid}"


def _pairs_file(variant: Variant) -> str:
    return f"train/{variant}/{'db_gl18' if variant == 'gl18' else variant}.pkl"


def _images_folder(variant: Variant) -> str:
    return "train/gl18/jpg" if variant == "gl18" else "train/retrieval-SfM-120k/ims"


def _download(config: SfmConfig) -> None:
    if config.variant != "retrieval-SfM-120k":
        raise DataError(
            f"the pairs of {config.variant} are not offered for download",
            where="data.download",
            mend="set it to false and put the files there, or use retrieval-SfM-120k",
        )
    for name in (config.variant, *([] if config.test == "none" else [config.test])):
        landmarks.fetch_sources(name, config.root)


def _pairs_address(config: SfmConfig) -> str:
    return location.join(location.expand(config.root), _pairs_file(config.variant))


def _content(config: SfmConfig, file: str) -> Any:
    """What is pickled in a file."""
    if not location.exists(file):
        raise DataError(
            "the file is missing",
            where=file,
            mend=f"`ray-retrieval datasets sfm-{config.variant}` says where it comes from",
        )
    return read_pickle(location.read_bytes(file, _MAX_BYTES), file)


def _parsed(content: Any, variant: Variant, where: str) -> Pairs:
    """One part of a file of pairs, checked; a photograph that is paired with itself is left out.

    Args:
        content: what was read.
        variant: decides where the images lie.
        where: for errors.
    """
    keys = ["cids", "qidxs", "pidxs", "cluster"]
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f"'{missing[0]}' is missing", where=where, mend=_MEND)
    cids = [str(cid) for cid in content["cids"]]
    folder = _images_folder(variant)
    names = [f"{folder}/{cid}.jpg" if variant == "gl18" else f"{folder}/{path_of(cid)}" for cid in cids]
    clusters = [str(cluster) for cluster in content["cluster"]]
    if len(clusters) != len(cids):
        raise DataError(f"{len(cids)} photographs have {len(clusters)} clusters", where=where, mend=_MEND)
    queries, positives = _flat(content["qidxs"], content["pidxs"], where)
    outside = (np.minimum(queries, positives) < 0) | (np.maximum(queries, positives) >= len(cids))
    if outside.any():
        pair = [int(rows[outside][0]) for rows in (queries, positives)]
        raise DataError(
            f"the pair {pair} names a photograph outside 0…{len(cids) - 1}", where=where, mend=_MEND
        )
    pairs = np.unique(np.stack([queries, positives], axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    boxes = _boxes(content["bbxs"], len(cids), content["qidxs"], where) if "bbxs" in content else None
    return Pairs(cids, names, clusters, pairs, boxes)


def _flat(queries: Any, positives: Any, where: str) -> tuple[IntArray, IntArray]:
    """int64 [p] each: query and positive of every pair, also where a query has a list of positives (GL18)."""
    if len(queries) != len(positives):
        raise DataError(
            f"{len(queries)} queries have {len(positives)} positives or lists of them",
            where=where,
            mend=_MEND,
        )
    lists = [given if isinstance(given, list | tuple | np.ndarray) else [given] for given in positives]
    try:
        flat = np.array([row for given in lists for row in given], np.int64)
        asked = np.array(queries, np.int64)
    except (TypeError, ValueError, OverflowError):
        raise DataError("queries and positives are not all numbers", where=where, mend=_MEND) from None
    return np.repeat(asked, [len(given) for given in lists]), flat


def _boxes(given: Any, photographs: int, queries: Any, where: str) -> list[list[float] | None]:
    """The box of each photograph: there is one for each of them, or for each query."""
    found = [None if box is None else [float(value) for value in box] for box in given]
    if len(found) == photographs:
        return found
    if len(found) != len(queries):
        raise DataError(
            f"{photographs} photographs, {len(queries)} of them queries, have {len(found)} boxes",
            where=where,
            mend=_MEND,
        )
    boxes: list[list[float] | None] = [None] * photographs
    for query, box in zip(queries, found, strict=True):
        boxes[query] = box
    return boxes


def _numbered(clusters: list[str]) -> tuple[IntArray, list[str]]:
    """int64 [n]: the clusters as 0…C-1, in the order of their numbers or else of their names; the names."""
    # Shorter numbers are smaller ones.
    numeric = all(cluster.isdigit() for cluster in clusters)
    names = sorted(set(clusters), key=lambda name: (len(name) if numeric else 0, name))
    number = {name: index for index, name in enumerate(names)}
    return np.array([number[cluster] for cluster in clusters], np.int64), names


def _table(found: Pairs, config: SfmConfig, part: str) -> ImageTable:
    """The photographs of a part, whether they are there or not."""
    root = location.expand(config.root)
    paths = [location.join(root, name) for name in found.names]
    images = images_at(paths)
    numbers, class_names = _numbered(found.clusters)
    columns = {
        "id": pa.array(found.cids, pa.string()),
        "image": images,
        "label": pa.array(numbers),
        "positives": found.positives(),
    }
    if found.boxes is not None:
        columns["bbx"] = pa.array(found.boxes, pa.list_(pa.float64()))
    return ImageTable(pa.table(columns), name=f"{config.variant}: {part}", class_names=class_names)
