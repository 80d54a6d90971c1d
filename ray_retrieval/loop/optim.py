"""Optimisers and learning-rate schedules, as pure functions of the clock."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from ray_retrieval.config import Config
from ray_retrieval.methods.base import Clock, Method


class OptimizerConfig(Config):
    """How parameters move."""

    name: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    """`sgd` (with momentum), `adam`, `adamw`, or `rmsprop` (without momentum, smoothing 0.99)."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate at the schedule's top."""
    lr_batch_size: int | None = Field(default=None, ge=1)
    """The batch size that `lr` is stated for: the rate used is lr × batch_size / lr_batch_size. Unset: `lr`
    as it stands, whatever the batch size."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the rate rises linearly to what the schedule says; 0: none."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of `sgd`."""
    nesterov: bool = False
    """Nesterov momentum of `sgd`."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Decay of all parameters: part of the gradient, but in `adamw`, where it is apart from it."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.nesterov and self.momentum == 0:
            raise ValueError("'nesterov' needs a 'momentum' above 0")
        return self


class _Schedule(Config):
    """How the rate changes over time."""

    def at(self, clock: Clock) -> float:
        """What the top rate is multiplied by."""
        raise NotImplementedError

    def rate(self, clock: Clock, top: float) -> float:
        """The learning rate, where `top` is that of the optimiser's configuration."""
        return top * self.at(clock)


class StepSchedule(_Schedule):
    """The rate is multiplied by `factor` at the given epochs, or after every so many epochs or steps."""

    name: Literal["step"] = "step"
    every: int | None = Field(default=None, ge=1)
    """Epochs between two drops."""
    every_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps between two drops, where a paper counts steps."""
    epochs: tuple[int, ...] = ()
    """Epochs (finished ones) after which the rate drops."""
    factor: float = Field(default=0.1, gt=0)
    """What the rate is multiplied by."""

    @model_validator(mode="after")
    def _check(self) -> "StepSchedule":
        if not (self.every or self.every_steps or self.epochs):
            raise ValueError("a step schedule needs 'every', 'every_steps' or 'epochs'")
        return self

    def at(self, clock: Clock) -> float:
        drops = sum(clock.epoch >= epoch for epoch in self.epochs)
        drops += clock.epoch // self.every if self.every else 0
        drops += clock.step // self.every_steps if self.every_steps else 0
        return self.factor**drops


class CosineSchedule(_Schedule):
    """Linear warm-up, then half a cosine down to `floor` times the rate at the last step."""

    name: Literal["cosine"] = "cosine"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps in which the rate rises linearly from 0."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Factor at the end."""

    def at(self, clock: Clock) -> float:
        # Plans of different epochs may differ by a step or two: not beyond the end.
        progress = min(1.0, clock.step / clock.total_steps)
        if progress < self.warmup:
            return (clock.step + 1) / (self.warmup * clock.total_steps + 1)
        falling = (progress - self.warmup) / (1 - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * falling))


class LinearSchedule(_Schedule):
    """The rate falls by the same amount after every step, from `lr` to `end` after the last one."""

    name: Literal["linear"] = "linear"
    end: float = Field(default=0.0, ge=0)
    """The rate at the end, in the unit of `lr`: both grow with the batch where `lr_batch_size` is set."""

    def at(self, clock: Clock) -> float:
        """The share of the way that is left."""
        # Plans of different epochs may differ by a step or two: not beyond the end.
        return 1 - min(1.0, clock.step / clock.total_steps)

    def rate(self, clock: Clock, top: float) -> float:
        return self.end + (top - self.end) * self.at(clock)


class ExponentialSchedule(_Schedule):
    """The rate falls by the same factor after every epoch."""

    name: Literal["exponential"] = "exponential"
    factor: float = Field(default=math.exp(-0.01), gt=0, le=1)
    """What the rate is multiplied by after an epoch; published for CNN image retrieval: e^-0.01 ≈ 0.990."""

    def at(self, clock: Clock) -> float:
        return self.factor**clock.epoch


class ConstantSchedule(_Schedule):
    """The rate stays."""

    name: Literal["constant"] = "constant"

    def at(self, clock: Clock) -> float:  # noqa: ARG002
        return 1.0


class PlateauSchedule(_Schedule):
    """The rate drops when the validation has stopped to get better; all is counted in validations.

    A drop is a pure function of what has been measured, so that a resumed run drops where an undisturbed one
    does. The same as `torch.optim.lr_scheduler.ReduceLROnPlateau` with mode `max` and a relative threshold.
    """

    name: Literal["plateau"] = "plateau"
    factor: float = Field(default=0.1, gt=0, lt=1)
    """What the rate is multiplied by."""
    patience: int = Field(default=4, ge=0)
    """Validations without a better one that are let pass; the next one drops the rate."""
    threshold: float = Field(default=1e-3, ge=0)
    """Share of the best measurement by which one has to exceed it to be better."""
    cooldown: int = Field(default=2, ge=0)
    """Validations after a drop that do not count against it."""
    min_factor: float = Field(default=0.05, ge=0, le=1)
    """The rate never falls below this share of its top."""

    def at(self, clock: Clock) -> float:
        factor, best, stale, cooling = 1.0, -math.inf, 0, 0
        for value in clock.measured:
            better = value > best * (1 + self.threshold)
            best = value if better else best
            stale = 0 if better or cooling else stale + 1
            cooling = max(0, cooling - 1)
            if stale > self.patience:
                factor = max(factor * self.factor, self.min_factor)
                stale, cooling = 0, self.cooldown
        return factor


Schedule = (
    StepSchedule | CosineSchedule | LinearSchedule | ExponentialSchedule | PlateauSchedule | ConstantSchedule
)
ScheduleConfig = Annotated[Schedule, Field(discriminator="name")]


def build_optimizer(config: OptimizerConfig, method: Method) -> torch.optim.Optimizer:
    """The optimiser over the method's parameter groups; each group keeps its `lr_factor`."""
    groups: list[dict[str, Any]] = [
        {
            "params": group.parameters,
            "lr_factor": group.lr_factor,
            "weight_decay": config.weight_decay if group.decays else 0.0,
        }
        for group in method.parameter_groups()
    ]
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=config.lr, weight_decay=config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer,
    config: OptimizerConfig,
    schedule: Schedule,
    clock: Clock,
    batch_size: int,
) -> float:
    """Set every group's rate for the coming step.

    Returns:
        The rate of a group whose factor is 1.
    """
    rate = schedule.rate(clock, config.lr) * min(1.0, (clock.step + 1) / (config.warmup_steps + 1))
    if config.lr_batch_size is not None:
        rate *= batch_size / config.lr_batch_size
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    return rate
