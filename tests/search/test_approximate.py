"""Approximate search: exact distances of FAISS's candidates, for many kinds of index."""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
from search_parts import assert_same

from ray_retrieval.config import validate
from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import ArtefactError, MetricError, QueryError, RecipeError
from ray_retrieval.search import approximate, structures
from ray_retrieval.search.approximate import (
    ApproximateConfig,
    ApproximateSegment,
    recall,
    search_approximate,
)
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.faiss_index import candidates, fill, innermost, train, untrained
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.vectors import VectorSegment, norm_error, search_vectors

KINDS = [
    "Flat",
    "SQ8",
    "PQ12x4fs",
    "IVF8,Flat",
    "IVF8,SQ8",
    "IVF8,PQ12x4fs",
    "IVF8,PQ12x4",
    "IVF8_HNSW8,Flat",
    "HNSW16",
    "HNSW16,SQ8",
    "Pad32,IVF8,PQ16x4fs",
    "PCAR16,IVF8,SQ8",
    "IVF8,PQ12x4fs,RFlat",
    "IVF8,PQ12x4fs,Refine(SQ8)",
    "IVF8,RaBitQ",
    "LSH",
]
EVERYTHING = Effort(nprobe=1000, ef_search=4000, k_factor=1000)


def clustered(count, dimension, *, seed=0):
    """Unit vectors around 20 centres."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((20, dimension))
    drawn = centres[generator.integers(0, 20, count)] + 0.7 * generator.standard_normal((count, dimension))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def exact_segments(vectors, shards=1):
    cuts = [len(vectors) * number // shards for number in range(shards + 1)]
    return [VectorSegment(vectors[a:b], a, norm_error(vectors[a:b])) for a, b in itertools.pairwise(cuts)]


def built(folder, factory, vectors, *, shards=1):
    trained = train(factory, vectors[:1000], seed=0)
    opened = []
    for number, segment in enumerate(exact_segments(vectors, shards)):
        path = folder / f"{number}.faiss"
        with path.open("wb") as stream:
            fill(trained, segment.vectors, stream.write)
        opened.append(ApproximateSegment(path, segment))
    return opened


def packed(mask):
    return np.packbits(mask, bitorder="little")


@pytest.mark.parametrize("factory", KINDS)
def test_looking_at_everything_is_the_exact_search(tmp_path, factory):
    vectors, queries = clustered(1500, 24), clustered(70, 24, seed=1)
    vectors[100:110] = vectors[:10]
    expected = search_vectors(exact_segments(vectors), queries, 10)
    for shards in (1, 3):
        segments = built(tmp_path, factory, vectors, shards=shards)
        assert_same(search_approximate(segments, queries, 10, EVERYTHING), expected)


@pytest.mark.parametrize("factory", KINDS)
def test_distances_are_exact_and_most_hits_are_found(tmp_path, factory):
    vectors, queries = clustered(1500, 24), clustered(70, 24, seed=1)
    exact = search_vectors(exact_segments(vectors), queries, 1500)
    found = search_approximate(built(tmp_path, factory, vectors), queries, 10, Effort(nprobe=6))
    places = np.argsort(exact.rows, axis=1)
    of_rows = np.take_along_axis(exact.distances, places, axis=1)
    np.testing.assert_array_equal(found.distances, np.take_along_axis(of_rows, found.rows, axis=1))
    order = np.lexsort((found.rows, found.distances), axis=1)
    np.testing.assert_array_equal(order, np.broadcast_to(np.arange(10), order.shape))
    assert recall(Hits(exact.distances[:, :10], exact.rows[:, :10]), found) > 0.8


def test_more_effort_finds_more(tmp_path):
    vectors, queries = clustered(3000, 24), clustered(100, 24, seed=1)
    exact = search_vectors(exact_segments(vectors), queries, 10)
    segments = built(tmp_path, "IVF25,PQ6x4fs", vectors)
    efforts = [Effort(nprobe=1, k_factor=1), Effort(nprobe=5, k_factor=4), Effort(nprobe=25, k_factor=64)]
    found = [recall(exact, search_approximate(segments, queries, 10, effort)) for effort in efforts]
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.99


def test_the_effort_of_one_search_does_not_reach_another(tmp_path):
    vectors, queries = clustered(3000, 24), clustered(60, 24, seed=1)
    segments = built(tmp_path, "IVF25,SQ8", vectors, shards=2)
    efforts = [Effort(nprobe=1), Effort(nprobe=25, k_factor=30)] * 10
    expected = [search_approximate(segments, queries, 10, effort) for effort in efforts[:2]]
    assert not np.array_equal(expected[0].rows, expected[1].rows)
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda effort: search_approximate(segments, queries, 10, effort, threads=3), efforts)
        )
    for number, hits in enumerate(found):
        assert_same(hits, expected[number % 2])


def test_faiss_with_its_search_replaced_for_tensors_does(tmp_path):
    """As after an import of pytorch-metric-learning."""
    code = (
        "import sys, faiss.contrib.torch_utils\n"
        "from pathlib import Path\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "import test_approximate as tests\n"
        "tests.test_looking_at_everything_is_the_exact_search(Path(sys.argv[1]), 'IVF8,SQ8')\n"
        "import test_asmk\n"
        "test_asmk.test_a_codebook_has_the_centres_of_clusters()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_threads_of_faiss_are_given_back(tmp_path):
    vectors = clustered(300, 24)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        search_approximate(built(tmp_path, "SQ8", vectors), vectors[:5], 3, Effort())
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("factory", ["IVF8,PQ12x4fs", "HNSW16,SQ8", "PCAR16,IVF8,SQ8"])
def test_a_build_repeats_byte_for_byte(tmp_path, factory):
    vectors = clustered(1500, 24)
    files = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        built(tmp_path / folder, factory, vectors)
        files.append((tmp_path / folder / "0.faiss").read_bytes())
    assert files[0] == files[1]


def test_products_are_not_ordered_for_a_search_by_hamming_distance():
    for factory in ("PQ4", "IVF4,PQ4", "OPQ4,IVF4,PQ4,RFlat"):
        assert not innermost(untrained(factory, 8, 256)).do_polysemous_training


def test_the_seed_counts():
    vectors = clustered(1500, 24)
    assert train("IVF8,Flat", vectors, seed=0) == train("IVF8,Flat", vectors, seed=0)
    assert train("IVF8,Flat", vectors, seed=0) != train("IVF8,Flat", vectors, seed=1)


def test_fewer_rows_than_hits(tmp_path):
    vectors = clustered(300, 24)
    trained = train("IVF4,SQ8", vectors, seed=0)
    for count in (0, 3):
        path = tmp_path / f"{count}.faiss"
        with path.open("wb") as stream:
            fill(trained, vectors[:count], stream.write)
        segment = ApproximateSegment(path, VectorSegment(vectors[:count], 50, 1e-6))
        assert len(segment) == count
        found = segment.search(vectors[:2], 5, EVERYTHING)
        assert found.rows.shape == (2, 5)
        assert (found.rows[:, :count] >= 50).all()
        assert (found.rows[:, count:] == NO_ROW).all()
        assert np.isinf(found.distances[:, count:]).all()
    assert search_approximate([], vectors[:2], 5, Effort()).rows.tolist() == [[NO_ROW] * 5] * 2
    assert search_approximate([segment], vectors[:0], 5, Effort()).rows.shape == (0, 5)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("Foo", "could not parse index string Foo"),
        ("PQ7x4", "multiple of the number of subquantizers"),
        ("IVF0,Flat", "'IVF0,Flat'"),
        ("IVF400,Flat", "400 cells, and there are 300 rows"),
        ("IDMap,Flat", "leave out what maps their ids"),
        ("IDMap2,SQ8", "leave out what maps their ids"),
        ("PQ12", "'PQ12'"),
        ("BIVF8", "could not parse index string BIVF8"),
        ("HNSW0", "at least 2 links"),
        ("HNSW1,SQ8", "at least 2 links"),
        ("IVF4_HNSW01,Flat", "at least 2 links"),
    ],
)
def test_strings_that_cannot_be_built_are_refused(factory, reason):
    with pytest.raises(RecipeError, match="'" + factory) as caught:
        train(factory, clustered(200 if factory == "PQ12" else 300, 24), seed=0)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.mend


@pytest.mark.parametrize(
    ("factory", "names"),
    [
        ("HNSW8", {"ef_search", "k_factor"}),
        ("HNSW8_SQ8", {"ef_search", "k_factor"}),
        ("IVF4,Flat", {"nprobe"}),
        ("IVF4,SQ8", {"nprobe", "k_factor"}),
        ("IVF4_HNSW8,Flat", {"nprobe", "ef_search"}),
        ("PCAR4,IVF4,Flat", {"nprobe", "k_factor"}),
        ("IVF4,PQ4x4fs,RFlat", {"nprobe", "k_factor"}),
        ("SQ8", {"k_factor"}),
        ("Flat", set()),
    ],
)
def test_what_is_set_in_vain_is_refused_and_what_counts_is_not(tmp_path, factory, names):
    form = Form(DescriptorKind.VECTORS, 24)
    (opened,) = built(tmp_path, factory, clustered(300, 24))
    assert opened.settings == names
    for name in Effort.model_fields:
        config = ApproximateConfig.model_validate({"search": factory, name: 3})
        if name in names:
            assert structures.chosen_search(form, 300, 1, config).factory == factory
            continue
        with pytest.raises(RecipeError, match=f"{name}: search '{factory}' has no use for it"):
            structures.chosen_search(form, 300, 1, config)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    vectors = clustered(300, 24)
    (opened,) = built(tmp_path, "SQ8", vectors)
    path = tmp_path / "0.faiss"
    with pytest.raises(ArtefactError, match="300 vectors of 24 dimensions"):
        ApproximateSegment(path, VectorSegment(vectors[:10], 0, 1e-6))
    with pytest.raises(ArtefactError, match="the queries 3"):
        opened.search(np.eye(3, dtype=np.float32), 1, Effort())
    with pytest.raises(QueryError, match="got 0"):
        opened.search(vectors, 0, Effort())
    with pytest.raises(QueryError, match="query 0"):
        opened.search(np.full((1, 24), np.nan, np.float32), 1, Effort())
    damaged = tmp_path / "damaged.faiss"
    damaged.write_bytes(b"nothing of the kind")
    (tmp_path / "cut.faiss").write_bytes(path.read_bytes()[:-1000])
    for wrong in (damaged, tmp_path / "cut.faiss", tmp_path / "missing.faiss"):
        with pytest.raises(ArtefactError, match="build the index again") as caught:
            ApproximateSegment(wrong, VectorSegment(vectors, 0, 1e-6))
        assert "\n" not in str(caught.value)


def test_recall_by_hand():
    exact = Hits(np.array([[0, 1, 2], [0, 1, np.inf]], np.float32), np.array([[5, 6, 7], [1, 2, NO_ROW]]))
    assert recall(exact, exact) == 1
    # The second hit of the first query is missing, and row 8 stands at the distance of row 7.
    found = Hits(np.array([[0, 2, 3], [1, 4, np.inf]], np.float32), np.array([[5, 8, 9], [2, 3, NO_ROW]]))
    assert recall(exact, found) == 3 / 5
    assert recall(exact, Hits(found.distances + 9, found.rows)) == 0
    for wrong in (found.take([0]), Hits(found.distances[:, :2], found.rows[:, :2])):
        with pytest.raises(MetricError, match="recall needs hits"):
            recall(exact, wrong)
    with pytest.raises(MetricError, match="nothing to measure"):
        recall(exact.take([]), exact.take([]))


def test_configurations():
    config = validate(ApproximateConfig, {"search": " IVF16,Flat ", "memory": "2 GiB"})
    assert (config.search, config.memory, config.effort.nprobe) == ("IVF16,Flat", 2 << 30, 64)
    assert ApproximateConfig().search == "exact"
    with pytest.raises(RecipeError, match="factory string"):
        validate(ApproximateConfig, {"search": ""})
    with pytest.raises(RecipeError, match="nprobe"):
        validate(ApproximateConfig, {"nprobe": 0})


@pytest.mark.parametrize("factory", [kind for kind in KINDS if kind != "IVF8,PQ12x4"])  # that one is slow
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_only_rows_of_a_mask_are_hits(tmp_path, factory, share):
    """Kinds that FAISS asks for some rows only, and the others, by more candidates."""
    vectors, queries = clustered(1500, 24), clustered(70, 24, seed=1)
    kept = np.random.default_rng(3).random(1500) < share
    alone = search_vectors([VectorSegment(vectors[kept], 0, 1e-6)], queries, 10)
    rows = np.flatnonzero(kept)[alone.rows]
    expected = Hits(alone.distances, rows)
    for shards in (1, 3):
        segments = built(tmp_path, factory, vectors, shards=shards)
        cuts = np.cumsum([len(segment) for segment in segments])[:-1]
        allowed = [packed(mask) for mask in np.split(kept, cuts)]
        found = search_approximate(segments, queries, 10, EVERYTHING, allowed=allowed, threads=2)
        assert np.isin(found.rows, [*np.flatnonzero(kept), NO_ROW]).all()
        assert recall(expected, found) > (0.85 if factory.startswith("HNSW") and share < 0.1 else 0.999)
        everything = [packed(np.ones(len(segment), bool)) for segment in segments]
        assert_same(
            search_approximate(segments, queries, 10, Effort(nprobe=2), allowed=everything),
            search_approximate(segments, queries, 10, Effort(nprobe=2)),
        )
        nothing = [packed(np.zeros(len(segment), bool)) for segment in segments]
        found = search_approximate(segments, queries[:2], 10, EVERYTHING, allowed=nothing)
        assert (found.rows == NO_ROW).all()


@pytest.mark.parametrize("factory", ["IVF8,RQ2x4", "IVF8,PQ8+8", "IVF8,ITQ8,SH"])
def test_cells_of_which_faiss_cannot_be_asked_for_some_rows(tmp_path, factory):
    vectors, queries = clustered(1500, 24), clustered(5, 24, seed=1)
    kept = np.arange(1500) % 2 == 0
    (segment,) = built(tmp_path, factory, vectors)
    alone = search_vectors([VectorSegment(vectors[kept], 0, 1e-6)], queries, 10)
    found = segment.search(queries, 10, EVERYTHING, packed(kept))
    np.testing.assert_array_equal(found.rows, np.flatnonzero(kept)[alone.rows])


def test_a_row_is_found_also_where_an_equal_one_may_not_be(tmp_path):
    some = clustered(500, 24)
    vectors, kept = np.concatenate([some, some]), np.arange(1000) >= 250
    for factory in ("IVF8,Flat", "IVF8,FlatDedup"):
        (segment,) = built(tmp_path, factory, vectors)
        found = segment.search(some[:20], 1, EVERYTHING, packed(kept))
        assert found.rows[:, 0].tolist() == list(range(500, 520))


def test_candidates_do_not_grow_with_what_a_mask_leaves_out(tmp_path, monkeypatch):
    vectors, queries = clustered(1500, 24), clustered(5, 24, seed=1)
    asked = []
    monkeypatch.setattr(
        approximate, "candidates", lambda *given: asked.append(given[2]) or candidates(*given)
    )
    mask = packed(np.arange(1500) % 30 == 0)
    for factory, count in (("IVF8,PQ12x4fs", 20), ("PQ12x4fs", 600)):
        asked.clear()
        (segment,) = built(tmp_path, factory, vectors)
        segment.search(queries, 5, Effort(k_factor=4), mask)
        assert asked == [count]
    monkeypatch.setattr(approximate, "_MOST_CANDIDATES", 100)
    segment.search(queries, 5, Effort(k_factor=4), mask)
    assert asked[-1] == 100


def test_what_a_kind_leaves_to_be_chosen(tmp_path):
    vectors = clustered(1500, 24)
    for factory, expected in {
        "IVF8,PQ12x4fs": (8, False, True),
        "IVF8,Flat": (8, False, False),
        "Pad32,IVF8,PQ16x4fs": (8, False, True),
        "IVF8_HNSW8,Flat": (8, False, False),
        "HNSW16": (0, True, False),
        "HNSW16,SQ8": (0, True, True),
        "SQ8": (0, False, True),
    }.items():
        (segment,) = built(tmp_path, factory, vectors)
        assert (segment.cells, segment.graph, segment.compares) == expected
        least, most = (segment.cost(effort, 10) for effort in (Effort(nprobe=1, ef_search=16), EVERYTHING))
        assert 0 < least < most
        assert segment.cost(EVERYTHING, 10) < 1e9
