"""Searching: embeddings, the exact scan over binary codes, and the sharded index."""

from ray_retrieval.search.building import build
from ray_retrieval.search.hits import NO_DISTANCE, NO_ROW, Hits, merge
from ray_retrieval.search.index import Index

__all__ = ["NO_DISTANCE", "NO_ROW", "Hits", "Index", "build", "merge"]
