"""The training loop in plain PyTorch: `Trainer`, what it is told, and what it leaves. It knows no Ray."""

from ray_retrieval.loop.checkpoints import STATE, Outcome, Reporter, read_outcome
from ray_retrieval.loop.config import CheckpointConfig, LogConfig, ProfileConfig, TrainConfig
from ray_retrieval.loop.process import Process
from ray_retrieval.loop.trainer import Trainer
from ray_retrieval.loop.validation import ValidationConfig, ValidationMetric

__all__ = [
    "STATE",
    "CheckpointConfig",
    "LogConfig",
    "Outcome",
    "Process",
    "ProfileConfig",
    "Reporter",
    "TrainConfig",
    "Trainer",
    "ValidationConfig",
    "ValidationMetric",
    "read_outcome",
]
