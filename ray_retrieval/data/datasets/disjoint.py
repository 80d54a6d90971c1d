"""Benchmarks of metric learning: the classes that are searched are not those that were learned from.

Validation must not see the test classes either. By default a tenth of the training classes, drawn by the
seed, is held out: their images are queries and database at once. The published code of most methods chooses
its model, and steers its learning rate, by the test images themselves; `validation: test` does the same, for
comparison with such numbers, and says so in the notes.

The whole images are used, not the boxes that some of the data sets come with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.data import location
from ray_retrieval.data.benchmark import Benchmark, from_tables
from ray_retrieval.data.columns import images_at
from ray_retrieval.data.datasets.lists import PARTS, Listed
from ray_retrieval.data.splits import REST, draw_groups, draw_one_each, load_or_draw, share_of
from ray_retrieval.data.table import ImageTable, IntArray
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder, is_uri

LEAST = 2
"""Classes of a part, at the least: with one, every image is relevant to every other."""
_GALLERY = "gallery_"


class DisjointConfig(Config):
    """What all class-disjoint benchmarks share."""

    root: str = "data"
    """Folder of the data set as it is published; a path or URI."""
    validation: Literal["classes", "test", "none"] = "classes"
    """What chooses among models: held-out training classes; the test images, as the published code does,
    which makes the numbers optimistic; or nothing."""
    validation_classes: float = Field(default=0.1, gt=0, le=0.5)
    """Share of the training classes that is held out for validation."""

    @property
    def protocol(self) -> "Disjoint":
        """What is published."""
        raise NotImplementedError

    def needs(self) -> list[str]:
        """The files under the root that tell the parts, in the form that is there."""
        raise NotImplementedError

    def read(self) -> "Parts":
        """The images of all parts, whether they are there or not.

        Raises:
            DataError: if a file is missing or damaged.
        """
        raise NotImplementedError

    def paths(self) -> list[str]:
        """Where the files of `needs` are."""
        root = location.expand(self.root)
        return [location.join(root, name) for name in self.needs()]


@dataclass(frozen=True)
class Count:
    """A published size. `images` is None where none is known for certain."""

    images: int | None
    classes: int


@dataclass(frozen=True)
class Disjoint:
    """What is published about a class-disjoint benchmark.

    Attributes:
        title: as reports name it.
        counts: train, queries and database → sizes, any one of which is right.
        ks: cut-offs of recall that its papers report.
        galleries: how many galleries of one image of each class are drawn from the test images; 0 where
            queries and database are told by the files.
    """

    title: str
    counts: Mapping[str, tuple[Count, ...]]
    ks: tuple[int, ...]
    galleries: int = 0


@dataclass(frozen=True)
class Parts:
    """Images of each part, with classes that count in one list of names.

    Attributes:
        listed: train, queries and database; the latter two are the same object where they are the same.
        class_names: in the order of the classes' numbers.
    """

    listed: dict[str, Listed]
    class_names: list[str]

    @staticmethod
    def of(train: "Named", queries: "Named", database: "Named | None" = None) -> "Parts":
        """Classes numbered as they come; without a database the queries are searched in themselves."""
        numbers: dict[str, int] = {}
        listed = []
        for names, classes in (train, queries, *([] if database is None else [database])):
            label = [numbers.setdefault(name, len(numbers)) for name in classes]
            listed.append(Listed(names, pa.array(label, pa.int64()), None))
        return Parts(dict(zip(PARTS, [*listed, listed[-1]], strict=False)), list(numbers))

    @staticmethod
    def by_number(images: "list[tuple[str, int, str]]", last: int) -> "Parts":
        """Classes up to a number are learned from, those above it are searched.

        Args:
            images: path, number and name of the class of each.
            last: the highest number that is learned from.
        """
        ordered = sorted(images, key=lambda image: image[1])
        train = [image for image in ordered if image[1] <= last]
        test = ordered[len(train) :]
        return Parts.of(*(([i[0] for i in part], [i[2] for i in part]) for part in (train, test)))


Named = tuple[list[str], list[str]]
"""Paths under the root, and the name of each one's class."""


def read_rows(file: str, words: int, *, header: int = 0) -> list[list[str]]:
    """The words of each line of a text file, blank lines left out.

    Args:
        file: where it lies.
        words: how many there are on each line, at the least.
        header: lines to skip.

    Raises:
        DataError: if the file is missing, has no row, or a line has fewer words.
    """
    if not location.exists(file):
        raise DataError(
            "the file is missing", where=file, mend="`ray-retrieval datasets NAME` says where it comes from"
        )
    with location.open_file(file) as source:
        lines = bytes(source.read()).decode("utf-8", "replace").splitlines()[header:]
    rows = [line.split() for line in lines]
    short = next((number for number, row in enumerate(rows) if row and len(row) < words), None)
    if short is not None:
        raise DataError(
            f"line {short + header + 1} has {len(rows[short])} words, {words} are expected",
            where=file,
            mend="the file is not the published one: get it anew",
        )
    rows = [row for row in rows if row]
    if not rows:
        raise DataError("the file has no row", where=file)
    return rows


def load(config: DisjointConfig, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark, with validation classes and galleries drawn by the seed or read from `splits`.

    Raises:
        DataError: if a file or an image is missing, a size is not a published one, a class is both learned
            from and searched, or the saved split was drawn otherwise.
        ArtefactError: if the saved split is damaged.
    """
    parts, protocol, root = config.read(), config.protocol, location.expand(config.root)
    _check_parts(parts, protocol)
    _refuse_missing(parts, root)
    base, rows = _one_table(parts, root, protocol.title)
    labels = np.asarray(base.labels, dtype=np.int64)
    origin = {
        "benchmark": protocol.title,
        "validation": config.validation,
        "validation_classes": config.validation_classes,
    }

    def draw(seed: int) -> dict[str, IntArray]:
        drawn = rows | _validation(config, labels, rows, seed)
        tested = rows["queries"]
        for number in range(protocol.galleries):
            drawn[f"{_GALLERY}{number}"] = tested[draw_one_each(labels[tested], seed, number)]
        return drawn

    split, notes = load_or_draw(splits, base, draw, seed=seed, origin=origin)
    notes += _said(config, labels, rows["train"], split.roles["train"])
    draws = tuple(
        np.searchsorted(rows["queries"], found)
        for role, found in split.roles.items()
        if role.startswith(_GALLERY)
    )
    tables = tables_of(base, split.roles, protocol.title)
    notes += lone_classes(tables["train"])
    benchmark = from_tables(
        protocol.title,
        tables,
        queries_in_database=tables["queries"] is tables["database"],
        ks=protocol.ks,
        gallery_draws=draws,
        notes=notes,
    )
    benchmark.check()
    return benchmark


def tables_of(base: ImageTable, roles: Mapping[str, IntArray], title: str) -> dict[str, ImageTable]:
    """The five tables of a benchmark whose classes are disjoint.

    The classes of each are numbered from 0: those of train for themselves, those of queries and database
    together. Queries and database that are the same rows are the same object.

    Args:
        base: all images.
        roles: role → int64 [m], rows of them, for each of `ROLES`.
        title: what the benchmark is called.
    """
    train = _named(base.take(roles["train"]).renumbered(), title, "train")
    queries, database = _searched(base, roles["queries"], roles["database"], title, "test")
    if np.array_equal(roles["validation_queries"], roles["queries"]):
        validation = (queries, database)
    else:
        pair = (roles["validation_queries"], roles["validation_database"])
        validation = _searched(base, *pair, title, "validation")
    return {
        "train": train,
        "validation_queries": validation[0],
        "validation_database": validation[1],
        "queries": queries,
        "database": database,
    }


def lone_classes(train: ImageTable) -> list[str]:
    """A note about training classes with one image, from which no pair can be learned; or none."""
    lone = int((np.bincount(np.asarray(train.labels)) == 1).sum())
    return [f"{lone} of {train.classes} training classes have a single image"] if lone else []


def _searched(
    base: ImageTable, queries: IntArray, database: IntArray, title: str, part: str
) -> tuple[ImageTable, ImageTable]:
    if np.array_equal(queries, database):
        found = base.take(queries)
        both = _named(found.renumbered() if len(queries) else found, title, part)
        return both, both
    both = base.take(np.concatenate([queries, database])).renumbered()
    first, second = np.arange(len(queries)), np.arange(len(queries), len(both))
    return (
        _named(both.take(first), title, f"{part} queries"),
        _named(both.take(second), title, f"{part} database"),
    )


def _named(table: ImageTable, title: str, part: str) -> ImageTable:
    return table.take(np.arange(len(table)), name=f"{title}: {part}")


def _check_parts(parts: Parts, protocol: Disjoint) -> None:
    classes = {part: set(found.label.to_pylist()) for part, found in parts.listed.items()}
    for part, accepted in protocol.counts.items():
        found = Count(len(parts.listed[part].names), len(classes[part]))
        if not any(
            right.classes == found.classes and right.images in (None, found.images) for right in accepted
        ):
            wanted = " or ".join(_in_words(right) for right in accepted)
            raise DataError(
                f"{part}: {wanted} are expected, there are {_in_words(found)}",
                where=protocol.title,
                mend="the files are not the published ones: get them anew",
            )
    shared = classes["train"] & (classes["queries"] | classes["database"])
    if shared:
        raise DataError(
            f"{len(shared)} classes are both in train and in the test, the first is "
            f"'{parts.class_names[min(shared)]}'",
            where=protocol.title,
            mend="the files are not the published ones: get them anew",
        )


def _in_words(count: Count) -> str:
    images = "" if count.images is None else f"{count.images:,} images of "
    return f"{images}{count.classes:,} classes"


def _refuse_missing(parts: Parts, root: str) -> None:
    if is_uri(root):
        return  # asking a store for each of 100,000 images takes longer than reading some of them
    names = [name for found in _different(parts) for name in found.names]
    missing = [name for name in names if not location.exists(location.join(root, name))]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(names):,} images are missing, the first is {missing[0]}",
            where=root,
            mend="put them there, or give their folder as data.root",
        )


def _different(parts: Parts) -> list[Listed]:
    """The parts, each object once."""
    return list({id(found): found for found in parts.listed.values()}.values())


def _one_table(parts: Parts, root: str, title: str) -> tuple[ImageTable, dict[str, IntArray]]:
    """All images, and the rows of each part."""
    found = _different(parts)
    names = [name for listed in found for name in listed.names]
    images = images_at([location.join(root, name) for name in names])
    label = pa.concat_arrays([listed.label for listed in found])
    base = ImageTable(
        pa.table({"id": names, "image": images, "label": label}), name=title, class_names=parts.class_names
    )
    starts = np.cumsum([0, *(len(listed.names) for listed in found)])
    place = {id(listed): number for number, listed in enumerate(found)}
    rows = {}
    for part in PARTS:
        number = place[id(parts.listed[part])]
        rows[part] = np.arange(starts[number], starts[number + 1])
    return base, rows


def _validation(
    config: DisjointConfig, labels: npt.NDArray[np.int64], rows: dict[str, IntArray], seed: int
) -> dict[str, IntArray]:
    """Rows of the validation, and of train where they are taken from it."""
    if config.validation == "test":
        return {"validation_queries": rows["queries"], "validation_database": rows["database"]}
    if config.validation == "none":
        none = np.zeros(0, np.int64)
        return {"validation_queries": none, "validation_database": none}
    train = rows["train"]
    classes = len(np.unique(labels[train]))
    held = share_of(classes, config.validation_classes, least=LEAST)
    if classes - held < LEAST:
        raise DataError(
            f"train: there are {classes} classes, {held + LEAST} are needed: {held} to validate on",
            where=config.protocol.title,
            mend="set data.validation to none",
        )
    drawn = draw_groups(labels[train], {"validation": held}, seed)
    validation = train[drawn["validation"]]
    return {
        "validation_queries": validation,
        "validation_database": validation,
        "train": train[drawn[REST]],
    }


def _said(config: DisjointConfig, labels: npt.NDArray[np.int64], all_: IntArray, kept: IntArray) -> list[str]:
    """What whoever reads the numbers should know about the validation."""
    if config.validation == "test":
        return [
            "the model is chosen by the test images themselves (validation: test), as published code does: "
            "its numbers are optimistic"
        ]
    if config.validation == "none":
        return ["there is no validation: the last model is kept"]
    classes = len(np.unique(labels[all_]))
    held = classes - len(np.unique(labels[kept]))
    return [
        f"{held:,} of {classes:,} training classes ({len(all_) - len(kept):,} of {len(all_):,} images) are "
        "held out for validation"
    ]
