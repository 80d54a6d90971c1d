"""The approximate search of opened shards, also where rows were removed or a filter leaves some out."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes, Vectors
from ray_retrieval.search.approximate import Structure, search_approximate
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.hits import NO_ROW, Hits, merge, no_hits
from ray_retrieval.search.manifest import Approximate
from ray_retrieval.search.segments import AnySegment, search_segments
from ray_retrieval.search.selection import FEW, FEW_SHARE, Selection, search_gathered, search_selected
from ray_retrieval.search.shard import Shard
from ray_retrieval.search.structure_kinds import opened_structures
from ray_retrieval.storage import Folder

_MORE_CELLS = 4
"""Times as many are looked at for queries that find too few, as long as that is a part of all."""


@dataclass(frozen=True)
class StructureSearch:
    """The approximate search of opened shards.

    Attributes:
        effort: how hard it looks unless told.
        segments: of the shards.
        filled: the structure of each that has one, by its place among them; the others are searched exactly.
    """

    effort: Effort
    segments: list[AnySegment]
    filled: dict[int, Structure]

    @property
    def settings(self) -> frozenset[str]:
        """Names of the fields of an effort that make a difference to what it finds."""
        return frozenset[str]().union(*(structure.settings for structure in self.filled.values()))

    @classmethod
    def open(cls, index: Folder, built: Approximate, shards: "dict[int, Shard]") -> "StructureSearch":
        """The search of some shards; files are mapped into memory where they can be.

        Args:
            index: the index's folder.
            built: what the manifest says of it.
            shards: those that are opened, by their numbers.

        Raises:
            ArtefactError: if a file is missing, damaged or of other descriptors.
        """
        files = [built.files[number] for number in shards]
        opened = list(shards.values())
        return cls(built.effort, [shard.segment for shard in opened], opened_structures(index, opened, files))

    def search(
        self,
        queries: Codes | Vectors,
        k: int,
        effort: Effort | None = None,
        *,
        selection: Selection | None = None,
        filtered: bool = False,
        threads: int,
    ) -> Hits:
        """The `k` nearest rows that it finds for each query, with exact distances, by (distance, row).

        Under a filter each query has `k` hits where so many rows may be hits. Where rows were only removed,
        it is not helped if it would find fewer than `k` with them, too: what is removed elsewhere changes no
        answer.

        Args:
            queries: codes or vectors.
            k: hits per query.
            effort: how hard to look.
            selection: the rows of the shards that may be hits; default all. Where few may, they are compared
                one by one.
            filtered: whether it is of a filter, not just what was not removed.
            threads: to share the work among.
        """
        effort, structures = effort or self.effort, list(self.filled.values())
        if selection is None:
            found = search_approximate(structures, queries.data, k, effort, threads=threads)
            return self._with_others(found, None, queries, k, threads)
        if len(selection) <= max(FEW, int(FEW_SHARE * selection.spans.rows)):
            everywhere = range(len(self.segments))
            return search_gathered(self.segments, everywhere, selection, queries, k, threads=threads)
        found = self._among(selection, queries, k, effort, threads)
        most = min(k, len(selection))
        short = np.flatnonzero(_counts(found) < most)
        if len(short) and not filtered:
            # Those that are short anyway would otherwise be answered in another way once any row is removed.
            unselected = self.search(queries.take(short), most, effort, threads=threads)
            short = short[_counts(unselected) == most]
        if len(short):
            hits = self._looking_harder(selection, queries.take(short), k, effort, threads)
            found.distances[short], found.rows[short] = hits.distances, hits.rows
        return found

    def _among(
        self, selection: Selection, queries: Codes | Vectors, k: int, effort: Effort, threads: int
    ) -> Hits:
        """What is found of the selected rows."""
        allowed = [selection.bits[number] for number in self.filled]
        structures = list(self.filled.values())
        found = search_approximate(structures, queries.data, k, effort, allowed=allowed, threads=threads)
        return self._with_others(found, selection, queries, k, threads)

    def _looking_harder(
        self, selection: Selection, queries: Codes | Vectors, k: int, effort: Effort, threads: int
    ) -> Hits:
        """As `_among`, of queries that find too few: in more cells, and in the end by the exact search."""
        found, short = no_hits(len(queries), k, _dtype_of(queries)), np.arange(len(queries))
        most = min(k, len(selection))
        cells = max((structure.cells for structure in self.filled.values()), default=0)
        nprobe = effort.nprobe * _MORE_CELLS
        # Where all that may be hits are to be found, or most cells are looked at, comparing all is as quick.
        while len(short) and nprobe <= cells // _MORE_CELLS and k < len(selection):
            harder = effort.model_copy(update={"nprobe": nprobe})
            hits = self._among(selection, queries.take(short), k, harder, threads)
            found.distances[short], found.rows[short] = hits.distances, hits.rows
            short = short[_counts(hits) < most]
            nprobe *= _MORE_CELLS
        if len(short):

            def find(some: Codes | Vectors, count: int) -> Hits:
                return search_segments(self.segments, some, count, threads=threads)

            some = queries.take(short)
            hits = search_selected(find, self.segments, selection, some, k, threads=threads)
            found.distances[short], found.rows[short] = hits.distances, hits.rows
        return found

    def _with_others(
        self, found: Hits, selection: Selection | None, queries: Codes | Vectors, k: int, threads: int
    ) -> Hits:
        """Hits of the structures, with those of the shards that have none."""
        others = [number for number in range(len(self.segments)) if number not in self.filled]
        if not others:
            return found
        return merge(
            [found, search_gathered(self.segments, others, selection, queries, k, threads=threads)], k
        )


def _counts(found: Hits) -> npt.NDArray[np.int64]:
    """How many hits each query has."""
    return np.asarray(np.count_nonzero(found.rows != NO_ROW, axis=1), np.int64)


def _dtype_of(queries: Codes | Vectors) -> type[np.int32] | type[np.float32]:
    return np.int32 if isinstance(queries, Codes) else np.float32
