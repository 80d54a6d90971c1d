"""What a model is trained on and measured by: five tables of images and the rules between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.data.table import BoolArray, ImageTable, IntArray
from ray_retrieval.errors import DataError

ROLES = ("train", "validation_queries", "validation_database", "queries", "database")


@dataclass
class Benchmark:
    """Tables of images by role. Two images are relevant to each other where they share a label.

    Where the benchmark has a ground truth, that alone says which images of the database are relevant to which
    test queries, and these need no labels.

    Attributes:
        name: of the benchmark and its protocol.
        train: what the model learns from.
        validation_queries: for choosing among models; may be empty where a protocol leaves none.
        validation_database: what these search in.
        queries: for the final measurement, once.
        database: what these search in.
        k: cut-off of the mean average precision; None for the whole database.
        queries_in_database: whether queries are in the database too, all or some, under the same ids, which
            no other image there has: a query is then left out of its own results. Where they are all that is
            in it, both roles have the same table object, so that it is encoded once.
        counts_queries: whether, where queries are in the database, the published numbers of codes count each
            query as a hit of its own. Where not, codes are not measured there.
        ks: cut-offs of the recall that the benchmark's papers report; empty where they report none.
        gallery_draws: for protocols that draw what is searched several times: queries and database are then
            the same table of all test images. Each draw, int64 rows of it, is a gallery; the other rows are
            the queries, and numbers are means over the draws.
        ground_truth: for each test query, lists of rows of the database, by name; see
            `metrics.ground_truth`. None where labels tell what is relevant.
        protocol: which lists these are; None without a ground truth.
        untrainable: why nothing can be learned here, in words; empty where it can. A model that exists can
            be measured all the same. The training images may then be missing, or none.
        decoded: whether each image of training and validation has been decoded before, when its collection
            was built, so that no run need look for those that cannot be.
        notes: what whoever reads the numbers should know.
    """

    name: str
    train: ImageTable
    validation_queries: ImageTable
    validation_database: ImageTable
    queries: ImageTable
    database: ImageTable
    k: int | None = None
    queries_in_database: bool = False
    counts_queries: bool = False
    ks: tuple[int, ...] = ()
    gallery_draws: tuple[IntArray, ...] = ()
    ground_truth: tuple[Mapping[str, IntArray], ...] | None = None
    protocol: Literal["revisited", "classic"] | None = None
    untrainable: str = ""
    decoded: bool = False
    notes: list[str] = field(default_factory=list)

    def tables(self) -> dict[str, ImageTable]:
        """The five tables by role."""
        return {role: getattr(self, role) for role in ROLES}

    def check(self, expected: dict[str, int] | None = None) -> None:
        """Assert that the benchmark is what it should be, and add what is odd about it to the notes.

        Noted are: queries in the database, training images or validation queries among the queries, rows
        without a label, and queries without any relevant image other than themselves.

        Args:
            expected: role → number of images, as published.

        Raises:
            DataError: if a count differs, a table other than those of the validation is empty, a label is
                missing, there is one class only, or the ground truth does not fit queries and database.
        """
        tables = self.tables()
        for role, count in (expected or {}).items():
            if len(tables[role]) != count:
                raise DataError(
                    f"{_words(role)}: {count} images are expected, there are {len(tables[role])}",
                    where=self.name,
                    mend="the files are not the published ones: get them anew",
                )
        for role in ("queries", "database") if self.untrainable else ("train", "queries", "database"):
            if not len(tables[role]):
                raise DataError(f"{_words(role)}: there is no image", where=self.name)
        for role, table in tables.items():
            if self.ground_truth is None or role not in ("queries", "database"):
                self._check_labels(role, table)
        assert not self.gallery_draws or self.queries is self.database
        assert (self.ground_truth is None) == (self.protocol is None)
        self._check_ground_truth()
        self._note_leaks()

    def _check_ground_truth(self) -> None:
        if self.ground_truth is None:
            return
        if len(self.ground_truth) != len(self.queries):
            raise DataError(
                f"there are {len(self.queries)} queries, and a ground truth of {len(self.ground_truth)}",
                where=self.name,
            )
        for query, lists in enumerate(self.ground_truth):
            for name, rows in lists.items():
                if len(rows) and (rows.min() < 0 or rows.max() >= len(self.database)):
                    raise DataError(
                        f"list '{name}' of query {query} names a row outside 0…{len(self.database) - 1}",
                        where=self.name,
                    )

    def _check_labels(self, role: str, table: ImageTable) -> None:
        _ = table.labels  # raises where one is missing
        if role in ("train", "database") and len(table) and _classes_present(table) < 2:
            raise DataError(
                "all images are of one class, retrieval needs two at least",
                where=table.name,
                mend="give images of several classes, with labels or in folders directly below the given one",
            )
        if len(table.unlabelled):
            self._note(
                f"{_words(role)}: {len(table.unlabelled)} of {len(table)} images have an empty list of labels"
            )
        if role == "validation_database" and len(table) and _classes_present(table) < 2:
            self._note(
                "validation database: all images are of one class, so every ranking of them is perfect"
            )
        if role in ("queries", "validation_queries") and len(table):
            database = self.database if role == "queries" else self.validation_database
            told = self.queries_in_database and not self.counts_queries
            themselves = role == "queries" and table is not database and not told
            relevant = have_relevant(table, database, themselves=themselves)
            if not relevant.all():
                lost = int((~relevant).sum())
                self._note(f"{_words(role)}: {lost} of {len(table)} have no relevant image in the database")

    def _note_leaks(self) -> None:
        pairs = [("queries", "train"), ("validation_queries", "train"), ("queries", "validation_queries")]
        if self.gallery_draws:
            self._note(
                f"{len(self.gallery_draws)} galleries of {len(self.gallery_draws[0])} images are drawn from "
                f"the {len(self.database)}, the others are the queries: numbers are means over the draws"
            )
        elif self.queries_in_database and self.queries is self.database:
            self._note("the queries are the database: each is left out of its own results")
        elif self.queries_in_database:
            known = int((places_in(self.queries, self.database) >= 0).sum())
            if known == len(self.queries):
                self._note("the queries are in the database")
            else:
                left_out = "" if self.counts_queries else ", and left out of their own results"
                self._note(f"{known} of {len(self.queries)} queries are in the database{left_out}")
                pairs.insert(0, ("queries", "database"))
            if self.counts_queries:
                self._note("codes count each query as its own hit, as published numbers do; vectors do not")
        else:
            pairs.insert(0, ("queries", "database"))
        for inner, outer in pairs:
            here, there = getattr(self, inner), getattr(self, outer)
            found = overlap(here, there)
            if self.queries_in_database and outer == "database":  # those told by their ids are no leak
                found = found[places_in(here.take(found), there) < 0]
            if len(found):
                self._note(
                    f"{len(found)} of {len(here)} {_words(inner)} are also in {_words(outer)}, "
                    f"the first is '{here.ids[int(found[0])]}'"
                )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def from_tables(
    name: str,
    tables: dict[str, ImageTable],
    *,
    k: int | None = None,
    queries_in_database: bool = False,
    counts_queries: bool = False,
    ks: tuple[int, ...] = (),
    gallery_draws: tuple[IntArray, ...] = (),
    notes: list[str],
) -> Benchmark:
    """A benchmark from its five tables by role; queries that are the database become the same table.

    Args:
        name: what it is called.
        tables: role → table, one for each of `ROLES`.
        k: as of `Benchmark`, like all that follows.
        queries_in_database: whether queries are images of the database, which their ids tell.
        counts_queries: whether codes count each of them as its own hit.
        ks: cut-offs of the metrics.
        gallery_draws: int64 [m] each, ascending: the rows of the database that are one drawn gallery.
        notes: for whoever reads the numbers.
    """
    train, validation_queries, validation_database, queries, database = (tables[role] for role in ROLES)
    if queries_in_database and queries.fingerprint == database.fingerprint:
        queries = database
    return Benchmark(
        name=name,
        train=train,
        validation_queries=validation_queries,
        validation_database=validation_database,
        queries=queries,
        database=database,
        k=k,
        queries_in_database=queries_in_database,
        counts_queries=counts_queries,
        ks=ks,
        gallery_draws=gallery_draws,
        notes=notes,
    )


def overlap(table: ImageTable, other: ImageTable) -> IntArray:
    """int64 [m], ascending: the rows of `table` whose image is in `other` too.

    Images that lie in the tables are the same where their bytes are; images elsewhere where their paths are.
    Files are not opened: a copy under another name goes unnoticed. Ids do not count, as two folders may use
    the same ones for different images.
    """
    lengths, others = table.inline_lengths(), other.inline_lengths()
    found = np.zeros(len(table), dtype=np.bool_)
    # Most images differ in length already, so few bytes are read.
    rows = np.flatnonzero((lengths >= 0) & np.isin(lengths, others))
    other_rows = np.flatnonzero((others >= 0) & np.isin(others, lengths))
    if len(rows) and len(other_rows):
        mine, theirs = table.inline_bytes(rows), other.inline_bytes(other_rows)
        # The smaller side goes into the hash table; what both have is then looked up in ours.
        common = theirs.filter(pc.is_in(theirs, mine)) if len(mine) < len(theirs) else theirs
        found[rows] = np.asarray(pc.is_in(mine, common))
    outside, other_outside = np.flatnonzero(lengths < 0), np.flatnonzero(others < 0)
    if len(outside) and len(other_outside):
        paths = table.path_column.take(pa.array(outside))
        other_paths = other.path_column.take(pa.array(other_outside))
        found[outside] = np.asarray(pc.and_(pc.is_in(paths, other_paths.drop_null()), paths.is_valid()))
    return np.flatnonzero(found)


def places_in(table: ImageTable, other: ImageTable) -> IntArray:
    """int64 [n]: where each row of `table` stands in `other`, by id and by image; -1 where it does not.

    An id alone does not tell, as two folders may use the same ones for different images. The image is the
    same as in `overlap`.
    """
    place = pc.index_in(table.id_column, other.id_column.combine_chunks())
    found = np.asarray(pc.fill_null(place, -1)).astype(np.int64)
    named = np.flatnonzero(found >= 0)
    if not len(named):
        return found
    theirs = found[named]
    lengths, others = table.inline_lengths()[named], other.inline_lengths()[theirs]
    paths, other_paths = (
        column.take(pa.array(rows))
        for column, rows in ((table.path_column, named), (other.path_column, theirs))
    )
    outside = (lengths < 0) & (others < 0)
    same = outside & np.asarray(pc.fill_null(pc.equal(paths, other_paths), False))
    inline = np.flatnonzero((lengths >= 0) & (lengths == others))
    if len(inline):
        same[inline] = np.asarray(
            pc.equal(table.inline_bytes(named[inline]), other.inline_bytes(theirs[inline]))
        )
    found[named[~same]] = -1
    return found


def have_relevant(queries: ImageTable, database: ImageTable, *, themselves: bool = False) -> BoolArray:
    """Bool [queries]: whether an image of the database other than the query itself shares a label with it.

    Args:
        queries: with labels.
        database: likewise; queries that are in it are told by `places_in`.
        themselves: whether a query that is in the database counts for itself.
    """
    labels, others = queries.labels, database.labels
    places = np.full(len(queries), -1) if themselves else _places(queries, database)
    inside = places >= 0
    if labels.ndim == 2:
        own = np.zeros_like(labels)
        own[inside] = others[places[inside]]
        return np.asarray((labels & (others.sum(axis=0) > own)).any(axis=1))
    classes, number = np.unique(np.concatenate([labels, others]), return_inverse=True)
    counts = np.bincount(number[len(labels) :], minlength=len(classes))[number[: len(labels)]]
    counts[inside] -= others[places[inside]] == labels[inside]
    return np.asarray(counts > 0)


def _places(queries: ImageTable, database: ImageTable) -> IntArray:
    return np.arange(len(queries)) if queries is database else places_in(queries, database)


def _classes_present(table: ImageTable) -> int:
    labels = table.labels
    return int(labels.any(axis=0).sum()) if labels.ndim == 2 else len(np.unique(labels))


def _words(role: str) -> str:
    return role.replace("_", " ")
