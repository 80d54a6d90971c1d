"""Example queries of a benchmark with what an index finds for them, as a report shows them."""

from dataclasses import replace

import numpy as np

from ray_retrieval.answers import Hit, example, hits_of, label_names, verified
from ray_retrieval.cores import cores
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import Descriptors, Local
from ray_retrieval.errors import DataError
from ray_retrieval.pictures import Example, Shown, cropped
from ray_retrieval.search import Index
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.rerank import GeometricVerificationConfig, build_all, rerank

_POSITIVE = ("easy", "hard", "ok")
"""The lists whose images are right, of the revisited benchmarks under the protocol medium."""


def of_benchmark(
    benchmark: Benchmark, queries: Embeddings, index: Index, *, count: int, hits: int
) -> list[Example]:
    """Some queries, evenly spread over all, and their nearest images.

    A hit is right where it shares a label with the query. Where the benchmark has a ground truth, it is right
    where that lists it as easy, hard or ok, neither right nor wrong where it is junk, and wrong otherwise; in
    the place of its labels stands the list. A query that is a box of a photograph is shown as that box.

    Args:
        benchmark: its queries.
        queries: their descriptors.
        index: of its database.
        count: how many queries; fewer where there are fewer.
        hits: how many images for each.
    """
    chosen = np.linspace(0, queries.rows - 1, min(count, queries.rows)).astype(np.int64)
    described = queries.descriptors.take(chosen)
    # Where the queries are in the index, each finds itself, which is no example of anything.
    found = _search(index, described, hits + benchmark.queries_in_database)
    table = benchmark.queries
    positions = {name: row for row, name in enumerate(table.ids)}
    rows = [positions[queries.ids[row]] for row in chosen]
    # Of the chosen rows only: a table's columns come with copies of its images.
    labels = table.take(np.array(rows, np.int64)).table["label"].to_pylist()
    lists = _lists(benchmark, rows)
    examples = []
    for number, row in enumerate(rows):
        shown = Shown(_picture(table, row), table.ids[row], label_names(labels[number], table.class_names))
        near = found[number]
        if benchmark.queries_in_database:
            near = [hit for hit in near if hit.id != shown.id]
        made = example(index, shown, near[:hits])
        examples.append(made if lists is None else _judged(made, lists[number]))
    return examples


def _search(index: Index, queries: Descriptors, k: int) -> list[list[Hit]]:
    """The hits of each query, as the command line searches: local features are verified."""
    if not isinstance(queries, Local):
        found = index.search(queries, k)
        return [hits_of(index, found, query) for query in range(len(queries))]
    (step,) = build_all([GeometricVerificationConfig()], index, threads=cores())
    found = index.search(queries, max(k, step.depth))
    ordered = rerank([step], queries, found)
    return [verified(index, found, ordered, step, query, k) for query in range(len(queries))]


def _lists(benchmark: Benchmark, queries: list[int]) -> list[dict[str, str]] | None:
    """For each query the list of every image that is in one, by its id; None without a ground truth."""
    if benchmark.ground_truth is None:
        return None
    ids = benchmark.database.ids
    return [
        {ids[row]: name for name, rows in benchmark.ground_truth[query].items() for row in rows.tolist()}
        for query in queries
    ]


def _judged(made: Example, lists: dict[str, str]) -> Example:
    def judged(hit: Shown) -> Shown:
        name = lists.get(hit.id)
        right = None if name == "junk" else name in _POSITIVE
        return replace(hit, right=right, labels=[] if name is None else [name])

    return Example(made.query, [judged(hit) for hit in made.hits])


def _picture(table: ImageTable, row: int) -> bytes | None:
    try:
        data, box = table.image_bytes(row), table.box(row)
    except DataError:
        return None  # the file has gone since: the picture shows a placeholder
    return data if box is None else cropped(data, box)
