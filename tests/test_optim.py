"""Optimisers and learning-rate schedules, against PyTorch's own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_retrieval.loop.optim import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    OptimizerConfig,
    PlateauSchedule,
    StepSchedule,
    build_optimizer,
    set_learning_rate,
)
from ray_retrieval.methods.base import Clock, ParameterGroup


def test_step_schedule_drops_after_whole_epochs():
    every = StepSchedule(every=30)
    assert [every.at(Clock(0, epoch=e)) for e in (0, 29, 30, 59, 60)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    with pytest.raises(ValidationError, match="'every', 'every_steps' or 'epochs'"):
        StepSchedule(factor=0.5)
    at = StepSchedule(epochs=(2, 3), factor=0.5)
    assert [at.at(Clock(0, epoch=e)) for e in (1, 2, 3)] == [1, 0.5, 0.25]


def test_step_schedule_can_count_steps():
    halved = StepSchedule(every_steps=2000, factor=0.5)
    clocks = [Clock(0, epoch=9, step=step) for step in (0, 1999, 2000, 6000)]
    assert [halved.at(clock) for clock in clocks] == [1, 1, 0.5, 0.125]


def test_cosine_schedule_rises_then_falls_to_its_floor():
    schedule = CosineSchedule(warmup=0.1, floor=0.2)
    rates = [schedule.at(Clock(0, step=step, total_steps=100)) for step in range(101)]
    assert rates[0] < 0.1
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.2 + 0.8 * 0.5, abs=0.01)
    assert rates[100] == pytest.approx(0.2)
    assert np.all(np.diff(rates[10:]) < 0)


def test_exponential_schedule_falls_after_every_epoch():
    schedule = ExponentialSchedule()
    clocks = [Clock(0, epoch=epoch, step=7 * epoch + 3, total_steps=70) for epoch in (0, 1, 10)]
    assert [schedule.at(clock) for clock in clocks] == pytest.approx(np.exp([0, -0.01, -0.1]))
    assert ExponentialSchedule(factor=0.5).rate(clocks[1], 0.2) == 0.1


def rates(optimizer, schedule, steps, batch_size=32):
    module = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_factor": 1.0}], lr=1.0)
    clocks = [Clock(0, step=step, total_steps=steps) for step in range(steps + 1)]
    return [set_learning_rate(module, optimizer, schedule, clock, batch_size) for clock in clocks]


@pytest.mark.parametrize("end", [0.0, 1e-4])
def test_linear_schedule_falls_to_its_end_as_pytorchs_does(end):
    found = rates(OptimizerConfig(lr=0.01), LinearSchedule(end=end), 20)
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(theirs, 1.0, end / 0.01, total_iters=20)
    for rate in found:
        assert rate == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        theirs.step()
        schedule.step()
    assert LinearSchedule(end=end).rate(Clock(0, step=21, total_steps=20), 0.01) == end


def test_the_warm_up_rises_to_the_schedule_and_the_batch_scales_both():
    warmed = OptimizerConfig(lr=0.1, warmup_steps=4, lr_batch_size=16)
    found = rates(warmed, ConstantSchedule(), 6, batch_size=32)
    assert found == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2, 0.2, 0.2])
    falling = rates(OptimizerConfig(lr=0.1), LinearSchedule(), 6)
    assert rates(OptimizerConfig(lr=0.1, warmup_steps=2), LinearSchedule(), 6)[2:] == falling[2:]


class OneWeight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
        self.exponent = torch.nn.Parameter(torch.tensor([3.0]))

    def parameter_groups(self):
        return [ParameterGroup([self.weight]), ParameterGroup([self.exponent], 10.0, decays=False)]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_what_does_not_decay_stays_without_a_gradient(name):
    module = OneWeight()
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.1, weight_decay=0.5), module)
    module.weight.grad, module.exponent.grad = torch.zeros(2), torch.zeros(1)
    optimizer.step()
    assert module.exponent.item() == 3
    assert (module.weight.detach().abs() < torch.tensor([2.0, 1.0])).all()


def test_sgd_has_the_momentum_that_was_asked_for():
    for momentum, nesterov in ((0.0, False), (0.7, False), (0.7, True)):
        module, peer = OneWeight(), OneWeight()
        settings = OptimizerConfig(lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01)
        ours = build_optimizer(settings, module)
        theirs = torch.optim.SGD(
            [peer.weight], lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01
        )
        for gradient in (torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0])):
            module.weight.grad = peer.weight.grad = gradient
            ours.step()
            theirs.step()
        assert torch.equal(module.weight, peer.weight)


def test_the_decay_of_adam_is_part_of_the_gradient():
    """Without a loss, the first step is the rate in the direction of the decay, whatever its size."""
    module = OneWeight()
    optimizer = build_optimizer(OptimizerConfig(name="adam", lr=0.1, weight_decay=5e-4), module)
    module.weight.grad = torch.zeros(2)
    optimizer.step()
    assert torch.allclose(module.weight.detach(), torch.tensor([1.9, -0.9]), atol=1e-3)


@given(
    values=st.lists(st.floats(0, 1), max_size=30),
    patience=st.integers(0, 3),
    cooldown=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 1e-3, 0.2]),
    factor=st.sampled_from([0.1, 0.5]),
    min_factor=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_plateau_drops_when_pytorch_does(values, patience, cooldown, threshold, factor, min_factor):
    ours = PlateauSchedule(
        patience=patience, cooldown=cooldown, threshold=threshold, factor=factor, min_factor=min_factor
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=factor,
        patience=patience,
        threshold=threshold,
        threshold_mode="rel",
        cooldown=cooldown,
        min_lr=min_factor,
        eps=0.0,
    )
    for count in range(len(values) + 1):
        measured = tuple(values[:count])
        assert ours.at(Clock(0, measured=measured)) == pytest.approx(optimizer.param_groups[0]["lr"])
        if count < len(values):
            theirs.step(values[count])


def test_plateau_as_published_drops_at_the_sixth_validation_that_is_no_better():
    published = PlateauSchedule()
    values = (0.5,) * 20
    factors = [published.at(Clock(0, measured=values[:count])) for count in range(21)]
    # The first sets the mark, five others are no better; two do not count; five more; then the floor.
    assert factors == pytest.approx([1] * 6 + [0.1] * 7 + [0.05] * 8)
    assert published.at(Clock(0)) == 1
