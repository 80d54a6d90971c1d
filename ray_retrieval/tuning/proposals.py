"""What the next trial tries."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ray_retrieval.errors import RecipeError
from ray_retrieval.tuning import space
from ray_retrieval.tuning.config import Range, TuneConfig
from ray_retrieval.tuning.ledger import Trial
from ray_retrieval.tuning.space import Parameters

if TYPE_CHECKING:
    import optuna

_AT_RANDOM = 10
"""Optuna's own number of trials before it learns from them; short searches begin earlier."""


def propose(
    config: TuneConfig,
    objectives: dict[str, Literal["max", "min"]],
    trials: Iterable[Trial],
    number: int,
) -> Parameters:
    """The parameters of a trial: a pure function of the search and of what is known of the trials so far.

    Raises:
        RecipeError: if Optuna is asked for and is not installed.
    """
    if config.searcher == "grid":
        return space.from_lists(config, number)
    if config.searcher == "random":
        return space.drawn(config, number)
    with quiet():
        seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
        study = optuna_study(config, objectives, trials, seed=seed)
        asked = study.ask({key: _distribution(values) for key, values in sorted(config.space.items())})
    return {key: _value(values, asked.params[key]) for key, values in config.space.items()}


def require_optuna() -> None:
    """Raise RecipeError if Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise RecipeError(
            "Optuna is not installed",
            where="tune.searcher",
            mend="pip install 'ray_retrieval[tune]', or set it to random",
        ) from None


def optuna_study(
    config: TuneConfig,
    objectives: dict[str, Literal["max", "min"]],
    trials: Iterable[Trial],
    *,
    seed: int,
) -> "optuna.Study":
    """The trials so far as a study of Optuna's, in memory.

    Those that were stopped count as pruned, with what they had measured; those that train as running, so that
    others keep away from them.
    """
    require_optuna()
    import optuna

    ways = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
    sampler = optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=min(_AT_RANDOM, max(2, space.count(config) // 3)),
        constant_liar=True,
    )
    study = optuna.create_study(directions=[ways[mode] for mode in objectives.values()], sampler=sampler)
    # In an order that a recipe does not change, as draws go by it.
    fields = sorted(config.space.items())
    distributions = {key: _distribution(values) for key, values in fields}
    states = {
        "finished": optuna.trial.TrialState.COMPLETE,
        "stopped": optuna.trial.TrialState.PRUNED,
        "failed": optuna.trial.TrialState.FAIL,
        "running": optuna.trial.TrialState.RUNNING,
    }
    for trial in sorted(trials, key=lambda trial: trial.number):
        done = trial.state == "finished" and trial.values is not None
        study.add_trial(
            optuna.trial.create_trial(
                state=states[trial.state],
                params={key: _place(values, trial.parameters[key]) for key, values in fields},
                distributions=distributions,
                values=[trial.values[name] for name in objectives] if done and trial.values else None,
                intermediate_values=dict(trial.curve) if len(objectives) == 1 else None,
            )
        )
    return study


def _distribution(values: Range) -> "optuna.distributions.BaseDistribution":
    from optuna import distributions

    if values.listed is not None:
        return distributions.CategoricalDistribution(range(len(values.listed)))
    assert values.bounds is not None
    low, high = values.bounds
    if values.randint is not None:
        return distributions.IntDistribution(int(low), int(high))
    return distributions.FloatDistribution(low, high, log=values.logarithmic)


def _value(values: Range, asked: Any) -> Any:
    return asked if values.listed is None else values.listed[asked]


def _place(values: Range, value: Any) -> Any:
    """A value as Optuna knows it: those of a list by their places, as they may be of any kind."""
    return value if values.listed is None else values.listed.index(value)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's lines about every trial, and its warnings of what it calls experimental.

    Raises:
        RecipeError: if Optuna is not installed.
    """
    require_optuna()
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
