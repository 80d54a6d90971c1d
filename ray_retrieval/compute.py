"""What the machine computes with: device, precision, threads."""

import ctypes
import os
import platform
import sys
import warnings
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from ray_retrieval.cores import cores
from ray_retrieval.errors import RecipeError

Precision = Literal["auto", "bf16", "float32"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of the GNU C library
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")

ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""What the environment of a process says whose threads take memory where the first does, and keep it too.
The C library reads it once, so a process of Ray has to be started with it."""


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is the current GPU where there is one, else the processor.

    Raises:
        RecipeError: if there is none of that name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(
            f"no device is called {name!r}",
            where="device",
            mend="known are auto, cpu, cuda, cuda:1 and so on",
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"{name} is asked for, and torch finds {torch.cuda.device_count()} GPUs",
            where="device",
            mend="give auto or cpu",
        )
    return device


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bfloat16; `auto` does where the hardware has instructions for it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def warn_of_slow_bf16(precision: Precision, device: torch.device) -> None:
    """Warn where a model is going to describe images in bfloat16 without instructions for it."""
    if uses_bf16(precision, device) and not uses_bf16("auto", device):
        warnings.warn(
            f"the model describes images in bfloat16, for which this {device.type} has no instructions: that "
            "may take ten times as long as in float32. Its export to ONNX computes in float32, or train with "
            "train.precision=float32",
            stacklevel=3,
        )


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The context in which a network computes at that precision."""
    context: AbstractContextManager[None] = torch.autocast(
        device.type, torch.bfloat16, enabled=uses_bf16(precision, device)
    )
    return context


def keep_freed_memory() -> None:
    """Let this process use the memory that it frees again, for one that does the same pass over and over.

    The GNU C library gives large blocks back to the system when they are freed, and the system clears every
    page of those that are asked for next: a third of the time in which a processor describes images, whose
    maps come and go layer by layer. Kept instead, the process stays as large as it has been at most, and
    passes of ever other sizes would let it grow. Nothing is done where the environment has settings of
    malloc's, and where there is another C library. Passes in another thread than the first need
    `ONE_ARENA` besides.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _CHOSEN):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def place(module: nn.Module, device: torch.device) -> None:
    """Move a network to a device, its convolutions in the memory format that is fastest there."""
    module.to(device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def describe_machine() -> str:
    """One line for reports: cores, architecture, accelerator."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cores()} cores, {platform.machine()}, {gpu}"
