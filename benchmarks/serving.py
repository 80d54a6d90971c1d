"""What serving costs: searches through HTTP against the same searches in one process, in one run.

    python benchmarks/serving.py                    100,000 codes of 64 bits
    python benchmarks/serving.py --backbones resnet101
    python benchmarks/serving.py --short            the first model, a few seconds a row
    python benchmarks/serving.py --groups 1         shards in a process of their own, not in the gateway
    python benchmarks/serving.py --index runs/quickstart/index --images DIR

The models are MobileNetV2, which takes the least time of those that are usual, and ResNet-50, which papers
take, both on 224 pixels. `alone` is the model on batches of 16, decoding included, on all cores: in a
process of its own for each, or in one process with as many threads, whichever does more. Without a server
too, processes keep the memory that they free for their next pass, as encoders do. `in process` is one after
another, encoded and searched, on one thread. The server has as many encoders of one thread. What it adds to
a search by an image is measured in turns: seconds of searches through HTTP by one client, seconds of the
same in its process, so that both see the machine as it is at the time. The rows below are 1, 8 and 64
clients, each with one connection, that send the bytes of an image and wait for the answer, in a process of
their own that does nothing but write and read sockets. `codes` are the same with the encoder left out:
descriptors are sent, so that what is left is the serving layer. On a machine of few cores clients, HTTP and
the model share them, which the last column shows: processor time of all processes but the clients' for a
search. Latencies and rates are of what was answered once all clients had been at it for some seconds.
"""

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from apart import at_once
from book import arguments, claim, measuring, on_threads
from PIL import Image

from ray_retrieval import model as models
from ray_retrieval.compute import keep_freed_memory
from ray_retrieval.cores import cores
from ray_retrieval.descriptors import Codes, Descriptors, Form
from ray_retrieval.methods import METHODS
from ray_retrieval.model import Encoder
from ray_retrieval.model_folder import model_of
from ray_retrieval.search import Index, build
from ray_retrieval.search.embeddings import finish, part_table, write_part
from ray_retrieval.serve.app import run
from ray_retrieval.serve.config import ServeConfig, ServedIndex
from ray_retrieval.storage import Folder

ROWS, BITS, K, BATCH = 100_000, 64, 10, 16
CLIENTS = (1, 8, 64)
BACKBONES = ("mobilenet_v2", "resnet50")
ADDED_MS = 10  # to the median, at most
WARM_UP_S = 3.0  # several batches of each encoder
TURN_S = 5.0  # of searches through HTTP, and then of searches in process


@dataclass(frozen=True)
class Row:
    """What clients saw: latencies in ms, searches a second, and processor time of the server for one, ms."""

    latencies: list[float]
    rate: float
    busy_ms: float
    failed: int

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.latencies, share)) if self.latencies else float("nan")


@dataclass(frozen=True)
class Known:
    """What is compared with: without a server.

    Attributes:
        alone: images a second of the model in batches, on all cores.
        layout: of its processes and threads.
        code_s: median seconds of one search by a code in a process.
    """

    alone: float
    layout: str
    code_s: float


def main() -> None:
    parser = arguments(__doc__, "a few seconds a row")
    parser.add_argument("--seconds", type=float, help="of each row")
    parser.add_argument("--groups", type=int, default=0, help="of shards; 0: in the gateway")
    parser.add_argument("--encoders", type=int, default=cores(), help="of the server (%(default)s)")
    parser.add_argument("--backbones", nargs="+", help=f"of the models, instead of {', '.join(BACKBONES)}")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--index", help="an index beside its model, instead of the one that is made")
    parser.add_argument("--images", help="a folder of query images, instead of those that are made")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    what = f"{options.rows:,} codes" if options.index is None else options.index
    with measuring(f"{what}, groups of shards: {options.groups}, encoders: {options.encoders}"):
        backbones = options.backbones or (BACKBONES[:1] if options.short else BACKBONES)
        for number, backbone in enumerate([""] if options.index else backbones):
            measure(options, backbone, codes=number == 0)


def measure(options: argparse.Namespace, backbone: str, *, codes: bool) -> None:
    """Print and claim what each number of clients sees, with one model; codes, which need none, once."""
    seconds = options.seconds or (5 if options.short else 20)
    with tempfile.TemporaryDirectory() as folder:
        if options.index is None:
            uri = _model(Path(folder) / "model", backbone)
            index = _index(Path(folder), uri, options.rows)
        else:
            uri, index = model_of(Folder(options.index)).uri, options.index
        images = _images(options.images)
        known = _known(uri, index, images, seconds)
        print(f"\n{backbone or uri}")
        print(f"alone       {known.alone:8.1f} images/s in batches of {BATCH}, {known.layout}")
        print(f"in process  {1000 * known.code_s:8.2f} ms for a code, searched: p50")
        with _server(uri, index, options) as url, multiprocessing.get_context("spawn").Pool(1) as client:
            bodies = {"images": [_upload(image) for image in images]}
            if codes:
                bodies["codes"] = [_code(index, row) for row in range(len(images))]
            _claim_added(backbone, *_in_turns(url, bodies["images"], (uri, index), images, seconds))
            columns = ("what", "clients", "p50 ms", "p95 ms", "p99 ms", "a second", "of the model alone")
            print(f"\n| {' | '.join((*columns, 'server processor ms'))} |")
            print("|---" * (len(columns) + 1) + "|")
            for what, requests in bodies.items():
                for clients in (1, max(CLIENTS)) if options.short else CLIENTS:
                    row = _measured(client, url, requests, clients, seconds)
                    said = [f"{row.percentile(share):.1f}" for share in (50, 95, 99)]
                    share = f"{row.rate / known.alone:.0%}" if what == "images" else "–"
                    failed = f" ({row.failed} failed)" if row.failed else ""
                    print(
                        f"| {what} | {clients} | {' | '.join(said)} | {row.rate:.1f}{failed} | {share} "
                        f"| {row.busy_ms:.1f} |",
                        flush=True,
                    )
                    _claim(what, clients, row, known, backbone)


def _claim_added(backbone: str, through: list[float], inside: list[float]) -> None:
    by = f" by {backbone}" if backbone else ""
    medians = np.median(through), np.median(inside)
    added = float(medians[0] - medians[1])
    print(
        f"one client  {medians[0]:8.2f} ms for an image through HTTP, {medians[1]:.2f} ms in process: p50; "
        f"added {added:.2f} ms"
    )
    claim(
        f"searches by an image{by} through HTTP, 1 client: what it adds to the median in process, over "
        f"{ADDED_MS} ms",
        peer=f"{ADDED_MS} ms",
        ratio=added / ADDED_MS,
        goal="<= 1",
        detail=f"{added:.1f} ms: p50 {medians[0]:.1f} ms of {len(through)} searches through HTTP, "
        f"{medians[1]:.1f} ms of {len(inside)} in process, in turns",
        headline=True,
    )


def _claim(what: str, clients: int, row: Row, known: Known, backbone: str) -> None:
    by = f" by {backbone}" if backbone else ""
    latencies = "p50 {:.1f}, p95 {:.1f}, p99 {:.1f} ms".format(*map(row.percentile, (50, 95, 99)))
    said = f"{latencies}; {row.rate:.1f} a second; {row.failed} failed"
    if what == "images":
        claim(
            f"searches by an image{by} through HTTP, clients: {clients}: images a second",
            peer="the model alone in batches, on all cores",
            ratio=row.rate / known.alone,
            goal=">= 0.85" if clients == max(CLIENTS) else None,
            detail=f"alone {known.alone:.1f} a second, {known.layout}; {said}",
            headline=clients == max(CLIENTS),
        )
    else:
        claim(
            f"searches by a code through HTTP, clients: {clients}: searches a second",
            peer="the same in process, one after another",
            ratio=row.rate * known.code_s,
            detail=f"in process {1000 * known.code_s:.2f} ms each; {said}",
        )


def _known(uri: str, index: str, images: list[bytes], seconds: float) -> Known:
    """What can be done without a server."""
    layouts = sorted({(1, cores()), (cores(), 1)})
    rates = {}
    for processes, threads in layouts:
        with at_once(_describing, (uri, images, threads), processes) as rate:
            rates[processes, threads] = rate(seconds)
    best = max(rates, key=lambda one: rates[one])
    opened = Index.open(index)
    codes = [opened.descriptors([row % opened.rows]) for row in range(len(images))]
    code_ms = _for_a_while(lambda turn: _search(opened, codes[turn % len(codes)]), min(1.0, seconds))
    layout = f"{best[0]} process{'es' * (best[0] > 1)} of {on_threads(best[1])}"
    return Known(rates[best], layout, float(np.median(code_ms)) / 1000)


def _describing(uri: str, images: list[bytes], threads: int) -> Callable[[], int]:
    """The work of a process that has a model: a batch, decoded and described."""
    keep_freed_memory()
    encoder = Encoder(uri, threads=threads, batch_size=BATCH)
    batch = [images[number % len(images)] for number in range(BATCH)]

    def work() -> int:
        encoder.encode(batch)
        return len(batch)

    return work


def _search(index: Index, query: Descriptors) -> None:
    found = index.search(query, K)
    index.records(found.rows[0][found.rows[0] >= 0]).to_pylist()


def _for_a_while(work: Callable[[int], None], seconds: float) -> list[float]:
    """Milliseconds of each call made for so long, after a first one; each is told its number."""
    work(0)
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        began = time.perf_counter()
        work(len(times))
        times.append(1000 * (time.perf_counter() - began))
    return times


@contextmanager
def _server(uri: str, index: str, options: argparse.Namespace) -> Iterator[str]:
    """A server on a local Ray of its own, as `ray-retrieval serve` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServeConfig(
        port=port,
        shard_groups=options.groups,
        encoder_replicas=options.encoders,
        encoder_batch=BATCH,
        max_ongoing=64,
        max_queued=64,
        poll_s=10,
    )
    with run({"index": ServedIndex(index=index, model=uri)}, config) as url:
        yield url


def _measured(process: Pool, url: str, requests: list[bytes], clients: int, seconds: float) -> Row:
    """What clients see in a process of their own, once they have all been at it for a while."""
    warm = min(WARM_UP_S, seconds)
    process.apply(_clients, (url, requests, 1, 0.0, 0.1))
    before = _busy(os.getpid())
    latencies, answered, failed = process.apply(_clients, (url, requests, clients, warm, seconds))
    busy = _busy(os.getpid()) - before
    return Row(latencies, len(latencies) / seconds, 1000 * busy / max(1, answered), failed)


def _in_turns(
    url: str, requests: list[bytes], artefacts: tuple[str, str], images: list[bytes], seconds: float
) -> tuple[list[float], list[float]]:
    """Latencies in ms through HTTP and in process of one client that has a model and an index itself."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_both_ways, (url, requests, artefacts, images, seconds))


def _both_ways(
    url: str, requests: list[bytes], artefacts: tuple[str, str], images: list[bytes], seconds: float
) -> tuple[list[float], list[float]]:
    """What `_in_turns` gives, for a process of its own."""
    keep_freed_memory()
    encoder, index = Encoder(artefacts[0], threads=1, batch_size=BATCH), Index.open(artefacts[1])

    def search(turn: int) -> None:
        _search(index, encoder.encode([images[turn % len(images)]])[0])

    through: list[float] = []
    inside: list[float] = []
    turn_s = min(TURN_S, seconds)
    _clients(url, requests, 1, 0.0, WARM_UP_S)
    for _ in range(round(seconds / turn_s)):
        latencies, _, failed = _clients(url, requests, 1, 0.0, turn_s)
        if failed:
            raise RuntimeError(f"{failed} searches by one client failed")
        through += latencies
        inside += _for_a_while(search, turn_s)
    encoder.close()
    return through, inside


def _busy(own: int) -> float:
    """Processor seconds of Ray's processes on this machine that this process has started."""
    total = 0.0
    for process in psutil.Process(own).children(recursive=True):
        try:
            if "ray::" in " ".join(process.cmdline()):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.Error:
            continue
    return total


def _clients(
    url: str, requests: list[bytes], clients: int, warm: float, seconds: float
) -> tuple[list[float], int, int]:
    """What `_all_clients` gives, for a process of its own."""
    return asyncio.run(_all_clients(url, requests, clients, warm, seconds))


async def _all_clients(
    url: str, requests: list[bytes], clients: int, warm: float, seconds: float
) -> tuple[list[float], int, int]:
    """Ask for `warm` seconds and then for `seconds` more.

    Returns:
        Latencies in ms of what was answered in the latter, how many answers came in all, and how many failed.
    """
    host, port = url.removeprefix("http://").split(":")
    latencies: list[float] = []
    answered, failed = 0, 0
    first = time.perf_counter() + warm
    last = first + seconds

    async def client(number: int) -> None:
        nonlocal answered, failed
        reader, writer = await asyncio.open_connection(host, int(port))
        began = time.perf_counter()
        while began < last:
            writer.write(requests[number % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            await reader.readexactly(length)
            ended = time.perf_counter()
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                failed += 1
            elif first <= ended < last:
                latencies.append(1000 * (ended - began))
            answered += 1
            number += clients
            began = ended
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return latencies, answered, failed


def _upload(image: bytes) -> bytes:
    """A whole request with an image in a form."""
    boundary = b"7d1a0c3e"
    body = (
        b"--" + boundary + b'\r\nContent-Disposition: form-data; name="image"; filename="q.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" + image + b"\r\n--" + boundary + b"--\r\n"
    )
    return _request(b"multipart/form-data; boundary=" + boundary, body)


def _code(index: str, row: int) -> bytes:
    """A whole request with the descriptor of a row."""
    opened = Index.open(index)
    data: Any = opened.descriptors([row % opened.rows]).data[0]
    example = {"code": data.tobytes().hex()} if data.dtype == np.uint8 else {"vector": data.tolist()}
    return _request(b"application/json", json.dumps({"examples": [example], "k": K}).encode())


def _request(kind: bytes, body: bytes) -> bytes:
    head = (
        b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: " + kind + b"\r\n"
        b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n"
    )
    return head + body


def _images(folder: str | None) -> list[bytes]:
    """Query images: JPEGs of smooth noise, or those of a folder."""
    if folder is not None:
        files = sorted(
            path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        )
        return [path.read_bytes() for path in files[:64]]
    made = []
    for seed in range(64):
        small = np.random.default_rng(seed).integers(0, 256, (24, 32, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def _model(folder: Path, name: str) -> str:
    """A backbone with a layer of 64 bits, random weights: it is as fast as a trained one."""
    kind, make = METHODS["greedyhash"]
    torch.manual_seed(0)
    backbone = {"name": name, "weights": "none"}
    config = kind.model_validate({"bits": BITS, "backbone": backbone, "image": {"size": 224}})
    models.save(
        Folder(folder),
        config=config.model_dump(mode="json"),
        weights=make(config, classes=10, pretrained=False).state_dict(),
        classes=10,
        class_names=None,
        precision="float32",
        training={},
        metrics={},
    )
    return str(folder)


def _index(folder: Path, uri: str, rows: int) -> str:
    """An index of random codes, as if the model had made them."""
    codes = Codes(np.random.default_rng(0).integers(0, 256, (rows, BITS // 8)).astype(np.uint8), BITS)
    image = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    table = pa.table(
        {
            "id": [f"image-{row:07d}" for row in range(rows)],
            "image": pa.nulls(rows, image),
            "label": pa.array(np.arange(rows) % 10),
        }
    )
    embeddings = Folder(folder / "embeddings")
    part = write_part(embeddings, 0, part_table(table, codes, first_row=0, skip={}), key="", errors=[])
    finish(
        embeddings,
        model=models.read_model_description(Folder(uri))[1],
        form=Form.of(codes),
        classes=10,
        class_names=None,
        parts=[part],
        source="",
    )
    build(embeddings, str(folder / "index"))
    return str(folder / "index")


if __name__ == "__main__":
    main()
