"""Numbers in sentences."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one: `1 query`, `1,200 queries`."""
    plural = {"query": "queries", "class": "classes"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"
