"""Local features of whole images at seven scales: images a second, against padding each scale to one square.

    python benchmarks/pyramid.py             ResNet-50, images of 640 x 480 and 1024 x 768, squares of 2048
    python benchmarks/pyramid.py --short     ResNet-18, images and squares a quarter as wide: seconds

`ours` is `Pyramid.extract`: images of a shape go through the network together, each scale as large as it is.
`padded` is how networks of a fixed input do it: the seven scales of one image, each put into the corner of a
square of zeros, are a batch of seven; of its cells those within the image count. Both have the same network,
with random weights, the same attention, and keep the 1000 best features, projected to 40 dimensions. They are
measured in turns. `pixels` is what goes through the network, in millions an image.

Goal: the ratio of the times is that of the pixels; the run fails below 0.6 of it. Rates are of wall time.
Without a GPU the ratio is that of processor time, which other work on the machine changes little as long as
one thread computes: several wait for each other, and count it as work.

`shared` is the share of our features that the padded way finds too, at the same scale and place. Not all:
beyond the border of an image there are zeros before each layer in ours, before the first alone in the other.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from book import arguments, claim, measuring
from timing import once
from torch import Tensor

from ray_retrieval.compute import autocast, pick_device, place, uses_bf16
from ray_retrieval.layers.attention import Attention
from ray_retrieval.layers.backbones import BackboneConfig, build_stages
from ray_retrieval.layers.pooling import l2_normalised
from ray_retrieval.layers.pyramid import Found, Pyramid, PyramidConfig
from ray_retrieval.layers.receptive_field import locations, receptive_field

SHAPES = [(480, 640), (768, 1024)]
SQUARE = 2048
SHORT = 4
"""By which `--short` divides all sides."""
DIMENSION = 40
SHARE_OF_PIXELS = 0.6  # small maps have the overhead of more calls


class Network:
    """What both ways have in common."""

    def __init__(self, backbone: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.below, _, channels, _ = build_stages(BackboneConfig(name=backbone, weights="none"))
        self.attention = Attention(channels)
        self.projection = torch.randn(DIMENSION, channels, device=device)
        for part in (self.below, self.attention):
            place(part.eval(), device)
        self.config = PyramidConfig()
        self.pyramid = Pyramid(self.config, receptive_field(self.below), channels)

    def project(self, features: Tensor) -> Tensor:
        return features @ self.projection.T

    def ours(self, images: Tensor) -> list[Found]:
        return self.pyramid.extract(
            images, lambda resized, _: self.below(resized), self.attention, self.project
        )

    def padded(self, image: Tensor, square: int) -> Found:
        """The features of one image [1, 3, h, w] by one batch of squares."""
        height, width = image.shape[2:]
        batch = image.new_zeros(len(self.config.scales), 3, square, square)
        shapes = [(round(height * scale), round(width * scale)) for scale in self.config.scales]
        for one, shape in zip(batch, shapes, strict=True):
            resized = F.interpolate(image, size=shape, mode="bilinear", antialias=True)
            one[:, : shape[0], : shape[1]] = resized[0]
        features = self.below(batch)
        scores = self.attention(features)
        parts = []
        for number, (scale, (high, wide)) in enumerate(zip(self.config.scales, shapes, strict=True)):
            field = self.pyramid.field
            rows, columns = -(-high // field.stride), -(-wide // field.stride)
            parts.append(
                (
                    features[number, :, :rows, :columns].flatten(1).T,
                    locations(rows, columns, field, wide / width, high / height, device=image.device),
                    torch.full((rows * columns,), scale, device=image.device),
                    scores[number, :rows, :columns].flatten(),
                )
            )
        joined = [torch.cat(column) for column in zip(*parts, strict=True)]
        best = joined[3].argsort(descending=True, stable=True)[: self.config.max_features]
        chosen, places, scales, ordered = (column[best] for column in joined)
        return Found(l2_normalised(self.project(l2_normalised(chosen))), places, scales, ordered)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time, and the time that counts: the same with a GPU, else that of the processor."""
    if not torch.cuda.is_available():
        return once(work)
    wall = once(lambda: (work(), torch.cuda.synchronize())).wall
    return wall, wall


def shared(ours: Found, padded: Found) -> float:
    """The share of our features that the padded way has at the same scale and place."""
    keys = [
        set(map(tuple, torch.cat([found.scales[:, None], found.locations], dim=1).round(decimals=2).tolist()))
        for found in (ours, padded)
    ]
    return len(keys[0] & keys[1]) / len(keys[0])


def measure(network: Network, shape: tuple[int, int], square: int, options: argparse.Namespace) -> bool:
    """Print one line of the table; whether the goal is reached."""
    device = network.projection.device
    height, width = shape
    coarse = torch.randn(options.images, 3, height // 8, width // 8, generator=torch.manual_seed(0))
    images = F.interpolate(coarse, size=shape, mode="bicubic").to(device)
    one = images[:1]
    first = network.ours(one)[0], network.padded(one, square)  # which warms both up
    taken = [
        (*seconds(lambda: network.ours(images)), *seconds(lambda: network.padded(one, square)))
        for _ in range(options.rounds)
    ]
    ours, ours_counted, padded, padded_counted = (
        statistics.median(column) for column in zip(*taken, strict=True)
    )
    ratio = padded_counted / ours_counted * len(images)
    scales = np.array(network.config.scales)
    pixels = height * width * float((scales**2).sum()) / 1e6, len(scales) * square**2 / 1e6
    print(
        f"{f'{width} x {height}':14}{len(images) / ours:10.3f}{1 / padded:10.3f}{ratio:9.1f}"
        f"{pixels[0]:10.2f}{pixels[1]:10.2f}{pixels[1] / pixels[0]:9.1f}{shared(*first):10.2f}",
        flush=True,
    )
    of_pixels = ratio / (pixels[1] / pixels[0])
    what = f"seven scales of {width} x {height}, {options.backbone}"
    peer = f"scales padded to squares of {square}"
    claim(f"{what}: their time over ours", peer=peer, ratio=ratio, headline=True)
    goal = f">= {SHARE_OF_PIXELS}"
    claim(f"{what}: that ratio over the ratio of the pixels", peer=peer, ratio=of_pixels, goal=goal)
    return of_pixels >= SHARE_OF_PIXELS


def main() -> None:
    parser = arguments(__doc__, "a smaller network, sides divided by 4")
    parser.add_argument("--backbone", default=None, help="default: resnet50; resnet18 with --short")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.backbone = options.backbone or ("resnet18" if options.short else "resnet50")
    factor = SHORT if options.short else 1
    device = pick_device()
    threads = f"{options.threads} thread{'' if options.threads == 1 else 's'}"
    kind = "bf16" if uses_bf16(options.precision, device) else "float32"
    said = (
        f"{options.backbone}, {kind}, {threads}, squares of {SQUARE // factor}"
        f"{', all sides a quarter' if options.short else ''}; {options.images} images"
    )
    network, reached = Network(options.backbone, device), True
    with measuring(said), torch.inference_mode(), autocast(options.precision, device):
        print(f"{'':14}{'images/s':>20}{'':9}{'pixels':>20}")
        heads = "".join(f"{head:>{size}}" for head, size in (("ours", 10), ("padded", 10), ("ratio", 9)) * 2)
        print(f"{'':14}{heads}{'shared':>10}")
        for height, width in SHAPES:
            shape = height // factor, width // factor
            reached &= measure(network, shape, SQUARE // factor, options)
    if not reached:
        print(f"\nthe ratio of the times is below {SHARE_OF_PIXELS} of that of the pixels")
        sys.exit(1)


if __name__ == "__main__":
    main()
