"""Approximate searches side by side, each at the least effort that finds as much as is asked for."""

import itertools
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from book import claim
from databases import embedded
from peers import Peer
from timing import latency, seconds

from ray_retrieval.descriptors import Codes, Vectors
from ray_retrieval.search import Index, build
from ray_retrieval.search.approximate import ApproximateConfig, Effort
from ray_retrieval.search.structure_kinds import opened_structures
from ray_retrieval.search.tuning import ladders
from ray_retrieval.storage import Folder

TARGETS = (0.9, 0.95, 0.99)
_CLAIMED = 0.95
K = 10

Recall = Callable[[npt.NDArray[Any], npt.NDArray[np.int64]], float]
"""The share of the exact hits among distances [q, k] and rows [q, k]."""


def compare(
    systems: Iterable[Callable[[], Peer]],
    queries: npt.NDArray[Any],
    recall: Recall,
    threads: int,
    what: str,
) -> None:
    """Print a table with a line for each system and share; the first one is ours, which ratios are to.

    Args:
        systems: build what is searched; one after another, so that only one takes memory.
        queries: [q, ...], all of one batch.
        recall: of hits of these queries.
        threads: of a batch, besides one.
        what: is searched, in words.
    """
    print(
        f"{'':26}{'built s':>9}{'B/row':>8}{'asked':>8}{'effort':>8}{'recall':>8}"
        f"{'one us':>9}{'us on 1':>9}{f'us on {threads}':>9}{'ratio':>8}"
    )
    first: dict[float, float] = {}
    for number, build_system in enumerate(systems):
        system = build_system()
        efforts = _least_efforts(system, queries, recall, threads)
        timed: dict[int, tuple[float, float, float]] = {}
        for target in TARGETS:
            name = f"{system.name:26}{system.built_s:9.1f}{system.row_bytes:8.0f}{target:8.2f}"
            effort, found = efforts[target]
            if effort is None:
                print(f"{name}{'':8}{found:8.3f}  is the most that it finds", flush=True)
                continue
            if effort not in timed:
                timed[effort] = _timed(system, queries, effort, threads)
            one, alone, shared = timed[effort]
            if number == 0:
                first[target] = alone
            ratio = f"{alone / first[target]:8.2f}" if target in first else ""
            if number and target == _CLAIMED and target in first:
                claim(
                    f"{what} with recall@{K} of {target}, {len(queries):,} at a time, 1 thread: its time "
                    "over ours",
                    peer=system.name,
                    ratio=alone / first[target],
                    detail=f"{1e6 * alone:.3g} us a query, {1e6 * first[target]:.3g} us; built in "
                    f"{system.built_s:.1f} s",
                    headline=True,
                )
            print(
                f"{name}{system.said(effort):>8}{found:8.3f}{1e6 * one:9.0f}{1e6 * alone:9.0f}"
                f"{1e6 * shared:9.0f}{ratio}",
                flush=True,
            )
        del system


def ours(descriptors: Codes | Vectors, config: ApproximateConfig, folder: Path, threads: int) -> Peer:
    """An index built for an approximate search, through embeddings of these descriptors.

    Its efforts are those that `auto` tries, in the order of what they cost: cells visited, and where the
    structure holds vectors compressed, candidates a hit that are compared again.
    """
    source, out = Folder(folder) / "embeddings", Folder(folder) / "index"
    embedded(source, descriptors)
    started = time.perf_counter()
    build(source, out, approximate=config, threads=threads)
    built_s = time.perf_counter() - started
    opened = {used: Index.open(out, threads=used) for used in (1, threads)}
    made = opened[1].manifest.approximate
    if made is None:
        raise SystemExit(f"'{config.search}' chose the exact search: take more rows")
    size = sum(file.bytes for file in made.files if file is not None) / len(descriptors.data)
    kind = type(descriptors)
    structures = list(opened_structures(out, list(opened[1].shards.values()), made.files).values())

    def cost(effort: Effort) -> float:
        return sum(structure.cost(effort, K) for structure in structures)

    efforts = sorted(itertools.chain(*ladders(structures[0], Effort())), key=cost)

    def search(queries: npt.NDArray[Any], k: int, effort: int, used: int) -> tuple[Any, Any]:
        asked = Codes(queries, descriptors.bits) if isinstance(descriptors, Codes) else kind(queries)
        hits = opened[used].search(asked, k, effort=efforts[effort])
        return hits.distances, hits.rows

    def said(effort: int) -> str:
        one = efforts[effort]
        return str(one.nprobe) if one.k_factor is None else f"{one.nprobe} x{one.k_factor}"

    return Peer(f"ours {made.factory}", search, tuple(range(len(efforts))), size, built_s, said=said)


def _least_efforts(
    system: Peer, queries: npt.NDArray[Any], recall: Recall, threads: int
) -> dict[float, tuple[int | None, float]]:
    """For each share: the least effort that reaches it, None if none does, and what it finds."""
    found: dict[float, tuple[int | None, float]] = {}
    share = 0.0
    for effort in system.efforts:
        share = recall(*system.search(queries, K, effort, threads))
        for target in TARGETS:
            if target not in found and share >= target:
                found[target] = (effort, share)
        if len(found) == len(TARGETS):
            return found
    return {target: found.get(target, (None, share)) for target in TARGETS}


def _timed(system: Peer, queries: npt.NDArray[Any], effort: int, threads: int) -> tuple[float, float, float]:
    """Seconds of a query: asked alone (the median), of the batch on one thread, and on all."""
    one = latency(lambda some: system.search(some, K, effort, 1), queries).p50
    batch = [
        seconds(partial(system.search, queries, K, effort, used), 3) / len(queries) for used in (1, threads)
    ]
    return one, batch[0], batch[1]
