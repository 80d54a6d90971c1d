"""Searching: embeddings, the exact scan over binary codes, and the sharded, versioned index."""

from ray_retrieval.search.adding import add
from ray_retrieval.search.building import build
from ray_retrieval.search.changes import remove, rollback
from ray_retrieval.search.compaction import compact
from ray_retrieval.search.exporting import export
from ray_retrieval.search.hits import NO_DISTANCE, NO_ROW, Hits, merge
from ray_retrieval.search.importing import imported
from ray_retrieval.search.index import Index
from ray_retrieval.search.retention import prune, versions

__all__ = [
    "NO_DISTANCE",
    "NO_ROW",
    "Hits",
    "Index",
    "add",
    "build",
    "compact",
    "export",
    "imported",
    "merge",
    "prune",
    "remove",
    "rollback",
    "versions",
]
