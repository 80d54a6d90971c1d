"""Embeddings against a protocol: which numbers come out, and what does not count for what."""

import statistics
from dataclasses import replace

import numpy as np
import pytest
from samples import coloured_benchmark, coloured_table
from search_parts import draw_vectors, write

from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.evaluate import EvaluateConfig, evaluate
from ray_retrieval.metrics import retrieval
from ray_retrieval.search.embeddings import Embeddings


def encoded(folder, table, vectors, **options):
    """Embeddings of a table with given vectors."""
    return Embeddings.open(write(folder, vectors, table.table, **options))


def of_itself(table, **settings):
    """A benchmark whose queries are its database."""
    return replace(
        coloured_benchmark(12), queries=table, database=table, queries_in_database=True, **settings
    )


def values(found):
    return {metric["name"]: metric["value"] for metric in found["test"]}


def test_queries_that_are_the_database_do_not_find_themselves(tmp_path):
    table, vectors = coloured_table(30), draw_vectors(30, 6)
    made = encoded(tmp_path, table, vectors)
    found = evaluate(made, made, EvaluateConfig(at=(1, 3)), of_itself(table))
    expected = retrieval.evaluate(vectors.data, table.labels, ks=(1, 3))
    assert values(found) == {name: metric.value for name, metric in expected.items()}
    assert found["pr_curve"] is None
    assert "does not count" in found["test"][0]["policy"]


def test_ids_tell_apart_only_where_queries_are_rows_of_the_database(tmp_path):
    """Two folders may call different images the same."""
    queries, database = coloured_table(9, seed=1, prefix="a"), coloured_table(30, seed=2, prefix="a")
    asked, rows = draw_vectors(9, 6, seed=1), draw_vectors(30, 6, seed=2)
    folders = encoded(tmp_path / "q", queries, asked), encoded(tmp_path / "d", database, rows)
    benchmark = replace(coloured_benchmark(12), queries=queries, database=database)
    apart = evaluate(*folders, EvaluateConfig(), benchmark)
    expected = retrieval.evaluate(asked.data, queries.labels, rows.data, database.labels)
    assert values(apart)["map"] == expected["map"].value
    inside = evaluate(*folders, EvaluateConfig(), replace(benchmark, queries_in_database=True))
    expected = retrieval.evaluate(
        asked.data,
        queries.labels,
        rows.data,
        database.labels,
        query_ids=queries.ids,
        database_ids=database.ids,
    )
    assert values(inside)["map"] == expected["map"].value
    assert values(inside)["map"] != values(apart)["map"]


def test_a_gallery_drawn_several_times_gives_means_over_the_draws(tmp_path):
    table, vectors = coloured_table(30), draw_vectors(30, 6)
    made = encoded(tmp_path, table, vectors, skip={4})  # an image that cannot be decoded has no row
    draws = (np.array([0, 4, 7, 8]), np.array([3, 10, 20]))
    found = evaluate(made, made, EvaluateConfig(at=(1,)), of_itself(table, gallery_draws=draws))
    each = []
    for draw in draws:
        gallery = np.setdiff1d(draw, [4])
        rest = np.setdiff1d(np.arange(30), [*draw, 4])
        labels = table.labels
        each.append(
            retrieval.evaluate(
                vectors.data[rest], labels[rest], vectors.data[gallery], labels[gallery], ks=(1,)
            )
        )
    for name, value in values(found).items():
        assert value == pytest.approx(statistics.fmean(one[name].value for one in each))
    assert "mean over 2 draws" in found["test"][0]["policy"]


def test_the_benchmarks_own_cut_offs_are_reported(tmp_path):
    table, vectors = coloured_table(30), draw_vectors(30, 6)
    made = encoded(tmp_path, table, vectors)
    benchmark: Benchmark = of_itself(table, ks=(2, 5))
    assert list(values(evaluate(made, made, EvaluateConfig(), benchmark)))[:2] == ["recall@2", "recall@5"]
    assert "recall@7" in values(evaluate(made, made, EvaluateConfig(at=(7,)), benchmark))


def test_re_ranked_results_stand_beside_the_plain_ones(tmp_path):
    """Query expansion, against its formula."""
    table, vectors = coloured_table(30), draw_vectors(30, 6)
    made = encoded(tmp_path, table, vectors)
    expansion = {"name": "query_expansion", "n": 3, "alpha": 2.0}
    found = evaluate(made, made, EvaluateConfig(at=(1, 5), rerank=(expansion,)), of_itself(table))
    plain = retrieval.evaluate(vectors.data, table.labels, ks=(1, 5))
    names = [*plain, *(f"{name}/reranked" for name in plain)]
    assert list(values(found)) == names
    assert [values(found)[name] for name in plain] == [metric.value for metric in plain.values()]
    assert "re-ranked by query_expansion (n 3, alpha 2.0)" in found["test"][-1]["policy"]
    similarity = vectors.data.astype(np.float64) @ vectors.data.T.astype(np.float64)
    np.fill_diagonal(similarity, -np.inf)
    first = np.argsort(-similarity, axis=1, kind="stable")[:, :3]
    weights = np.clip(np.take_along_axis(similarity, first, axis=1), 0, None) ** 2
    expanded = vectors.data + (weights[..., None] * vectors.data[first]).sum(axis=1)
    expanded /= np.linalg.norm(expanded, axis=1, keepdims=True)
    ids = {"query_ids": np.arange(30), "database_ids": np.arange(30)}
    expected = retrieval.evaluate(
        expanded.astype(np.float32), table.labels, vectors.data, table.labels, ks=(1, 5), **ids
    )
    for name, metric in expected.items():
        assert values(found)[f"{name}/reranked"] == pytest.approx(metric.value)


@pytest.mark.parametrize("name", ["query_expansion", "database_augmentation"])
def test_what_searches_anew_puts_the_whole_ranking_in_order(tmp_path, monkeypatch, name):
    table = coloured_table(60)
    made = encoded(tmp_path, table, draw_vectors(60, 6))
    config = EvaluateConfig(at=(1,), rerank=({"name": name, "n": 3},))
    whole = evaluate(made, made, config, of_itself(table))
    monkeypatch.setattr("ray_retrieval.evaluation._DEPTH", 1)
    assert evaluate(made, made, config, of_itself(table)) == whole
    monkeypatch.setattr("ray_retrieval.evaluation._PLACES", 1)
    assert values(evaluate(made, made, config, of_itself(table)))["map/reranked"] != pytest.approx(
        values(whole)["map/reranked"]
    )


@pytest.mark.parametrize("block", [7, 4096])
def test_blocks_of_queries_change_nothing(tmp_path, monkeypatch, block):
    queries, database = coloured_table(20, seed=1, prefix="q"), coloured_table(60, seed=2, prefix="d")
    folders = (
        encoded(tmp_path / "q", queries, draw_vectors(20, 6, seed=1)),
        encoded(tmp_path / "d", database, draw_vectors(60, 6, seed=2)),
    )
    benchmark = replace(coloured_benchmark(12), queries=queries, database=database)
    config = EvaluateConfig(at=(1,), rerank=({"name": "k_reciprocal", "k1": 8, "k2": 3, "depth": 30},))
    whole = evaluate(*folders, config, benchmark)
    monkeypatch.setattr("ray_retrieval.evaluate._RERANKED", block)
    assert evaluate(*folders, config, benchmark) == whole
    assert values(whole)["map/reranked"] != values(whole)["map"]


@pytest.mark.parametrize(
    "steps",
    [[], ["query_expansion"], ["database_augmentation", "k_reciprocal"], ["superglobal", "diffusion"]],
)
@pytest.mark.parametrize("block", [7, 4096])
def test_progress_counts_every_query_once_or_where_re_ranked_four_times(tmp_path, monkeypatch, steps, block):
    queries, database = coloured_table(20, seed=1, prefix="q"), coloured_table(61, seed=2, prefix="d")
    folders = (
        encoded(tmp_path / "q", queries, draw_vectors(20, 6, seed=1)),
        encoded(tmp_path / "d", database, draw_vectors(61, 6, seed=2)),
    )
    benchmark = replace(coloured_benchmark(12), queries=queries, database=database)
    monkeypatch.setattr("ray_retrieval.evaluate._RERANKED", block)
    done = []
    config = EvaluateConfig(at=(1,), rerank=[{"name": name} for name in steps])
    evaluate(*folders, config, benchmark, progress=done.append)
    assert sum(done) == 20 * (4 if steps else 1)
    assert min(done) >= 0
    assert max(done) <= 20


def test_the_policy_says_what_a_query_is_re_ranked_with(tmp_path):
    table, vectors = coloured_table(30), draw_vectors(30, 6)
    made = encoded(tmp_path / "d", table, vectors)
    asked = coloured_table(9, seed=1, prefix="q")
    other = encoded(tmp_path / "q", asked, draw_vectors(9, 6, seed=1))
    outside = replace(coloured_benchmark(12), queries=asked, database=table)
    alone = "each query is re-ranked alone with the database"

    def policy(queries, benchmark, *steps):
        config = EvaluateConfig(at=(1,), rerank=steps)
        return evaluate(queries, made, config, benchmark)["test"][-1]["policy"]

    share, expand = {"name": "k_reciprocal", "k1": 5}, {"name": "query_expansion"}
    assert alone in policy(other, outside, share)
    assert alone not in policy(other, outside, {**share, "joint": True})
    assert alone not in policy(other, outside, expand)
    assert alone not in policy(made, of_itself(table), share)
    assert alone in policy(made, of_itself(table), expand, share)
