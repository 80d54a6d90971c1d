import os
import platform
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from ray_retrieval import compute, encode
from ray_retrieval.errors import RecipeError


def test_bfloat16_without_instructions_is_warned_of(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.warns(UserWarning, match=r"this cpu has no instructions.*train.precision=float32"):
        compute.warn_of_slow_bf16("bf16", device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute.warn_of_slow_bf16("float32", device)
        compute.warn_of_slow_bf16("auto", device)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        compute.warn_of_slow_bf16("bf16", device)


PASSES = """
import resource
import torch
from ray_retrieval.compute import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
# The heap takes a few turns to grow to what is needed.
print(min(faults() for _ in range(20)))
"""
"""The fewest pages that the system has to find while 64 MiB are asked for, written to and freed."""


IN_A_THREAD = PASSES.replace(
    "print(min(faults() for _ in range(20)))",
    "from concurrent.futures import ThreadPoolExecutor\n"
    "pool = ThreadPoolExecutor(1)\n"
    "print(min(pool.submit(faults).result() for _ in range(20)))",
)


@pytest.mark.parametrize(
    ("passes", "more"), [(PASSES, {}), (IN_A_THREAD, compute.ONE_ARENA)], ids=["first thread", "another"]
)
def test_memory_of_a_pass_is_used_again_by_the_next(passes: str, more: dict[str, str]) -> None:
    if "glibc" not in platform.libc_ver():
        pytest.skip("another C library")
    environment = {name: value for name, value in os.environ.items() if name not in compute._CHOSEN} | more
    done = subprocess.run(
        [sys.executable, "-c", passes], check=True, capture_output=True, text=True, env=environment
    )
    assert int(done.stdout) < 1000  # of 16,384


def test_settings_of_the_environment_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    monkeypatch.setattr("ctypes.CDLL", lambda _name: pytest.fail("the C library was asked"))
    compute.keep_freed_memory()


@pytest.mark.parametrize(("square", "other"), [(True, False), (False, False), (True, True)])
def test_encoders_of_images_of_one_size_keep_it(
    square: bool, other: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    made = SimpleNamespace(one_size=square)
    monkeypatch.setattr(encode, "Encoder", lambda *_given, **_options: made)
    monkeypatch.setattr(encode, "keep_freed_memory", lambda: kept.append(True))
    work = [encode._Work(model, "out") for model in (["model", "another"] if other else ["model"])]
    assert encode._PartEncoder(work, {}, encode.EncodeConfig(), 1)._encoder("model") is made
    assert bool(kept) == (square and not other)


@pytest.mark.parametrize(
    ("name", "message"), [("gpu", "no device is called 'gpu'"), ("cuda:99", "torch finds [0-9]+ GPUs")]
)
def test_a_device_that_is_not_there_is_told_in_one_line(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^device: .*{message}") as caught:
        compute.pick_device(name)
    assert "\n" not in str(caught.value)
    assert compute.pick_device("cpu").type == "cpu"
