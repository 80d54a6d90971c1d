"""What every registered method must keep."""

import copy

import numpy as np
import pytest
import torch
from samples import coloured_table, sized

from ray_retrieval import model
from ray_retrieval.descriptors import Form, concatenate
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.methods import METHODS, build
from ray_retrieval.methods.base import Batch, Clock, Method
from ray_retrieval.storage import Folder

CLASSES = 4
BANK = {"hashnet": {"preset": "deephash"}, "xbm": {"warmup_steps": 0}}
"""Settings under which a method has a state beside its parameters."""
ALWAYS = {"gem": {"projection": True, "loss": {"name": "contrastive", "negatives": 2}}}
"""Settings that a method needs for what all are asked here."""


def small(name, **settings):
    backbone = BackboneConfig(name="small", weights="none")
    return sized(name, 13, backbone=backbone, image={"size": 16}, **ALWAYS.get(name, {}), **settings)


def images(count=8):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8))


def built(name, **settings):
    """A method ready to train on 16 images of four classes."""
    method = build(small(name, **settings), classes=CLASSES)
    method.start_training(coloured_table(16, classes=CLASSES), torch.device("cpu"))
    return method


def loss_of(method, pictures, labels):
    batch = Batch.whole(torch.arange(len(labels)), labels)
    return sum(method.objective(method(pictures), batch, Clock(seed=0)).values())


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_parameter_moves_in_one_step(name):
    torch.manual_seed(0)
    method = built(name).train()
    before = {key: value.clone() for key, value in method.named_parameters() if value.requires_grad}
    groups = [parameter for group in method.parameter_groups() for parameter in group.parameters]
    assert {id(p) for p in groups} == {id(p) for p in method.parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(groups, lr=0.1)
    loss_of(method, images(), torch.arange(8) % CLASSES).backward()
    optimizer.step()
    after = dict(method.named_parameters())
    still = [key for key, value in before.items() if torch.equal(value, after[key])]
    assert still == []


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_it_describes_alike(name, tmp_path):
    torch.manual_seed(0)
    config = small(name)
    method = build(config, classes=CLASSES).eval()
    model.save(
        Folder(tmp_path),
        config=config.model_dump(mode="json"),
        weights=method.state_dict(),
        classes=CLASSES,
        class_names=["a", "b", "c", "d"],
        precision="float32",
        training={"epoch": 1},
        metrics={},
    )
    loaded = model.load(str(tmp_path))
    with torch.inference_mode():
        expected, found = method.describe(images()), loaded.method.describe(images())
    assert np.array_equal(expected.data, found.data)
    assert Form.of(found) == loaded.form == config.form
    assert (loaded.form.size, loaded.class_names) == (13, ["a", "b", "c", "d"])
    assert loaded.fingerprint == model.read_model_description(Folder(tmp_path))[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_description_does_not_depend_on_the_batch_around_it(name):
    torch.manual_seed(0)
    method = build(small(name), classes=CLASSES).eval()
    with torch.inference_mode():
        whole = method.describe(images())
        alone = concatenate([method.describe(images()[row : row + 1]) for row in range(8)])
    if whole.data.dtype == np.uint8:
        assert np.array_equal(whole.data, alone.data)
    else:  # a library may add up in another order for another number of images
        np.testing.assert_allclose(whole.data, alone.data, atol=1e-5 if whole.data.itemsize == 4 else 2e-3)


BY_IMAGE = [name for name, (_, method) in METHODS.items() if not method.whole_batches]
"""Methods whose loss is a sum over images; those that pair images are tested on real processes."""


@pytest.mark.parametrize("name", BY_IMAGE)
def test_the_loss_of_shares_averages_to_the_loss_of_the_batch(name):
    torch.manual_seed(0)
    method = built(name).eval()
    pictures, labels = images(), torch.arange(8) % CLASSES
    whole = loss_of(method, pictures, labels)
    parts = []
    for part in (slice(0, 3), slice(3, 8)):  # unequal on purpose
        rows = torch.arange(8)
        batch = Batch(rows[part], labels[part], rows, labels, start=part.start, world=2)
        parts.append(sum(method.objective(method(pictures[part]), batch, Clock(seed=0)).values()))
    assert torch.allclose(sum(parts) / 2, whole, atol=1e-6)


SHUFFLED = [name for name, (_, method) in METHODS.items() if method.plan is Method.plan]
"""Methods that take all images once an epoch; others have tests of their plans of their own."""


@pytest.mark.parametrize("name", SHUFFLED)
def test_a_plan_covers_every_row_once_and_depends_on_seed_and_epoch_alone(name):
    method = build(small(name), classes=CLASSES)
    table = coloured_table(45, classes=CLASSES)
    plan = method.plan(table, 10, Clock(seed=1, epoch=2))
    assert sorted(np.concatenate(plan)) == list(range(45))
    assert {len(batch) for batch in plan} <= {11, 12}
    again = method.plan(table, 10, Clock(seed=1, epoch=2, step=7))
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))
    other = method.plan(table, 10, Clock(seed=1, epoch=3))
    assert not np.array_equal(np.concatenate(plan), np.concatenate(other))


@pytest.mark.parametrize("name", METHODS)
def test_training_state_survives_a_checkpoint(name):
    torch.manual_seed(0)
    settings = BANK.get(name, {})
    method, labels = built(name, **settings).eval(), torch.arange(8) % CLASSES
    loss_of(method, images(), labels)
    saved = copy.deepcopy(method.training_state())
    assert bool(saved) == (name in BANK)
    fresh = built(name, **settings).eval()
    fresh.load_state_dict(method.state_dict())
    fresh.load_training_state(saved)
    assert torch.equal(loss_of(fresh, images(), labels), loss_of(method, images(), labels))


@pytest.mark.parametrize("name", METHODS)
def test_class_probabilities_are_there_or_none(name):
    found = build(small(name), classes=CLASSES).eval().class_probabilities(images())
    assert found is None or torch.allclose(found.sum(dim=1), torch.ones(8))
    assert (found is not None) == (name in ("greedyhash", "delf"))


@pytest.mark.parametrize("name", METHODS)
def test_the_exported_state_holds_parameters_and_buffers_of_the_network_alone(name):
    trained, fresh = built(name, **BANK.get(name, {})), build(small(name), classes=CLASSES)
    loss_of(trained, images(), torch.arange(8) % CLASSES)
    assert trained.state_dict().keys() == fresh.state_dict().keys()
