"""Image retrieval by published methods, on Ray.

    from ray_retrieval import Run, Searcher, load_recipe

    Run(load_recipe("jobs/quickstart.yaml")).all()
    Searcher("runs/quickstart/index").search(["photo.jpg"], k=5)

Names are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Benchmark": "data.benchmark",
    "Client": "client",
    "Encoder": "model",
    "ImageTable": "data.table",
    "Index": "search",
    "Recipe": "recipe",
    "RetrievalError": "errors",
    "Run": "run",
    "Searcher": "query",
    "load_model": "model",
    "load_recipe": "recipe",
    "open_images": "data.table",
}
_ELSEWHERE = {"load_model": "load", "load_recipe": "load"}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ray_retrieval' has no attribute {name!r}")
    return getattr(import_module(f"ray_retrieval.{_HOMES[name]}"), _ELSEWHERE.get(name, name))
