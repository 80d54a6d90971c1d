"""The trials under the ids by which Tune knows them."""

import json
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

from ray_retrieval.errors import RetrievalError
from ray_retrieval.tuning.reports import Report
from ray_retrieval.tuning.trials import Trials

_LOST = "the process of the trial was lost"
_NODE_LOST = "the node of the trial was lost"
_IN_DOUBT_S = 30.0
"""Seconds until a lost process is taken for its own loss: that of its node is noticed later."""


class Handout:
    """Hands out the trials' numbers, and takes in what becomes of them.

    Args:
        trials: of the search.
        room: how many may train at the same time, which may change.
        ended: called with how many more have ended for good.
        alive: whether a node is there, by its id.

    Attributes:
        error: what kept the records from being written; then nothing is handed out any more. Raised in Tune's
            own calls, it would be lost in an error of Tune's.
    """

    def __init__(
        self,
        trials: Trials,
        room: Callable[[], int],
        ended: Callable[[int], None],
        *,
        alive: Callable[[str], bool] = lambda _node: True,
    ) -> None:
        self.error: RetrievalError | None = None
        self._alive = alive
        self._in_doubt: dict[str, tuple[float, str, str | None]] = {}
        self._trials, self._room, self._have_ended = trials, room, ended
        self._left = trials.left
        self._numbers: dict[str, int] = {}

    @property
    def over(self) -> bool:
        """Whether nothing will be handed out any more."""
        return self.error is not None or self._trials.left == 0

    def next(self, trial_id: str, known: Set[str]) -> int | None:
        """The number of a trial to train now; None where there is none, or no room.

        Args:
            trial_id: Tune's, of the new one.
            known: the ids of the trials that Tune has not ended.
        """
        if self.error is not None:
            return None
        with self._noting():
            self._judge_losses()
            for dropped in self._numbers.keys() - known - self._in_doubt.keys():
                self._end(dropped, _LOST)
            if self._trials.running < self._room():
                trial = self._trials.next()
                self._count()
                if trial is not None:
                    self._numbers[trial_id] = trial.number
                    return trial.number
        return None

    def reported(self, trial_id: str, report: str) -> bool:
        """Take in what a trial has measured; whether it is to stop."""
        stops = True
        if self.error is None:
            with self._noting():
                stops = self._trials.reported(self._numbers[trial_id], Report(**json.loads(report)))
        return stops

    def ended(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note that a trial has ended: by itself, by being stopped, or with a failure that it has told."""
        if self.error is not None:
            return  # it was stopped by that, and goes on with the next start
        with self._noting():
            if "failure" in result:
                self._end(trial_id, **json.loads(result["failure"]))
            else:
                self._trials.completed(self._numbers.pop(trial_id))
                self._count()

    def lost(self, trial_id: str, reason: str, node: str | None = None) -> None:
        """Note that the process of a trial was lost.

        Args:
            trial_id: Tune's.
            reason: what Ray says.
            node: that it was on; None where that is known to be there.
        """
        if self.error is not None:
            return
        own = _LOST
        if "low on memory" in reason:
            own, node = f"{_LOST}: its node ran low on memory", None
        elif "Traceback" in reason:  # in what surrounds our own code in it
            own, node = f"{_LOST}: {reason.strip().splitlines()[-1]}", None
        until = time.monotonic() + (0 if node is None else _IN_DOUBT_S)
        self._in_doubt[trial_id] = (until, own, node)
        with self._noting():
            self._judge_losses()

    def _judge_losses(self) -> None:
        """End the trials whose processes were lost, as soon as it is clear by what."""
        for trial_id, (until, own, node) in list(self._in_doubt.items()):
            gone = node is not None and not self._alive(node)
            if gone or time.monotonic() >= until:
                del self._in_doubt[trial_id]
                self._end(trial_id, _NODE_LOST if gone else own, node_lost=gone)

    def _end(self, trial_id: str, error: str, **how: bool) -> None:
        self._trials.failed(self._numbers.pop(trial_id), error, **how)
        self._count()

    def _count(self) -> None:
        before, self._left = self._left, self._trials.left
        if before != self._left:
            self._have_ended(before - self._left)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep the first error of the records."""
        try:
            yield
        except RetrievalError as error:
            self.error = error
