"""Batch normalisation: in training over the whole global batch, and in use inside the convolutions before it.

`torch.nn.SyncBatchNorm` runs on GPUs only. With statistics of each worker's share alone, the same recipe
trains differently on one and on two workers; with these, on any backend of torch.distributed, the gradients
are those of one process.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ray_retrieval.workers import several, sum_over_workers


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of the batches of all workers together.

    Called on float [n, channels, h, w], it gives the same; statistics are in float32 or wider.
    """

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or not several():
            return super().forward(images)
        wide = images if images.dtype == torch.float64 else images.float()
        count = wide.new_tensor([wide.numel() / wide.shape[1]])
        sums = sum_over_workers(torch.cat([wide.sum(dim=(0, 2, 3)), count]))
        mean, total = sums[:-1] / sums[-1], sums[-1].detach()
        centred = wide - mean[:, None, None]
        variance = sum_over_workers(centred.square().sum(dim=(0, 2, 3))) / total
        self._update_running(mean.detach(), variance.detach() * total / (total - 1))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        normalised = centred * scale[:, None, None]
        if self.bias is not None:
            normalised = normalised + self.bias[:, None, None]
        return normalised.to(images.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def synchronise_batch_norm(module: nn.Module) -> None:
    """Make every `nn.BatchNorm2d` inside use the statistics of the global batch; parameters stay in place."""
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = GlobalBatchNorm2d


def fold_batch_norm(module: nn.Module) -> None:
    """Give the convolutions inside the batch normalisations that follow them, which then cost nothing.

    In evaluation mode the maps stay what they were but for rounding. Parameters of both are replaced.

    Args:
        module: in evaluation mode. What is folded of it are `nn.Sequential` and torchvision's ResNets.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # see `layers.backbones`

    # Of these it is known that they call their layers in the order in which they hold them.
    in_order = (nn.Sequential, ResNet, BasicBlock, Bottleneck)
    for block in [one for one in module.modules() if isinstance(one, in_order)]:
        for (name, layer), (behind, norm) in pairwise(block.named_children()):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(block, name, fuse_conv_bn_eval(layer, norm))
                setattr(block, behind, nn.Identity())
