"""An index that Ray tasks write is the one that one process writes, byte for byte."""

import os
import signal
import sys
from pathlib import Path

import bare_parts
import numpy as np
import pyarrow as pa
import pytest
import ray
from bare_parts import Bare, build_bare
from search_parts import draw_codes, draw_images, draw_local, draw_vectors, files_in, images_of, write

from ray_retrieval.cluster import connect
from ray_retrieval.cluster.pool import RayPool, pool_of
from ray_retrieval.errors import DataError
from ray_retrieval.search import Index, add, build, compact, remove
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.pool import Threads
from ray_retrieval.search.votes import LocalSearchConfig

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def ray_pool():
    # Ray's workers do not find what stands in tests.
    for module in (bare_parts, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    with connect():
        yield RayPool(2, threads=1)


KINDS = {
    "codes": (draw_codes(90, 50), {}),
    "cells": (draw_codes(90, 50), {"approximate": ApproximateConfig(search="BIVF4", recall_queries=20)}),
    "vectors": (
        draw_vectors(90, 8),
        {"approximate": ApproximateConfig(search="IVF2,PQ4x4fs", recall_queries=20)},
    ),
    "local": (draw_local(30, 8), {"local": LocalSearchConfig(shortlist="votes", factory="IVF2,SQ8")}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_writes_it_is_the_same(ray_pool, tmp_path, kind):
    descriptors, options = KINDS[kind]
    count = len(descriptors)
    source = write(tmp_path / "e", descriptors, draw_images(count))
    more = write(tmp_path / "more", descriptors.take(np.arange(9)), images_of(9, start=count))
    written = {}
    for name, pool in (("here", Threads(1)), ("ray", ray_pool)):
        index, done = tmp_path / name, []
        build(source, index, shards=3, pool=pool, progress=done.append, **options)
        assert done[-1] == count
        add(index, more, shards=2, pool=pool)
        remove(index, ["image-0003"])
        compact(index, shards=2, keep=3, pool=pool)
        Index.open(index).verify()
        written[name] = files_in(index)
    assert written["ray"] == written["here"]


def test_finished_shards_are_kept_and_others_written_again(ray_pool, tmp_path):
    source = Bare(draw_codes(60, 16), pa.table({"n": np.arange(60)}))
    whole = build_bare(source, tmp_path / "index", shards=3)
    expected = files_in(tmp_path / "index")
    first, second, _ = (tmp_path / "index" / shard.folder for shard in whole.shards)
    written = (first / "codes.bin").stat().st_mtime_ns
    (second / "shard.json").unlink()
    (tmp_path / "index" / "CURRENT").unlink()
    build_bare(source, tmp_path / "index", shards=3, pool=ray_pool)
    assert files_in(tmp_path / "index") == expected
    assert (first / "codes.bin").stat().st_mtime_ns == written


class Dying(Bare):
    """Ends the process that reads the last rows, the first time."""

    def tables(self, start, stop):
        mark = Path(self.mark)
        if stop == len(self) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().tables(start, stop)


class Failing(Bare):
    def tables(self, start, stop):
        raise DataError("this row cannot be read", where="row 7", mend="mend it")
        yield


def test_a_worker_that_dies_is_replaced(ray_pool, tmp_path):
    source = Dying(draw_codes(40, 16))
    source.mark = str(tmp_path / "died")
    build_bare(source, tmp_path / "ray", shards=4, pool=ray_pool)
    assert (tmp_path / "died").exists()
    build_bare(Bare(draw_codes(40, 16)), tmp_path / "here", shards=4)
    assert files_in(tmp_path / "ray") == files_in(tmp_path / "here")


def test_errors_are_those_of_the_piece(ray_pool, tmp_path):
    with pytest.raises(DataError, match="this row cannot be read"):
        build_bare(Failing(draw_codes(40, 16)), tmp_path / "ray", shards=4, pool=ray_pool)
    assert not (tmp_path / "ray" / "CURRENT").exists()


def test_one_worker_needs_no_ray():
    with pool_of(1, threads=2) as pool:
        assert isinstance(pool, Threads)
