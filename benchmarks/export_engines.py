"""Engines that describe images: ONNX Runtime in float32 and 8 bits against the model by torch, in one run.

    python benchmarks/export_engines.py [--short] [--backbones resnet18 resnet50] [--size 224] [--batch 16]

Prepared images are in memory: what is measured is the way from pixels to codes, on as many threads for each
engine. Engines take turns, and the medians of several rounds are compared. The model has random weights,
whose codes tell nothing of what 8 bits cost: that is for `ray-retrieval export --int8`, with images.
"""

import argparse
import statistics
import tempfile
import time
import warnings

import numpy as np
import torch
from book import arguments, claim, measuring, on_threads
from workload import photographs

from ray_retrieval import model
from ray_retrieval.compute import autocast, pick_device, place
from ray_retrieval.cores import cores
from ray_retrieval.engines import find_export
from ray_retrieval.export import export
from ray_retrieval.layers.batch_norm import fold_batch_norm
from ray_retrieval.methods import build
from ray_retrieval.methods.greedyhash import GreedyHashConfig
from ray_retrieval.storage import Folder

ENGINES = ("torch float32", "torch bf16", "onnx", "onnx-int8")


def main() -> None:
    parser = arguments(__doc__, "one small backbone, a minute")
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "resnet50", "mobilenet_v2"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    if options.short:
        options.backbones, options.size, options.rounds = ["resnet18"], 160, 3
    torch.set_num_threads(options.threads)
    with measuring(f"{options.size} px, batches of {options.batch}, {on_threads(options.threads)}"):
        heads = f"{'backbone':<14}{'engine':<16}{'images/s':>9}{'ratio':>7}{'MB':>8}"
        print(f"{heads}  agreement with torch float32")
        for backbone in options.backbones:
            measure(backbone, options)


def measure(backbone: str, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Folder(folder) / "model"
        save_model(source, backbone, options.size)
        table = photographs(48)
        sizes = {"torch float32": source.size(model.WEIGHTS)}
        for int8 in (False, True):
            said = export(
                source, images=table, int8=int8, max_loss=1.0 if int8 and table.has_labels else None
            )
            sizes["onnx-int8" if int8 else "onnx"] = said["file"]["bytes"]
        runs = engines_of(source)
        generator = np.random.default_rng(0)
        shape = (options.batch, 3, options.size, options.size)
        images = torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))
        codes = {name: run(images).data for name, run in runs.items()}  # and warms up
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                started = time.perf_counter()
                run(images)
                times[name].append(time.perf_counter() - started)
    base = statistics.median(times["torch float32"])
    for name in runs:
        taken = statistics.median(times[name])
        turned = np.unpackbits(codes[name] ^ codes["torch float32"]).mean()
        size = f"{sizes[name] / 1e6:8.1f}" if name in sizes else f"{'':8}"
        print(
            f"{backbone:<14}{name:<16}{options.batch / taken:9.1f}{base / taken:7.2f}{size}  "
            f"{1 - turned:.4f} of the bits"
        )
        if name != "torch float32":
            claim(
                f"{backbone} at {options.size} px by {name}, {on_threads(options.threads)}: images a second",
                peer="torch float32",
                ratio=base / taken,
                detail=f"{options.batch / taken:.1f} images/s",
                headline=name == "onnx-int8",
            )


def engines_of(source: Folder):
    """What describes images, by its name."""
    loaded = model.load(source)
    fold_batch_norm(loaded.method)  # as an encoder does
    place(loaded.method, pick_device("cpu"))
    device = pick_device("cpu")

    def by_torch(precision):
        def run(images):
            with torch.inference_mode(), autocast(precision, device):
                return loaded.method.describe(images)

        return run

    runs = {"torch float32": by_torch("float32"), "torch bf16": by_torch("bf16")}
    for engine in ("onnx", "onnx-int8"):
        runs[engine] = find_export(source, loaded.fingerprint, engine).open(loaded.method).describe
    return runs


def save_model(where: Folder, backbone: str, size: int) -> None:
    torch.manual_seed(0)
    config = GreedyHashConfig(bits=64, backbone={"name": backbone, "weights": "none"}, image={"size": size})
    model.save(
        where,
        config=config.model_dump(mode="json"),
        weights=build(config, classes=10).state_dict(),
        classes=10,
        class_names=None,
        precision="float32",
        training={"epoch": 0},
        metrics={},
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
