"""Oxford5k and Paris6k, and both revisited: landmarks to test on, with and without distractors.

    data: {name: roxford5k, root: data}
    data: {name: rparis6k, root: data, distractors: data/revisitop1m}

A query is a box of a photograph, so its table has the column `box`, list<double>. What is relevant to it is
told by lists of rows of the database, which are in the order of the file's `imlist`; distractors follow them.
There are no labels. In Oxford5k and Paris6k the photographs of the queries are in the database too, and count
as the ground truth lists them; the revisited benchmarks have left them out.

Nothing can be learned from them: a model that exists is measured (`train.start` with `train.epochs=0`), or
one is trained by a benchmark that tests on them (`data: {name: sfm, test: roxford5k}`).

Under the root, as cirtorch lays them out (the revisited ones have the photographs of the older ones):

    test/oxford5k/gnd_oxford5k.pkl      test/roxford5k/gnd_roxford5k.pkl     test/oxford5k/jpg/….jpg
    test/paris6k/gnd_paris6k.pkl        test/rparis6k/gnd_rparis6k.pkl       test/paris6k/jpg/….jpg

Reference: Philbin et al., CVPR 2007 and 2008; Radenović et al., Revisiting Oxford and Paris, CVPR 2018.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ray_retrieval.config import Config
from ray_retrieval.data import location
from ray_retrieval.data.benchmark import Benchmark, overlap
from ray_retrieval.data.columns import IMAGE_TYPE, images_at
from ray_retrieval.data.datasets.lists import Listed
from ray_retrieval.data.download import SOURCES, fetch
from ray_retrieval.data.pickles import read_pickle
from ray_retrieval.data.table import ImageTable, IntArray, concatenate, open_images
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder, is_uri
from ray_retrieval.words import several

LandmarksName = Literal["oxford5k", "paris6k", "roxford5k", "rparis6k"]
Distractors = str | tuple[str, ...] | None

KS = (1, 5, 10)
"""Numbers of hits at which the papers report precision."""
_DISTRACTORS = 1_001_001
"""Images of R1M, the distractors of the revisited benchmarks."""
_MAX_BYTES = 1 << 28
_MEND = "the file is not the published one: get it anew"


@dataclass(frozen=True)
class Published:
    """What is published of a benchmark.

    Attributes:
        title: as reports name it.
        images: the folder of the photographs, below the root.
        protocol: which lists its ground truth has.
        queries: how many there are.
        database: how many photographs are searched; any one is right.
        lists: list → rows of all queries together; empty where they are not known for certain.
    """

    title: str
    images: str
    protocol: Literal["revisited", "classic"]
    queries: int
    database: tuple[int, ...]
    lists: Mapping[str, int]


_OXFORD, _PARIS = "test/oxford5k/jpg", "test/paris6k/jpg"
PUBLISHED: dict[LandmarksName, Published] = {
    "oxford5k": Published("Oxford5k", _OXFORD, "classic", 55, (5_063,), {}),
    # Of 6,412 photographs 20 are damaged, which the usual lists leave out.
    "paris6k": Published("Paris6k", _PARIS, "classic", 55, (6_392, 6_412), {}),
    "roxford5k": Published(
        "ROxford5k", _OXFORD, "revisited", 70, (4_993,), {"easy": 3_029, "hard": 2_497, "junk": 1_356}
    ),
    "rparis6k": Published(
        "RParis6k", _PARIS, "revisited", 70, (6_322,), {"easy": 6_874, "hard": 10_350, "junk": 7_153}
    ),
}
_LISTS = {"revisited": ("easy", "hard", "junk"), "classic": ("ok", "junk")}


class LandmarksConfig(Config):
    """What the benchmarks of landmarks share."""

    name: LandmarksName
    """Which of them."""
    root: str = "data"
    """Folder that holds `test/`, as cirtorch lays it out; a path or URI. Of each benchmark its ground truth,
    such as `test/roxford5k/gnd_roxford5k.pkl`; the photographs of Oxford are in `test/oxford5k/jpg/`, those
    of Paris in `test/paris6k/jpg/`, revisited or not."""
    distractors: Distractors = None
    """Further photographs to search in, none of which shows a landmark of the queries: R1M, say. A folder,
    list, CSV or Parquet, or several of them."""
    download: bool = False
    """Fetch what is missing of the ground truth and the photographs; not the distractors."""

    def needs(self) -> list[str]:
        """The ground truth and the folder of photographs, below the root."""
        return needs_of(self.name)


class Oxford5kConfig(LandmarksConfig):
    """Oxford5k: 55 queries of 11 buildings, to test on."""

    name: Literal["oxford5k"] = "oxford5k"
    """The benchmark."""


class Paris6kConfig(LandmarksConfig):
    """Paris6k: 55 queries of 11 landmarks, to test on."""

    name: Literal["paris6k"] = "paris6k"
    """The benchmark."""


class ROxford5kConfig(LandmarksConfig):
    """Oxford5k revisited: 70 queries, easy and hard, to test on."""

    name: Literal["roxford5k"] = "roxford5k"
    """The benchmark."""


class RParis6kConfig(LandmarksConfig):
    """Paris6k revisited: 70 queries, easy and hard, to test on."""

    name: Literal["rparis6k"] = "rparis6k"
    """The benchmark."""


@dataclass(frozen=True)
class GroundTruthFile:
    """The content of a `gnd_….pkl`.

    Attributes:
        queries: names of the query photographs, without their suffix.
        database: names of the photographs that are searched.
        boxes: of each query: left, top, right, bottom in pixels.
        lists: of each query: list → int64 rows of the database.
    """

    queries: list[str]
    database: list[str]
    boxes: list[list[float]]
    lists: tuple[dict[str, IntArray], ...]


@dataclass(frozen=True)
class LandmarksTest:
    """Queries and database to test on, with what is said of them in `Benchmark`."""

    title: str
    queries: ImageTable
    database: ImageTable
    ground_truth: tuple[Mapping[str, IntArray], ...]
    protocol: Literal["revisited", "classic"]
    notes: list[str]


def load(config: LandmarksConfig, *, seed: int, splits: Folder) -> Benchmark:  # noqa: ARG001 nothing is drawn
    """The benchmark, without images to learn from or to validate on.

    Raises:
        DataError: as `read_test`.
        StoreError: if something is to be downloaded and the server does not answer.
    """
    if config.download:
        fetch_sources(config.name, config.root)
    test = read_test(config.name, config.root, config.distractors)
    none = no_images(f"{test.title}: train")
    benchmark = Benchmark(
        name=test.title,
        train=none,
        validation_queries=none,
        validation_database=none,
        queries=test.queries,
        database=test.database,
        ks=KS,
        ground_truth=test.ground_truth,
        protocol=test.protocol,
        untrainable=f"{test.title} has no images to learn from",
        notes=test.notes,
    )
    benchmark.check()
    return benchmark


def read_test(name: LandmarksName, root: str, distractors: Distractors = None) -> LandmarksTest:
    """Queries and database, with the ground truth.

    Raises:
        DataError: if a file or a photograph is missing or damaged, a number is not the published one, or a
            distractor is among the photographs.
    """
    published, found = PUBLISHED[name], read_ground_truth(name, root)
    missing = missing_images(root, [_image(published, one) for one in (*found.queries, *found.database)])
    if missing:
        raise DataError(missing, where=location.expand(root), mend=_mend_of(root, published.images))
    boxes = pa.array(found.boxes, pa.list_(pa.float64()))
    queries = _table(_unique(found.queries), found.queries, root, published, "queries", box=boxes)
    database = _table(found.database, found.database, root, published, "database")
    title, notes = published.title, []
    if distractors:
        database, added = _with_distractors(database, distractors)
        title = f"{title} + {'R1M' if added == _DISTRACTORS else f'{added:,} distractors'}"
        notes.append(f"{added:,} distractors are in the database, relevant to no query")
    return LandmarksTest(title, queries, database, found.lists, published.protocol, notes)


def completed(
    benchmark: Benchmark,
    test: LandmarksName | Literal["none"],
    test_root: str,
    distractors: Distractors,
    *,
    title: str,
    root: str,
    mend: str,
) -> Benchmark:
    """A collection to learn from, with landmarks to test on, or tested on its own validation.

    Args:
        benchmark: the collection, its test that of the validation; untrainable where its images are missing.
        test: the landmarks.
        test_root: folder that holds `test/`.
        distractors: further photographs to test in.
        title: of the collection.
        root: where the collection is looked for.
        mend: how it is got.

    Raises:
        DataError: if a photograph to test on is missing, or the collection is and there is no test either.
    """
    if test != "none":
        benchmark = _with_test(benchmark, read_test(test, test_root, distractors))
    elif benchmark.untrainable:
        raise DataError(benchmark.untrainable, where=location.expand(root), mend=mend)
    else:
        benchmark.notes.insert(0, _without_test(title))
    benchmark.check()
    return benchmark


def _with_test(benchmark: Benchmark, test: LandmarksTest) -> Benchmark:
    """What was to be learned from and validated on, with landmarks to test on."""
    return replace(
        benchmark,
        name=test.title,
        queries=test.queries,
        database=test.database,
        queries_in_database=False,
        ks=KS,
        ground_truth=test.ground_truth,
        protocol=test.protocol,
        notes=[*benchmark.notes, *test.notes],
    )


def _without_test(title: str) -> str:
    """A note on the numbers of a collection that is tested on its own validation."""
    return (
        f"{title} has no test of its own: its numbers are those of the validation, by which the model is "
        "chosen, and optimistic"
    )


def read_ground_truth(name: LandmarksName, root: str) -> GroundTruthFile:
    """The ground truth, whether the photographs are there or not.

    Raises:
        DataError: if the file is missing or damaged, or a number is not the published one.
    """
    file = location.join(location.expand(root), needs_of(name)[0])
    if not location.exists(file):
        raise DataError(
            "the file is missing",
            where=file,
            mend=f"`ray-retrieval datasets {name}` says where it comes from",
        )
    content = read_pickle(location.read_bytes(file, _MAX_BYTES), file)
    found = _parsed(content, PUBLISHED[name], file)
    _check_counts(found, PUBLISHED[name], file)
    return found


def listed(config: LandmarksConfig) -> dict[str, Listed]:
    """What the ground truth names, whether the photographs are there or not.

    Raises:
        DataError: as `read_ground_truth`.
    """
    found, published = read_ground_truth(config.name, config.root), PUBLISHED[config.name]
    return {
        part: Listed([_image(published, name) for name in names], pa.nulls(len(names)), None)
        for part, names in (("queries", found.queries), ("database", found.database))
    }


def needs_of(name: LandmarksName) -> list[str]:
    """The ground truth and the folder of photographs, below the root."""
    return [f"test/{name}/gnd_{name}.pkl", PUBLISHED[name].images]


def no_images(name: str) -> ImageTable:
    """A table without a row."""
    images = pa.array([], IMAGE_TYPE)
    return ImageTable(pa.table({"id": pa.array([], pa.string()), "image": images}), name=name)


def missing_images(root: str, names: list[str]) -> str:
    """How many of the files below a local root are not there, in words; empty where all are."""
    root = location.expand(root)
    if is_uri(root):
        return ""  # asking a store for each of 100,000 images takes longer than reading some of them
    missing = [name for name in names if not location.exists(location.join(root, name))]
    if not missing:
        return ""
    return f"{len(missing):,} of {len(names):,} images are missing, the first is {missing[0]}"


def fetch_sources(name: str, root: str) -> None:
    """Download what is missing of a published collection, and tell on stderr how far it is.

    A folder of images that is there is taken for whole.

    Raises:
        DataError: if the root is no local path, or a file cannot be had.
        StoreError: if the server does not answer.
    """
    root = location.expand(root)
    if is_uri(root):
        raise DataError("downloads go to a local folder", where=root, mend="give a path as data.root")
    fetch(SOURCES[name], Path(root), say=lambda line: print(line, file=sys.stderr, flush=True))


def _mend_of(root: str, folder: str) -> str:
    """What to do where photographs of a folder below the root are missing."""
    if location.exists(location.join(location.expand(root), folder)):
        return f"put them there; or remove {folder}, and data.download=true fetches all of it anew"
    return "put them there, or set data.download=true"


def _image(published: Published, name: str) -> str:
    return f"{published.images}/{name}.jpg"


def _unique(names: list[str]) -> list[str]:
    """The names as ids: a photograph that is several queries has `#2`, `#3`, … after its name."""
    seen: Counter[str] = Counter()
    ids = []
    for name in names:
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def _table(
    ids: list[str], names: list[str], root: str, published: Published, part: str, **columns: pa.Array
) -> ImageTable:
    paths = [location.join(location.expand(root), _image(published, name)) for name in names]
    images = images_at(paths)
    table = pa.table({"id": pa.array(ids, pa.string()), "image": images, **columns})
    return ImageTable(table, name=f"{published.title}: {part}")


def _with_distractors(database: ImageTable, distractors: str | tuple[str, ...]) -> tuple[ImageTable, int]:
    """The database with further photographs behind it, and their number."""
    parts = [database]
    for given in several(distractors):
        further = open_images(given)
        same = overlap(further, database)
        if len(same):
            raise DataError(
                f"{len(same)} distractors are in the database, the first is '{further.ids[int(same[0])]}'",
                where=given,
                mend="leave them out: they would count as wrong where they are right",
            )
        ids = pa.array([f"distractor/{name}" for name in further.ids], pa.string())
        parts.append(ImageTable(pa.table({"id": ids, "image": further.table["image"]}), name=further.name))
    joined = concatenate(parts, name=database.name)
    return joined, len(joined) - len(database)


def _parsed(content: Any, published: Published, where: str) -> GroundTruthFile:
    names = ("imlist", "qimlist", "gnd")
    missing = [key for key in names if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f"'{missing[0]}' is missing", where=where, mend=_MEND)
    database, queries, gnd = content["imlist"], content["qimlist"], content["gnd"]
    if len(gnd) != len(queries):
        raise DataError(
            f"there are {len(queries)} queries, and a ground truth of {len(gnd)}", where=where, mend=_MEND
        )
    boxes, lists = [], []
    for query, given in enumerate(gnd):
        needed = ("bbx", *_LISTS[published.protocol])
        absent = [key for key in needed if not isinstance(given, dict) or key not in given]
        if absent:
            raise DataError(f"query {query} has no '{absent[0]}'", where=where, mend=_MEND)
        try:
            boxes.append([float(place) for place in given["bbx"]])
            lists.append(
                {name: np.array(given[name], np.int64).reshape(-1) for name in _LISTS[published.protocol]}
            )
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"query {query}: box or rows are no numbers", where=where, mend=_MEND) from None
    return GroundTruthFile(
        [str(name) for name in queries], [str(name) for name in database], boxes, tuple(lists)
    )


def _check_counts(found: GroundTruthFile, published: Published, where: str) -> None:
    """Raise DataError where a number is not the published one."""
    counts: list[tuple[str, int, tuple[int, ...]]] = [
        ("queries", len(found.queries), (published.queries,)),
        ("photographs in the database", len(found.database), published.database),
    ]
    for name, total in published.lists.items():
        counts.append((f"rows listed as {name}", sum(len(one[name]) for one in found.lists), (total,)))
    for what, number, accepted in counts:
        if number not in accepted:
            wanted = " or ".join(f"{one:,}" for one in accepted)
            raise DataError(f"{wanted} {what} are expected, there are {number:,}", where=where, mend=_MEND)
