"""A recording of some steps by PyTorch's profiler: where the time of a training goes."""

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ray_retrieval.loop.config import ProfileConfig
from ray_retrieval.storage import Folder

PROFILE, TRACE, OPERATORS = "profile", "trace.json", "operators.txt"
_ROWS = 40
"""Operators in the table."""


class Recording:
    """Records steps, and writes them into `profile/` in the run's folder.

    `trace.json` is for chrome://tracing or Perfetto; `operators.txt` lists the operators that took the most
    time. A training that ends earlier leaves what was recorded until then.

    Args:
        config: which steps, counted from now.
        run: the run's folder.
        device: of the training.
    """

    def __init__(self, config: ProfileConfig, run: Folder, device: torch.device) -> None:
        self._folder, self._device = run / PROFILE, device
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # The profiler's own start falls into the last step that is waited for.
        times = schedule(wait=config.wait - 1, warmup=1, active=config.steps, repeat=1)
        self._profiler = profile(activities=activities, schedule=times, on_trace_ready=self._write)
        self._left = config.wait + config.steps
        self._profiler.start()

    def step(self) -> None:
        """Called after every step."""
        if self._left:
            self._left -= 1
            self._profiler.step()
            if not self._left:
                self._profiler.stop()

    def close(self) -> None:
        """End the recording, where it has not ended."""
        if self._left:
            self._left = 0
            self._profiler.stop()

    def _write(self, recorded: profile) -> None:
        with tempfile.TemporaryDirectory(prefix="profile-") as folder:
            trace = Path(folder) / TRACE
            recorded.export_chrome_trace(str(trace))
            self._folder.write_bytes(TRACE, trace.read_bytes())
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=_ROWS)
        self._folder.write_text(OPERATORS, table + "\n")
