"""What each further node costs, measured on 1, 2 and 4 simulated ones, and a model of larger clusters.

    python benchmarks/scaling.py             encoding, training by two methods, and what the model makes of it
    python benchmarks/scaling.py --short     encoding and training by one method, without `idle`: minutes
    python benchmarks/scaling.py --model     no measurement: what recorded numbers come to; all are options

Nodes are those of `ray.cluster_utils.Cluster`: on one machine, each with a raylet, an object store, workers
and one logical processor of its own; the head has none. They share the machine's cores, so the network sleeps
20 ms for each image in place of computing (`sleeping.py`), and the work grows with the nodes. All else is
real: JPEGs are decoded, parts written, gradients of 4 MB averaged by gloo, checkpoints kept. Without any
overhead, more nodes would take the time of one.

`start` is the time until all workers have begun, `end` that after the last pass; with several nodes both are
too long, as their processes import what they need on the same cores. `each` is the time from one part of a
worker to its next, for an image (20 ms and the overhead), or from one training step of 16 images to the next
(320 ms and the overhead), and `cpu` what the worker computes meanwhile: the lower quartiles, as others may
use the machine too. `added` is the difference to one node for each further node. `work` and `Ray` are
processor time, of the processes that encode or train and of all others (driver, raylets, control store,
dashboard and their agents); `cores`, how many were busy in the mean: near the machine's number, it is the
machine that is measured. `idle` is what nodes without work take. Let nothing else run beside it.

Workers of a training wake at the same moment, so that their processor time is divided by the machine's cores
rather than by the nodes' own: what their steps take longer than one worker's is an upper bound.

What is not measured: a network between nodes, their disks, a GPU, and more nodes than four.
"""

import argparse
import itertools
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
from book import arguments, claim, measuring
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.cluster_utils import Cluster
from scaling_model import Assumed, Measured, add_options, from_options, show
from sleeping import LOG, METHODS, SECONDS, Encoding, passes
from workload import photographs, photographs_benchmark

from ray_retrieval import model
from ray_retrieval.cluster import SETTINGS, connect
from ray_retrieval.encode import EncodeJob, encode
from ray_retrieval.loop import TrainConfig
from ray_retrieval.methods import build
from ray_retrieval.storage import Folder
from ray_retrieval.train import train

BATCH, PASSES = 16, 4
"""Images of a pass, which is a worker's share of a step, and passes of a part."""


class ProcessorTime:
    """Seconds that this process and its descendants compute while the block runs, read twice a second.

    Attributes:
        work: of the processes that encode or train.
        others: of all others.
        homes: the parents of the former: raylets, one a node.
    """

    _WORKERS = ("PartEncoder", "RayTrainWorker")

    def __enter__(self) -> "ProcessorTime":
        self._latest: dict[tuple[int, float], float] = {}
        self._workers: set[tuple[int, float]] = set()
        self.homes: set[int] = set()
        self._read()
        self._before = dict(self._latest)
        self._ended, self._own = threading.Event(), 0.0
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._reader.join()
        self._read()
        used = {key: total - self._before.get(key, 0.0) for key, total in self._latest.items()}
        self.work = sum(used[key] for key in self._workers)
        self.others = sum(used.values()) - self.work - self._own

    def _follow(self) -> None:
        while not self._ended.wait(0.5):
            self._read()
        self._own = time.thread_time()

    def _read(self) -> None:
        this = psutil.Process()
        for process in (this, *this.children(recursive=True)):
            try:
                with process.oneshot():
                    key, times = (process.pid, process.create_time()), process.cpu_times()
                    self._latest[key] = times.user + times.system
                    if key not in self._workers and any(
                        name in "".join(process.cmdline()) for name in self._WORKERS
                    ):
                        self._workers.add(key)
                        self.homes.add(process.ppid())
            except psutil.Error:
                continue  # it has just ended, and what was read last counts


@contextmanager
def growing(sizes: list[int], log: str) -> Iterator[Iterator[int]]:
    """A cluster that has as many nodes as each of the sizes, one after another."""
    # Nodes that share cores must not wait for threads in loops.
    for name, value in {**SETTINGS, LOG: log, "OMP_WAIT_POLICY": "PASSIVE"}.items():
        os.environ.setdefault(name, value)
    # As `ray.init` does for a Ray that it starts: without a token, all who reach its ports are let in.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    enable_token_auth_by_default()
    # Any ports: another Ray of this machine may have the usual ones.
    head = {"num_cpus": 0, "dashboard_port": None, "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": True})
    os.environ["RAY_ADDRESS"] = cluster.address

    def grown() -> Iterator[int]:
        for size in sizes:
            while len(cluster.worker_nodes) < size:
                cluster.add_node(num_cpus=1)
            yield size

    try:
        with connect():
            yield grown()
    finally:
        cluster.shutdown()


def measure_idle() -> float:
    """Cores that a cluster without work takes."""
    time.sleep(5)  # until what starts with a node has started
    with ProcessorTime() as spent:
        time.sleep(5)
    return (spent.work + spent.others) / 5


def measure_encoding(nodes: int, images: int, where: Folder, out: Folder) -> dict[str, float]:
    """Encode so many images a node."""
    table = photographs(nodes * images)
    config = Encoding(workers=nodes, threads=1, batch_size=BATCH, rows_per_part=PASSES * BATCH)
    with taking(nodes, PASSES, PASSES * BATCH) as row:
        encode([EncodeJob(where, table, out)], config)
    return {**row, "images": images}


def measure_training(name: str, nodes: int, steps: int, epochs: int, out: Folder) -> dict[str, float]:
    """Train for epochs of so many steps with 16 images a node."""
    benchmark = photographs_benchmark(steps * nodes * BATCH, classes=4 * nodes)
    config = TrainConfig(
        epochs=epochs,
        batch_size=nodes * BATCH,
        workers=nodes,
        precision="float32",
        validation={"every": None},
        checkpoint={"min_seconds": 0},
    )
    with taking(nodes, 1, 1) as row:
        train(METHODS[name], config, benchmark, seed=0, run=out, provenance={})
    return row


@contextmanager
def taking(nodes: int, together: int, images: int) -> Iterator[dict[str, float]]:
    """What the block takes on so many nodes; filled in when it ends.

    Args:
        nodes: with one worker each.
        together: passes of a part, or of a step.
        images: that `each` is of: those of a part, or 1 for a step as a whole.
    """
    row: dict[str, float] = {"nodes": nodes}
    with ProcessorTime() as spent:
        started = time.monotonic()
        yield row
        ended = time.monotonic()
    logs = passes(started)
    # The first passes come while other processes still start.
    between = np.concatenate([np.diff(log[::together], axis=0)[1:] for log in logs])
    each, computed = 1e3 * np.quantile(between, 0.25, axis=0) / images
    row |= {
        "used": len(spent.homes),
        "start": max(log[0, 0] for log in logs) - started,
        "end": ended - max(log[-1, 0] for log in logs) - SECONDS * BATCH,
        "each": float(each),
        "computed": float(computed),
        "work": spent.work,
        "others": spent.others,
        "cores": (spent.work + spent.others) / (ended - started),
    }
    shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
    print(f"{shown}; load {os.getloadavg()[0]:.0f}", file=sys.stderr, flush=True)


def report(what: str, rows: list[dict[str, float]], ideal: float) -> None:
    """Print a table whose first row is that of one node."""
    print(
        f"\n{what}\n{'nodes':>6}{'used':>6}{'start s':>9}{'added':>8}{'end s':>7}{'each ms':>9}"
        f"{'overhead':>10}{'added':>8}{'cpu ms':>8}{'added':>7}{'pace':>7}{'work s':>9}"
        f"{'Ray s':>8}{'cores':>7}"
    )
    one = rows[0]
    for row in rows:
        more = row["nodes"] - one["nodes"]
        added = [
            f"{(row[name] - one[name]) / more:{width}.2f}" if more else " " * width
            for name, width in (("start", 8), ("each", 8), ("computed", 7))
        ]
        if more:
            claim(
                f"{what}, {row['nodes']:.0f} nodes: time of each over that on {one['nodes']:.0f}",
                peer="fewer nodes",
                ratio=row["each"] / one["each"],
                detail=f"{row['each']:.1f} ms, {one['each']:.1f} ms",
                headline=row is rows[-1],
            )
        print(
            f"{row['nodes']:6}{row['used']:6}{row['start']:9.1f}{added[0]}{row['end']:7.1f}{row['each']:9.2f}"
            f"{row['each'] - ideal:10.2f}{added[1]}{row['computed']:8.2f}{added[2]}{ideal / row['each']:7.3f}"
            f"{row['work']:9.1f}{row['others']:8.1f}{row['cores']:7.2f}"
        )


def save_model(where: Folder) -> Folder:
    method = METHODS["greedyhash"]
    model.save(
        where,
        config=method.model_dump(mode="json"),
        weights=build(method, classes=10).state_dict(),
        classes=10,
        class_names=None,
        precision="float32",
        training={"epoch": 0},
        metrics={},
    )
    return where


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Print what nodes cost; returns what the model takes of it."""
    images, steps, epochs = (256, 8, 2) if options.short else (640, 12, 3)
    methods = ["greedyhash"] if options.short else list(METHODS)
    encoded: list[dict[str, float]] = []
    trained: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    idle: list[float] = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as log:
        where = save_model(Folder(folder) / "model")
        with growing(options.nodes, log) as sizes:
            for nodes in sizes:
                if not options.short:
                    idle.append(measure_idle())
                encoded.append(measure_encoding(nodes, images, where, Folder(folder) / f"encoded-{nodes}"))
                for name in methods:
                    out = Folder(folder) / f"{name}-{nodes}"
                    trained[name].append(measure_training(name, nodes, steps, epochs, out))
    if idle:
        listed = ", ".join(f"{nodes}: {used:.3f}" for nodes, used in zip(options.nodes, idle, strict=True))
        print(f"\nidle, cores by nodes: {listed}")
    report(f"encode {images} images a node", encoded, 1e3 * SECONDS)
    for name, rows in trained.items():
        what = f"train {name}, {epochs} epochs of {steps} steps, {BATCH} images a node"
        report(what, rows, 1e3 * SECONDS * BATCH)
    return for_model(encoded, trained["greedyhash"])


def for_model(encoded: list[dict[str, float]], trained: list[dict[str, float]]) -> dict[str, float]:
    one, most = encoded[0], encoded[-1]
    more, part = max(1, most["nodes"] - one["nodes"]), PASSES * BATCH
    return {
        "encode_start": one["work"] - 1e-3 * one["computed"] * one["images"] + one["others"],
        "encode_start_node": max(0.0, (most["others"] - one["others"]) / more),
        "encode_part": part * (one["each"] - 1e3 * SECONDS),
        "encode_part_node": max(0.0, part * (most["each"] - one["each"]) / more),
        "step_own": trained[0]["each"] - 1e3 * SECONDS * BATCH,
    }


def main() -> None:
    parser = arguments(__doc__, "fewer nodes, images and steps, one method, no model")
    parser.add_argument("--model", action="store_true", help="the model alone")
    parser.add_argument("--nodes", type=int, nargs="+", help="ascending; default 1 2 4, and 1 2 with --short")
    add_options(parser)
    options: Any = parser.parse_args()
    options.nodes = options.nodes or ([1, 2] if options.short else [1, 2, 4])
    measured, assumed = from_options(Measured, options), from_options(Assumed, options)
    if not options.model:
        if any(one >= other for one, other in itertools.pairwise(options.nodes)):
            parser.error("--nodes are to be given in ascending order")
        with measuring(f"{', '.join(map(str, options.nodes))} nodes"):
            measured = replace(measured, **measure(options))
            if not options.short:
                from scaling_constants import constants

                measured = replace(measured, **constants())
    if not options.short:
        show(measured, assumed)


if __name__ == "__main__":
    main()
