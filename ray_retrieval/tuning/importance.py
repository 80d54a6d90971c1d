"""How much each field that was searched mattered."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from ray_retrieval.tuning.config import Range, TuneConfig
from ray_retrieval.tuning.ledger import Trial
from ray_retrieval.tuning.proposals import optuna_study, quiet

_LEAST = 4
"""Trials with a value that it takes to say anything."""


@dataclass(frozen=True)
class Importance:
    """Shares of the fields in how the trials' values differ.

    Attributes:
        by: how they were found, in a sentence.
        shares: between 0 and 1, the largest first.
    """

    by: str
    shares: dict[str, float]


def importance(
    config: TuneConfig,
    objectives: dict[str, Literal["max", "min"]],
    trials: list[Trial],
) -> Importance | None:
    """The importance of each field for the first objective; None of too few trials or of equal values.

    By functional analysis of variance (Hutter et al., ICML 2014) where Optuna is installed; else by ranks,
    one field at a time. Trials that were stopped count with the best value they had, so it also tells how
    early they were.
    """
    name = next(iter(objectives))
    measured = [trial for trial in trials if trial.values is not None and trial.state != "running"]
    values = np.array([trial.values[name] for trial in measured if trial.values], np.float64)
    if len(measured) < _LEAST or np.ptp(values) == 0:
        return None
    if find_spec("optuna"):
        found = _by_variance(config, {name: objectives[name]}, measured)
    else:
        chosen = {key: [trial.parameters[key] for trial in measured] for key in config.space}
        shares = {key: by_ranks(span, chosen[key], values) for key, span in config.space.items()}
        found = Importance(
            "Share of the variance of the values' ranks that goes with each field alone", shares
        )
    ordered = sorted(found.shares.items(), key=lambda item: -item[1])
    early = sum(trial.state != "finished" for trial in measured)
    counted = f", {early} of which ended early and count with the best they had by then" if early else ""
    return Importance(f"{found.by}, over {len(measured)} trials{counted}", dict(ordered))


def _by_variance(
    config: TuneConfig, objective: dict[str, Literal["max", "min"]], trials: list[Trial]
) -> Importance:
    import optuna

    ended = [Trial(t.number, t.parameters, "finished", t.values) for t in trials]
    with quiet():
        study = optuna_study(config, objective, ended, seed=config.seed)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=config.seed)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    shares = {key: float(found.get(key, 0.0)) for key in config.space}
    return Importance("Functional analysis of variance (fANOVA) of a random forest, by Optuna", shares)


def by_ranks(span: Range, chosen: list[object], values: NDArray[np.float64]) -> float:
    """The share of the variance of the values' ranks that a field explains alone.

    Of numbers it is the square of Spearman's rank correlation, of listed values the correlation ratio η².

    Args:
        span: of the field.
        chosen: what each of n trials had.
        values: [n], what each of them reached.

    Returns:
        From 0 to 1; 0 where all values or all choices are equal.
    """
    ranks = rankdata(values)
    total = float(np.var(ranks))
    if total == 0:
        return 0.0
    if span.listed is not None:
        places = np.array([span.listed.index(value) for value in chosen])
        means = np.array([ranks[places == place].mean() for place in places])
        return float(np.var(means)) / total
    numbers = rankdata(np.array(chosen, np.float64))
    if np.ptp(numbers) == 0:
        return 0.0
    return float(np.corrcoef(numbers, ranks)[0, 1]) ** 2
