"""Receptive fields against what the gradient of one cell reaches, and locations against a resized ramp."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.resnet import BasicBlock

from ray_retrieval.errors import ModelError
from ray_retrieval.layers.backbones import BackboneConfig, build_stages
from ray_retrieval.layers.receptive_field import ReceptiveField, locations, receptive_field


def linear(network):
    """The same layers with weights that let every pixel count, and averages for maxima: no gradient is 0."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
        if isinstance(layer, nn.MaxPool2d):
            parent, _, leaf = name.rpartition(".")
            pooling = nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding)
            setattr(network.get_submodule(parent), leaf, pooling)
    return network.eval()


def reached(network, height, width, channels=3):
    """Rows of the input that the cell in the middle of the map depends on, and the row of that cell."""
    image = torch.ones(1, channels, height, width, requires_grad=True)
    features = network(image)
    row, column = features.shape[2] // 2, features.shape[3] // 2
    features[0, :, row, column].sum().backward()
    return torch.nonzero(image.grad.abs().sum(dim=(0, 1, 3)) > 0).flatten().tolist(), row


def test_published_numbers_of_resnets():
    with torch.device("meta"):
        for name in ("resnet50", "resnet101"):
            below, above, _, _ = build_stages(BackboneConfig(name=name, weights="none"))
            field = receptive_field(below)
            assert (field.stride, field.offset) == (16, 0)
            if name == "resnet50":
                assert field == ReceptiveField(267, 16, 133)
                assert receptive_field(nn.Sequential(below, above)) == ReceptiveField(427, 32, 213)


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50", "mobilenet_v2"])
def test_a_cell_depends_on_the_pixels_of_its_box_alone(name, stride):
    below = build_stages(BackboneConfig(name=name, weights="none"), stride=stride).below
    field = receptive_field(below)
    rows, cell = reached(linear(below), field.size + 3 * field.stride, 8)
    first = field.stride * cell - field.padding
    assert first >= 0, "the box is within the image"
    assert rows == list(range(first, first + field.size))
    assert np.mean(rows) == field.stride * cell + field.offset


layers = st.one_of(
    st.tuples(st.just("conv"), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)),
    st.tuples(st.just("pool"), st.integers(2, 4), st.integers(1, 3), st.integers(0, 1), st.just(1)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(layers, max_size=4))
def test_any_stack_of_layers_is_what_the_gradient_reaches(stack):
    modules = [
        nn.Conv2d(1, 1, window, stride, padding, dilation, bias=False)
        if kind == "conv"
        else nn.AvgPool2d(window, stride, padding)
        for kind, window, stride, padding, dilation in stack
    ]
    network = linear(nn.Sequential(*modules))
    field = receptive_field(network)
    assume(field.size < 60)
    rows, cell = reached(network, 100, 100, channels=1)
    first = field.stride * cell - field.padding
    # Dilation leaves pixels out between the first and the last, so the box must be within the image.
    assume(first >= 0 and first + field.size <= 100)
    assert (rows[0], rows[-1]) == (first, first + field.size - 1)


@pytest.mark.parametrize("shortcut", [nn.AvgPool2d(2, 2), nn.AvgPool2d(9, 2, 4), nn.Conv2d(4, 4, 8, 2, 3)])
def test_branches_that_are_added_see_what_either_sees(shortcut):
    block = linear(nn.Sequential(BasicBlock(4, 4, stride=2, downsample=shortcut)))
    field = receptive_field(block)
    rows, cell = reached(block, 40, 40, channels=4)
    assert rows == list(range(field.stride * cell - field.padding, rows[0] + field.size))


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 3), nn.Conv2d(1, 1, (3, 5)), nn.Conv2d(1, 1, 3, padding="same")]
)
def test_layers_that_it_is_not_known_of_are_refused(layer):
    with pytest.raises(ModelError):
        receptive_field(nn.Sequential(layer))


def test_locations_by_hand():
    # Cells see pixels -1 to 6, 3 to 10, ...; the image was resized to half its width, a third of its height.
    found = locations(2, 3, ReceptiveField(size=8, stride=4, padding=1), 0.5, 1 / 3)
    assert found.dtype == torch.float32
    expected = [[5.5, 8.5], [13.5, 8.5], [21.5, 8.5], [5.5, 20.5], [13.5, 20.5], [21.5, 20.5]]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert locations(0, 5, ReceptiveField(), 1, 1).shape == (0, 2)


@pytest.mark.parametrize("sides", [(96, 144), (37, 50), (190, 275), (64, 64)])
def test_locations_are_those_that_resizing_gives_pixels(sides):
    """Pixels that hold their own x and y are resized: each cell's location is what is read at its centre."""
    height, width = 96, 144
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    resized = F.interpolate(torch.stack([x, y])[None], size=sides, mode="bilinear", antialias=True)[0]
    field = ReceptiveField(size=35, stride=8, padding=17)
    rows, columns = (sides[0] - 1) // 8 + 1, (sides[1] - 1) // 8 + 1
    expected = resized[:, ::8, ::8]
    found = locations(rows, columns, field, sides[1] / width, sides[0] / height).T.reshape(2, rows, columns)
    # At the borders pixels are means of those within the image alone; elsewhere the weights of a mean are of
    # whole pixels, and a little uneven. Half a pixel of the resized image, forgotten, would be 0.2 or more.
    torch.testing.assert_close(found[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=0.05, rtol=0)


def test_boxes_lie_about_the_centres_of_their_cells():
    field = ReceptiveField(size=16, stride=4, padding=6)
    boxes = field.boxes(3, 5)
    assert boxes[0].tolist() == [-6.5, -6.5, 9.5, 9.5]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    torch.testing.assert_close(centres, locations(3, 5, field, 1, 1))
    assert ((boxes[:, 2:] - boxes[:, :2]) == 16).all()
