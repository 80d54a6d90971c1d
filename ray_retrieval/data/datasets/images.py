"""The user's own images.

With a folder alone (class = sub-folder), everything else follows:

    data: {name: images, database: photos/}

Of each class a tenth become test queries and a tenth validation queries, at least one and about 1,000 in all;
they leave the database, and the rest is both database and training set. A class thus needs four images. Of
more than 1,000 classes, 1,000 that are drawn give a query of either kind.

What is given separately is used as it is. With `queries` given, all of `database` stays in the database; the
validation queries are drawn from it (from the part that is neither in `queries` nor in `train`, where that is
at least half of it and has enough of each class) and left out of training and of the validation database
alone. Queries of either kind that are given and in the database too are not trained on, and left out of their
own results, where their ids there are the same.

With `split: classes` whole classes are drawn instead, so that none is both learned from and searched:

    data: {name: images, database: products.csv, split: classes, split_by: category}

Half of them are for the test, each of their images a query in all others, and a tenth of the rest likewise
for validation. With `split_by` the groups of a column are drawn rather than single classes.
"""

import functools
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from ray_retrieval.config import Config
from ray_retrieval.data.benchmark import Benchmark, from_tables, overlap, places_in
from ray_retrieval.data.columns import NAMED_FROM
from ray_retrieval.data.datasets.disjoint import LEAST, lone_classes, tables_of
from ray_retrieval.data.readers import check_root
from ray_retrieval.data.splits import REST, Split, SplitPlan, draw_groups, held_groups, load_or_draw
from ray_retrieval.data.table import ImageTable, IntArray, open_images
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder

_ROOM, _SPARSE = 1000, 10
"""Class numbers are taken as they are up to so many; beyond that, up to so many for each that is in use."""
_KEEP = 2
"""Images of each class that stay for training: a pair to learn from."""


class ImagesConfig(Config):
    """Your own images, with labels: a folder of class folders, lists, CSV or Parquet."""

    name: Literal["images"] = "images"
    """The benchmark."""
    database: str
    """What is searched: a folder (class = sub-folder), a `.txt` list, a `.csv`, or Parquet; a path or URI."""
    queries: str | None = None
    """Test queries in any of these forms; drawn from the database by default."""
    validation_queries: str | None = None
    """Validation queries in any of these forms; drawn from the database by default."""
    train: str | None = None
    """Training images in any of these forms; by default the database without what is a query."""
    root: str | None = None
    """Where the relative paths of lists and tables start; by default the folder of each."""
    queries_per_class: int | None = Field(default=None, ge=1)
    """Test queries to draw of each class (of all images where these have several labels)."""
    query_fraction: float = Field(default=0.1, gt=0, le=0.5)
    """Test queries to draw as a share of each class, where no number is given."""
    validation_queries_per_class: int | None = Field(default=None, ge=0)
    """Validation queries to draw of each class (of all images where these have several labels)."""
    validation_fraction: float = Field(default=0.1, ge=0, le=0.5)
    """Validation queries to draw as a share of each class, where no number is given; 0 for none."""
    queries_at_most: int = Field(default=1000, ge=1)
    """About how many queries of either kind the shares may give in all."""
    validation_database: int = Field(default=10_000, ge=1)
    """About how many images of the database a validation searches at most."""
    k: int | None = Field(default=None, ge=1)
    """Cut-off of the mean average precision; the whole database by default."""
    split: Literal["images", "classes"] = "images"
    """What is drawn: images of every class, or whole classes, so that no class is both learned from and
    searched; then everything comes from `database`."""
    split_by: str | None = None
    """With `split: classes`, a column of the database whose groups of classes are kept together."""
    test_classes: float = Field(default=0.5, gt=0, lt=1)
    """With `split: classes`, the share of the classes (or groups) to test on."""
    validation_classes: float = Field(default=0.1, ge=0, le=0.5)
    """With `split: classes`, the share of the others to validate on; 0 for none."""

    @model_validator(mode="after")
    def _one_source_of_classes(self) -> "ImagesConfig":
        given = [
            role for role in ("queries", "validation_queries", "train") if getattr(self, role) is not None
        ]
        if self.split == "classes" and given:
            raise ValueError(
                f"with split: classes everything is drawn from the database, {given[0]} is given"
            )
        if self.split == "images" and self.split_by is not None:
            raise ValueError("split_by needs split: classes")
        return self


def load(config: ImagesConfig, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark, by the split in `splits`; without one it is drawn by `seed` and saved there.

    Raises:
        RecipeError: if there is a root and nothing that has paths.
        DataError: if there are no images or labels, one class only, too few images of a class (which is
            named), or the saved split was drawn otherwise.
        ArtefactError: if the saved split is damaged.
    """
    given = _open_all(config)
    base = given["database"]
    if config.split == "classes":
        return _by_classes(config, base, seed, splits)
    train, queries = given.get("train"), given.get("queries")
    origin = _origin(config)

    def draw(seed: int) -> dict[str, IntArray]:
        return _draw(config, given, seed)

    split, notes = load_or_draw(splits, base, draw, seed=seed, origin=origin)
    tables = {
        role: base.take(rows, name=f"{base.name}: {_words(role)}") for role, rows in split.roles.items()
    }
    tables |= {role: table for role, table in given.items() if role in ("queries", "validation_queries")}
    if "validation_queries" not in tables:
        tables["validation_queries"] = base.take(np.zeros(0, dtype=np.int64))
    if train is not None:
        drawn = [tables[role] for role in ("queries", "validation_queries") if role not in given]
        tables["train"] = _without(train, drawn, notes)
    for role in ("queries", "validation_queries"):
        if role not in given and len(tables[role]):
            stays = "stay in" if queries is not None else "are not in"
            notes.append(
                f"{len(tables[role])} {_words(role)} are drawn from the images and {stays} the database"
            )
    inside = queries is not None and _told_by_ids(queries, base)
    benchmark = from_tables("images", tables, k=config.k, queries_in_database=inside, notes=notes)
    benchmark.check()
    return benchmark


def _told_by_ids(queries: ImageTable, base: ImageTable) -> bool:
    """Whether queries are in the database, and the ids of all tell which rows of it they are.

    The metrics leave out the row with a query's id: the same file under another id is a leak.
    """
    inside = places_in(queries, base) >= 0
    return bool(inside.any() and (inside == np.isin(queries.ids, base.ids)).all())


def _by_classes(config: ImagesConfig, base: ImageTable, seed: int, splits: Folder) -> Benchmark:
    """The benchmark whose test classes, and validation classes, are not learned from."""
    if base.is_multilabel:
        raise DataError(
            "images with several labels cannot be parted by class", where=base.name, mend="use split: images"
        )
    origin = {
        "benchmark": config.name,
        **config.model_dump(include={"split", "split_by", "test_classes", "validation_classes"}),
    }

    def draw(seed: int) -> dict[str, IntArray]:
        groups, kind, least = base.labels, "classes", LEAST
        if config.split_by is not None:
            groups, kind, least = _groups(base, config.split_by), f"groups by {config.split_by}", 1
        counts = held_groups(
            len(np.unique(groups)),
            config.test_classes,
            config.validation_classes,
            least=least,
            kind=kind,
            where=base.name,
            mend="ask for fewer test_classes, or validation_classes=0",
        )
        drawn = draw_groups(groups, counts, seed)
        validation = drawn.get("validation", np.zeros(0, dtype=np.int64))
        return {
            "train": drawn[REST],
            "validation_queries": validation,
            "validation_database": validation,
            "queries": drawn["test"],
            "database": drawn["test"],
        }

    split, notes = load_or_draw(splits, base, draw, seed=seed, origin=origin)
    tables = tables_of(base, split.roles, base.name)
    counts = [f"{tables[role].classes:,}" for role in ("train", "validation_queries", "queries")]
    notes.append(
        f"whole classes are drawn: {counts[0]} to train, {counts[1]} to validate, {counts[2]} to test on"
    )
    notes += lone_classes(tables["train"])
    benchmark = from_tables("images by class", tables, k=config.k, queries_in_database=True, notes=notes)
    benchmark.check()
    return benchmark


def _groups(base: ImageTable, column: str) -> npt.NDArray[Any]:
    """The group of each image, by a column of the database.

    Raises:
        DataError: if the column is not there or has empty places, or a class is in several groups.
    """
    columns = [name for name in base.table.column_names if name not in ("id", "image", "label")]
    if column not in columns:
        raise DataError(
            f"no column '{column}'",
            where=base.name,
            mend=f"there are: {', '.join(columns)}" if columns else "there is none beside the labels",
        )
    values = base.table[column].to_pylist()
    if None in values:
        raise DataError(f"row {values.index(None)} has no {column}", where=base.name)
    group_of: dict[int, Any] = {}
    for label, value in zip(base.labels.tolist(), values, strict=True):
        if group_of.setdefault(label, value) != value:
            raise DataError(
                f"class '{base.class_name(label)}' is in '{group_of[label]}' and in '{value}' of {column}",
                where=base.name,
                mend="give a column that has one value for all images of a class",
            )
    return np.array(values)


def _open_all(config: ImagesConfig) -> dict[str, ImageTable]:
    """The tables that are given, with labels that mean the same in all."""
    places = {
        "database": config.database,
        "queries": config.queries,
        "validation_queries": config.validation_queries,
        "train": config.train,
    }
    given = {role: place for role, place in places.items() if place is not None}
    check_root(config.root, given.values(), where="data.root")
    tables = {role: open_images(place, root=config.root) for role, place in given.items()}
    tables = _named_where_few(tables)
    for table in tables.values():
        _ = table.labels  # raises where one is missing
    return _with_common_classes(tables)


def _named_where_few(tables: dict[str, ImageTable]) -> dict[str, ImageTable]:
    """Numbers are names where hardly any of them is a class: each up to the highest would take its place."""
    if any(table.class_names is not None or not table.has_labels for table in tables.values()):
        return tables
    present = functools.reduce(np.union1d, [table.classes_present for table in tables.values()])
    if max(table.classes for table in tables.values()) <= max(_ROOM, _SPARSE * len(present)):
        return tables
    return {role: table.named_by_number() for role, table in tables.items()}


def _with_common_classes(tables: dict[str, ImageTable]) -> dict[str, ImageTable]:
    """Two folders number their classes each by its own sub-folders: here the names decide."""
    if len({table.is_multilabel for table in tables.values()}) > 1:
        # Where a list has a place for each class, `path 1` may be a class number or the one place.
        if any(table.stated_classes is not None for table in tables.values()):
            raise DataError(
                "some of the images have several labels and some have one", mend="give all the same form"
            )
        tables = {role: table.with_lists() for role, table in tables.items()}
    tables = _all_named_by_number(tables)
    named = {table.class_names is not None for table in tables.values()}
    if len(named) > 1:
        raise DataError(
            "some of the labels have names and some are numbers",
            mend="give names, or numbers, in all of them",
        )
    if named == {False}:
        widths = {table.classes for table in tables.values()}
        stated = {table.stated_classes for table in tables.values()} - {None}
        if len(widths) == 1 or not tables["database"].is_multilabel:
            return tables
        if stated and stated != {max(widths)}:
            raise DataError(f"the lists have different numbers of labels: {sorted(widths)}")
        return {role: table.among(max(widths)) for role, table in tables.items()}
    names = list(tables["database"].class_names or [])
    others = {name for table in tables.values() for name in table.class_names or []}
    names += sorted(others - set(names))
    return {role: table.with_classes(names) for role, table in tables.items()}


def _all_named_by_number(tables: dict[str, ImageTable]) -> dict[str, ImageTable]:
    """Numbers are names in all tables where they are in one, being too large to count classes."""
    names = [name for table in tables.values() for name in table.class_names or []]
    if not all(map(str.isdecimal, names)) or max(map(int, names), default=0) < NAMED_FROM:
        return tables
    return {
        role: table.named_by_number() if table.class_names is None else table
        for role, table in tables.items()
    }


def _draw(config: ImagesConfig, given: dict[str, ImageTable], seed: int) -> dict[str, IntArray]:
    """Rows of the database by role, for all roles that are not given."""
    base, queries, train = given["database"], given.get("queries"), given.get("train")
    everything = np.arange(len(base))
    parts: dict[str, int | float] = {}
    if queries is None:
        parts["queries"] = _share(config.queries_per_class, config.query_fraction, config, len(base))
    if config.validation_queries is None:
        count = config.validation_queries_per_class
        parts["validation_queries"] = _share(count, config.validation_fraction, config, len(base))
    plan = SplitPlan(parts, seed, keep=_KEEP if parts else 0, most=config.queries_at_most)
    roles = _drawn(base, [everything] if queries is None else _pools(base, queries, train), plan)
    none = np.zeros(0, dtype=np.int64)
    rest = np.setdiff1d(everything, np.concatenate([none, *roles.values()]))
    roles["database"] = rest if queries is None else everything
    validation = given.get("validation_queries")
    asked = base.labels[roles["validation_queries"]] if validation is None else validation.labels
    roles["validation_database"] = _at_most(config.validation_database, base, rest, asked, seed)
    if train is None:
        asked_with = [overlap(base, table) for table in (queries, validation) if table is not None]
        roles["train"] = np.setdiff1d(rest, np.concatenate([none, *asked_with]))
    return roles


def _pools(base: ImageTable, queries: ImageTable, train: ImageTable | None) -> list[IntArray]:
    """Rows to draw validation queries from, the best first: no test queries, nor what is learned from.

    Each has at least half of the database; the last is all of it.
    """
    everything, asked = np.arange(len(base)), overlap(base, queries)
    learned = np.zeros(0, dtype=np.int64) if train is None else overlap(base, train)
    pools = [np.setdiff1d(everything, held) for held in (np.union1d(asked, learned), asked, learned)]
    return [*(pool for pool in pools if 2 * len(pool) >= len(base)), everything]


def _drawn(base: ImageTable, pools: list[IntArray], plan: SplitPlan) -> dict[str, IntArray]:
    """The roles of a plan, as rows of the database, from the first pool with enough of each class."""

    def draw(pool: IntArray) -> dict[str, IntArray]:
        drawn = Split.draw(base.labels[pool], plan, class_names=base.class_names, where=base.name).roles
        return {role: pool[drawn[role]] for role in plan.parts}

    for pool in pools[:-1]:
        with suppress(DataError):
            return draw(pool)
    return draw(pools[-1])


def _share(count: int | None, fraction: float, config: ImagesConfig, images: int) -> int | float:
    return min(fraction, config.queries_at_most / images) if count is None else count


def _at_most(limit: int, base: ImageTable, rows: IntArray, asked: npt.NDArray[Any], seed: int) -> IntArray:
    """About `limit` of the rows, the same share of each class.

    Where there are more classes than that, the rows of the classes that are asked for, and others by chance.
    """
    if len(rows) <= limit:
        return rows
    labels = base.labels[rows]
    if labels.ndim == 1 and len(np.unique(labels)) > limit:
        wanted = np.isin(labels, asked)
        others, rows, labels = rows[~wanted], rows[wanted], labels[wanted]
        if len(rows) < limit:
            plan = SplitPlan({"kept": limit - len(rows)}, seed)
            drawn = Split.draw(np.zeros(len(others), np.int64), plan).roles["kept"]
            return np.union1d(rows, others[drawn])
    plan = SplitPlan({"kept": limit / len(rows)}, seed)
    return rows[Split.draw(labels, plan).roles["kept"]]


def _without(train: ImageTable, drawn: list[ImageTable], notes: list[str]) -> ImageTable:
    """The training images that are not among the drawn queries."""
    held = [overlap(train, table) for table in drawn]
    rows = np.setdiff1d(np.arange(len(train)), np.concatenate([np.zeros(0, dtype=np.int64), *held]))
    if len(rows) == len(train):
        return train
    notes.append(f"{len(train) - len(rows)} images of train are drawn as queries and not trained on")
    return train.take(rows)


def _origin(config: ImagesConfig) -> dict[str, Any]:
    """What the draw follows: another value needs another split."""
    fields = config.model_dump(include=set(_DRAWN_BY))
    given = {role: getattr(config, role) is not None for role in ("queries", "validation_queries", "train")}
    return {
        "benchmark": config.name,
        **fields,
        "given": sorted(role for role, there in given.items() if there),
    }


_DRAWN_BY = (
    "queries_per_class",
    "query_fraction",
    "validation_queries_per_class",
    "validation_fraction",
    "queries_at_most",
    "validation_database",
)


def _words(role: str) -> str:
    return role.replace("_", " ")
