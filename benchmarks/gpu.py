"""What a GPU gains from each form of the work, and how near it comes to its own limits, in one run.

    python benchmarks/gpu.py            ResNet-50, batches of 128 images of 224 px
    python benchmarks/gpu.py --short    ResNet-18, batches of 32 images of 128 px

Without a GPU there is nothing to measure, and it says so.

`describe` is a model's description of uint8 images that lie on the GPU: in float32 as layers are built, in
float32 with channels last, in bfloat16 with both, and that compiled by `torch.compile` with CUDA graphs. Each
ratio is to the form before it; `limit` is the share of the arithmetic speed that a product of large matrices
reaches in the same precision and run.
In float32 the convolutions and that product both use TF32. Codes of bfloat16 must agree with those of float32
in 98 % of the bits.

`train` is a step of our loop (GreedyHash), in float32 and in bfloat16; and `passes`, the same network, loss,
gradients and update on a batch that is on the GPU and normalised, as they are, and recorded once as a CUDA
graph and replayed. Recording fails where something waits for the GPU: that it ends says that the inner loop
is safe for it. What the replay gains is what launching costs.

`decode` is JPEGs of 512 x 512 to pixels of the network's size: nvJPEG by torchvision and a resize, both on
the GPU, against our decoding and resizing on all cores.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from book import arguments, claim, measuring, skipped
from timing import in_turns
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from train_step import trainer_of
from workload import photographs

from ray_retrieval.compute import Precision, autocast
from ray_retrieval.cores import cores
from ray_retrieval.data.transforms import Preprocessing, normalise, prepare
from ray_retrieval.layers.sign import straight_through_sign
from ray_retrieval.methods import build
from ray_retrieval.methods.base import Batch, Clock
from ray_retrieval.methods.greedyhash import GreedyHash, GreedyHashConfig

SIDE = 512
MATRIX = 8192
AGREEMENT = 0.98


def timed(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each on the GPU, its end waited for; they take turns."""

    def finished(work: Callable[[], object]) -> None:
        work()
        torch.cuda.synchronize()

    taken = in_turns({name: partial(finished, work) for name, work in works.items()}, rounds)
    return {name: one.wall for name, one in taken.items()}


def network_of(options: Namespace) -> GreedyHash:
    torch.manual_seed(0)
    config = GreedyHashConfig(
        bits=64, backbone={"name": options.backbone, "weights": "none"}, image={"size": options.size}
    )
    made = build(config, classes=100)
    assert isinstance(made, GreedyHash)
    return made.eval()


def forms_of(options: Namespace, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Relaxed codes of uint8 images, in each form."""
    plain, last = network_of(options).to(device), network_of(options).to(device)
    last.to(memory_format=torch.channels_last)
    layers = nn.Sequential(last.backbone, last.hash_layer)
    compiled = torch.compile(layers, mode="reduce-overhead")

    def as_built(images: Tensor) -> Tensor:
        found: Tensor = plain.hash_layer(plain.backbone(normalise(images, plain.preprocessing)))
        return found

    def in_form(network: Callable[[Tensor], Tensor], precision: Precision, images: Tensor) -> Tensor:
        with autocast(precision, device):
            return network(last.normalised(images))

    return {
        "float32": as_built,
        "float32, channels last": partial(in_form, layers, "float32"),
        "bf16, channels last": partial(in_form, layers, "bf16"),
        "bf16, channels last, compiled": partial(in_form, compiled, "bf16"),
    }


def describe(options: Namespace, device: torch.device) -> bool:
    """Print the table of `describe`; whether codes agree."""
    images = torch.randint(0, 256, (options.batch, 3, options.size, options.size), dtype=torch.uint8).to(
        device
    )
    forms = forms_of(options, device)
    with torch.inference_mode():
        codes = {name: form(images).float().clone() >= 0 for name, form in forms.items()}
        with FlopCounterMode(display=False) as counter:
            forms["float32"](images)
        taken = timed({name: partial(form, images) for name, form in forms.items()}, options.rounds)
        speeds = {
            kind: matrix_speed(kind, device, options.rounds) for kind in (torch.float32, torch.bfloat16)
        }
    work, before, good = counter.get_total_flops(), "", True
    print(f"{'':36}{'images/s':>10}{'ratio':>8}{'limit':>8}{'same bits':>11}")
    for name, seconds in taken.items():
        share = work / seconds / speeds[torch.bfloat16 if "bf16" in name else torch.float32]
        same = float((codes[name] == codes["float32"]).float().mean())
        ratio = taken[before] / seconds if before else 1.0
        print(f"{f'describe, {name}':36}{options.batch / seconds:10.0f}{ratio:8.2f}{share:8.2f}{same:11.4f}")
        good &= same >= AGREEMENT
        what = f"describing on a GPU, {options.backbone}, {options.batch} images of {options.size} px, {name}"
        detail = f"{options.batch / seconds:,.0f} images/s"
        if before:
            claim(f"{what}: time of the form before over it", peer=before, ratio=ratio, detail=detail)
        peer = "a product of large matrices"
        claim(f"{what}: share of the arithmetic speed", peer=peer, ratio=share, detail=detail)
        before = name
    whole = taken["float32"] / min(taken.values())
    claim(
        f"describing on a GPU, {options.backbone}, {options.batch} images of {options.size} px: time as "
        "built over that of the fastest form",
        peer="float32, layers as they are built",
        ratio=whole,
        detail=f"{min(taken, key=lambda name: taken[name])}",
        headline=True,
    )
    return good


def matrix_speed(kind: torch.dtype, device: torch.device, rounds: int) -> float:
    """Floating-point operations a second of a product of large square matrices."""
    one = torch.randn(MATRIX, MATRIX, device=device, dtype=kind)
    other = torch.randn(MATRIX, MATRIX, device=device, dtype=kind)
    return 2 * MATRIX**3 / timed({"product": lambda: one @ other}, rounds)["product"]


def train(options: Namespace, device: torch.device) -> None:
    """Print the table of `train`."""
    print(f"\n{'':36}{'images/s':>10}{'ratio':>8}")
    precisions: tuple[Precision, ...] = ("float32", "bf16")
    made = {
        precision: trainer_of(
            "greedyhash",
            Namespace(**{**vars(options), "precision": precision, "threads": cores(), "memory": 1}),
        )
        for precision in precisions
    }
    rows = np.arange(made["bf16"].config.batch_size)
    images = made["bf16"].train_images.batch(rows)
    works: dict[str, Callable[[], object]] = {
        f"step, {precision}": partial(one._step, rows, images) for precision, one in made.items()
    }
    passes = passes_of(options, device)
    works |= {"passes, bf16": passes, "passes, bf16, CUDA graph": recorded(passes)}
    taken = timed(works, options.rounds)
    pairs = {"step, bf16": "step, float32", "passes, bf16, CUDA graph": "passes, bf16"}
    for name, seconds in taken.items():
        other = pairs.get(name)
        ratio = f"{taken[other] / seconds:8.2f}" if other else ""
        print(f"{f'train, {name}':36}{len(rows) / seconds:10.0f}{ratio}")
        if other:
            claim(
                f"training on a GPU, {options.backbone}, {len(rows)} images of {options.size} px, {name}: "
                f"time of {other} over it",
                peer=other,
                ratio=taken[other] / seconds,
                detail=f"{len(rows) / seconds:,.0f} images/s",
                headline=True,
            )
    for one in made.values():
        for source in (one.train_images, one.queries, one.database):
            source.close()


def passes_of(options: Namespace, device: torch.device) -> Callable[[], None]:
    """Forward, loss, backward and update of our method on a batch that stays where it is."""
    network = network_of(options).to(device, memory_format=torch.channels_last).train()
    images = torch.randint(
        0, 256, (options.batch, 3, options.size, options.size), dtype=torch.uint8, device=device
    )
    rows = torch.arange(options.batch, device=device)
    batch, clock = Batch.whole(rows, rows % 100), Clock(0)
    # Not within the passes: it makes tensors of constants, which are copied to the GPU each time.
    normalised = network.normalised(images)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def passes() -> None:
        optimizer.zero_grad(set_to_none=False)
        with autocast("bf16", device):
            relaxed = network.hash_layer(network.backbone(normalised))
            outputs = {"relaxed": relaxed, "logits": network.classifier(straight_through_sign(relaxed))}
        torch.stack(list(network.objective(outputs, batch, clock).values())).sum().backward()
        optimizer.step()

    return passes


def recorded(passes: Callable[[], None]) -> Callable[[], None]:
    """The same, recorded as a CUDA graph.

    Raises:
        RuntimeError: if they wait for the GPU.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            passes()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        passes()
    return graph.replay


def decode(options: Namespace, device: torch.device) -> None:
    """Print the table of `decode`."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def on_the_gpu() -> Tensor:
        decoded = decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device)
        return resized(torch.stack(decoded), options.size)

    table = photographs(options.batch, side=SIDE)
    files = [table.image_bytes(row) for row in range(len(table))]
    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    preprocessing = Preprocessing(size=options.size)
    with ThreadPoolExecutor(cores()) as pool:
        works: dict[str, Callable[[], object]] = {
            "ours, all cores": lambda: [*pool.map(lambda file: prepare(file, preprocessing, None), files)],
            "nvJPEG and resize": on_the_gpu,
        }
        taken = timed(works, options.rounds)
    print(f"\n{'':36}{'images/s':>10}{'ratio':>8}")
    for name, seconds in taken.items():
        ratio = taken["ours, all cores"] / seconds
        print(f"{f'decode, {name}':36}{len(files) / seconds:10.0f}{ratio:8.2f}")
    claim(
        f"decoding and resizing {len(files)} JPEGs of {SIDE} x {SIDE} to {options.size} px on a GPU: our "
        f"time on {cores()} cores over its",
        peer="our decoding and resizing, all cores",
        ratio=taken["ours, all cores"] / taken["nvJPEG and resize"],
        detail=f"{len(files) / taken['nvJPEG and resize']:,.0f} images/s",
        headline=True,
    )


def resized(images: Tensor, size: int) -> Tensor:
    """Images uint8 [n, 3, h, w] as uint8 [n, 3, size, size], where they are."""
    scaled = nn.functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def main() -> int:
    parser = arguments(__doc__, "a small network, few rounds")
    parser.add_argument("--backbone", help="default resnet50; resnet18 with --short")
    parser.add_argument("--batch", type=int, help="images; default 128, or 32")
    parser.add_argument("--size", type=int, help="pixels of a side; default 224, or 128")
    parser.add_argument("--rounds", type=int, help="of each, after one to warm up; default 20, or 5")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        skipped("no GPU")
        return 0
    sizes = ("resnet18", 32, 128, 5) if options.short else ("resnet50", 128, 224, 20)
    for name, value in zip(("backbone", "batch", "size", "rounds"), sizes, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    device = torch.device("cuda")
    # By default PyTorch uses TF32 for convolutions and not for products: the limit would be another's.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    with measuring(f"{options.backbone}, {options.batch} images of {options.size} px"):
        good = describe(options, device)
        train(options, device)
        decode(options, device)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
