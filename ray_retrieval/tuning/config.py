"""What a recipe says of a search for hyperparameters."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ray_retrieval.config import Config, read_number
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.loop.validation import MEASURED

SIZES = ("bits", "dimension")
"""Objectives that no validation measures: the size of the descriptors, of which less is better."""
SHARED = (
    "start",
    "validation",
    "workers",
    "threads",
    "cache_memory",
    "checkpoint",
    "log",
    "tensorboard",
    "profile",
    "max_failures",
)
"""Fields of `train` that all trials share: they change no model, or how models are compared."""

Value = Annotated[Any, BeforeValidator(read_number)]


class Range(Config):
    """The values that one field may take; exactly one key says which."""

    uniform: tuple[float, float] | None = None
    """Any number from the first to the second, each as likely."""
    loguniform: tuple[float, float] | None = None
    """The same of their logarithms: for rates and penalties, whose size is unknown."""
    randint: tuple[int, int] | None = None
    """A whole number from the first to the second, both included."""
    choice: tuple[Value, ...] | None = Field(default=None, min_length=1)
    """One of these values."""
    grid: tuple[Value, ...] | None = Field(default=None, min_length=1)
    """Every one of these values in turn, with every one of the other fields' grids."""

    @model_validator(mode="after")
    def _check(self) -> "Range":
        given = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(given) != 1:
            kinds = ", ".join(type(self).model_fields)
            raise ValueError(f"state one of {kinds}, got {' and '.join(given) or 'none'}")
        if self.bounds is None:
            return self
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"'{given[0]}' goes from a lower to a higher number, got [{low}, {high}]")
        if self.loguniform is not None and low <= 0:
            raise ValueError(f"'loguniform' has positive numbers only, got [{low}, {high}]")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest number; None where values are listed."""
        return self.uniform or self.loguniform or self.randint

    @property
    def listed(self) -> tuple[Any, ...] | None:
        """The values of a choice or grid; None of a range of numbers."""
        return self.choice or self.grid

    @property
    def logarithmic(self) -> bool:
        return self.loguniform is not None


class TuneConfig(Config):
    """A search: `ray-retrieval tune` trains the recipe with several values of some of its fields."""

    space: dict[str, Range] = Field(min_length=1)
    """Fields of `method` and `train` by their dotted keys, each with the values that it may take:
    `{method.loss.margin: {uniform: [0.1, 1.0]}}`. Data and seed are the same in all trials, whose values
    would not compare otherwise."""
    metric: str | tuple[str, ...] | None = None
    """What is looked for: a metric of the validation queries, or `bits` of codes, or `dimension` of vectors;
    several for the trials of which no other one is better in all. Unset: the recipe's
    `train.validation.metric`."""
    mode: Literal["max", "min"] | tuple[Literal["max", "min"], ...] | None = None
    """Whether more or less of it is better, for each. Unset: more, but of `bits` and `dimension` less."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """How values are chosen: drawn, all combinations of lists in turn, or by Optuna from the trials so far
    (TPE, which needs the extra `tune`)."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Which trials are stopped before their end: those that are not among the best of all trials at the same
    epoch (asha), those that were never as good as the others' median (median), or none. `none` where there
    are several metrics."""
    grace: int = Field(default=1, ge=1)
    """Epochs that every trial may train before it can be stopped."""
    reduction: int = Field(default=3, ge=2)
    """Of asha: one trial in so many goes on past `grace` epochs, past `reduction` times as many, and on."""
    trials: int | None = Field(default=None, ge=1)
    """How many; unset: 12, or with a grid all combinations."""
    concurrent: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Trials that train at the same time; `auto`: as many as the cluster has room for, also when it grows. A
    trial on a processor counts with its cache of images and a gigabyte of memory: set it where networks need
    more."""
    workers: int = Field(default=1, ge=1)
    """Processes that train one trial together, in place of `train.workers`."""
    max_failures: int = Field(default=1, ge=0)
    """How often a trial that failed is tried again; the loss of the node that it was on is no failure."""
    seed: int = Field(default=0, ge=0)
    """Determines what is drawn; the seed of the trainings is the recipe's."""
    evaluate: bool = True
    """Encode, index and measure the best trial on the test queries when the search has ended."""

    @model_validator(mode="after")
    def _check(self) -> "TuneConfig":
        for key, values in self.space.items():
            section, _, field = key.partition(".")
            if section not in ("method", "train") or not field:
                raise ValueError(
                    f"'space' has fields of 'method' and 'train', such as 'method.bits', got '{key}'"
                )
            if section == "train" and field.split(".")[0] in SHARED:
                raise ValueError(f"'{key}' is the same in all trials; it cannot be in 'space'")
            if self.searcher == "grid" and values.listed is None:
                raise ValueError(f"the searcher is grid, so '{key}' needs a list: 'grid' or 'choice'")
            if self.searcher == "optuna" and values.grid is not None:
                raise ValueError(f"'{key}' has a grid, which optuna does not search: make it a 'choice'")
        if isinstance(self.mode, tuple) and len(self.mode) != len(self._metrics):
            raise ValueError(f"{len(self._metrics)} metrics need as many modes, got {len(self.mode)}")
        if len(set(self._metrics)) != len(self._metrics) or self.metric == ():
            raise ValueError("'metric' names one metric or several different ones")
        if len(self._metrics) > 1 and self.scheduler != "none":
            raise ValueError(
                f"'scheduler' is none where there are several metrics: {self.scheduler} compares by one"
            )
        return self

    @property
    def _metrics(self) -> tuple[str | None, ...]:
        return self.metric if isinstance(self.metric, tuple) else (self.metric,)

    def check_metrics(self, kind: DescriptorKind, selected_by: str) -> None:
        """Raise ValueError if a metric is not measured on validation queries.

        Args:
            kind: of the descriptors.
            selected_by: the recipe's `train.validation.metric`.
        """
        known = [*MEASURED[kind], "bits" if kind is DescriptorKind.CODES else "dimension"]
        for name in self._metrics:
            if name is not None and name not in known:
                raise ValueError(f"'tune.metric' is one of {', '.join(known)} for {kind.value}, got '{name}'")
            if name == "accuracy" != selected_by:  # which is not measured of every benchmark
                raise ValueError("'tune.metric' is accuracy only where 'train.validation.metric' is")
        if all(name in SIZES for name in self._metrics):
            raise ValueError("'tune.metric' needs something that is measured on validation queries")

    def objectives(self, selected_by: str) -> dict[str, Literal["max", "min"]]:
        """What is looked for, and which way.

        Args:
            selected_by: the recipe's `train.validation.metric`.
        """
        names = [name or selected_by for name in self._metrics]
        modes = self.mode if isinstance(self.mode, tuple) else [self.mode] * len(names)
        return {
            name: mode or ("min" if name in SIZES else "max") for name, mode in zip(names, modes, strict=True)
        }

    def identity(self) -> dict[str, Any]:
        """What two starts of one search have in common; it may go on with more trials, or elsewhere."""
        kept = {"space", "metric", "mode", "searcher", "scheduler", "grace", "reduction", "seed"}
        return self.model_dump(mode="json", include=kept, exclude_none=True)
