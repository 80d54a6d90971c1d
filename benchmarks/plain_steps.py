"""Training steps of the five methods as one would write them down with PyTorch and the paper alone.

Each is a network of layers copied from a method, so that both start from the same weights in the same memory
format, and the paper's loss on one batch. Nothing is spread over workers, resumed, logged or checked.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_retrieval.compute import Precision, autocast

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Embed = Callable[[Tensor], Tensor]


class Plain(nn.Module):
    """A network and a loss; sub-classes name the layers that they copy.

    Args:
        method: ours, whose layers are copied, on its device.
    """

    layers: tuple[str, ...] = ()

    def __init__(self, method: Any) -> None:
        super().__init__()
        for name in self.layers:
            setattr(self, name, copy.deepcopy(getattr(method, name)))
        device = next(self.parameters()).device
        self.mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(STD, device=device).view(1, 3, 1, 1)

    def normalised(self, images: Tensor) -> Tensor:
        return ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def loss(self, images: Tensor, labels: Tensor, precision: Precision) -> Tensor:
        """Of uint8 images [n, 3, h, w] and class numbers int64 [n]."""
        raise NotImplementedError


class Sign(torch.autograd.Function):
    """The sign, whose gradient is passed on as it is."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        return values.sign()

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class GreedyHash(Plain):
    """Su et al. 2018: classification of the signs, and |(|h| − 1)|³."""

    layers = ("backbone", "hash_layer", "classifier")

    def loss(self, images: Tensor, labels: Tensor, precision: Precision) -> Tensor:
        with autocast(precision, images.device):
            relaxed = self.hash_layer(self.backbone(self.normalised(images)))
            logits = self.classifier(Sign.apply(relaxed))
        penalty = (relaxed.float().abs() - 1).abs().pow(3).mean()
        return F.cross_entropy(logits.float(), labels) + 0.1 * penalty


class HashNet(Plain):
    """Cao et al. 2017, as in the authors' code: one half of a batch against the other."""

    layers = ("backbone", "hash_layer")

    def __init__(self, method: Any) -> None:
        super().__init__(method)
        self.slope, self.similar_weight, self.step = method.config.slope, method.weights.value, 0

    def loss(self, images: Tensor, labels: Tensor, precision: Precision) -> Tensor:
        with autocast(precision, images.device):
            relaxed = self.hash_layer(self.backbone(self.normalised(images)))
        codes = torch.tanh((1 + 0.005 * self.step) ** 0.5 * relaxed.float())
        self.step += 1
        half = len(codes) // 2
        similar = (labels[:half, None] == labels[half:]).float()
        products = self.slope * codes[:half] @ codes[half:].T
        losses = products.clamp(min=0) - similar * products + torch.log1p(torch.exp(-products.abs()))
        weights = torch.where(similar > 0, self.similar_weight, 1.0)
        return (weights * losses).sum() / weights.sum()


class Xbm(Plain):
    """Wang et al. 2020: the contrastive loss within the batch and against a ring of embeddings."""

    layers = ("backbone", "embedding")

    def __init__(self, method: Any) -> None:
        super().__init__(method)
        memory = method.memory
        self.memory, self.memory_labels = memory.embeddings.clone(), memory.labels.clone()
        self.place = 0

    def embed(self, images: Tensor) -> Tensor:
        pooled = self.backbone(self.normalised(images)).amax(dim=(2, 3))
        return F.normalize(self.embedding(pooled).float(), dim=1)

    @staticmethod
    def contrastive(
        anchors: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, itself: Tensor
    ) -> Tensor:
        similarity = anchors @ others.T
        same = labels[:, None] == other_labels
        positive = (1 - similarity)[same & ~itself].sum()
        negative = similarity[~same & (similarity > 0.5)].sum()
        return (positive + negative) / len(anchors)

    def loss(self, images: Tensor, labels: Tensor, precision: Precision) -> Tensor:
        with autocast(precision, images.device):
            embeddings = self.embed(images)
        count, rows = len(labels), torch.arange(len(labels), device=labels.device)
        slots = (self.place + rows) % len(self.memory)
        self.memory[slots], self.memory_labels[slots] = embeddings.detach(), labels
        self.place = (self.place + count) % len(self.memory)
        within = self.contrastive(
            embeddings, labels, embeddings, labels, torch.eye(count, dtype=torch.bool, device=labels.device)
        )
        own = slots[:, None] == torch.arange(len(self.memory), device=labels.device)
        return within + self.contrastive(embeddings, labels, self.memory, self.memory_labels, own)


class Gem(Plain):
    """Radenović et al. 2018: generalised mean, and the contrastive loss of tuples, summed over them.

    A tuple is a query, its positive and five negatives; batch normalisation keeps its statistics.
    """

    layers = ("backbone",)

    def __init__(self, method: Any) -> None:
        super().__init__(method)
        self.p = nn.Parameter(method.pooling.p.detach().clone())

    def train(self, mode: bool = True) -> "Gem":
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        return self

    def loss(self, images: Tensor, _labels: Tensor, precision: Precision) -> Tensor:
        with autocast(precision, images.device):
            features = self.backbone(self.normalised(images))
        pooled = features.float().clamp(min=1e-6).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)
        vectors = pooled / (pooled.norm(dim=1, keepdim=True) + 1e-6)
        tuples = vectors.view(-1, 7, vectors.shape[1])
        gaps = (tuples[:, :1] - tuples[:, 1:] + 1e-6).norm(dim=2)
        near, far = gaps[:, 0].square(), (0.85 - gaps[:, 1:]).clamp(min=0).square().sum(dim=1)
        return 0.5 * (near + far).sum()


class Delf(Plain):
    """Noh et al. 2017 with the joint training of DELG: two classifiers, one of which stops gradients."""

    layers = ("backbone", "above", "classifier", "attention", "attention_classifier")

    def loss(self, images: Tensor, labels: Tensor, precision: Precision) -> Tensor:
        with autocast(precision, images.device):
            features = self.backbone(self.normalised(images))
            top = self.above(features)
            scores = self.attention(features.detach())
        logits = self.classifier(top.float().mean(dim=(2, 3)))
        fixed = features.detach().float()
        pooled = (F.normalize(fixed, dim=1) * scores[:, None]).mean(dim=(2, 3))
        attended = self.attention_classifier(pooled)
        return F.cross_entropy(logits, labels) + F.cross_entropy(attended, labels)


PLAIN = {"greedyhash": GreedyHash, "hashnet": HashNet, "xbm": Xbm, "gem": Gem, "delf": Delf}


class Loop:
    """Steps of a plain network by stochastic gradient descent.

    Args:
        network: trained.
        precision: of its passes.
        lr: learning rate.
    """

    def __init__(self, network: Plain, precision: Precision, lr: float) -> None:
        self.network, self.precision = network.train(), precision
        trained = [value for value in network.parameters() if value.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=5e-4)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step on uint8 images and their labels, which may lie in the processor's memory."""
        device = next(self.network.parameters()).device
        self.optimizer.zero_grad()
        self.network.loss(images.to(device), labels.to(device), self.precision).backward()
        self.optimizer.step()
