"""What encoding, training and searching cost with up to 64 GPUs and a billion images: formulas with numbers.

`Measured` holds what `scaling.py` measures, with the values of one run as defaults, and `Assumed` what was
taken from elsewhere. All are options of `scaling.py --model`. Nothing here has been run at these sizes: it
says what the measured and assumed numbers come to, and which of the costs is the largest.
"""

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from ray_retrieval.search.choosing import choose_for_vectors

GPUS = (1, 8, 64)
BATCH_NORMS, COLLECTIVES = 53, 4
"""Batch normalisations of ResNet-50; sums over all workers of each, two forward and two backward."""
FEATURES, FEATURE_DIMENSION = 1_000, 40
SHARDS = 64
NEGATIVES, QUERIES, POOL = 5, 2_000, 22_000
"""Of an epoch of GeM, as published."""


def _number(default: float, what: str) -> Any:
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class Measured:
    """What was measured; by default on two cores of an AMD EPYC with AVX-512."""

    encode_start: float = _number(9.5, "s of processor time that one node and the driver take to start")
    encode_start_node: float = _number(0.03, "s more of the driver's for each further node")
    encode_part: float = _number(43.3, "ms of a part of 64 images beside the network, one node")
    encode_part_node: float = _number(0, "ms more for each further node")
    encode_write: float = _number(
        1.52, "microseconds to write an image of a large part: code, id, label, path"
    )
    step_own: float = _number(12.8, "ms of a training step beside the network, one worker")
    decode: float = _number(1.74, "ms of one core to decode and resize a JPEG of 512 x 512 to 224")
    image_bytes: float = _number(113_921, "of that JPEG")
    table_row: float = _number(84.25, "bytes of an image in a table of paths")
    index_row: float = _number(84, "bytes of an image in an index beside its descriptor")
    index_codes: float = _number(2_850_000, "images a second of processor time into an index of 64-bit codes")
    index_vectors: float = _number(
        270_000, "images a second of processor time into an index of 128 dimensions"
    )
    scan_one: float = _number(3.74, "10^9 codes of 64 bits a second and core, one query")
    scan_many: float = _number(11.7, "10^9 codes of 64 bits a second and core, 256 queries at once, each")
    scan_vectors: float = _number(51.9, "10^6 vectors of 128 dimensions a second and core, one query")
    mining: float = _number(
        2.01, "s of one core for the negatives of 2,000 queries among 20,000 images, 2048-d"
    )


@dataclass(frozen=True)
class Assumed:
    """What was not measured."""

    images: float = _number(1e9, "images to encode, to index and to search")
    gpu_encode: float = _number(2500, "images a second that a GPU describes: ResNet-50, 224 pixels, bf16")
    gpu_train: float = _number(800, "images a second that it trains on, likewise")
    bandwidth: float = _number(10, "GB/s between any two GPUs")
    latency: float = _number(20, "microseconds of a message from one GPU to another")
    parameters: float = _number(23.5e6, "whose gradients travel, in float32: ResNet-50")
    batch: float = _number(64, "images a step, for each GPU")
    threads: float = _number(8, "processor threads of a worker that trains")
    cores: float = _number(16, "cores of a machine that searches")


def add_options(parser: Any) -> None:
    for group, what in ((Measured, "measured by this script"), (Assumed, "assumed")):
        options = parser.add_argument_group(what)
        for one in fields(group):
            name = "--" + one.name.replace("_", "-")
            options.add_argument(
                name, type=float, default=one.default, help=f"{one.metadata['help']} (%(default)g)"
            )


def from_options(group: type, options: Any) -> Any:
    return group(**{one.name: getattr(options, one.name) for one in fields(group)})


def show(measured: Measured, assumed: Assumed) -> None:
    """Print the numbers that go in, and what they come to."""
    for values, what in (
        (measured, "measured (by default on 2 cores of an AMD EPYC)"),
        (assumed, "assumed"),
    ):
        print(f"\n{what}")
        for one in fields(values):
            print(f"  {one.name:20}{getattr(values, one.name):>16,.6g}   {one.metadata['help']}")
    encoding(measured, assumed)
    step(measured, assumed, shared=False)
    step(measured, assumed, shared=True)
    mining(measured, assumed)
    storage(measured, assumed)
    searching(measured, assumed)


def encoding(measured: Measured, assumed: Assumed) -> None:
    count = assumed.images
    rows = min(max(int(count) // 200, 512), 65_536)  # what `encode.rows_per_part` is where it is not set
    print(
        f"\nencode {count:,.0f} images in parts of {rows:,.0f}, one GPU a node; seconds of a part:\n"
        "  network = rows / gpu_encode, write = rows · encode_write,\n"
        "  beside = encode_part + encode_part_node · (GPUs - 1); hours = images / (GPUs · rows) · part +\n"
        "  start; cores = images a second · decode\n"
        f"{'GPUs':>6}{'network':>9}{'write':>7}{'beside':>8}{'share':>7}{'start s':>9}{'hours':>9}"
        f"{'GPU hours':>11}{'cores':>7}{'GB/s read':>11}"
    )
    network, write = rows / assumed.gpu_encode, rows * measured.encode_write * 1e-6
    for gpus in GPUS:
        beside = 1e-3 * (measured.encode_part + measured.encode_part_node * (gpus - 1))
        part = network + write + beside
        start = measured.encode_start + measured.encode_start_node * (gpus - 1)
        rate = gpus * rows / part
        hours = (count / rate + start) / 3600
        print(
            f"{gpus:6}{network:9.2f}{write:7.2f}{beside:8.2f}{network / part:7.3f}{start:9.1f}{hours:9.2f}"
            f"{gpus * hours:11.1f}{rate * measured.decode / 1e3:7.0f}"
            f"{rate * measured.image_bytes / 1e9:11.2f}"
        )
    print(
        f"  the table of all images, which the driver holds, and the object stores of all nodes once more:\n"
        f"  {count:,.0f} · {measured.table_row:.0f} bytes = {count * measured.table_row / 1e9:,.0f} GB"
    )


@dataclass(frozen=True)
class Traffic:
    """What a method sends in a step beside its gradients.

    Attributes:
        width: float32 numbers of an image that are gathered from all workers; 0: none.
        batch_norms: whose statistics are those of the global batch.
        memory: numbers that every worker keeps.
    """

    width: int = 0
    batch_norms: int = BATCH_NORMS
    memory: int = 0


METHODS = {
    "greedyhash": Traffic(),
    "hashnet": Traffic(width=64),
    "xbm": Traffic(width=128, memory=55_000 * 128),
    "gem": Traffic(width=2048, batch_norms=0),
}


def step(measured: Measured, assumed: Assumed, *, shared: bool) -> None:
    """A training step, with as many images for each GPU, or the images of one GPU shared by all."""
    what = f"{assumed.batch:.0f} images in all" if shared else f"{assumed.batch:.0f} images for each GPU"
    print(f"\ntraining step, {what}; ms")
    if not shared:
        print(
            "  network = images / gpu_train; gradients = 2 (G - 1) / G · 4 · parameters / bandwidth, after\n"
            "  the network; norms = 4 sums for each of 53 batch normalisations · latency · log2 G;\n"
            "  gather = 3 (G - 1) / G · images · 4 · width / bandwidth, there and back; own = step_own"
        )
    print(
        f"{'':12}{'GPUs':>6}{'network':>9}{'gradients':>11}{'norms':>8}{'gather':>8}{'own':>7}{'step':>8}"
        f"{'images/s':>10}{'share':>7}{'memory MB':>11}"
    )
    for name, traffic in METHODS.items():
        alone = 0.0
        for gpus in GPUS:
            each = assumed.batch / gpus if shared else assumed.batch
            parts = costs(measured, assumed, traffic, gpus, each)
            rate = gpus * each / sum(parts) * 1e3
            alone = alone or rate
            cells = "".join(f"{part:{width}.2f}" for part, width in zip(parts, (9, 11, 8, 8, 7), strict=True))
            print(
                f"{name:12}{gpus:6}{cells}{sum(parts):8.1f}{rate:10,.0f}{rate / alone / gpus:7.2f}"
                f"{4e-6 * traffic.memory:11.0f}"
            )


def costs(
    measured: Measured, assumed: Assumed, traffic: Traffic, gpus: int, images: float
) -> tuple[float, ...]:
    """Milliseconds of a step: network, gradients, batch normalisation, gathers, and the loop's own."""
    around = (gpus - 1) / gpus
    message = 1e-3 * assumed.latency * math.log2(gpus)
    per_byte = 1e3 / (1e9 * assumed.bandwidth)
    gathered = 4 * traffic.width * images * gpus
    return (
        1e3 * images / assumed.gpu_train,
        2 * around * 4 * assumed.parameters * per_byte + 2 * message,
        COLLECTIVES * traffic.batch_norms * message,
        3 * around * gathered * per_byte + (2 * message if traffic.width else 0),
        measured.step_own,
    )


def mining(measured: Measured, assumed: Assumed) -> None:
    described = QUERIES + POOL
    images = QUERIES * (2 + NEGATIVES)
    rule = measured.mining * POOL / 20_000 / assumed.threads
    print(
        f"\nGeM's mining of an epoch of {images:,} images, of {described:,} described; s\n"
        "  describing = images / (GPUs · gpu_encode);\n"
        "  gather = (G - 1) / G · images · 8,192 / bandwidth;\n"
        "  rule = mining · pool / 20,000 / threads, on every worker alike;\n"
        "  training = images / (GPUs · gpu_train)\n"
        f"{'GPUs':>6}{'describing':>12}{'gather':>8}{'rule':>7}{'training':>10}{'mining of all':>15}"
    )
    for gpus in GPUS:
        describing = described / (gpus * assumed.gpu_encode)
        gather = (gpus - 1) / gpus * described * 8192 / (1e9 * assumed.bandwidth)
        training = images / (gpus * assumed.gpu_train)
        mined = describing + gather + rule
        print(
            f"{gpus:6}{describing:12.2f}{gather:8.2f}{rule:7.2f}{training:10.2f}"
            f"{mined / (mined + training):15.2f}"
        )


def storage(measured: Measured, assumed: Assumed) -> None:
    count = assumed.images
    features = FEATURES * (2 * FEATURE_DIMENSION + 8 + 4 + 4) + 16
    kinds = {
        "codes, 64 bits": (8.0, measured.index_codes),
        "vectors, 128": (512.0, measured.index_vectors),
        "vectors, 2048": (8192.0, measured.index_vectors / 16),
        f"{FEATURES:,} features": (float(features), measured.index_vectors * 512 / features),
    }
    print(
        f"\nindex of {count:,.0f} images; bytes an image = descriptor + index_row, and in embeddings/ about\n"
        "  as many; a feature: 40 float16, place, scale and score = 96 bytes; processor hours, where\n"
        "  not measured by the bytes of the descriptor\n"
        f"{'':16}{'bytes':>9}{'TB':>9}{'hours':>8}"
    )
    for name, (size, pace) in kinds.items():
        print(
            f"{name:16}{size + measured.index_row:9,.0f}{count * (size + measured.index_row) / 1e12:9.3f}"
            f"{count / pace / 3600:8.1f}"
        )
    held = count * measured.index_row / SHARDS
    print(f"  {SHARDS} shards: writing one holds its ids, labels and paths, {held / 1e9:.1f} GB")
    print("  approximate search of 128 dimensions, as `auto` chooses it, which visits 64 cells for a query:")
    for train_rows in (131_072, 2_000_000):
        choice = choose_for_vectors(int(count), 128, train_rows=train_rows)
        cells = int(re.findall("IVF([0-9]+)", choice.factory or "IVF1")[0])
        rows = count * min(1, 64 / cells)
        print(f"  train_rows={train_rows:,}: {rows:,.0f} rows; {choice.factory}; {choice.why}")


def searching(measured: Measured, assumed: Assumed) -> None:
    count = assumed.images
    rates = {
        "codes, 64 bits, one query": (1e9 * measured.scan_one, 8),
        "codes, 64 bits, of 256 at once": (1e9 * measured.scan_many, 8),
        "vectors, 128, one query": (1e6 * measured.scan_vectors, 512),
    }
    print(
        f"\nexact search of {count:,.0f} images, by cores: images / rate\n"
        f"{'':32}{'s · core':>10}{f'ms, {assumed.cores:.0f} cores':>15}{'machines for 0.1 s':>20}"
        f"{'GB mapped':>11}"
    )
    for name, (rate, size) in rates.items():
        work = count / rate
        machine = work / assumed.cores
        print(
            f"{name:32}{work:10.2f}{1e3 * machine:15.0f}{math.ceil(machine / 0.1):20}"
            f"{count * size / 1e9:11,.0f}"
        )
