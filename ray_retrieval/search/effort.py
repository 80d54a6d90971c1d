"""How hard an approximate search looks."""

from collections.abc import Collection

from pydantic import Field

from ray_retrieval.config import Config
from ray_retrieval.errors import RecipeError


class Effort(Config):
    """How hard a search looks for candidates."""

    nprobe: int = Field(default=64, ge=1)
    """Cells that are visited, of kinds that divide the rows into cells (IVF)."""
    ef_search: int = Field(default=64, ge=1)
    """Length of the list of candidates in a graph (HNSW); never less than the candidates asked for."""
    k_factor: int | None = Field(default=None, ge=1)
    """Candidates per hit, which are then compared exactly. None: 2 where the structure holds the vectors as
    they are, 16 where it holds them compressed."""


def refuse_needless(named: Collection[str], counting: Collection[str], search: str) -> None:
    """Raise RecipeError if a field of `Effort` is set that a search has no use for.

    Args:
        named: fields that are set.
        counting: fields that make a difference to the search.
        search: its name.
    """
    listed = ", ".join(name for name in Effort.model_fields if name in counting)
    for name in Effort.model_fields:
        if name in named and name not in counting:
            mend = f"leave it out; what counts is {listed}" if listed else "leave it out"
            raise RecipeError(f"search '{search}' has no use for it", where=name, mend=mend)
