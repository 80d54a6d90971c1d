"""The records of a search: `study.json` says what is searched, `trials.jsonl` what came of every trial."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ray_retrieval import recipe as recipes
from ray_retrieval.errors import ArtefactError, RecipeError, RetrievalError
from ray_retrieval.lock import clear
from ray_retrieval.storage import Folder, is_described, read_description, write_description
from ray_retrieval.tuning.space import Parameters

STUDY, TRIALS = "study.json", "trials.jsonl"
DATA = "images"
"""The folder of what was found out about the images before the trials."""
TUNE = "tune"
"""The folder of Ray Tune's own files."""
WRITTEN = frozenset(
    {STUDY, TRIALS, DATA, TUNE, "trials", "model", "recipe.yaml", "metrics.json", "report.html"}
)
"""Everything that a search writes into its folder, by its name there."""
_KIND, _VERSION = "tuning", 1

State = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """One trial as `trials.jsonl` has it, a line each.

    Attributes:
        number: counted from 0; its folder is called after it.
        parameters: values by dotted keys.
        state: `running` is also what a killed search leaves: then it is continued.
        values: of the objectives by name, of the model that the trial keeps; None before the first.
        curve: what was measured of the first measured objective, [epoch, value].
        epochs: trained so far.
        seconds: since it was started, over all attempts.
        failures: how often it failed.
        losses: how often the node was lost that it was on, which is no failure of its own.
        final: whether it would fail alike however often it is tried.
        error: what it failed of the last time, or what stopped it.
        selected: of the model that the trial keeps, the metric that models are selected by.
    """

    number: int
    parameters: Parameters
    state: State = "running"
    values: dict[str, float] | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    epochs: int = 0
    seconds: float = 0.0
    failures: int = 0
    losses: int = 0
    final: bool = False
    error: str | None = None
    selected: float | None = None

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.number:04d}"

    @property
    def folder(self) -> str:
        """Where its run lies in the folder of the search."""
        return f"trials/{self.name}"

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Trial":
        return Trial(**{**values, "curve": [(int(epoch), float(value)) for epoch, value in values["curve"]]})


class Ledger:
    """The trials of a search in its folder, every change of which is written down at once.

    Args:
        folder: of the search.
        identity: what makes it this search and no other, as plain values.
        fresh: begin anew: what is in the folder does not count.
    """

    def __init__(self, folder: Folder, identity: dict[str, Any], *, fresh: bool = False) -> None:
        self.folder, self.identity = folder, identity
        known = [] if fresh else read_trials(folder)
        self.trials: dict[int, Trial] = {trial.number: trial for trial in known}

    def check(self) -> None:
        """Refuse to go on with another search.

        Raises:
            RecipeError: naming what differs from the search in the folder, or that it holds something else.
        """
        if not self.folder.exists(STUDY):
            if _is_foreign(self.folder):
                raise RecipeError(
                    "the output folder holds something that is no search",
                    where=self.folder,
                    mend="choose another output=…",
                )
            return
        old = read_description(self.folder, STUDY, kind=_KIND, version=_VERSION)
        changed = recipes.differences({key: old.get(key) for key in self.identity}, self.identity)
        if changed:
            raise RecipeError(
                f"the folder holds another search ({recipes.in_few_words(changed)})",
                where=self.folder,
                mend="choose another output=… or delete that search with `fresh`",
            )

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Write `study.json` where it is not there yet: what the block adds to the folder is the search's.

        Nothing is left of a search in whose beginning something was found wrong.
        """
        begun, existed = self.folder.exists(STUDY), self.folder.exists()
        if not begun:
            self._describe()
        try:
            yield
        except RetrievalError:
            for name in () if begun else (DATA, STUDY):
                self.folder.remove(name)
            if not existed:
                self.folder.remove()
            raise

    def begin_anew(self) -> None:
        """Delete what an earlier search wrote, with the folder's lock held, and write `study.json` anew.

        Raises:
            RecipeError: if there is something in the folder, but no search.
            ConflictError: if another process works within; then nothing has been deleted.
        """
        refuse_foreign(self.folder)
        # What stays is a search's folder at every moment: what no search writes may be left in it.
        clear(self.folder, "tune", last=TRIALS, only=WRITTEN - {STUDY})
        self._describe()

    def _describe(self, **more: str) -> None:
        body = {**self.identity, **more}
        write_description(self.folder, STUDY, kind=_KIND, version=_VERSION, body=body)

    def keep_beginning(self, images: str, start: str | None) -> None:
        """Note what trials are trained and compared with; until there is one, others take their place.

        Args:
            images: a fingerprint of the images.
            start: that of the model or the weights that trials start from; None where there are none.

        Raises:
            RecipeError: if the search was begun with others.
        """
        given = {"images": images, **({} if start is None else {"start": start})}
        said = self.folder.read_json(STUDY)
        known = {key: said[key] for key in ("images", "start") if self.trials and said.get(key) is not None}
        names = {"images": "training or validation images", "start": "model or weights to start from"}
        for key, value in given.items():
            if known.get(key, value) != value:
                raise RecipeError(
                    f"the {names[key]} are not those that the search was begun with, so its trials would not "
                    "compare",
                    where=self.folder,
                    mend="bring them back, choose another output=… or delete the search with `fresh`",
                )
        if not given.keys() <= known.keys():
            self._describe(**given)

    def write(self) -> None:
        """Bring `trials.jsonl` up to date."""
        lines = [
            json.dumps(asdict(self.trials[number]), ensure_ascii=False) for number in sorted(self.trials)
        ]
        self.folder.write_text(TRIALS, "".join(f"{line}\n" for line in lines))

    def in_order(self) -> list[Trial]:
        """All trials by their numbers."""
        return [self.trials[number] for number in sorted(self.trials)]


def read_trials(folder: Folder) -> list[Trial]:
    """The trials of the search in a folder, by their numbers; none before the first.

    Raises:
        ArtefactError: if a line of `trials.jsonl` is none of ours.
    """
    found = []
    for number, record in folder.read_json_lines(TRIALS).items():
        try:
            found.append(Trial.from_json(record))
        except (ValueError, TypeError, KeyError):
            raise ArtefactError(
                f"line {number} does not describe a trial", where=f"{folder}/{TRIALS}", mend="remove the line"
            ) from None
    return found


def refuse_foreign(folder: Folder) -> None:
    """Raise RecipeError if there is something in a folder that is no search: it must not be deleted."""
    if _is_foreign(folder):
        raise RecipeError(
            "the output folder holds something that is no search, so `fresh` does not delete it",
            where=folder,
            mend="choose another output=…",
        )


def _is_foreign(folder: Folder) -> bool:
    """Whether there is something in a folder that no search left: each begins with `study.json`."""
    if not folder.exists(STUDY):
        return bool(folder.names())
    return not is_described(folder, STUDY, kind=_KIND)


def front(trials: Iterable[Trial], objectives: dict[str, Literal["max", "min"]]) -> list[Trial]:
    """The trials of which no other one is at least as good in all objectives and better in one, best first.

    They are of those that ran to their end, or if none did, of those that were stopped. With one objective
    they are the best trial, and those that equal it. Ordered by the objectives one after another, then by
    their numbers.
    """
    measured = [trial for trial in trials if trial.values is not None]
    for state in ("finished", "stopped"):
        those = [(trial, _gains(trial, objectives)) for trial in measured if trial.state == state]
        if those:
            best = [pair for pair in those if not any(_dominates(other, pair[1]) for _, other in those)]
            best.sort(key=lambda pair: ([-gain for gain in pair[1]], pair[0].number))
            return [trial for trial, _ in best]
    return []


def _gains(trial: Trial, objectives: dict[str, Literal["max", "min"]]) -> list[float]:
    """The objectives so that more is better."""
    assert trial.values is not None
    return [trial.values[name] * (1 if mode == "max" else -1) for name, mode in objectives.items()]


def _dominates(one: list[float], other: list[float]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))
