"""Google Landmarks v2 to learn from: photographs with landmarks for labels, from the shards of a build.

    ray-retrieval gldv2 download data/gldv2 --tars 0-499
    ray-retrieval gldv2 build data/gldv2 --out data/gldv2-clean

    data: {name: gldv2, root: data/gldv2-clean, test: roxford5k, test_root: data}

`gldv2_build` says what is in the folder. No image is in memory: the tables hold addresses in the shards, at
which single images are read in any order.

The validation searches photographs of whole classes, and asks with those of them that have another of their
class to find. The collection has no photographs to test on: `test` names one of the benchmarks of landmarks
(`landmarks`). A model is then measured whether the photographs that it learned from are there or not.

The build has decoded each photograph and left out those that cannot be: no run looks at all of them again.

Reference: Weyand et al., Google Landmarks Dataset v2, CVPR 2020; the clean subset: Yokoo et al., Two-stage
Discriminative Re-ranking for Large-scale Landmark Retrieval, 2020.
"""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from ray_retrieval.config import Config
from ray_retrieval.data import location
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.columns import IMAGE_TYPE, images_at
from ray_retrieval.data.datasets import landmarks
from ray_retrieval.data.datasets.gldv2_build import DESCRIPTION, KIND, VERSION, entries_of
from ray_retrieval.data.datasets.gldv2_plan import PARTS
from ray_retrieval.data.datasets.landmarks import Distractors, LandmarksName
from ray_retrieval.data.datasets.lists import Listed
from ray_retrieval.data.table import ImageTable, IntArray
from ray_retrieval.storage import Folder, check_file, read_description

TITLE = "Google Landmarks v2"
_SEED = 0
"""Of the sample of the validation: the same photographs whatever the seed of a training."""


class Gldv2Config(Config):
    """Google Landmarks v2, to learn from: photographs labelled by landmark."""

    name: Literal["gldv2"] = "gldv2"
    """The benchmark."""
    root: str = "data/gldv2-clean"
    """The folder of a build; a path or URI."""
    validation: int | None = Field(default=50_000, ge=2)
    """At most so many photographs of the validation, of whole classes; unset: all of them. The port's source
    evaluates on 50,000."""
    test: LandmarksName | Literal["none"] = "none"
    """What to test on; `none`: the validation's own photographs."""
    test_root: str = "data"
    """Folder that holds `test/`, laid out as for `roxford5k` and the like; a path or URI."""
    distractors: Distractors = None
    """Further photographs to test in, as of the benchmark to test on."""
    download: bool = False
    """Fetch what is missing of the benchmark to test on. `ray-retrieval gldv2` fetches the collection."""

    @model_validator(mode="after")
    def _distractors_need_a_test(self) -> "Gldv2Config":
        if self.distractors and self.test == "none":
            raise ValueError("'distractors' are searched in a 'test', which is none")
        return self

    def needs(self) -> list[str]:
        """The description of the build, below the root, and the files of the test."""
        tests = [] if self.test == "none" else landmarks.needs_of(self.test)
        return [DESCRIPTION, *(location.join(location.expand(self.test_root), name) for name in tests)]


def load(config: Gldv2Config, *, seed: int, splits: Folder) -> Benchmark:  # noqa: ARG001 the build parts them
    """The benchmark: training photographs, and validation queries and database.

    Without a test, queries and database are those of the validation. With one, a build that is missing or
    not complete makes the benchmark untrainable, and is no error.

    Raises:
        DataError: if a photograph to test on is missing, or there is no build and no test either.
        ArtefactError: if the build is damaged.
        StoreError: if something is to be downloaded and the server does not answer.
    """
    if config.download and config.test != "none":
        landmarks.fetch_sources(config.test, config.test_root)
    return landmarks.completed(
        _to_learn_from(config),
        config.test,
        config.test_root,
        config.distractors,
        title=TITLE,
        root=config.root,
        mend="`ray-retrieval gldv2 build` makes it; data.root says where it is",
    )


def listed(config: Gldv2Config) -> dict[str, Listed]:
    """What a build lists, by part, whether its shards are there or not.

    Raises:
        ArtefactError: if a list is missing.
    """
    found = {}
    for part in PARTS:
        with Folder(config.root).reading(f"{part}.parquet") as stream:
            rows = pq.read_table(stream)
        addresses = pc.struct_field(rows["image"], "path").to_pylist()
        found[part] = Listed(addresses, rows["label"].combine_chunks(), None)
    return found


def _to_learn_from(config: Gldv2Config) -> Benchmark:
    """The benchmark with the validation for a test; without images where there is no build."""
    folder = Folder(config.root)
    if not folder.exists(DESCRIPTION):
        none = landmarks.no_images(f"{TITLE}: train")
        return Benchmark(
            name=TITLE,
            train=none,
            validation_queries=none,
            validation_database=none,
            queries=none,
            database=none,
            untrainable=f"there is no complete build: {DESCRIPTION} is missing",
        )
    built = read_description(folder, DESCRIPTION, kind=KIND, version=VERSION)
    if folder.is_local:  # asking a store for each of 256 files takes longer than reading some of them
        for entry in entries_of(built):
            check_file(folder, entry, content=False)
    with folder.reading("classes.parquet") as stream:
        names = pq.read_table(stream)["name"].to_pylist()
    train, validation = (_table(folder, part, names) for part in PARTS)
    sample = _whole_classes(validation, config.validation)
    if len(sample) < len(validation):
        validation = validation.take(sample)
    queries = validation.take(_with_another(validation), name=f"{TITLE}: validation queries")
    return Benchmark(
        name=TITLE,
        train=train,
        validation_queries=queries,
        validation_database=validation,
        queries=queries,
        database=validation,
        queries_in_database=True,
        decoded=True,
        notes=_notes(built, len(validation)),
    )


def _table(folder: Folder, part: str, names: list[str]) -> ImageTable:
    with folder.reading(f"{part}.parquet") as stream:
        rows = pq.read_table(stream)
    # Addresses are below the folder. Joined at once: a step of Python for each of 1.3 million takes seconds.
    before, _, after = location.join(folder.uri, "*").rpartition("*")
    path = pc.binary_join_element_wise(before, pc.struct_field(rows["image"], "path"), after, "")
    images = pa.chunked_array([images_at(chunk) for chunk in path.chunks], IMAGE_TYPE)
    table = pa.table({"id": rows["id"], "label": rows["label"], "image": images})
    return ImageTable(table, name=f"{TITLE}: {part}", class_names=names)


def _whole_classes(table: ImageTable, limit: int | None) -> IntArray:
    """int64, ascending: the rows of classes drawn one after another, as many as stay within the limit.

    Single rows of 81,000 classes would seldom have another of their class to find.
    """
    if limit is None or len(table) <= limit:
        return np.arange(len(table))
    labels = np.asarray(table.labels, np.int64)
    counts = np.bincount(labels)
    order = np.argsort(np.random.Generator(np.random.Philox(_SEED)).random(len(counts)), kind="stable")
    kept = np.zeros(len(counts), np.bool_)
    kept[order[np.cumsum(counts[order]) <= limit]] = True
    return np.flatnonzero(kept[labels])


def _with_another(table: ImageTable) -> IntArray:
    """int64, ascending: the rows whose class another row has too."""
    labels = np.asarray(table.labels, np.int64)
    return np.flatnonzero(np.bincount(labels, minlength=1)[labels] > 1)


def _notes(built: dict[str, Any], validation: int) -> list[str]:
    parts = built["parts"]
    train, held = parts["train"], parts["validation"]
    notes = [
        f"{TITLE} ({built['origin']['subset']}) is learned from: {train['images']:,} photographs of "
        f"{train['classes']:,} classes"
    ]
    if validation < held["images"]:
        notes.append(f"the validation has {validation:,} of {held['images']:,} photographs, of whole classes")
    if built["missing"]:
        total = built["missing"] + built["images"]
        notes.append(f"{built['missing']:,} of {total:,} photographs are missing from the build")
    return notes
