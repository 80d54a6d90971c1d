"""The reference of the Python interface, from signatures and docstrings."""

import inspect
import re
from importlib import import_module
from typing import Any

import ray_retrieval
from reference_pages import markdown

_HEAD = """# Python

The names that `ray_retrieval` gives, then those of the parts that are used beside it. They are imported
when they are first used, so that importing the package costs nothing. What goes wrong is raised as a
`RetrievalError`: what, where, and the mend.
"""

_PARTS: dict[str, tuple[str, ...]] = {
    "ray_retrieval.search": (
        "build",
        "imported",
        "add",
        "remove",
        "compact",
        "rollback",
        "versions",
        "prune",
        "export",
        "merge",
        "Hits",
    ),
    "ray_retrieval.answers": ("Hit", "Answer"),
    "ray_retrieval.descriptors": ("Codes", "Vectors", "Local"),
    "ray_retrieval.embed": ("embed", "Embedded"),
    "ray_retrieval.finder": ("Finder",),
    "ray_retrieval.recipe": ("load_study", "rerank_steps"),
    "ray_retrieval.client": ("AsyncClient", "Id"),
    "ray_retrieval.match": ("match",),
    "ray_retrieval.metrics.hamming": ("mean_average_precision", "evaluate", "evaluate_shards"),
    "ray_retrieval.metrics.retrieval": ("evaluate",),
    "ray_retrieval.metrics.rankings": ("evaluate",),
    "ray_retrieval.metrics.revisited": ("evaluate",),
}
"""Modules with the names that belong to the interface beside the package's own."""


def page() -> str:
    """Every public name with its signature and what it does."""
    parts = [_HEAD, "## ray_retrieval\n"]
    parts += [
        _entry(name, getattr(ray_retrieval, name), ray_retrieval.__name__) for name in ray_retrieval.__all__
    ]
    for module, names in _PARTS.items():
        parts.append(f"## {module}\n")
        parts += [_entry(name, getattr(import_module(module), name), module) for name in names]
    return "\n".join(parts)


def _entry(name: str, thing: Any, module: str) -> str:
    anchor = f"{module}.{name}".replace(".", "-").lower()
    parts = [f"### {name} {{ #{anchor} }}", _signature(name, thing), markdown.docstring(thing.__doc__)]
    if inspect.isclass(thing):
        rows = [
            [f"`{member}{_arguments(getattr(thing, member))}`", markdown.prose(markdown.summary(what))]
            for member, what in _members(thing)
        ]
        if rows:
            parts.append(markdown.table(["member", "what"], rows))
    return "\n\n".join(parts) + "\n"


def _members(thing: type) -> list[tuple[str, str]]:
    """Public methods and properties of the class itself that say what they are."""
    return [
        (name, inspect.getdoc(value) or "")
        for name, value in vars(thing).items()
        if not name.startswith("_")
        and (callable(value) or isinstance(value, property | classmethod | staticmethod))
        and getattr(getattr(thing, name), "__doc__", None)
    ]


def _signature(name: str, thing: Any) -> str:
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return ""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    bare = signature.replace(
        parameters=[
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in signature.parameters.values()
        ],
        return_annotation=inspect.Signature.empty,
    )
    shown = re.sub(r"<function (\w+) at \w+>", r"\1", str(bare))
    return f"```text\n{name}{shown}\n```" if len(shown) < 400 else ""


def _arguments(thing: Any) -> str:
    if isinstance(thing, property):
        return ""
    try:
        parameters = [name for name in inspect.signature(thing).parameters if name != "self"]
    except (TypeError, ValueError):
        return ""
    return f"({', '.join(parameters)})"
