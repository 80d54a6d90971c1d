"""How hard an approximate search looks."""

from pydantic import Field

from ray_retrieval.config import Config


class Effort(Config):
    """How hard a search looks for candidates."""

    nprobe: int = Field(default=64, ge=1)
    """Cells that are visited, of kinds that divide the rows into cells (IVF)."""
    ef_search: int = Field(default=64, ge=1)
    """Length of the list of candidates in a graph (HNSW); never less than the candidates asked for."""
    k_factor: int | None = Field(default=None, ge=1)
    """Candidates per hit, which are then compared exactly. None: 2 where the structure holds the vectors as
    they are, 16 where it holds them compressed."""
