"""HashNet: pairwise similarity learning whose tanh sharpens into a sign while it trains.

Cao, Long, Wang, Yu: HashNet: Deep Learning to Hash by Continuation, ICCV 2017.

    h = hash layer of the backbone's features         [n, bits]
    u = tanh(β·h)                                     β grows with the steps (continuation, section 3.3)
    L = Σ w_ij · (log(1 + e^θ_ij) − s_ij·θ_ij)        θ_ij = α·u_i·u_j; s_ij = 1 where i and j share a label
    b = sign(h)                                       the code

Two settings are in use, and differ in all of α, β, the pairs and their weights:

                 official (the authors' PyTorch code)       deephash (later implementations)
    α            10 / bits                                  0.1
    pairs        one half of a batch with the other         the batch with a memory of all training codes
    weights      (c·Σ₊ + Σ₋) / (c·n₁ + n₀)                  mean over similar + mean over dissimilar
    β            √(1 + 0.005 · step)                        √(⌊epoch / 20⌋ + 1)

Where we differ: the halves of `official` are those of one shuffled batch, where the authors draw two batches
by two loaders; an image is never paired with itself; images without a label, and slots of the memory that
have not been written yet, are left out rather than counted as dissimilar; the hash layer starts from
N(0, 0.01²) in both settings.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ray_retrieval.config import Config
from ray_retrieval.data.labels import sharing_pairs
from ray_retrieval.data.table import ImageTable
from ray_retrieval.layers.pooling import wide
from ray_retrieval.losses.memory import CrossBatchMemory
from ray_retrieval.losses.pairwise import ClassWeights, labelled, share_a_label, weighted_pairwise_loss
from ray_retrieval.methods.base import Batch, Clock, Outputs
from ray_retrieval.methods.hashing import HashingConfig, HashingMethod
from ray_retrieval.workers import sum_over_workers


class StepContinuation(Config):
    """β = (1 + rate · step)^power."""

    name: Literal["steps"] = "steps"
    rate: float = Field(default=0.005, ge=0)
    """What a step adds."""
    power: float = Field(default=0.5, ge=0)
    """The exponent."""
    every: int = Field(default=1, ge=1)
    """Steps between two changes of β; 200 in the authors' code."""

    def at(self, clock: Clock) -> float:
        return float((1 + self.rate * (clock.step - clock.step % self.every)) ** self.power)


class EpochContinuation(Config):
    """β = √(⌊epoch / every⌋ + 1), with epochs counted from 0."""

    name: Literal["epochs"] = "epochs"
    every: int = Field(default=20, ge=1)
    """Epochs between two changes of β."""

    def at(self, clock: Clock) -> float:
        return math.sqrt(clock.epoch // self.every + 1)


class ConstantContinuation(Config):
    """β stays."""

    name: Literal["constant"] = "constant"
    value: float = Field(default=1.0, gt=0)
    """β."""

    def at(self, clock: Clock) -> float:  # noqa: ARG002
        return self.value


ContinuationConfig = Annotated[
    StepContinuation | EpochContinuation | ConstantContinuation, Field(discriminator="name")
]

_PRESETS: dict[str, dict[str, Any]] = {
    "official": {
        "alpha": "10/bits",
        "pairs": "cross",
        "class_weights": "constant",
        "continuation": {"name": "steps"},
    },
    "deephash": {
        "alpha": 0.1,
        "pairs": "bank",
        "class_weights": "batch",
        "continuation": {"name": "epochs"},
    },
}


class HashNetConfig(HashingConfig):
    """HashNet."""

    name: Literal["hashnet"] = "hashnet"
    preset: Literal["official", "deephash"] = "official"
    """Which of the two settings in use fills in `alpha`, `pairs`, `class_weights` and `continuation` where
    they are not given."""
    alpha: Literal["10/bits"] | Annotated[float, Field(gt=0)] = "10/bits"
    """α, the slope of the sigmoid: a number, or `10/bits`. A number puts a floor under the loss of short
    codes, as θ is α·bits at the most."""
    pairs: Literal["batch", "cross", "bank"] = "cross"
    """What is paired: `batch`: all images of a batch; `cross`: its first half with its second; `bank`: the
    batch with a memory of codes."""
    class_weights: Literal["dataset", "batch", "constant"] = "constant"
    """Balance of similar and dissimilar pairs: by their share in the training set, by their numbers in the
    batch, or by `positive_weight`."""
    positive_weight: float | None = Field(default=None, gt=0)
    """c of `constant`: a similar pair counts c times a dissimilar one. Unset: (n₁ + n₀)/n₁ of the training
    set, as the authors advise; their published runs have 1 for COCO, 5 for NUS-WIDE and 100 for ImageNet."""
    continuation: ContinuationConfig = StepContinuation()
    """How β grows."""
    bank_size: int | None = Field(default=None, ge=1)
    """Slots of the memory of `bank`, a ring of the newest codes. Unset: one for each training image."""
    head_lr_factor: float = Field(default=10.0, gt=0)
    """Learning rate of the hash layer, as a multiple of the backbone's; published: 10."""

    @field_validator("alpha", mode="before")
    @classmethod
    def _number_or_rule(cls, value: Any) -> Any:
        if value == "10/bits":
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-1 as text
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"a number above 0, or '10/bits', got {value!r}")
        return number

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**_PRESETS.get(str(values.get("preset", "official")), {}), **values}

    @property
    def slope(self) -> float:
        """α as a number."""
        return 10 / self.bits if self.alpha == "10/bits" else float(self.alpha)


class HashNet(HashingMethod):
    """A backbone and a hash layer under the weighted pairwise loss."""

    whole_batches = True
    config: HashNetConfig

    def __init__(self, config: HashNetConfig, *, classes: int, pretrained: bool = True) -> None:
        super().__init__(config, classes=classes, pretrained=pretrained)
        nn.init.normal_(self.hash_layer.weight, std=0.01)
        nn.init.zeros_(self.hash_layer.bias)
        self.weights = ClassWeights("batch")
        self.memory: CrossBatchMemory | None = None

    def start_training(self, table: ImageTable, device: torch.device) -> None:
        config, several = self.config, table.labels.ndim == 2
        if config.class_weights == "dataset":
            self.weights = ClassWeights("dataset", _similar_share(table))
        elif config.class_weights == "constant":
            value = config.positive_weight or 1 / max(_similar_share(table), 1e-12)
            self.weights = ClassWeights("constant", value)
        if config.pairs == "bank":
            self.memory = CrossBatchMemory(
                config.bank_size or len(table),
                config.bits,
                classes=table.classes if several else None,
                slot_per_image=config.bank_size is None,
                dtype=wide(self.hash_layer.weight.detach()[:0]).dtype,
                device=device,
            )

    def forward(self, images: Tensor) -> Outputs:
        return {"relaxed": self.relaxed(images)}

    def objective(self, outputs: Outputs, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The pairwise loss; with `pairs: bank` the batch's codes are put into the memory first."""
        codes = torch.tanh(self.config.continuation.at(clock) * wide(outputs["relaxed"]))
        if self.memory is not None:
            everyone = batch.gather(codes.detach())
            self.memory.write(batch.global_rows, everyone, batch.global_labels, step=clock.step)
            other_rows, others, other_labels = self.memory.contents()
        else:
            other_rows, others, other_labels = batch.global_rows, batch.gather(codes), batch.global_labels
        similar = share_a_label(batch.labels, other_labels)
        valid = labelled(batch.labels)[:, None] & labelled(other_labels)
        valid &= batch.rows[:, None] != other_rows
        if self.config.pairs == "cross":
            half = batch.global_size // 2
            second = torch.arange(batch.global_size, device=valid.device) >= half
            valid &= (batch.positions >= half)[:, None] != second
        loss = weighted_pairwise_loss(
            codes,
            others,
            similar,
            valid,
            alpha=self.config.slope,
            weights=self.weights,
            over_workers=sum_over_workers,
        )
        return {"pairwise": batch.total(loss)}

    def training_state(self) -> dict[str, Any]:
        return {} if self.memory is None else {"memory": self.memory.state()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        if self.memory is not None:
            self.memory.load_state(state["memory"])


def _similar_share(table: ImageTable) -> float:
    """Share of similar pairs among the pairs of different images that both have a label."""
    images = len(table) - len(table.unlabelled)
    return (sharing_pairs(table.labels) - images) / max(1, images**2 - images)
