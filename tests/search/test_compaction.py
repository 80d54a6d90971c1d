"""What compacting writes anew, and what it leaves as it is."""

import itertools

import numpy as np
import pytest
from bare_parts import Bare, build_bare
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import assert_same, draw_codes, draw_vectors

from ray_retrieval.search import Index, add, compact, compaction, remove
from ray_retrieval.search.approximate import ApproximateConfig


def grown(index, sizes, draw=draw_codes, **settings):
    """An index with a shard for each size."""
    total = draw(sum(sizes), 16, seed=4)
    ends = np.cumsum([0, *sizes])
    build_bare(Bare(total.take(np.arange(sizes[0]))), index, **settings)
    for start, stop in itertools.pairwise(ends[1:]):
        add(index, Bare(total.take(np.arange(start, stop))))
    return total


def sizes_of(manifest):
    return [shard.rows for shard in manifest.shards]


@pytest.mark.parametrize(
    ("sizes", "gone", "expected"),
    [
        ([40, 40], [], None),  # as it should be
        ([40, 7], [], None),  # one small shard has nothing to be merged with
        ([40, 40, 5, 5, 5], [], [40, 40, 15]),
        ([40, 5, 40, 40], [], [40, 28, 28, 29]),
        ([40, 40, 40], [41, 42], [40, 39, 39]),
        ([40, 40, 40], [100], [40, 40, 39]),
        ([40, 40, 2], [80, 81], [40, 40]),  # nothing is left of the last one
        ([10] * 20, [], None),
        ([2] * 70, [], [8, 9, 9, 9] * 3 + [8, 9, 9, 9]),  # so many are merged although they are equal
    ],
)
def test_shards_stay_until_one_is_small_or_lost_rows(tmp_path, sizes, gone, expected):
    total = grown(tmp_path, sizes)
    if gone:
        remove(tmp_path, [str(row) for row in gone])
    before = Index.open(tmp_path)
    tried = compact(tmp_path, keep=1, dry_run=True)
    change = compact(tmp_path, keep=1)
    assert (tried.changed, tried.pruned) == (change.changed, change.pruned)
    assert change.changed == (expected is not None)
    assert sorted(sizes_of(change.manifest)) == sorted(expected or sizes)
    assert sizes_of(change.manifest)[:1] == (expected or sizes)[:1]
    assert not compact(tmp_path).changed
    after = Index.open(tmp_path)
    after.verify()
    rows = after.living()
    np.testing.assert_array_equal(after.descriptors(rows).data, before.descriptors().data)
    assert after.records(rows)["id"].to_pylist() == before.records(before.living())["id"].to_pylist()
    assert len(after) == len(total) - len(gone)


def test_shards_that_stay_keep_their_files(tmp_path):
    options = {"approximate": ApproximateConfig(search="IVF2,SQ8", recall_queries=9)}
    grown(tmp_path, [40, 40, 3, 3], draw_vectors, **options)
    first = Index.open(tmp_path).manifest
    tried = compact(tmp_path, keep=1, dry_run=True)
    assert compact(tmp_path, keep=1).pruned == tried.pruned
    second = Index.open(tmp_path).manifest
    assert second.shards[:2] == first.shards[:2]
    trained_and_two = 3
    assert second.files[:trained_and_two] == first.files[:trained_and_two]
    assert len(second.files) == trained_and_two + 1
    queries = draw_vectors(5, 16, seed=9)
    opened = Index.open(tmp_path)
    effort = first.approximate.effort.model_copy(update={"nprobe": 2, "k_factor": 40})
    assert_same(opened.search(queries, 5, effort=effort), opened.search(queries, 5, exact=True))


def test_no_shard_becomes_larger_than_the_most(tmp_path, monkeypatch):
    grown(tmp_path, [60, 9])
    monkeypatch.setattr(compaction, "ROWS_PER_SHARD", 25)
    remove(tmp_path, ["3"])
    assert sizes_of(compact(tmp_path).manifest) == [22, 23, 23]
    assert sizes_of(compact(tmp_path, shards=2).manifest) == [34, 34]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_compacting_twice_changes_nothing_more(tmp_path_factory, sizes, seed):
    index = tmp_path_factory.mktemp("compacted") / "index"
    generator, rows = np.random.default_rng(seed), sum(sizes)
    total = grown(index, sizes)
    gone = np.flatnonzero(generator.random(rows) < 0.2)[: rows - 1]
    if len(gone):
        remove(index, [str(row) for row in gone])
    left = np.setdiff1d(np.arange(rows), gone)
    change = compact(index, keep=1)
    assert change.changed or not len(gone)
    assert not compact(index).changed
    opened = Index.open(index)
    np.testing.assert_array_equal(opened.descriptors().data, total.data[left])
    assert opened.records(opened.living())["id"].to_pylist() == [str(row) for row in left]
