"""From candidates that FAISS finds to exact hits: with indices on the processor in the GPU's place."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import assert_same, draw_codes, draw_images, draw_vectors, write

from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import QueryError
from ray_retrieval.search import Index, build, gpu
from ray_retrieval.search.gpu import GpuSearch
from ray_retrieval.search.scan import Segment, to_words
from ray_retrieval.search.segments import search_segments
from ray_retrieval.search.vectors import VectorSegment, norm_error


class Shaken:
    """An index that rounds distances otherwise, and so puts near ones in another order."""

    def __init__(self, index, size):
        self._index, self._size = index, size

    @property
    def ntotal(self):
        return self._index.ntotal

    def add_c(self, count, pointer):
        self._index.add_c(count, pointer)

    def search_c(self, count, queries, k, distances, rows):
        self._index.search_c(count, queries, k, distances, rows)
        found = faiss.rev_swig_ptr(distances, count * k).reshape(count, k)
        numbers = faiss.rev_swig_ptr(rows, count * k).reshape(count, k)
        found += np.random.default_rng(0).uniform(-1e-7, 1e-7, found.shape).astype(np.float32)
        order = np.argsort(found, axis=1)
        found[:], numbers[:] = np.take_along_axis(found, order, 1), np.take_along_axis(numbers, order, 1)


def flat(form):
    if form.kind is DescriptorKind.CODES:
        return faiss.IndexBinaryFlat(form.size)
    return Shaken(faiss.IndexFlatL2(form.size), form.size)


def drawn(kind, sizes, seed, distinct):
    count, first, segments = sum(sizes), 3, []
    data = draw_codes(count, 16, seed=seed, distinct=distinct) if kind == "codes" else None
    data = data or draw_vectors(count, 6, seed=seed, distinct=distinct)
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        rows = data.data[start : start + size]
        segments.append(
            Segment(to_words(rows, 16), first)
            if kind == "codes"
            else VectorSegment(np.ascontiguousarray(rows), first, norm_error(rows))
        )
        first += size + 2
    return segments, data


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["codes", "vectors"]),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
    distinct=st.sampled_from([1, 3, 40, 900]),
    k=st.sampled_from([1, 5, 40, 400]),
    most=st.sampled_from([64, 2048]),
)
def test_hits_are_those_of_the_exact_search(kind, sizes, seed, distinct, k, most):
    segments, data = drawn(kind, sizes, seed, distinct)
    queries = data.take(np.random.default_rng(seed).integers(0, len(data), 7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "MOST", most)
        patch.setattr(gpu, "_SPARE", 8)
        patch.setattr(gpu, "_QUERIES_AT_ONCE", 4)
        found = GpuSearch(segments, Form.of(data), flat).search(queries, k, threads=1)
    assert_same(found, search_segments(segments, queries, k, threads=1))


def test_what_a_gpu_does_not_search_is_refused(tmp_path):
    for form, message in (
        (Form(DescriptorKind.CODES, 12), "12 bits"),
        (Form(DescriptorKind.LOCAL, 12), "local features"),
    ):
        with pytest.raises(QueryError, match=message):
            GpuSearch([], form)


@pytest.mark.skipif(faiss.get_num_gpus() > 0, reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    build(write(tmp_path / "e", draw_codes(9, 16), draw_images(9)), tmp_path / "index")
    with pytest.raises(QueryError, match=r"FAISS sees no GPU.*without `gpu`"):
        Index.open(tmp_path / "index", gpu=True)
