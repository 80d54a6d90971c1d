"""Checkpoints in a folder, local or a store's, each whole once its last file is there: `state.json`."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ray_retrieval.loop.checkpoints import STATE
from ray_retrieval.storage import Folder


def put(folder: Folder, name: str, write: Callable[[Path], None], *, keep: int) -> None:
    """Add a checkpoint, and delete all but the newest ones.

    Args:
        folder: of the checkpoints.
        name: of the new one; the numbers in it are higher than those of the others, the first ones first.
        write: fills a local folder.
        keep: how many stay.
    """
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as made:
        write(Path(made))
        for file in sorted(Path(made).iterdir(), key=lambda file: file.name == STATE):
            with file.open("rb") as source, (folder / name).writing(file.name) as target:
                shutil.copyfileobj(source, target)
    for old in sorted(folder.names(), key=_numbers)[:-keep]:
        (folder / old).remove(STATE)  # first: what is half deleted is no checkpoint
        (folder / old).remove()


def fetch_newest(folder: Folder, into: Path) -> Path | None:
    """Copy the newest whole checkpoint into a local folder; returns where, None where there is none."""
    whole = [name for name in folder.names() if (folder / name).exists(STATE)]
    if not whole:
        return None
    name = max(whole, key=_numbers)
    newest, local = folder / name, into / name
    local.mkdir(parents=True, exist_ok=True)
    for file in newest.names():
        with newest.reading(file) as source, (local / file).open("wb") as target:
            shutil.copyfileobj(source, target)
    return local


def _numbers(name: str) -> list[int]:
    """A key that sorts epoch 9999 before epoch 10000."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


def newer(one: Path | None, other: Path | None) -> Path | None:
    """The local checkpoint that has come further, the first if both have come as far."""
    if one is None or other is None:
        return one or other
    return other if _step(other) > _step(one) else one


def _step(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / STATE).read_text())["step"])
