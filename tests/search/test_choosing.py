"""Which search `auto` takes, and that it says why."""

import faiss
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.config import validate
from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import RecipeError
from ray_retrieval.recipe import IndexConfig
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.cells import cells_in
from ray_retrieval.search.choosing import (
    EXACT_CODES,
    EXACT_VECTORS,
    choose,
    choose_for_codes,
    choose_for_vectors,
)
from ray_retrieval.search.structure_sizes import structure_bytes

CODES, VECTORS = Form(DescriptorKind.CODES, 64), Form(DescriptorKind.VECTORS, 128)


def test_a_small_database_is_searched_exactly():
    assert choose_for_vectors(EXACT_VECTORS, 128).factory is None
    assert "200,000" in choose_for_vectors(EXACT_VECTORS, 128).why
    assert choose_for_codes(EXACT_CODES, 64).factory is None
    assert "100,000,000" in choose_for_codes(EXACT_CODES, 64).why


def test_choices_by_size_and_memory():
    choose = choose_for_vectors
    assert choose(1_000_000, 128).factory == "IVF1024,PQ64x4fs"
    assert choose(1_000_000, 128, 41_100_000).factory == "IVF1024,PQ64x4fs"
    assert choose(1_000_000, 128, 40_000_000).factory == "IVF1024,PQ32x4fs"
    assert choose(1_000_000, 128, 20_000_000).factory == "IVF1024,PQ16x4fs"
    assert choose(1_000_000, 127).factory == "Pad128,IVF1024,PQ64x4fs"
    assert choose(1_000_000, 128, train_rows=5000).factory == "IVF128,PQ64x4fs"
    with pytest.raises(RecipeError, match="allow more memory"):
        choose(1_000_000, 128, 1_000_000)


def test_each_shard_has_cells_of_its_own():
    memory = 45_000_000
    assert choose_for_vectors(10**6, 128, memory).factory == "IVF1024,PQ64x4fs"
    chosen = choose_for_vectors(10**6, 128, memory, shards=20).factory
    assert chosen == "IVF1024,PQ32x4fs"
    assert structure_bytes(chosen, 10**6, 128, 20).bytes <= memory
    with pytest.raises(RecipeError, match="in 64 shards takes at least"):
        choose_for_vectors(10**6, 128, memory, shards=64)
    taken = structure_bytes("BIVF2048", 10**9, 64).bytes
    assert choose_for_codes(10**9, 64, taken).factory == "BIVF2048"
    assert choose_for_codes(10**9, 64, taken, shards=100).factory is None
    auto = ApproximateConfig(search="auto", memory=memory)
    assert choose(VECTORS, 10**6, auto, 20).factory == chosen


@pytest.mark.parametrize(
    ("search", "setting"),
    [
        ("exact", {"nprobe": 3}),
        ("exact", {"ef_search": 3}),
        ("exact", {"k_factor": 3}),
        ("exact", {"recall_target": 0.9}),
        ("exact", {"memory": 1}),
        ("BIVF64", {"memory": 1}),
    ],
)
def test_what_a_search_has_no_use_for_is_refused(search, setting):
    with pytest.raises(RecipeError, match="has no use for it") as caught:
        choose(CODES, 10, ApproximateConfig(search=search, **setting))
    assert caught.value.where in setting
    with pytest.raises(RecipeError, match=next(iter(setting))):
        validate(IndexConfig, {"search": search, **setting})


def test_choices_for_codes_by_size_and_memory():
    assert choose_for_codes(10**9, 64).factory == "BIVF2048"
    assert choose_for_codes(10**9, 64, train_rows=10**7).factory == "BIVF32768"
    assert "12 bytes a row" in choose_for_codes(10**9, 64).why
    exact = choose_for_codes(10**9, 64, 8 << 30)
    assert exact.factory is None
    assert "allowed are 8,589,934,592" in exact.why


def test_what_is_asked_for_is_taken():
    for search, factory in (("exact", None), ("IVF4,Flat", "IVF4,Flat")):
        assert choose(VECTORS, 10**6, ApproximateConfig(search=search)) == (factory, "asked for")
    auto = ApproximateConfig(search="auto")
    assert choose(VECTORS, 10**6, auto).factory == "IVF1024,PQ64x4fs"
    assert choose(CODES, 10**6, auto).factory is None
    assert choose(CODES, 10**9, auto).factory == "BIVF2048"
    everything = ApproximateConfig(search="auto", recall_target=1)
    assert choose(VECTORS, 10**6, everything) == (None, "only the exact search finds all that is near")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(EXACT_VECTORS + 1, 10**8),
    dimension=st.integers(1, 300),
    width=st.sampled_from([None, 1, 2, 4]),
    train_rows=st.integers(1, 10**6),
)
def test_every_choice_can_be_built(rows, dimension, width, train_rows):
    memory = None if width is None else rows * (dimension // width + 24) + 10**8
    choice = choose_for_vectors(rows, dimension, memory, train_rows=train_rows)
    index = faiss.index_factory(dimension, choice.factory, faiss.METRIC_L2)
    cells = faiss.extract_index_ivf(index).nlist
    assert cells == 1 or 39 * cells <= train_rows
    cells = cells_in(choose_for_codes(rows + EXACT_CODES, 8 * dimension, train_rows=train_rows).factory)
    assert cells == 1 or 39 * cells <= train_rows
