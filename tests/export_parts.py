"""Tiny models of every kind to export, with statistics as after training."""

import numpy as np
import torch

from ray_retrieval import model
from ray_retrieval.data.mixed import MixedImages
from ray_retrieval.data.transforms import prepare
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.methods import METHODS, build
from ray_retrieval.storage import Folder

SMALL = BackboneConfig(name="small", weights="none")
WHOLE = {"size": 48, "resize": "long_side"}
SETTINGS = {
    "greedyhash": {"bits": 16, "image": {"size": 16}},
    "hashnet": {"bits": 13, "image": {"size": 16}},
    "greedyhash_unsupervised": {"bits": 16, "image": {"size": 16}},
    "xbm": {"dimension": 12, "image": {"size": 24}},
    "gem": {"image": WHOLE, "dimension": 20, "whitening": {"name": "pca"}, "scales": [1.0, 0.7071]},
    "delf": {
        "image": WHOLE,
        "crop": {"size": 32},
        "dimension": 8,
        "hidden": 16,
        "pyramid": {"scales": [0.5, 1.0, 1.4142], "max_features": 30},
        "global_head": {"dimension": 6, "scales": [0.5, 1.0]},
    },
}
"""Of each method; those of several sizes, whitening and a global head among them."""


def made(name, table=None, **settings):
    """A method in evaluation mode whose layers have seen something; codes are balanced over the table."""
    torch.manual_seed(0)
    config = METHODS[name][0](**{"backbone": SMALL, **SETTINGS[name], **settings})
    method = build(config, classes=3)
    for layer in method.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        if name == "gem" and method.whitening is not None:
            method.whitening.weight.normal_()
            method.whitening.bias.normal_(std=0.1)
            method.whitened.fill_(1)
        if name == "delf":
            method.components.normal_()
            method.centre.normal_(std=0.01)
        if table is not None and config.form.kind.value == "codes":
            pixels = [prepare(table.image_bytes(row), config.image) for row in range(len(table))]
            relaxed = method.eval().relaxed(torch.from_numpy(np.stack(pixels)))
            method.hash_layer.bias -= relaxed.mean(dim=0)
    return method.eval()


def saved(folder, method, precision="float32"):
    model.save(
        Folder(folder),
        config=method.config.model_dump(mode="json"),
        weights=method.state_dict(),
        classes=3,
        class_names=["red", "green", "blue"],
        precision=precision,
        training={"epoch": 1},
        metrics={},
    )
    return str(folder)


def prepared(table, preprocessing):
    """All images of a table, as an encoder prepares them."""
    images = [prepare(table.image_bytes(row), preprocessing) for row in range(len(table))]
    return torch.from_numpy(np.stack(images)) if preprocessing.square else MixedImages(images)
