"""Losses of tuples (query, positive, several mined negatives): one value a tuple.

They are sums over the pairs of a tuple, not means, and the published learning rates are for their sum over
the tuples of a step, which the caller forms.

Reference: Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019, eq. 5
(contrastive); Arandjelovic et al., NetVLAD, CVPR 2016, section 4 (triplets of squared distances). Constants
and margins as in cirtorch, the authors' code.
"""

import torch
from torch import Tensor

_INSIDE_DISTANCE = 1e-6
"""Added to every difference of coordinates, so that the distance of equal vectors has a gradient."""


def contrastive_tuple_losses(
    queries: Tensor, positives: Tensor, negatives: Tensor, *, margin: float = 0.85
) -> Tensor:
    """½ ‖q − p‖² + ½ Σ_j max(0, margin − ‖q − n_j‖)² of each tuple.

    Args:
        queries: float [t, d], unit vectors, in float32 or wider.
        positives: [t, d].
        negatives: [t, n, d]; n may be 0.
        margin: distance within which a negative pushes. Published: 0.7 for AlexNet, 0.75 for VGG, 0.85 for
            ResNet-101, and about twice as much with a learned projection as the last layer.

    Returns:
        Float [t].
    """
    near = distances(queries, positives)
    far = distances(queries[:, None], negatives)
    return 0.5 * near.square() + 0.5 * (margin - far).clamp(min=0).square().sum(dim=1)


def triplet_tuple_losses(
    queries: Tensor, positives: Tensor, negatives: Tensor, *, margin: float = 0.1
) -> Tensor:
    """Σ_j max(0, ‖q − p‖² − ‖q − n_j‖² + margin) of each tuple: its positive is paired with every negative.

    Args:
        queries: float [t, d], unit vectors, in float32 or wider.
        positives: [t, d].
        negatives: [t, n, d]; n may be 0, which leaves no loss.
        margin: in squared distances. Published: 0.1 by default, 0.5 in the recipes of ResNets.

    Returns:
        Float [t].
    """
    near = (queries - positives).square().sum(dim=1, keepdim=True)
    far = (queries[:, None] - negatives).square().sum(dim=2)
    return (near - far + margin).clamp(min=0).sum(dim=1)


def distances(vectors: Tensor, others: Tensor) -> Tensor:
    """‖v − o + 1e-6‖ over the last axis, the 1e-6 in every coordinate, as in the code of the authors.

    Args:
        vectors: float [..., d].
        others: [..., d].
    """
    found: Tensor = torch.linalg.vector_norm(vectors - others + _INSIDE_DISTANCE, dim=-1)
    return found
