"""Trials' parameters: drawn or taken in turn, each a pure function of the seed and the trial's number.

Which trial has which does not depend on the order in which a recipe names the fields.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ray_retrieval.tuning.config import Range, TuneConfig

Parameters = dict[str, Any]
"""Values by dotted keys."""

_TRIALS = 12
_CHECKED = 256
"""Combinations of listed values that are looked at before anything starts."""


def count(config: TuneConfig) -> int:
    """How many trials a search has."""
    if config.searcher == "grid":
        whole = math.prod(len(values.listed or ()) for values in config.space.values())
        return min(whole, config.trials or whole)
    return config.trials or _TRIALS


def from_lists(config: TuneConfig, number: int) -> Parameters:
    """The combination of a number, from 0, of all lists' values; the last key by alphabet varies fastest."""
    found: Parameters = {}
    for key, values in sorted(config.space.items(), reverse=True):
        assert values.listed is not None, "a grid has lists only"
        number, place = divmod(number, len(values.listed))
        found[key] = values.listed[place]
    return {key: found[key] for key in config.space}


def drawn(config: TuneConfig, number: int) -> Parameters:
    """The parameters of a number: grids in turn, the others drawn from their ranges."""
    generator = np.random.default_rng([config.seed, number])
    found: Parameters = {}
    turn = number
    for key, values in sorted(config.space.items()):
        if values.grid is not None:
            turn, place = divmod(turn, len(values.grid))
            found[key] = values.grid[place]
        else:
            found[key] = _draw(values, generator)
    return {key: found[key] for key in config.space}


def _draw(values: Range, generator: np.random.Generator) -> Any:
    if values.choice is not None:
        return values.choice[int(generator.integers(len(values.choice)))]
    if values.randint is not None:
        return int(generator.integers(*values.randint, endpoint=True))
    assert values.bounds is not None
    low, high = values.bounds
    if not values.logarithmic:
        return float(generator.uniform(low, high))
    drawn_value = math.exp(generator.uniform(math.log(low), math.log(high)))
    return float(min(max(drawn_value, low), high))


def to_check(config: TuneConfig) -> Iterator[Parameters]:
    """Parameters that have to make a valid recipe before a search starts.

    Of a grid all trials. Else all combinations of listed values, with the middle of each range; where they
    are too many, each value once, with the first of the other lists. At last a number of each range that is
    not whole, as those are that will be drawn, be the middle one or not.
    """
    if config.searcher == "grid":
        yield from (from_lists(config, number) for number in range(count(config)))
        return
    middle = {key: _middle(values) for key, values in config.space.items()}
    lists = {key: values.listed for key, values in config.space.items() if values.listed is not None}
    if math.prod(map(len, lists.values())) <= _CHECKED:
        for chosen in itertools.product(*lists.values()):
            yield middle | dict(zip(lists, chosen, strict=True))
    else:
        yield middle
        for key, listed in lists.items():
            yield from (middle | {key: value} for value in listed)
    parts = {key: values.uniform or values.loguniform for key, values in config.space.items()}
    if any(parts.values()):
        yield middle | {
            key: bounds[0] + (bounds[1] - bounds[0]) / math.pi for key, bounds in parts.items() if bounds
        }


def _middle(values: Range) -> Any:
    if values.listed is not None:
        return values.listed[0]
    assert values.bounds is not None
    low, high = values.bounds
    if values.randint is not None:
        return (int(low) + int(high)) // 2
    return math.sqrt(low * high) if values.logarithmic else (low + high) / 2
