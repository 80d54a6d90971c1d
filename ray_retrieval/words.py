"""Numbers in sentences, and texts that may be one or several."""

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one: `1 query`, `1,200 queries`."""
    plural = {"query": "queries", "class": "classes"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"


def several(given: str | Iterable[Item] | None) -> list[str | Item]:
    """What was given as a list: one text alone is that one and not its letters, None is none."""
    if given is None:
        return []
    return [given] if isinstance(given, str) else list(given)
