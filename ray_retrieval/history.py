"""The history of a training: `history.jsonl` in the run's folder, a record for every finished epoch."""

import json
from typing import Any

from ray_retrieval.storage import Folder

HISTORY = "history.jsonl"


class History:
    """What the leading process adds to, and a restart rewrites."""

    def __init__(self, run: Folder) -> None:
        self._run = run
        self._lines: list[str] = []

    def restart(self, records: list[dict[str, Any]]) -> None:
        """Go on after the records of a checkpoint; what was written after it is replaced by what comes."""
        self._lines = [json.dumps(record) for record in records]

    def add(self, record: dict[str, Any]) -> None:
        self._lines.append(json.dumps(record))
        self._run.write_text(HISTORY, "".join(f"{line}\n" for line in self._lines))


def read_history(run: Folder) -> list[dict[str, Any]]:
    """The records of all finished epochs of a run; none before the first.

    Raises:
        ArtefactError: if a line is damaged.
    """
    return [*run.read_json_lines(HISTORY).values()]
