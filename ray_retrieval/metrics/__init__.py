"""What is measured, each number with its policy: `hamming` for binary codes."""

from ray_retrieval.metrics.metric import Metric

__all__ = ["Metric"]
