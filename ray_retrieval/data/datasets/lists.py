"""Benchmarks that are list files: one for training, one of queries, one of the database.

A line of a list is `path 0 0 1 … 0` (multi-hot), or `path class`, as the hashing literature exchanges its
splits. The lists carry the prefixes of the machines they were made on (`./data/coco/…`, `/home/…`): leading
folders are dropped until an image is found under `root`.

No list names validation queries, and the test queries are not used to choose a model. They are drawn, by the
seed, from the part of the database that is neither query nor training image, and searched in another sample
of it; at test time both stay in the database, as the protocol has it. Where fewer than 100 images are left
there, a tenth of the training images is held out for both; with fewer than 1,000 of those there is no
validation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.data import location
from ray_retrieval.data.benchmark import Benchmark, from_tables
from ray_retrieval.data.columns import images_at
from ray_retrieval.data.list_files import ListFile, parse_list
from ray_retrieval.data.splits import REST, Split, SplitPlan, load_or_draw
from ray_retrieval.data.table import BoolArray, ImageTable, IntArray
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder, is_uri

FILES = {"train": "train.txt", "queries": "test.txt", "database": "database.txt"}
"""What the lists of a published benchmark are called."""
PARTS = tuple(FILES)
_FEWEST = 100
"""Images from which validation is drawn, at the least: fewer would tell nothing."""
_TRIES = 50
"""Images of a list that are looked for in vain before its prefix is given up: copies lack some."""


class ListFilesConfig(Config):
    """What all benchmarks made of list files share."""

    root: str = "data"
    """Folder that the paths in the lists start from; a path or URI."""
    lists: str | None = None
    """Folder of the list files; by default the root."""
    missing: Literal["refuse", "drop"] = "refuse"
    """What to do about images that are in a list but not under the root: refuse them all, or leave them out,
    with a note; then the numbers of images are not compared with the published ones. Images in a store
    (a URI) are not looked for beforehand."""
    validation_queries: int = Field(default=1000, ge=0)
    """Validation queries to draw, at most half of what there is to draw from; 0 for none."""
    validation_database: int = Field(default=10_000, ge=1)
    """Images that these search in, at most."""

    @property
    def folder(self) -> str:
        """Where the lists are."""
        return location.expand(self.lists or self.root)


class ListsConfig(ListFilesConfig):
    """Any three list files."""

    name: Literal["lists"] = "lists"
    """The benchmark."""
    train: str = "train.txt"
    """List of the training images."""
    queries: str = "test.txt"
    """List of the test queries."""
    database: str = "database.txt"
    """List of what is searched."""
    k: int | None = Field(default=None, ge=1)
    """Cut-off of the mean average precision; the whole database by default."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of the columns."""


@dataclass(frozen=True)
class Protocol:
    """What is published about a benchmark.

    Attributes:
        title: as reports name it.
        k: cut-off of the mean average precision; None for the whole database.
        counts: images by part; None where no number is published.
        classes: number of classes; None for any.
        class_names: in the order of the columns, where the columns are known.
    """

    title: str
    k: int | None
    counts: dict[str, int | None]
    classes: int | None = None
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Listed:
    """Paths and labels of one part, whether the images are there or not."""

    names: list[str]
    label: pa.Array
    classes: int | None

    @staticmethod
    def of(found: ListFile) -> "Listed":
        return Listed(found.names, found.label, found.classes)

    def take(self, rows: IntArray) -> "Listed":
        return Listed([self.names[row] for row in rows], self.label.take(pa.array(rows)), self.classes)


def load(config: ListsConfig, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark of any list files.

    Raises:
        DataError: if a list or an image is missing, a line is wrong, or the saved split was drawn otherwise.
        ArtefactError: if the saved split is damaged.
    """
    protocol = Protocol("lists", config.k, {}, class_names=config.class_names)
    return from_parts(config, read_parts(config), protocol, seed=seed, splits=splits)


def list_files(config: ListFilesConfig) -> dict[str, str]:
    """The list of each part, whether it is there or not."""
    names = {part: getattr(config, part) for part in PARTS} if isinstance(config, ListsConfig) else FILES
    return {part: location.join(config.folder, name) for part, name in names.items()}


def read_parts(config: ListFilesConfig) -> dict[str, Listed]:
    """Train, queries and database as the lists have them.

    Raises:
        DataError: if a list is missing, or a line is wrong.
    """
    return {part: read_part(file, config.root) for part, file in list_files(config).items()}


def read_part(file: str, root: str) -> Listed:
    """A list with paths that start from `root`.

    Raises:
        DataError: if the list is missing, or a line is wrong.
    """
    if not location.exists(file):
        raise DataError(
            "no such list", where=file, mend="`ray-retrieval datasets NAME` says where it comes from"
        )
    found = Listed.of(parse_list(file))
    return Listed(strip_prefixes(found.names, location.expand(root)), found.label, found.classes)


def strip_prefixes(names: list[str], root: str) -> list[str]:
    """The paths without the leading folders of another machine.

    A prefix is what has to go from a path so that an image is found under `root`; all paths that begin with
    it lose it, those before it and those whose image is missing too. All lose a leading `./`.
    """
    plain = [name.removeprefix("./") for name in names]
    prefixes = _foreign_prefixes(plain, root)
    return [name[len(next(filter(name.startswith, prefixes), "")) :] for name in plain]


def _foreign_prefixes(names: list[str], root: str) -> list[str]:
    """Every prefix of another machine, the longest first."""
    foreign: list[str] = []
    # Folders that are under the root as the list has them: what begins so has no prefix.
    at_home: list[str] = []
    tries = _TRIES
    for name in names:
        if "/" not in name or name.startswith((*foreign, *at_home)):
            continue
        prefix = _foreign_prefix(name, root)
        if prefix:
            foreign.append(prefix)
        elif prefix is not None:
            at_home.append(name.partition("/")[0] + "/")
        else:
            tries -= 1
            if not tries:
                break
    return sorted(foreign, key=len, reverse=True)


def _foreign_prefix(name: str, root: str) -> str | None:
    """What has to go from a path so that its image is found; None where it is not found."""
    parts = name.split("/")
    for dropped in range(len(parts)):
        rest = "/".join(parts[dropped:])
        if rest and not rest.startswith("/") and location.exists(location.join(root, rest)):
            return name[: len(name) - len(rest)]
    return None


def from_parts(
    config: ListFilesConfig,
    parts: dict[str, Listed],
    protocol: Protocol,
    *,
    seed: int,
    splits: Folder,
    notes: list[str] | None = None,
) -> Benchmark:
    """The benchmark of three parts, with validation queries drawn or read from `splits`.

    Raises:
        DataError: if the parts' labels differ in width or form, images are missing, or a number of images is
            not the published one.
    """
    notes = list(notes or [])
    _check_width(parts, protocol)
    parts, lost = _present(config, parts)
    base, rows, contradictions = _one_table(parts, config, protocol)
    notes += contradictions
    inside = bool(np.isin(rows["queries"], rows["database"]).any())
    origin = {
        "benchmark": protocol.title,
        "validation_queries": config.validation_queries,
        "validation_database": config.validation_database,
    }

    def draw(seed: int) -> dict[str, IntArray]:
        return rows | _draw_validation(config, base, rows, seed)

    split, said = load_or_draw(splits, base, draw, seed=seed, origin=origin)
    held = len(np.setdiff1d(rows["train"], split.roles["train"]))
    if held:
        notes.append(f"{held} training images are held out for validation: the database leaves none for it")
    if not len(split.roles["validation_queries"]) and config.validation_queries:
        notes.append("there are too few images to draw validation queries from: the last model is kept")
    if lost:
        notes.append(f"{lost} images of the lists are missing and left out: numbers are not comparable")
    tables = {
        role: base.take(found, name=f"{protocol.title}: {role.replace('_', ' ')}")
        for role, found in split.roles.items()
    }
    benchmark = from_tables(
        protocol.title,
        tables,
        k=protocol.k,
        queries_in_database=inside,
        counts_queries=True,
        notes=[*said, *notes],
    )
    expected = {part: count for part, count in protocol.counts.items() if count is not None and not lost}
    if held:
        expected.pop("train", None)
    benchmark.check(expected)
    return benchmark


def _check_width(parts: dict[str, Listed], protocol: Protocol) -> None:
    widths = {part: found.classes for part, found in parts.items()}
    wanted = protocol.classes or (len(protocol.class_names) if protocol.class_names else None)
    expected = wanted or next(iter(widths.values()))
    for part, width in widths.items():
        if pa.types.is_null(parts[part].label.type):
            raise DataError(
                f"{part}: the list has no labels",
                where=protocol.title,
                mend="give every line a path and its labels",
            )
        one_class_will_do = protocol.classes is None and len(set(widths.values())) == 1
        if width != expected and not (width is None and one_class_will_do):
            found = "one class a line" if width is None else f"{width} labels a line"
            raise DataError(
                f"{part}: {found}, {expected or 'one class'} are expected",
                where=protocol.title,
                mend="give three lists of the same benchmark",
            )


def _present(config: ListFilesConfig, parts: dict[str, Listed]) -> tuple[dict[str, Listed], int]:
    """The parts without the images that are missing, and how many these are."""
    root = location.expand(config.root)
    if is_uri(root):
        return parts, 0  # asking a store for each of 100,000 images takes longer than reading some of them
    there: dict[str, bool] = {}
    for found in parts.values():
        for name in found.names:
            if name not in there:
                there[name] = location.exists(location.join(root, name))
    missing = [name for name, found in there.items() if not found]
    if missing and config.missing == "refuse":
        raise DataError(
            f"{len(missing):,} of {len(there):,} images of the lists are missing, the first is {missing[0]}",
            where=root,
            mend="put them there, give their folder as data.root, or set data.missing to drop",
        )
    if not missing:
        return parts, 0
    return {
        part: found.take(np.flatnonzero([there[name] for name in found.names]))
        for part, found in parts.items()
    }, len(missing)


def _one_table(
    parts: dict[str, Listed], config: ListFilesConfig, protocol: Protocol
) -> tuple[ImageTable, dict[str, IntArray], list[str]]:
    """One table of all images, each once, the rows of each part, and a note where lists contradict."""
    order = ("database", "train", "queries")
    names = pa.array([name for part in order for name in parts[part].names], pa.string())
    labels = pa.concat_arrays([parts[part].label for part in order])
    codes = names.dictionary_encode()
    number = codes.indices.to_numpy()
    _, first = np.unique(number, return_index=True)
    ids = codes.dictionary
    root = location.expand(config.root)
    images = images_at([location.join(root, name) for name in ids.to_pylist()])
    table = pa.table({"id": ids, "image": images, "label": labels.take(pa.array(first))})
    class_names = list(protocol.class_names) if protocol.class_names else None
    base = ImageTable(table, name=protocol.title, class_names=class_names, classes=parts["database"].classes)
    rows, start = {}, 0
    for part in order:
        stop = start + len(parts[part].names)
        rows[part] = number[start:stop].astype(np.int64)
        start = stop
        if len(np.unique(rows[part])) != len(rows[part]):
            values, counts = np.unique(rows[part], return_counts=True)
            twice = ids[int(values[counts.argmax()])].as_py()
            raise DataError(f"{part}: '{twice}' stands more than once", where=protocol.title)
    notes = []
    if not labels.take(pa.array(first[number])).equals(labels):
        pairs = zip(labels.to_pylist(), labels.take(pa.array(first[number])).to_pylist(), strict=True)
        differ = np.flatnonzero([own != counted for own, counted in pairs])
        notes.append(
            f"{len(np.unique(number[differ]))} images have other labels in another list, the first is "
            f"'{names[int(differ[0])]}': those of the database count, then those of train"
        )
    return base, {part: rows[part] for part in PARTS}, notes


def _draw_validation(
    config: ListFilesConfig, base: ImageTable, rows: dict[str, IntArray], seed: int
) -> dict[str, IntArray]:
    """Rows of `validation_queries` and `validation_database`, and of `train` where they are taken from it."""
    none = np.zeros(0, np.int64)
    empty = {"validation_queries": none, "validation_database": none}
    if not config.validation_queries:
        return empty
    pool = np.setdiff1d(rows["database"], np.concatenate([rows["queries"], rows["train"]]))
    taken = {}
    if len(pool) < _FEWEST:
        if len(rows["train"]) < 10 * _FEWEST:
            return empty
        share = SplitPlan({"held": 0.1}, seed)
        split = Split.draw(_groups(base.labels[rows["train"]], len(rows["train"]) // 10), share).roles
        pool = np.sort(rows["train"][split["held"]])
        taken = {"train": np.setdiff1d(rows["train"], pool)}
    queries = min(config.validation_queries, len(pool) // 2)
    database = min(config.validation_database, len(pool) - queries)
    # Shares, not numbers: a number would be that many of each class where images have one class.
    share = SplitPlan({"queries": queries / len(pool)}, seed)
    first = Split.draw(_groups(base.labels[pool], queries), share).roles
    others = pool[first[REST]]
    if database < len(others):
        share = SplitPlan({"database": database / len(others)}, seed + 1)
        others = others[Split.draw(_groups(base.labels[others], database), share).roles["database"]]
    return {"validation_queries": pool[first["queries"]], "validation_database": others, **taken}


def _groups(labels: IntArray | BoolArray, wanted: int) -> IntArray | BoolArray:
    """The labels to draw `wanted` images by: one for all where there are more classes than that.

    A share takes one image of every class at least, which would be too many.
    """
    many = labels.ndim == 1 and len(np.unique(labels)) > wanted
    return np.zeros(len(labels), np.int64) if many else labels


def listed_or_drawn(
    config: ListFilesConfig,
    annotated: Callable[[str], Listed],
    counts: Mapping[str, int | None],
    *,
    seed: int,
    splits: Folder,
    where: str,
) -> tuple[dict[str, Listed], list[str]]:
    """The parts by their lists, or drawn by the seed where none of the lists is there.

    Args:
        config: of the benchmark.
        annotated: all images of the data set, given the root.
        counts: how many of each part are drawn.
        seed: as of `drawn_parts`.
        splits: as of `drawn_parts`.
        where: as of `drawn_parts`.

    Returns:
        The parts, and notes for whoever reads the numbers: some where they are drawn, else none.

    Raises:
        DataError: as `read_parts`, `annotated` and `drawn_parts`.
    """
    if any(location.exists(file) for file in list_files(config).values()):
        return read_parts(config), []
    wanted = {part: count or 0 for part, count in counts.items()}
    parts, note = drawn_parts(annotated(config.root), wanted, seed=seed, splits=splits, where=where)
    return parts, [note]


def drawn_parts(
    listed: Listed, counts: dict[str, int], *, seed: int, splits: Folder, where: str
) -> tuple[dict[str, Listed], str]:
    """Queries, training images and database drawn by the seed, for a benchmark whose lists are not there.

    Args:
        listed: all images of the data set, in an order of their own.
        counts: how many of each part; what is beyond all of them is left over.
        seed: of the draw, where none is saved yet.
        splits: the folder in which the draw is kept as `parts.json`.
        where: what the data set is called.

    Returns:
        The parts, and a note for whoever reads the numbers.

    Raises:
        DataError: if there are too few images, or the saved draw belongs to others.
    """
    if len(listed.names) < sum(counts.values()):
        raise DataError(
            f"{sum(counts.values()):,} images are expected, there are {len(listed.names):,}", where=where
        )
    ids = pa.array(listed.names, pa.string())
    images = images_at(ids)
    table = ImageTable(
        pa.table({"id": ids, "image": images, "label": listed.label}), name=where, classes=listed.classes
    )

    def draw(seed: int) -> dict[str, IntArray]:
        roles = Split.draw(table.labels, SplitPlan(counts, seed), where=where).roles
        return {part: roles[part] for part in counts}

    origin = {"benchmark": where, **counts}
    split, _ = load_or_draw(splits / "parts", table, draw, seed=seed, origin=origin)
    note = f"the parts are drawn (seed {split.origin['seed']}), they are not the published lists"
    return {part: listed.take(rows) for part, rows in split.roles.items()}, note
