"""The index artefact: descriptors of a database in shards, and what is known of each row.

    CURRENT · manifest-000001-….json    see `manifest.py`
    shards/<fingerprint>/…              see `shard.py`
    approximate/<fingerprint>/…         see `structures.py`; missing where the search is exact
    local/<fingerprint>/…               see `shortlist.py`, of local features
    deletes/<fingerprint>.bin           see `deletes.py`; missing where nothing was removed

A row is a number from 0, in the order of the embeddings. Hits are sorted by (distance, row), so an index
of codes or vectors that is searched exactly gives the same hits, bit for bit, however many shards and threads
it has; hits of groups of its shards, merged, are again the same. Rows that were removed keep their numbers
until the index is compacted, and are never hits. `building.build` makes an index, `changes` change it.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_retrieval.descriptors import Codes, Descriptors, Form, Local, Vectors, assembled, concatenate
from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.search.deletes import read_deletes
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.filters import Filter
from ray_retrieval.search.gpu import GpuSearch
from ray_retrieval.search.hits import Hits, check_k
from ray_retrieval.search.images import fetch_image
from ray_retrieval.search.manifest import Manifest, read_current, read_pointer, read_version
from ray_retrieval.search.neighbours import Neighbours
from ray_retrieval.search.rows import ids_as_text
from ray_retrieval.search.segments import search_segments
from ray_retrieval.search.selection import RecentSelections, Selection, Spans, is_among, search_selected
from ray_retrieval.search.shard import Shard, aligned, joined
from ray_retrieval.search.shortlist import ShortlistSearch
from ray_retrieval.search.structure_search import StructureSearch
from ray_retrieval.search.vectors import check_unit_queries
from ray_retrieval.storage import Folder, check_file

_ROW = pa.field("row", pa.int64())
_OTHERS = (pa.field("label", pa.null()), pa.field("path", pa.null()))
"""Columns that every index has, if only null."""
_AT_ONCE = (
    1 << 16
)  # rows that a filter is asked of, at least: each time takes some time, however few they are
_MOST_HITS = 2**31 - 1
"""Of a query: more take 24 GB for each."""


class Index:
    """One version of an index, opened for searching. Make one with `Index.open`.

    Attributes:
        folder: the index's folder.
        manifest: of the version.
        schema: of what is known of its rows; columns of some shards are null in others.
        rows: number of rows that a search can find: those of the opened shards that were not removed.
        shortlist: the search of local features; None of other kinds.
        shards: the opened ones, by their numbers.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        shards: "dict[int, Shard]",
        deleted: npt.NDArray[np.int64],
        threads: int,
        structure: StructureSearch | None,
        shortlist: ShortlistSearch | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shards = shards
        self.shortlist, self._structure = shortlist, structure
        self._gpu: GpuSearch | None = None
        self._shards = list(shards.values())
        self._segments = [shard.segment for shard in self._shards]
        self._threads = threads
        self._spans = Spans(
            np.array([shard.entry.first_row for shard in self._shards], np.int64),
            np.array([shard.entry.rows for shard in self._shards], np.int64),
        )
        self._living = Selection.of(self._spans, deleted)
        self._filtered = RecentSelections()
        self.rows = len(self._living)
        schemas = [shard.rows.schema for shard in self._shards]
        ids = schemas[0].field("id")
        self.schema: pa.Schema = pa.unify_schemas(
            [pa.schema([_ROW, ids, *_OTHERS]), *schemas], promote_options="permissive"
        )

    @classmethod
    def open(
        cls,
        uri: "str | Path | Folder",
        *,
        shards: Sequence[int] | None = None,
        threads: int = 1,
        check: Literal["size", "content"] = "size",
        model: str | None = None,
        version: int | None = None,
        gpu: bool = False,
    ) -> "Index":
        """A version of an index; its files are mapped into memory, not read.

        Args:
            uri: the index directory.
            shards: numbers of the shards to open; all unless given.
            threads: processor threads that a search may use.
            check: compare the files' sizes with the manifest, or their checksums as well, which reads all.
            model: fingerprint of the model that queries are encoded with.
            version: its number; default the current one.
            gpu: copy the codes or vectors to a GPU, where all of them are compared, also of an index that was
                built for an approximate search. The hits are those of the exact search.

        Raises:
            ArtefactError: if there is no index or no such version, a file is missing or damaged, a shard does
                not exist, or the index was made by another model.
            QueryError: if there is no GPU that it can be searched on.
        """
        folder = Folder(uri)
        manifest = read_current(folder) if version is None else read_version(folder, version)
        if model is not None and model != manifest.model:
            raise ArtefactError(
                f"the index was made by model {manifest.model}, the queries are of model {model}",
                where=folder,
                mend="use the model that made the index, or build an index with this one",
            )
        available = range(len(manifest.shards))
        chosen = available if shards is None else sorted(set(shards))
        unknown = [number for number in chosen if number not in available]
        if unknown or not chosen:
            asked = ", ".join(str(number) for number in unknown) or "none"
            raise ArtefactError(
                f"the index has shards 0 to {len(available) - 1}, asked for: {asked}", where=folder
            )
        content = check == "content"
        try:
            opened = {
                number: Shard(folder, manifest.shards[number], manifest.form, content=content)
                for number in chosen
            }
            found = cls.of(folder, manifest, opened, threads=threads, content=content)
        except ArtefactError:
            # Between the looks at `CURRENT` and at its files it may have been replaced, and they pruned.
            if version is None and read_pointer(folder) != manifest.pointer:
                return cls.open(uri, shards=shards, threads=threads, check=check, model=model, gpu=gpu)
            raise
        if gpu:
            found._gpu = GpuSearch(found._segments, manifest.form)
        return found

    @classmethod
    def of(
        cls,
        folder: Folder,
        manifest: Manifest,
        shards: "dict[int, Shard]",
        *,
        threads: int = 1,
        content: bool = False,
    ) -> "Index":
        """A version with shards that are open already.

        Args:
            folder: the index's folder.
            manifest: of the version, which need not be current.
            shards: by their numbers, in ascending order.
            threads: processor threads that a search may use.
            content: compare the checksums of the files beside the shards, not just their sizes.

        Raises:
            ArtefactError: if a file is missing or damaged.
        """
        for number in shards if manifest.beside else ():
            file = manifest.beside[number]
            if file is not None:
                check_file(folder, file.model_dump(), content=content)
        deleted = read_deletes(folder, manifest, content=content)
        structure = None
        if manifest.approximate is not None:
            structure = StructureSearch.open(folder, manifest.approximate, shards)
        shortlist = None
        if manifest.local is not None:
            shortlist = ShortlistSearch.open(
                folder, manifest.local, shards, manifest.shards, images=manifest.rows
            )
        return cls(folder, manifest, shards, deleted, threads, structure, shortlist)

    def __len__(self) -> int:
        return self.rows

    def with_effort(self, effort: Effort) -> "Index":
        """The same version, opened once, whose approximate searches look so hard unless told."""
        found = copy.copy(self)
        if self._structure is not None:
            found._structure = replace(self._structure, effort=effort)
        if self.shortlist is not None:
            config = self.shortlist.config.model_copy(update={"nprobe": effort.nprobe})
            found.shortlist = replace(self.shortlist, config=config)
        return found

    @property
    def version(self) -> int:
        """Number of the opened version; it grows with every change of the index."""
        return self.manifest.number

    @cached_property
    def form(self) -> Form:
        """What it holds of an image."""
        return self.manifest.form

    @property
    def model(self) -> str:
        """Fingerprint of the model that made the index."""
        return self.manifest.model

    @property
    def class_names(self) -> list[str] | None:
        return None if self.manifest.class_names is None else list(self.manifest.class_names)

    @property
    def deleted(self) -> int:
        """Rows of the opened shards that were removed and are still in their files."""
        return self._spans.rows - self.rows

    @property
    def next_row(self) -> int:
        """One more than the greatest number of a row."""
        return self.manifest.next_row

    def living(self, where: "str | Filter | None" = None) -> npt.NDArray[np.int64]:
        """The rows that a search can find, or those that pass a filter: int64, ascending.

        Raises:
            QueryError: if the filter is not one for this index.
        """
        return self.selection(where).chosen()

    def check_filter(self, where: "str | Filter") -> None:
        """Raise QueryError if a filter is not one for this index."""
        asked = Filter.of(where)
        asked.mask(pa.RecordBatch.from_pylist([], schema=self.schema), self.schema, self.class_names)

    def at(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64 [m]: the rows at places, int64 [m] in 0 … `rows` - 1, among those that a search can find."""
        return self._living.at(places)

    def removed(self) -> npt.NDArray[np.int64]:
        """The rows of the opened shards that no search finds any more: int64, ascending."""
        return self._living.dead

    def located(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of rows, int64 [m], the number of the opened shard that holds each, and the place there: int64 [m].

        Raises:
            QueryError: if a row is not in the opened shards, or was removed.
        """
        places, inside = self._locate(rows)
        return np.array(list(self.shards), np.int64)[places], inside

    def search(
        self,
        queries: Descriptors,
        k: int,
        *,
        exact: bool = False,
        effort: Effort | None = None,
        where: "str | Filter | None" = None,
    ) -> Hits:
        """The `k` nearest rows of the opened shards for each query, sorted by (distance, row).

        Distances of codes and vectors are exact in any case. An index that was built for an approximate
        search may miss a near row; how often is in `info`. Of local features the hits are the shortlist that
        the index was built for, see `shortlist.ShortlistSearch.search`: images that have nothing in common
        with a query are no hits.

        Args:
            queries: descriptors of the index's form.
            k: hits per query; where there are fewer, `NO_ROW` fills the places after the last.
            exact: look at every row, or feature, of an index that was built for an approximate search.
            effort: how hard an approximate search looks; default what the index was built with.
            where: which rows may be hits, such as `label in (3, dog)`: see `filters`. The search is that of
                a database of these rows alone; of codes and vectors it has `k` hits where so many rows pass.

        Raises:
            ArtefactError: if the queries are no descriptors, or of another form than the index.
            QueryError: if `k` is no whole number, or < 1, or no array can be so long, a vector of the queries
                is not of length 1, or the filter is not one for this index.
        """
        if Form.of(queries) != self.form:
            raise ArtefactError(
                f"the index holds {self.form}, the queries are {Form.of(queries)}",
                where=self.folder,
                mend="encode the queries with the model that made the index",
            )
        check_k(k)
        if k > _MOST_HITS:
            raise QueryError(
                f"k is the number of hits to return and at most {_MOST_HITS:,}, got {k:,}",
                mend=f"the index has {self.rows:,} rows: ask for no more",
            )
        if isinstance(queries, Vectors):
            check_unit_queries(queries.data)
        selection = self.selection(where) if where is not None or self.deleted else None
        if self.shortlist is not None:
            assert isinstance(queries, Local)
            return self.shortlist.search(
                queries,
                k,
                exact=exact,
                effort=effort,
                selection=selection,
                filtered=where is not None,
                threads=self._threads,
            )
        assert isinstance(queries, Codes | Vectors)
        if self._structure is not None and self._gpu is None and not exact:
            return self._structure.search(
                queries,
                k,
                effort,
                selection=selection,
                filtered=where is not None,
                threads=self._threads,
            )

        def find(some: Codes | Vectors, count: int) -> Hits:
            if self._gpu is not None:
                return self._gpu.search(some, count, threads=self._threads)
            return search_segments(self._segments, some, count, threads=self._threads)

        if selection is None:
            return find(queries, k)
        return search_selected(find, self._segments, selection, queries, k, threads=self._threads)

    @property
    def settings(self) -> frozenset[str]:
        """Names of the fields of `effort` that make a difference to a search; none where all is compared."""
        search = None if self._gpu is not None else self.shortlist or self._structure
        return frozenset() if search is None else search.settings

    @property
    def votes(self) -> bool:
        """Whether what is nearest is known only once the neighbours of all shards are merged."""
        return self.shortlist is not None and self.shortlist.kind in ("votes", "exact")

    def count(self, where: "str | Filter | None" = None) -> int:
        """How many rows of the opened shards a search can find, or pass a filter.

        Raises:
            QueryError: if the filter is not one for this index.
        """
        return len(self.selection(where))

    def nearest_features(
        self, queries: Local, *, where: "str | Filter | None" = None, compare_few: bool = True
    ) -> Neighbours:
        """What the queries' features would vote on, among the opened shards, where the index has `votes`.

        Merged by `neighbours.merge_neighbours` with that of the other shards, and voted on by `votes.cast`,
        it gives the hits of a search of all shards.

        Args:
            queries: sets of the index's form.
            where: as for `search`.
            compare_few: compare the features one by one where only `few_features` of the opened shards may be
                found. Of shards that are merged with others which have more, they must not be.

        Returns:
            The nearest features of each feature of the queries, one query after another.

        Raises:
            QueryError: if the filter is not one for this index.
        """
        assert self.shortlist is not None
        selection = self._voting(where)
        return self.shortlist.nearest(
            queries, selection=selection, compare_few=compare_few, threads=self._threads
        )

    def few_features(self, where: "str | Filter | None" = None) -> int | None:
        """How many features of the opened shards `nearest_features` compares one by one: None if by an index.

        Raises:
            QueryError: if the filter is not one for this index.
        """
        assert self.shortlist is not None
        return self.shortlist.few_features(self._voting(where))

    def _voting(self, where: "str | Filter | None") -> Selection | None:
        """The rows whose features vote: None of an index that nothing was removed from, without a filter."""
        # As with all shards opened: how features are compared may depend on whether there is a selection.
        return self.selection(where) if where is not None or self.manifest.deleted else None

    def selection(self, where: "str | Filter | None" = None) -> Selection:
        """The rows that a search can find, or those that pass a filter.

        Raises:
            QueryError: if the filter is not one for this index.
        """
        if where is None:
            return self._living
        asked = Filter.of(where)
        return self._filtered.of(asked, self._select)

    def _select(self, asked: Filter) -> Selection:
        """The rows that pass a filter; shards of few rows are looked at together."""
        blocks = (block for shard in self._shards for block in shard.rows.blocks())
        masks = (
            asked.mask(some, self.schema, self.class_names) for some in joined(blocks, self.schema, _AT_ONCE)
        )
        return Selection.of(self._spans, self._living.dead, masks)

    def descriptors(self, rows: "npt.NDArray[np.int64] | Sequence[int] | None" = None) -> Descriptors:
        """The descriptors of rows of the opened shards, int64 [m], in the order asked; of all by default.

        Raises:
            QueryError: if a row is not in the opened shards, or was removed.
        """
        if rows is None:
            kept = [np.flatnonzero(self._living.mask(number)) for number in range(len(self._shards))]
            pairs = zip(self._shards, kept, strict=True)
            return concatenate([shard.descriptors(places) for shard, places in pairs])
        wanted = np.asarray(rows, np.int64).reshape(-1)
        numbers, places = self._locate(wanted)
        here = ((number, np.flatnonzero(numbers == number)) for number in np.unique(numbers))
        parts = ((some, self._shards[number].descriptors(places[some])) for number, some in here)
        return assembled(self.form, len(wanted), parts)

    def vectors(self, rows: "npt.NDArray[np.int64] | None" = None) -> npt.NDArray[np.float32]:
        """As `descriptors`, of an index of vectors: float32 [n, dimension].

        Raises:
            ArtefactError: if it holds codes or local features.
        """
        found = self.descriptors(rows)
        if not isinstance(found, Vectors):
            raise ArtefactError(f"it holds {self.form}, vectors are asked for", where=self.folder)
        return found.data

    def records(self, rows: "npt.NDArray[np.int64] | Sequence[int]") -> pa.Table:
        """What is known of some rows: row, id, label, path and the images' further columns.

        Args:
            rows: int64 [m], numbers of rows of the opened shards, in any order; repeats are allowed.

        Returns:
            One row each, in the order asked; ids are text, also where they are numbers.

        Raises:
            QueryError: if a row is not in the opened shards, or was removed.
        """
        wanted = np.asarray(rows, np.int64).reshape(-1)
        numbers, places = self._locate(wanted)
        used = np.unique(numbers)
        tables = [self._shards[number].rows.take(places[numbers == number]) for number in used]
        parts = [aligned(table, self.schema) for table in tables]
        found = ids_as_text(pa.concat_tables(parts or [self.schema.empty_table()]))
        if len(used) < 2:
            return found
        # The rows now stand shard by shard; the inverse of that reordering brings them back.
        return found.take(pa.array(np.argsort(np.argsort(numbers, kind="stable"))))

    def row_of(self, identifier: str | int) -> int | None:
        """Number of the row with that id, or None; the first call sorts the ids, unless they are numbers."""
        identifier = str(identifier)
        for shard in self._shards:
            place = shard.rows.place_of(identifier)
            row = None if place is None else shard.entry.first_row + place
            if row is not None and self._living.allows(np.array([row])).all():
                return row
        return None

    def image_bytes(self, row: int) -> bytes:
        """The image file of a row, from the index or from where its path points.

        Raises:
            QueryError: if the row is not in the opened shards.
            ArtefactError: if the image is not in the index and its file cannot be read.
            StoreError: if its file lies in a store that does not give it.
        """
        numbers, places = self._locate(np.array([row], np.int64))
        shard, place = self._shards[int(numbers[0])], int(places[0])
        held = shard.image(place)
        if held is not None:
            return held
        known = self.records([row])
        identifier, path = (known[name][0].as_py() for name in ("id", "path"))
        if path is None:
            raise ArtefactError(
                f"it does not hold image '{identifier}'", where=self.folder, mend="build it with its images"
            )
        data = fetch_image(path)
        if data is None:
            raise ArtefactError(
                f"the file of image '{identifier}' cannot be read",
                where=path,
                mend="put it back where it was when the images were encoded",
            )
        return data

    def verify(self) -> list[str]:
        """Read everything again and compare it with what was recorded.

        Returns:
            What was checked, one line each.

        Raises:
            ArtefactError: naming the first file that is missing, damaged or inconsistent.
        """
        from ray_retrieval.search.checking import check

        return check(self)

    def info(self) -> dict[str, Any]:
        """What the index is, as plain values."""
        from ray_retrieval.search.checking import describe

        return describe(self)

    def _locate(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where each row lies among the opened shards, and its place there."""
        numbers, places, here = self._spans.place(rows)
        removed = is_among(rows, self._living.dead)
        for wrong, why in ((~here, "no row {} in the opened shards"), (removed, "row {} was removed")):
            if wrong.any():
                raise QueryError(why.format(rows[wrong][0]), where=self.folder, status=404)
        return numbers, places
