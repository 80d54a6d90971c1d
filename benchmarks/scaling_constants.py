"""What one image costs on one core: the numbers of the model that need no cluster.

All are processor time, so that it matters little what else the machine does; waiting for a disk is no part.
"""

import itertools
import tempfile
from collections.abc import Callable
from functools import partial

import numpy as np
from databases import PART, paths_of, unit_vectors, write_embeddings
from mining import Workload, simulated
from timing import once, shortest
from workload import photographs

from ray_retrieval.data.mining import hard_negatives
from ray_retrieval.data.transforms import Preprocessing, prepare
from ray_retrieval.descriptors import Codes, DescriptorKind, Descriptors, Form, Vectors
from ray_retrieval.search.building import build
from ray_retrieval.search.scan import scan, to_words
from ray_retrieval.search.vectors import VectorSegment, norm_error, search_vectors
from ray_retrieval.storage import Folder


def seconds(work: Callable[[], object], times: int) -> float:
    """Of processor time, the shortest of several runs, after one to warm up."""
    return shortest(work, times, warm_up=True).processor


def constants() -> dict[str, float]:
    """By the names of `scaling_model.Measured`, all on one thread."""
    return {**of_images(), **of_indices(), **of_searches(), "mining": of_mining()}


def of_images() -> dict[str, float]:
    table = photographs(64, side=512)
    files = [table.image_bytes(row) for row in range(len(table))]
    preprocessing = Preprocessing(size=224)
    taken = seconds(lambda: [prepare(file, preprocessing, None) for file in files], 3)
    return {"decode": 1e3 * taken / len(files), "image_bytes": float(np.mean([len(file) for file in files]))}


def of_indices(count: int = 2 * PART) -> dict[str, float]:
    table = paths_of(count)
    codes = np.random.default_rng(0).integers(0, 256, (count, 8), np.uint8)
    vectors = unit_vectors(count, 128, 1)
    paces, written, extra = [], [], 0.0
    kinds: list[tuple[Form, Callable[[slice], Descriptors], int]] = [
        (Form(DescriptorKind.CODES, 64), lambda some: Codes(codes[some], 64), 8),
        (Form(DescriptorKind.VECTORS, 128), lambda some: Vectors(vectors[some]), 512),
    ]
    for form, described, size in kinds:
        with tempfile.TemporaryDirectory() as folder:
            source, out = Folder(folder) / "embeddings", Folder(folder) / "index"
            written.append(once(partial(write_embeddings, source, table, form, described)).processor)
            copies = (build(source, out / str(number)) for number in itertools.count())
            paces.append(count / seconds(partial(next, copies), 2))
            held = sum(file.bytes for shard in next(copies).shards for file in shard.files)
            extra = held / count - size
    return {
        "table_row": table.table.nbytes / count,
        "encode_write": 1e6 * written[0] / count,
        "index_row": extra,
        "index_codes": paces[0],
        "index_vectors": paces[1],
    }


def of_searches() -> dict[str, float]:
    random, rows = np.random.default_rng(0), 10_000_000
    codes = to_words(random.integers(0, 256, (rows, 8), np.uint8), 64).view(np.uint8)
    queries = random.integers(0, 256, (256, 8), np.uint8)
    one = rows / seconds(lambda: scan(codes, queries[:1], 64, 10), 5)
    many = 256 * rows / seconds(lambda: scan(codes, queries, 64, 10), 2)
    vectors = unit_vectors(300_000, 128, 1)
    segments = [VectorSegment(vectors, 0, norm_error(vectors))]
    asked = unit_vectors(1, 128, 2)
    floats = len(vectors) / seconds(lambda: search_vectors(segments, asked, 10), 5)
    return {"scan_one": one / 1e9, "scan_many": many / 1e9, "scan_vectors": floats / 1e6}


def of_mining() -> float:
    given = simulated(Workload(2_000, 20_000, 551, 2048))
    return seconds(lambda: hard_negatives(*given, 5), 1)
