"""Dropout over the global batch."""

import torch
from torch import nn

from ray_retrieval.layers.dropout import GlobalDropout, synchronise_dropout


def test_the_shares_of_workers_are_what_one_worker_drops():
    values = torch.randn(12, 7, 3)
    torch.manual_seed(5)
    plain = nn.Dropout(0.4)
    whole = [plain(values), plain(values)]  # two layers in turn
    for start, stop in ((0, 5), (5, 9), (9, 12)):
        (layer,) = synchronise_dropout(nn.Sequential(nn.Dropout(0.4)))
        layer.start, layer.total = start, 12
        torch.manual_seed(5)
        for expected in whole:
            assert torch.equal(layer(values[start:stop]), expected[start:stop])


def test_in_evaluation_nothing_is_dropped():
    layer = GlobalDropout(0.9).eval()
    layer.total = 4
    values = torch.randn(4, 3)
    assert torch.equal(layer(values), values)


def test_without_a_global_batch_it_is_plain_dropout():
    values = torch.ones(4, 300)
    torch.manual_seed(1)
    expected = nn.Dropout(0.5)(values)
    torch.manual_seed(1)
    assert torch.equal(GlobalDropout(0.5)(values), expected)
    assert 200 < int((expected == 0).sum()) < 1000
