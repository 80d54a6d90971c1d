"""The searches of binary codes that `search.py` measures: all of them, and by cells."""

import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from book import claim, on_threads
from databases import clustered_codes, mapped_codes
from equal_recall import K, compare, ours
from peers import (
    Peer,
    faiss_binary_flat,
    faiss_binary_ivf,
    faiss_knn_hamming,
    usearch_exact_codes,
    usearch_graph,
)
from timing import bandwidth, latency, most_private_memory, private_memory, seconds

from ray_retrieval.descriptors import Codes
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.scan import scan, to_words

Bytes = npt.NDArray[np.uint8]

_COPIED_ROWS = 200_000_000  # Of more, no peer gets a copy in memory.
_BATCH, _LEAST_BATCH, _BATCH_WORK = 1000, 32, 2e10  # queries · rows
_LEAST_READ = 1 << 26  # bytes; fewer lie in a cache, and are read before a thread has begun
_SLOW_ROWS = 10_000_000  # of usearch's exact search, which takes some 70 ns for each
_PEER_S = 1.0  # What a slow peer gets at least queries for
_TRAIN_ROWS = 131_072
_GRAPH_ROWS = 1_000_000  # A graph over more takes minutes to build, and loses to the scan.
_PEERS = ("flat", "knn", "usearch")
_CLAIMED, _GOAL_ROWS, _BOUND_ROWS = 10, 1_000_000, 100_000_000


def measure_exact(rows: int, bits: int, threads: int, packages: dict[str, Any], folder: Path) -> None:
    """One table: k, queries at a time, threads."""
    with mapped_codes(folder, rows, -(-bits // 8)) as database:
        _measure_mapped(database, bits, threads, packages)


def _measure_mapped(database: Bytes, bits: int, threads: int, packages: dict[str, Any]) -> None:
    rows, width = database.shape
    words = to_words(database, bits)  # As an index stores them: whole words. Of 64 bits, the mapped file.
    stored = words.view(np.uint8)
    count = int(min(_BATCH, max(_LEAST_BATCH, _BATCH_WORK // rows)))
    queries = np.random.default_rng(0).integers(0, 256, (count, width), np.uint8)
    flat = words.reshape(-1)
    large = words.nbytes >= _LEAST_READ
    speeds = {used: bandwidth(flat, used) for used in sorted({1, threads})} if large else {}
    before = private_memory()
    with most_private_memory() as most:
        for k in (10, 100):
            scan(stored, queries[:_LEAST_BATCH], bits, k, threads=threads)
    read = ", ".join(f"{speed / 1e9:.1f} GB/s on {used}" for used, speed in speeds.items())
    print(f"\n{rows:,} codes of {bits} bits" + (f"; read in a loop at {read}" if read else ""))
    if most:
        print(f"private memory {before / 1e6:,.0f} MB before searching, {most[0] / 1e6:,.0f} MB at most")
    print(
        f"{'k':>5}{'queries':>8}{'threads':>8}{'queries/s':>12}{'p50 ms':>10}{'p95 ms':>10}{'G/s':>8}"
        f"{'bound':>7}" + "".join(f"{name:>11}" for name in _PEERS) + f"{'ratio':>8}"
    )
    peers = _exact_peers(database, packages)
    agreed = scan(stored, queries[:4], bits, 10, threads=threads).distances
    assert np.array_equal(agreed, peers[0].search(queries[:4], 10, 0, threads)[0])
    for k in (10, 100):
        for asked in (queries[:1], queries):
            for used in sorted({1, threads}):
                cells, taken = _ours(stored, asked, queries, bits, k, used, speeds.get(used))
                theirs = {peer.name: _a_query(peer, asked, k, used) for peer in peers}
                cells += "".join(
                    f"{1e3 * len(asked) * theirs[name]:11.2f}" if theirs.get(name) else f"{'':11}"
                    for name in _PEERS
                )
                fastest, name = min((each, name) for name, each in theirs.items() if each)
                if k == _CLAIMED:
                    _claim(database, bits, used, asked, taken, fastest, name, speeds.get(used))
                print(f"{k:5}{len(asked):8}{used:8}{cells}{len(asked) * fastest / taken:8.1f}", flush=True)


def _claim(
    database: Bytes,
    bits: int,
    threads: int,
    asked: Bytes,
    taken: float,
    fastest: float,
    name: str,
    speed: float | None,
) -> None:
    what = f"exact search of {len(database):,} codes of {bits} bits, k = {_CLAIMED}, {on_threads(threads)}"
    claim(
        f"{what}, {len(asked):,} at a time: the fastest peer's time over ours",
        peer=f"FAISS, {name}" if name != "usearch" else name,
        ratio=len(asked) * fastest / taken,
        goal=">= 3" if threads == 1 and len(database) >= _GOAL_ROWS else None,
        detail=f"{1e3 * fastest:.3g} ms a query, {1e3 * taken / len(asked):.3g} ms",
        headline=threads == 1 and len(database) >= _GOAL_ROWS,
    )
    if speed and len(asked) == 1:
        claim(
            f"{what}, one at a time: our time over that of reading the codes",
            peer="a loop that reads them",
            ratio=taken * speed / to_words(database[:1], bits).nbytes / len(database),
            goal="<= 1.5" if len(database) >= _BOUND_ROWS else None,
            headline=len(database) >= _BOUND_ROWS,
        )


def _ours(
    stored: Bytes, asked: Bytes, queries: Bytes, bits: int, k: int, threads: int, speed: float | None
) -> tuple[str, float]:
    """The cells of a line, and the seconds of all queries: the shortest of several times."""
    search = partial(scan, stored, bits=bits, k=k, threads=threads)
    taken = seconds(lambda: search(asked), 5)
    rate = len(stored) * len(asked) / taken / 1e9
    if len(asked) > 1:
        return f"{len(asked) / taken:12,.0f}{'':10}{'':10}{rate:8.2f}{'':7}", taken
    half, most, _ = latency(search, queries)
    bound = f"{taken * speed / stored.nbytes:7.2f}" if speed else f"{'':7}"
    return f"{1 / taken:12,.0f}{1e3 * half:10.2f}{1e3 * most:10.2f}{rate:8.2f}{bound}", taken


def _exact_peers(database: Bytes, packages: dict[str, Any]) -> list[Peer]:
    """What may be asked for this many codes; the first is one of FAISS's."""
    rows = len(database)
    peers = [faiss_knn_hamming(database)]
    if rows <= _COPIED_ROWS:
        peers.append(faiss_binary_flat(database))
    if "usearch" in packages and rows <= _SLOW_ROWS:
        peers.append(usearch_exact_codes(packages["usearch"], database))
    return peers


def _a_query(peer: Peer, queries: Bytes, k: int, threads: int) -> float:
    """Seconds for one of a batch of queries: of as many as take some seconds."""
    started = time.perf_counter()
    peer.search(queries[:1], k, 0, threads)
    one = time.perf_counter() - started
    some = queries[: max(peer.at_once, int(_PEER_S / one))]
    return seconds(lambda: peer.search(some, k, 0, threads), 3) / len(some)


def measure_approximate(rows: int, bits: int, threads: int, packages: dict[str, Any], folder: Path) -> None:
    """One table: codes in cells, ours and FAISS's; all codes; a graph where there are few."""
    codes, queries = clustered_codes(rows, bits, 1), clustered_codes(_BATCH, bits, 2)
    cells = 2 ** round(math.log2(math.sqrt(rows)))
    print(f"\n{rows:,} clustered codes of {bits} bits, {len(queries):,} queries, k = {K}")
    last = scan(codes, queries, bits, K, threads=threads).distances[:, -1:]
    systems = [
        partial(faiss_binary_ivf, codes, cells, _TRAIN_ROWS, threads),
        partial(_all_codes, codes, bits),
    ]
    if "usearch" in packages and rows <= _GRAPH_ROWS:
        systems.append(partial(usearch_graph, packages["usearch"], codes, threads))
    with tempfile.TemporaryDirectory(dir=folder) as made:
        config = ApproximateConfig(search=f"BIVF{cells}", train_rows=_TRAIN_ROWS)
        ours_first = partial(ours, Codes(codes, bits), config, Path(made), threads)
        # Hits at the distance of the last exact one count, whichever of the rows at that distance they are.
        what = f"search of {rows:,} clustered codes of {bits} bits"
        compare(
            [ours_first, *systems], queries, lambda found, _rows: float(np.mean(found <= last)), threads, what
        )


def _all_codes(codes: Bytes, bits: int) -> Peer:
    """Our exact scan."""
    stored = to_words(codes, bits).view(np.uint8)

    def search(queries: Bytes, k: int, _effort: int, threads: int) -> tuple[Any, Any]:
        hits = scan(stored, queries, bits, k, threads=threads)
        return hits.distances, hits.rows

    return Peer("ours, all codes", search, (0,), stored.shape[1], 0.0)
