"""HashNet: presets, schedules, which pairs count."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from samples import coloured_table

from ray_retrieval.config import validate
from ray_retrieval.errors import RecipeError
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.methods.base import Batch, Clock
from ray_retrieval.methods.hashnet import (
    ConstantContinuation,
    EpochContinuation,
    HashNet,
    HashNetConfig,
    StepContinuation,
)

SMALL = BackboneConfig(name="small", weights="none")


def method(table=None, **settings):
    torch.manual_seed(0)
    made = HashNet(HashNetConfig(bits=16, backbone=SMALL, **settings), classes=4)
    made.start_training(table or coloured_table(20, classes=4), torch.device("cpu"))
    return made


def loss(made, relaxed, rows, labels, clock=Clock(seed=0)):  # noqa: B008
    batch = Batch.whole(torch.as_tensor(rows), torch.as_tensor(labels))
    return made.objective({"relaxed": relaxed}, batch, clock)["pairwise"]


def test_presets_are_the_published_settings():
    official, deephash = HashNetConfig(bits=16), HashNetConfig(bits=16, preset="deephash")
    assert (official.slope, official.pairs, official.class_weights) == (0.625, "cross", "constant")
    assert (deephash.slope, deephash.pairs, deephash.class_weights) == (0.1, "bank", "batch")
    assert [official.continuation.at(Clock(0, step=step)) for step in (0, 200, 10_000)] == pytest.approx(
        [1, math.sqrt(2), math.sqrt(51)]
    )
    betas = [deephash.continuation.at(Clock(0, epoch=epoch)) for epoch in (0, 19, 20, 40, 149)]
    assert betas == pytest.approx([1, 1, 1.414214, 1.732051, 2.828427], abs=1e-6)


def test_a_preset_gives_way_to_what_is_said_and_is_written_out_in_full():
    made = HashNetConfig(preset="deephash", alpha="10/bits", pairs="batch")
    assert (made.slope, made.pairs, made.class_weights) == (10 / 48, "batch", "batch")
    assert validate(HashNetConfig, made.model_dump(mode="json")) == made
    with pytest.raises(RecipeError, match="did you mean 'pairs'"):
        validate(HashNetConfig, {"pair": "bank"})
    with pytest.raises(ValidationError, match="official"):
        HashNetConfig(preset="oficial")


def test_continuation_is_a_function_of_the_clock():
    held = StepContinuation(every=200)
    assert held.at(Clock(0, step=399)) == held.at(Clock(0, step=200)) == pytest.approx(math.sqrt(2))
    assert EpochContinuation(every=3).at(Clock(0, epoch=9)) == 2
    assert ConstantContinuation(value=4.0).at(Clock(0, epoch=9, step=99)) == 4


@pytest.mark.parametrize(
    ("preset", "expected"), [("official", math.log(2)), ("deephash", 2 * math.log(2))], ids=str
)
def test_the_loss_at_zero_codes(preset, expected):
    found = loss(method(preset=preset), torch.zeros(8, 16), range(8), [0, 1, 2, 3] * 2)
    assert float(found) == pytest.approx(expected)


def test_an_image_is_not_paired_with_itself():
    # One image of each class: no similar pair is left, and ℓ of the others is log 2 at zero codes.
    found = loss(method(preset="deephash", pairs="batch"), torch.zeros(4, 16), range(4), range(4))
    assert float(found) == pytest.approx(math.log(2))


def test_images_without_a_label_do_not_count():
    table = coloured_table(20, classes=4, several_labels=True)
    made = method(table, preset="deephash", pairs="batch")
    torch.manual_seed(1)
    relaxed = torch.randn(6, 16)
    labels = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]])
    whole = loss(made, relaxed, range(6), torch.cat([labels, torch.zeros(2, 4)]))
    assert float(whole) == pytest.approx(float(loss(made, relaxed[:4], range(4), labels)))


def test_cross_pairs_join_the_halves_alone():
    made = method(pairs="cross", class_weights="batch")
    torch.manual_seed(2)
    relaxed, labels = torch.randn(6, 16, dtype=torch.float64), [0, 1, 2, 0, 2, 1]
    u = torch.tanh(relaxed)
    similar, dissimilar = [], []
    for i in range(3):
        for j in range(3, 6):
            theta = float(10 / 16 * u[i] @ u[j])
            if labels[i] == labels[j]:
                similar.append(math.log1p(math.exp(theta)) - theta)
            else:
                dissimilar.append(math.log1p(math.exp(theta)))
    expected = np.mean(similar) + np.mean(dissimilar)
    assert float(loss(made, relaxed, range(6), labels)) == pytest.approx(expected)


def test_the_bank_pairs_a_batch_with_all_codes_seen_so_far():
    made = method(preset="deephash")
    torch.manual_seed(3)
    first, second = torch.randn(4, 16), torch.randn(4, 16, requires_grad=True)
    loss(made, first, [0, 1, 2, 3], [0, 1, 0, 1])
    assert len(made.memory) == 4
    found = loss(made, second, [2, 3, 4, 5], [0, 1, 0, 1])
    ids = [0, 1, 2, 3, 4, 5]
    labels = {0: 0, 1: 1, 2: 0, 3: 1, 4: 0, 5: 1}
    bank = {0: first[0], 1: first[1], 2: second[0], 3: second[1], 4: second[2], 5: second[3]}
    kinds = {True: [], False: []}
    for i, row in zip([2, 3, 4, 5], second, strict=True):
        for j in ids:
            if i != j:
                theta = (0.1 * torch.tanh(row) @ torch.tanh(bank[j])).item()
                s = labels[i] == labels[j]
                kinds[s].append(math.log1p(math.exp(theta)) - s * theta)
    assert float(found) == pytest.approx(np.mean(kinds[True]) + np.mean(kinds[False]), rel=1e-5)
    found.backward()  # into the rows, not into the memory
    assert second.grad.abs().sum() > 0


def test_a_ring_can_take_the_place_of_a_slot_for_each_image():
    made = method(preset="deephash", bank_size=6)
    for start in (0, 4, 8):
        loss(made, torch.randn(4, 16), range(start, start + 4), [0, 1, 2, 3])
    assert sorted(made.memory.ids.tolist()) == [6, 7, 8, 9, 10, 11]


def test_class_weights_come_from_the_training_set():
    table = coloured_table(20, classes=4)  # five of each class: 4 of 19 others are similar
    assert method(table, class_weights="dataset").weights.value == pytest.approx(4 / 19)
    assert method(table, class_weights="constant").weights.value == pytest.approx(19 / 4)
    assert method(table, class_weights="constant", positive_weight=5.0).weights.value == 5.0


def test_losses_are_computed_in_32_bits():
    made = method(preset="deephash", pairs="batch")
    relaxed = torch.randn(8, 16).to(torch.bfloat16)
    found = loss(made, relaxed, range(8), [0, 1, 2, 3] * 2)
    assert found.dtype == torch.float32
    assert float(found) == float(loss(made, relaxed.float(), range(8), [0, 1, 2, 3] * 2))


def test_it_starts_as_published_and_its_hash_layer_learns_ten_times_faster():
    made = method()
    assert float(made.hash_layer.weight.std()) == pytest.approx(0.01, rel=0.1)
    assert not made.hash_layer.bias.any()
    factors = [group.lr_factor for group in made.parameter_groups()]
    assert factors == [1.0, 10.0]
