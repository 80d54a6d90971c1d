"""A search on a GPU has the hits of the exact search, bit for bit."""

import faiss
import numpy as np
import pytest
from bare_parts import Bare, build_bare
from search_parts import assert_same, draw_codes, draw_vectors

from ray_retrieval.search import Index, remove
from ray_retrieval.search.approximate import ApproximateConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0, reason="FAISS sees no GPU"
    ),
]

DRAWN = {
    "codes": lambda count, seed: draw_codes(count, 64, seed=seed, distinct=max(1, count // 2)),
    "vectors": lambda count, seed: draw_vectors(count, 96, seed=seed, distinct=max(1, count // 2)),
}


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("k", [1, 10, 2100])
def test_hits_are_those_of_the_processor(tmp_path, kind, k):
    config = ApproximateConfig(search="IVF16,SQ8" if kind == "vectors" else "exact", recall_queries=5)
    build_bare(Bare(DRAWN[kind](30_000, 1), step=9000), tmp_path, shards=3, approximate=config)
    remove(tmp_path, [str(row) for row in range(0, 30_000, 7)])
    queries = DRAWN[kind](200, 2)
    on_gpu, here = Index.open(tmp_path, gpu=True), Index.open(tmp_path, threads=2)
    for where in (None, "id < 9000", "id < 40"):
        assert_same(on_gpu.search(queries, k, where=where), here.search(queries, k, where=where, exact=True))
    stored = here.descriptors(np.array([1, 29_999]))
    assert on_gpu.search(stored, 1).distances.tolist() == [[0], [0]]
