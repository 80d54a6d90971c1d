"""Exact search on a GPU: FAISS compares all rows there, and what it finds is measured and ordered here.

A GPU rounds distances in ways of its own and keeps no order among equal ones. So more candidates are fetched
than hits are asked for, and their distances are those of `search_segments`. The hits are certain where the
last candidate is farther than the last hit by more than rounding can account for; queries where it is not,
because many rows are equally far, are searched on the processor. So the hits are bit for bit the same.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import faiss as untyped_faiss
import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes, Form, Local, Vectors
from ray_retrieval.errors import QueryError
from ray_retrieval.search.hits import NO_ROW, Hits, merge, no_hits
from ray_retrieval.search.scan import Segment
from ray_retrieval.search.segments import AnySegment, search_segments
from ray_retrieval.search.vectors import VectorSegment, check_query_vectors, distances_to

faiss: Any = untyped_faiss  # Its own types leave out half of what is there.

MOST = 2048
"""Candidates of one search, which is what FAISS's kernels can select."""
_SPARE = 64
_QUERIES_AT_ONCE = 1024
_ROWS_AT_ONCE = 1 << 18
_UNIT_ROUNDOFF = 2.0**-24  # of float32
_MEND = "search without `gpu`"

Flat = Callable[[Form], Any]
"""Makes an empty index of FAISS that compares all rows of a form."""


class GpuSearch:
    """The exact search of segments that lie on a GPU as well.

    Args:
        segments: of codes or vectors, in ascending order of rows.
        form: of their rows.
        flat: makes the index of a segment; default on the first GPU.

    Raises:
        QueryError: if there is no GPU, it has too little memory, or it does not search such descriptors.
    """

    def __init__(self, segments: Sequence[AnySegment], form: Form, flat: Flat | None = None) -> None:
        self._segments, self._form = list(segments), form
        self._flat = flat or _on_gpu(form)
        self._lock = threading.Lock()  # FAISS's indices on a GPU take one search at a time
        self._indices = [self._filled(segment) for segment in self._segments]

    def search(self, queries: Codes | Vectors, k: int, *, threads: int) -> Hits:
        """As `search_segments`, with the same hits.

        Args:
            queries: of the form.
            k: hits per query; more than `MOST` are searched for on the processor.
            threads: for what is done there.
        """
        if isinstance(queries, Vectors):
            check_query_vectors(queries.data, self._form.size)
        if not self._segments or len(queries) == 0 or k > MOST:
            return search_segments(self._segments, queries, k, threads=threads)
        found = no_hits(len(queries), k, np.int32 if isinstance(queries, Codes) else np.float32)
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            places = np.arange(start, min(start + _QUERIES_AT_ONCE, len(queries)))
            some = queries.take(places)
            pairs = zip(self._segments, self._indices, strict=True)
            hits = merge([self._nearest(*pair, some, k, threads) for pair in pairs], k)
            found.distances[places], found.rows[places] = hits.distances, hits.rows
        return found

    def _nearest(
        self, segment: AnySegment, index: Any, queries: Codes | Vectors, k: int, threads: int
    ) -> Hits:
        """The nearest rows of one segment."""
        found = no_hits(len(queries), k, np.int32 if isinstance(queries, Codes) else np.float32)
        left = np.arange(len(queries))
        for count in dict.fromkeys(min(most, MOST, index.ntotal) for most in (2 * k + _SPARE, MOST)):
            if len(left):
                hits, certain = self._candidates(segment, index, queries.take(left), k, count)
                found.distances[left], found.rows[left] = hits.distances, hits.rows
                left = left[~certain]
        if len(left):
            hits = search_segments([segment], queries.take(left), k, threads=threads)
            found.distances[left], found.rows[left] = hits.distances, hits.rows
        return found

    def _candidates(
        self, segment: AnySegment, index: Any, queries: Codes | Vectors, k: int, count: int
    ) -> tuple[Hits, npt.NDArray[np.bool_]]:
        """The nearest of `count` candidates, and for which queries they are those of all rows."""
        raw = no_hits(len(queries), count, np.int32 if isinstance(queries, Codes) else np.float32)
        data: npt.NDArray[Any] = np.ascontiguousarray(queries.data)
        pointers = [faiss.swig_ptr(array) for array in (data, raw.distances, raw.rows)]
        with self._lock:
            # Past `search`, which other packages replace.
            index.search_c(len(data), pointers[0], count, *pointers[1:])
        exact, slack = raw.distances, np.zeros(len(data))
        if isinstance(queries, Vectors):
            assert isinstance(segment, VectorSegment)
            exact = distances_to(segment.vectors, data, raw.rows)
            slack = _rounding(data, segment)
        rows = np.where(raw.rows == NO_ROW, NO_ROW, raw.rows + _first_row(segment))
        hits = merge([Hits(exact, rows)], k)
        last = hits.distances[:, min(k, count) - 1].astype(np.float64)
        certain = raw.distances[:, -1].astype(np.float64) - slack > last
        return hits, certain | (count == index.ntotal)

    def _filled(self, segment: AnySegment) -> Any:
        """A segment's rows in an index."""
        try:
            index = self._flat(self._form)
            for start in range(0, len(_rows(segment)), _ROWS_AT_ONCE):
                some = _rows(segment)[start : start + _ROWS_AT_ONCE]
                if isinstance(segment, Segment):
                    some = np.ascontiguousarray(some).view(np.uint8)[:, : self._form.size // 8]
                some = np.ascontiguousarray(some)
                index.add_c(len(some), faiss.swig_ptr(some))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-120:]
            raise QueryError(f"the GPU does not take the index: {reason}", mend=_MEND) from None
        return index


def _rounding(queries: npt.NDArray[np.float32], segment: VectorSegment) -> npt.NDArray[np.float64]:
    """float64 [q]: at most so much does a squared distance change where float32 is rounded in any order.

    Reference: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1: γ_n is about n u,
    here of |q|² + |x|² − 2 q·x; twice as much to be sure.
    """
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1) + np.sqrt(1 + segment.norm_error)
    return np.asarray(2 * _UNIT_ROUNDOFF * (queries.shape[1] + 8) * lengths**2)


def _rows(segment: AnySegment) -> npt.NDArray[Any]:
    assert isinstance(segment, Segment | VectorSegment)
    return segment.words if isinstance(segment, Segment) else segment.vectors


def _first_row(segment: AnySegment) -> int:
    assert isinstance(segment, Segment | VectorSegment)
    return segment.first_row


def _on_gpu(form: Form) -> Flat:
    """Indices on the first GPU."""
    if isinstance(form.zeros(0), Local):
        raise QueryError("local features are not searched on a GPU", mend=_MEND)
    if isinstance(form.zeros(0), Codes) and form.size % 8:
        raise QueryError(
            f"a GPU searches codes of whole bytes, these have {form.size} bits",
            mend=_MEND,
        )
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise QueryError("FAISS sees no GPU here", mend=f"{_MEND}, or install faiss-gpu beside a CUDA driver")
    resources = faiss.StandardGpuResources()

    def flat(form: Form) -> Any:
        kind = faiss.GpuIndexBinaryFlat if isinstance(form.zeros(0), Codes) else faiss.GpuIndexFlatL2
        return kind(resources, form.size)

    return flat
