"""The book of benchmarks: what a script claims, and what the scripts have in common.

A script calls `claim` for every ratio that it stands for. `run.py` names a file in the environment, to which
each is added as a line of JSON, and makes one table of the claims of all scripts; a script that is run by
itself prints its own tables, and its claims go nowhere.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLAIMS = "BENCHMARK_CLAIMS"
"""The variable that names the file."""
SAMPLE_S = 0.5
"""Seconds for which it is watched what others use."""
_GOAL = re.compile(r"(>=|<=) (\d+(?:\.\d+)?)")


def claim(
    what: str, *, peer: str, ratio: float, goal: str | None = None, detail: str = "", headline: bool = False
) -> None:
    """Record one ratio, if a file is named for it.

    Args:
        what: is measured, with its sizes, and what the ratio is of.
        peer: or limit, that is compared with. One claim is made against a peer once.
        ratio: the number.
        goal: `>= 3` or `<= 1.1`; None where there is none at these sizes.
        detail: a few words more, such as the times.
        headline: whether the README has it.

    Raises:
        ValueError: if the ratio is not finite, the goal of another form, or a text does not fit in a table.
    """
    if not math.isfinite(ratio):
        raise ValueError(f"the ratio of '{what}' is {ratio}")
    for text in (what, peer, detail):
        if "|" in text or "\n" in text:
            raise ValueError(f"a cell of a table has neither '|' nor line breaks, found {text!r}")
    reached = None if goal is None else is_reached(ratio, goal)
    _write(
        {
            "claim": what,
            "peer": peer,
            "ratio": float(ratio),
            "goal": goal,
            "reached": reached,
            "detail": detail,
            "headline": headline,
        }
    )


def skipped(why: str) -> None:
    """Say that nothing can be measured here, such as for want of a GPU; the table says so as well."""
    print(f"not measured: {why}")
    _write({"skipped": why})


def is_reached(ratio: float, goal: str) -> bool:
    """Whether a ratio is as a goal says.

    Raises:
        ValueError: if the goal is not of the form `>= 3` or `<= 1.1`.
    """
    found = _GOAL.fullmatch(goal)
    if found is None:
        raise ValueError(f"a goal is of the form '>= 3' or '<= 1.1', found '{goal}'")
    bound = float(found[2])
    return ratio >= bound if found[1] == ">=" else ratio <= bound


def arguments(doc: str | None, short: str) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring, with `--short`.

    Args:
        doc: of the script.
        short: what is less in the short form.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=short)
    return parser


@contextmanager
def measuring(what: str) -> Iterator[None]:
    """Print the machine and what is measured.

    A script that runs by itself prints how many processors others use, before and after; else `run.py` does.
    """
    from ray_retrieval.compute import describe_machine  # and PyTorch, which not every script needs
    from ray_retrieval.cores import cores

    if os.environ.get(CLAIMS):
        print(f"{describe_machine()}; {what}\n", flush=True)
        yield
        return
    print(f"{describe_machine()}; {what}; others use {others():.1f} of {cores()} processors\n", flush=True)
    yield
    print(f"\nafter it others use {others():.1f}", flush=True)


def on_threads(count: int) -> str:
    """In words."""
    return "1 thread" if count == 1 else f"{count} threads"


def others(tries: int = 1) -> float:
    """How many processors, of those that this process may use, others keep at work while it waits.

    The mean of half a second. The load of the last minute would count what this process or the script before
    it has just done.

    Args:
        tries: how often it is measured at most. The least counts: what has just ended may still be clearing
            up. It ends with the first time that the machine is quiet.
    """
    import psutil

    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    least = math.inf
    for _ in range(tries):
        shares = psutil.cpu_percent(interval=SAMPLE_S, percpu=True)
        least = min(least, sum(share for number, share in enumerate(shares) if number in allowed) / 100)
        if not is_busy(least):
            break
    return least


def is_busy(used: float) -> bool:
    """Whether others use more processors than a measurement bears: a tenth of those that there are."""
    from ray_retrieval.cores import cores

    return used > 0.1 * cores()


def machine() -> str:
    """One line: cores, architecture, accelerator, the processor if it has a name, its vector instructions."""
    import torch

    from ray_retrieval.compute import describe_machine

    vectors = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{describe_machine()}, {vectors}"
    return f"{describe_machine()}, {name}, {vectors}"


def _write(record: dict[str, object]) -> None:
    file = os.environ.get(CLAIMS)
    if file:
        with Path(file).open("a") as stream:
            stream.write(json.dumps(record) + "\n")
