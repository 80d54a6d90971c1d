"""What an index is said to take is what its files take."""

import re

import numpy as np
import pytest
from bare_parts import Bare, build_bare
from search_parts import draw_codes, draw_images, draw_local, draw_vectors, write
from typer.testing import CliRunner

from ray_retrieval.cli import app
from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import RecipeError
from ray_retrieval.search import Index, build
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.planning import descriptor_bytes, known_bytes, plan
from ray_retrieval.search.sources import EmbeddedRows
from ray_retrieval.search.structure_sizes import cells_of_kind, structure_bytes
from ray_retrieval.search.votes import LocalSearchConfig


def sized(index, suffixes):
    """Without what the files are filled from, which no search needs."""
    found = [path for path in index.rglob("*") if path.suffix in suffixes and path.stem != "trained"]
    return sum(path.stat().st_size for path in found)


@pytest.fixture(scope="module")
def vectors():
    return draw_vectors(5000, 24, seed=3)


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQ8", "PQ8x4fs", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ12x4fs", "Pad32,IVF8,PQ8x4fs", "HNSW8"],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_structures_take_what_is_said(tmp_path, vectors, factory, shards):
    config = ApproximateConfig(search=factory, recall_queries=5)
    build_bare(Bare(vectors, step=2000), tmp_path / "index", shards=shards, approximate=config)
    said, real = structure_bytes(factory, len(vectors), 24, shards), sized(tmp_path / "index", {".faiss"})
    assert abs(said.bytes - real) < 0.02 * real + 1024 * shards
    info = Index.open(tmp_path / "index").info()
    assert info["structure_bytes"] == real
    assert info["private_bytes"] <= real
    assert (info["private_bytes"] == real) == ("IVF" in factory and "PQ" in factory)


@pytest.mark.parametrize("bits", [1, 200])
def test_codes_take_whole_words(tmp_path, bits):
    build_bare(Bare(draw_codes(40, bits)), tmp_path / "index", shards=2)
    said = plan(Form(DescriptorKind.CODES, bits), 40, shards=2)
    assert [(kind.kind, kind.private, kind.auto) for kind in said] == [
        ("exact", 0, True),
        ("BIVF2048", 0, False),
    ]
    assert sized(tmp_path / "index", {".bin"}) == said[0].mapped + 2 * 64
    info = Index.open(tmp_path / "index").info()
    assert (info["descriptor_bytes"], info["known_bytes"]) == (said[0].mapped + 2 * 64, 0)
    assert info["searched_bytes_per_row"] == pytest.approx(said[0].bytes_per_row + 2 * 64 / 40)


@pytest.mark.parametrize("bits", [10, 200])
def test_cells_of_codes_take_what_is_said(tmp_path, bits):
    config = ApproximateConfig(search="BIVF8", recall_queries=5)
    build_bare(Bare(draw_codes(900, bits)), tmp_path / "index", shards=2, approximate=config)
    said, real = structure_bytes("BIVF8", 900, bits, 2), sized(tmp_path / "index", {".cells"})
    assert abs(said.bytes - real) < 2 * (64 * 8 * 4 + 128)
    info = Index.open(tmp_path / "index").info()
    assert (info["structure_bytes"], info["private_bytes"]) == (real, 0)


def test_local_features_take_what_is_said(tmp_path):
    sets = draw_local(60, 8, vectors=6, most=40)
    source = write(tmp_path / "e", sets, draw_images(60))
    features = Embeddings.open(source).features
    assert features == len(sets.data)
    said = {kind.kind: kind for kind in plan(Form.of(sets), 60, features=features)}
    assert [name for name, kind in said.items() if kind.auto] == ["exact"]
    for name in ("exact", "global", "votes", "asmk"):
        build(source, tmp_path / name, local=LocalSearchConfig(shortlist=name, recall_queries=3))
        real = sized(tmp_path / name, {".bin", ".faiss", ".asmk"})
        both = said[name].mapped + said[name].private
        # How many features of an image share a word is not known before.
        assert real - 3000 < both < real + (30 * features if name == "asmk" else 3000)


def test_the_shortlist_that_is_asked_for_is_planned(tmp_path):
    form, asked = Form(DescriptorKind.LOCAL, 40, 6), LocalSearchConfig(shortlist="asmk", words=1000)
    said = {kind.kind: kind for kind in plan(form, 100, features=9000, local=asked)}
    assert [name for name, kind in said.items() if kind.auto] == ["asmk"]
    few = LocalSearchConfig(shortlist="asmk", words=10)
    (less,) = (kind for kind in plan(form, 100, features=9000, local=few) if kind.kind == "asmk")
    assert said["asmk"].mapped - less.mapped == 990 * (4 * 40 + 8)
    unknown = LocalSearchConfig(factory="IVF4,PQ10")
    assert [kind.kind for kind in plan(form, 100, features=9000, local=unknown)] == [
        "exact",
        "global",
        "asmk",
    ]
    with pytest.raises(RecipeError, match="no global vectors"):
        plan(Form(DescriptorKind.LOCAL, 40), 100, local=LocalSearchConfig(shortlist="global"))
    source = write(tmp_path / "e", draw_local(30, 8, most=40), draw_images(30))
    for asked_for, mark in (([], "exact .* auto"), (["--search", "votes"], "votes .* asked for")):
        result = CliRunner().invoke(app, ["index", "plan", str(source), *asked_for])
        assert re.search(mark, result.output), result.output
    result = CliRunner().invoke(app, ["index", "plan", str(source), "--search", "IVF4,Flat"])
    assert "'shortlist': input should be 'auto', 'votes'" in str(result.exception)


def test_what_else_is_known_is_estimated(tmp_path):
    source = write(tmp_path / "e", draw_codes(300, 32), draw_images(300, inline=False))
    build(source, tmp_path / "index")
    real = (next((tmp_path / "index").rglob("rows.arrow"))).stat().st_size
    said = known_bytes(EmbeddedRows(Embeddings.open(source)))
    assert 0.5 * real < said < 1.2 * real


def test_what_auto_takes_is_marked_and_memory_is_looked_at():
    form = Form(DescriptorKind.VECTORS, 128)
    assert [kind.kind for kind in plan(form, 1000) if kind.auto] == ["exact"]
    limited = ApproximateConfig(search="auto", memory=3 * 10**9)
    (large,) = [kind for kind in plan(form, 10**8) if kind.auto]
    (small,) = [kind for kind in plan(form, 10**8, config=limited) if kind.auto]
    assert large.kind.endswith("PQ64x4fs")
    assert small.private < 3 * 10**9 < large.private
    assert large.mapped == descriptor_bytes(form, 10**8) == 512 * 10**8
    nothing = ApproximateConfig(search="auto", memory=10)
    assert [kind for kind in plan(form, 10**8, config=nothing) if kind.auto] == []
    for few in (nothing, ApproximateConfig(search="auto", memory=10**6)):
        assert [kind.kind for kind in plan(form, 1000, config=few) if kind.auto] == ["exact"]


def test_rows_to_train_on_do_not_grow_with_all_rows_and_fit_the_memory():
    form = Form(DescriptorKind.VECTORS, 2048)
    planned = [
        next(
            kind
            for kind in plan(form, rows, config=ApproximateConfig(search="auto", memory=memory))
            if kind.auto
        )
        for rows, memory in ((10**7, None), (10**9, None), (10**6, 600 * 10**6))
    ]
    assert [kind.train_rows for kind in planned] == [131_072, 131_072, 600 * 10**6 // (2 * 4 * 2048)]
    assert planned[1].training == 2 * 131_072 * 4 * 2048
    assert planned[2].training <= 600 * 10**6
    assert 39 * cells_of_kind(planned[2].kind) <= planned[2].train_rows


def test_what_is_asked_for_is_planned():
    form = Form(DescriptorKind.VECTORS, 128)
    for search in ("exact", "IVF300,SQ8", "HNSW32"):
        (asked,) = [kind for kind in plan(form, 10**6, config=ApproximateConfig(search=search)) if kind.auto]
        assert asked.kind == search
    less = ApproximateConfig(search="auto", train_rows=5000)
    (asked,) = [kind for kind in plan(form, 10**6, config=less) if kind.auto]
    assert asked.kind == "IVF128,PQ64x4fs"
    unknown = plan(form, 10**6, config=ApproximateConfig(search="NSG32"))
    assert [kind for kind in unknown if kind.auto] == []
    with pytest.raises(RecipeError, match="has no use for it"):
        plan(form, 10, config=ApproximateConfig(search="exact", memory=9))


def test_a_search_that_cannot_be_built_is_not_planned():
    codes, vectors = Form(DescriptorKind.CODES, 64), Form(DescriptorKind.VECTORS, 32)
    with pytest.raises(RecipeError, match="'nope' is no search of codes"):
        plan(codes, 1000, config=ApproximateConfig(search="nope"))
    with pytest.raises(RecipeError, match="'nope'"):
        plan(vectors, 1000, config=ApproximateConfig(search="nope"))
    with pytest.raises(RecipeError, match="2,000 cells, and there are 1,000 rows"):
        plan(codes, 1000, config=ApproximateConfig(search="BIVF2000"))


def test_unknown_structures_are_not_guessed(tmp_path, vectors):
    assert structure_bytes("NSG16", 10, 4) is None
    config = ApproximateConfig(search="IVF4,PQ4", recall_queries=5)
    build_bare(Bare(vectors.take(np.arange(900))), tmp_path / "index", approximate=config)
    assert Index.open(tmp_path / "index").info()["private_bytes"] is None
