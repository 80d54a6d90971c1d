"""What the tests of the training loop share."""

import torch
from samples import coloured_benchmark, sized

from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.loop import Process, TrainConfig, Trainer
from ray_retrieval.methods import build
from ray_retrieval.methods.gem import Gem


def config(**changes):
    settings = {
        "epochs": 3,
        "batch_size": 8,
        "precision": "float32",
        "optimizer": {"lr": 0.05},
        "schedule": {"name": "cosine", "warmup": 0.2},
        "augmentation": {"pad": 2, "flip": True, "brightness": 0.1},
        "checkpoint": {"min_seconds": 0},
    }
    return TrainConfig.model_validate({**settings, **changes})


def trainer(
    train=None,
    *,
    process=None,
    benchmark=None,
    dtype=torch.float32,
    method="greedyhash",
    dropout=0.0,
    image_settings=None,
    **settings,
):
    torch.manual_seed(0)
    image = image_settings or {"size": 16}
    settings = {"backbone": BackboneConfig(name="small", weights="none"), "image": image, **settings}
    method = build(sized(method, 12, **settings), classes=3).to(dtype)
    if dtype == torch.float64 and not isinstance(method, Gem):
        look_at_one_pixel(method)
    if dropout:  # two layers: what one draws must not depend on how often the other has drawn
        method.backbone.extend([torch.nn.Dropout(dropout), torch.nn.Dropout(dropout)])
    return Trainer(
        method, benchmark or coloured_benchmark(), train or config(), seed=5, process=process or Process()
    )


def look_at_one_pixel(network):
    """Make 3×3 convolutions of a network 1×1: at float64 they would take nearly all the time of a test.

    Not of one that whitens its maps: few of their directions would be left.
    """
    for layer in list(network.modules()):
        for name, child in layer.named_children():
            if isinstance(child, torch.nn.Conv2d) and child.kernel_size == (3, 3):
                setattr(layer, name, one_pixel(child))


def one_pixel(layer):
    made = torch.nn.Conv2d(layer.in_channels, layer.out_channels, 1, bias=False, dtype=layer.weight.dtype)
    torch.nn.init.kaiming_normal_(made.weight)
    return made.requires_grad_(layer.weight.requires_grad)


class LocalReporter:
    """Checkpoints in a folder; can stop the run like a kill after so many."""

    def __init__(self, folder, stop_after=None):
        self.folder, self.left, self.records, self.metrics = folder, stop_after, [], []

    def latest(self):
        found = sorted(self.folder.glob("*"), key=lambda path: path.stat().st_mtime_ns)
        return found[-1] if found else None

    def epoch_done(self, record):
        self.records.append(record)

    def checkpoint(self, name, metrics, write):
        self.metrics.append(metrics)
        if write is not None:
            (self.folder / name).mkdir(parents=True)
            write(self.folder / name)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def loss_curve(history):
    """All numbers of a training one after another, but for its speed."""
    rows = [
        (r["loss"], *r["terms"].values(), *r.get("observed", {}).values(), r["validation"]["map"], r["lr"])
        for r in history
    ]
    return [value for row in rows for value in row]
