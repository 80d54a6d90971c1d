"""On the driver: what Tune asks of a search, answered by `tuning.handout`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.tune import Stopper
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ray_retrieval.cluster.meanwhile import environment, quiet
from ray_retrieval.tuning.handout import Handout

_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one has a table even where it is asked to be silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the records are ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, and the same command goes on
}


class HandingOut(Searcher):
    """Hands out the trials' numbers, and hears how each ended.

    Args:
        handout: of the search.
        following: hears of trials what a searcher does not.
    """

    def __init__(self, handout: Handout, following: "Following") -> None:
        super().__init__()
        self._handout, self._following = handout, following

    def suggest(self, trial_id: str) -> Any:
        number = self._handout.next(trial_id, self._following.known())
        if number is not None:
            return {"number": number}
        return Searcher.FINISHED if self._handout.over else None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            self._handout.lost(trial_id, *self._following.loss)
        else:
            self._handout.ended(trial_id, result or {})

    def get_state(self) -> dict[str, Any]:
        return {}  # the ledger has it all

    def set_state(self, state: dict[str, Any]) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Following(FIFOScheduler):
    """Stops the trials that `tuning.stopping` says.

    Args:
        handout: of the search.
        node: the driver's, without which there is no search.
    """

    def __init__(self, handout: Handout, node: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._handout, self._node = handout, node
        self._controller: Any = None
        self._nodes: dict[str, str] = {}
        self.loss: tuple[str, str | None] = ("", None)
        """What Ray says of the process that was lost last, and its node, if not the driver's."""

    def known(self) -> set[str]:
        """The ids of the trials that Tune has not ended; of some it does not say that it has."""
        trials = [] if self._controller is None else self._controller.get_trials()
        return {trial.trial_id for trial in trials if not trial.is_finished()}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:  # noqa: ARG002
        self._controller = tune_controller

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:  # noqa: ARG002
        file = trial.error_file
        reason = Path(file).read_text() if file and Path(file).is_file() else ""
        node = self._nodes.get(trial.trial_id)
        self.loss = (reason, None if node == self._node else node)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        if "node" in result:
            self._nodes[trial.trial_id] = result["node"]
        if "report" not in result:
            return str(TrialScheduler.CONTINUE)
        stop = self._handout.reported(trial.trial_id, result["report"])
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Ending(Stopper):
    """Stops everything where the records cannot be written."""

    def __init__(self, handout: Handout) -> None:
        self._handout = handout

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        return self._handout.error is not None

    def __getstate__(self) -> dict[str, Any]:
        return {}


@contextmanager
def settings() -> Iterator[None]:
    """Tune with our settings, without lines about itself, and without keys in what it starts.

    It gives the AWS keys of this process's environment to every trial, by which they get into Ray's logs and
    its dashboard. As other work on a cluster, trials have what the node or the job has.
    """
    passed = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in passed if not name.startswith("AWS_")}
    try:
        with environment(_SETTINGS), quiet("ray.tune", below=logging.CRITICAL):
            yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE = passed
