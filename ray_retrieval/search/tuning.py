"""How hard an approximate search has to look: the least that finds what it is to find.

Efforts are tried in ladders, one for each number of candidates that are compared again, each from little to
much. In a ladder recall does not fall, so the first effort that reaches a target is found by bisection; of
the ladders' firsts the cheapest is taken. What an effort costs is counted in bytes that it looks at, not
timed, so that the same rows come to the same effort on any machine.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple

from ray_retrieval.errors import RecipeError
from ray_retrieval.search.approximate import ApproximateConfig, Structure
from ray_retrieval.search.effort import Effort

_FACTOR, _FACTORS = 16, (4, 16, 64)
_SHORTEST, _LONGEST = 16, 1024  # lists of candidates in a graph

RecallOf = Callable[[Effort], float]
Ladder = tuple[Effort, ...]


class Tried(NamedTuple):
    """An effort and the recall that it was measured to have."""

    effort: Effort
    recall: float


def ladders(
    structure: Structure, effort: Effort, stated: Container[str] = (), *, harder: bool = False
) -> list[Ladder]:
    """The efforts to try.

    Args:
        structure: of any shard; all are of a kind.
        effort: says what is not varied.
        stated: names of what is not, beside what does not count for the kind.
        harder: only efforts that look at least as hard, and this one.
    """

    def values(name: str, counts: bool, known: Iterable[int], own: int) -> list[int]:
        if not counts or name in stated:
            return [own]
        return [own, *(value for value in known if value > own)] if harder else list(known)

    nprobes = values("nprobe", structure.cells > 0, quarters(1, structure.cells), effort.nprobe)
    lists = values("ef_search", structure.graph, quarters(_SHORTEST, _LONGEST), effort.ef_search)
    factors: list[int | None] = [effort.k_factor]
    if structure.compares:
        factors = [*values("k_factor", True, _FACTORS, effort.k_factor or _FACTOR)]
    return [
        tuple(Effort(nprobe=nprobe, ef_search=many, k_factor=factor) for nprobe in nprobes for many in lists)
        for factor in factors
    ]


def quarters(first: int, last: int) -> list[int]:
    """From `first` to `last`: the doubles, and a quarter, a half and three quarters more of each."""
    doubles = (first * 2**power for power in range((last // first).bit_length()))
    return [*sorted({some for one in doubles for n in range(4) if (some := one + n * one // 4) < last}), last]


def cheapest(
    efforts: Sequence[Ladder], structures: Sequence[Structure], recall_of: RecallOf, target: float, hits: int
) -> Tried | None:
    """The effort that reaches a recall at the least cost, or None."""
    reached = [found for ladder in efforts if (found := _first(ladder, recall_of, target)) is not None]

    def cost(tried: Tried) -> float:
        return sum(structure.cost(tried.effort, hits) for structure in structures)

    return min(reached, key=cost, default=None)


def settle(
    config: ApproximateConfig,
    target: float | None,
    structures: Sequence[Structure],
    recall_of: RecallOf,
    hits: int,
) -> Tried:
    """How hard the configured search looks, and what it finds.

    Args:
        config: what is asked for.
        target: recall that is to be reached; None: any will do.
        structures: of all shards.
        recall_of: measures an effort.
        hits: that recall is measured of.

    Raises:
        RecipeError: if the target is not reached; it says what would reach it.
    """
    auto = config.search == "auto"
    tried = None if auto else Tried(config.effort, recall_of(config.effort))
    if tried is not None and (target is None or tried.recall >= target):
        return tried
    assert target is not None
    stated = {name for name in Effort.model_fields if auto and getattr(config, name) is not None}
    efforts = ladders(structures[0], config.effort, stated, harder=not auto)
    found = cheapest(efforts, structures, recall_of, target, hits)
    if auto and found is not None:
        return found
    hardest = found or Tried(efforts[-1][-1], recall_of(efforts[-1][-1]))
    raise _refusal(tried or hardest, target, hits, reaches=found, hardest=hardest)


def raised(
    built: Tried, target: float, structures: Sequence[Structure], recall_of: RecallOf, hits: int
) -> Tried:
    """An effort that reaches a target again, if one does, after the rows have changed."""
    if built.recall >= target:
        return built
    harder = ladders(structures[0], built.effort, harder=True)
    return cheapest(harder, structures, recall_of, target, hits) or built


def _first(ladder: Ladder, recall_of: RecallOf, target: float) -> Tried | None:
    """The first effort of a ladder that reaches the target."""
    low, high, found = 0, len(ladder), None
    while low < high:
        middle = (low + high) // 2
        tried = Tried(ladder[middle], recall_of(ladder[middle]))
        if tried.recall >= target:
            high, found = middle, tried
        else:
            low = middle + 1
    return found


def _refusal(tried: Tried, target: float, hits: int, *, reaches: Tried | None, hardest: Tried) -> RecipeError:
    """What was found, and what would find more."""
    if reaches is not None:
        options = " ".join(
            f"{name}={value}"
            for name, value in reaches.effort.model_dump().items()
            if value != getattr(tried.effort, name)
        )
        mend = f"{options} finds {reaches.recall:.4f}"
    else:
        mend = (
            f"even {_in_words(hardest.effort)} finds {hardest.recall:.4f}: take a kind that compresses less, "
            "or more rows to train on, or search exactly"
        )
    return RecipeError(
        f"it finds {tried.recall:.4f} of the {hits} nearest, {target:g} is asked for",
        where="recall_target",
        mend=mend,
    )


def _in_words(effort: Effort) -> str:
    given = effort.model_dump(exclude_none=True)
    return ", ".join(f"{name}={value}" for name, value in given.items())
