"""The recipes that come with the package, each as it is."""

import re
from pathlib import Path
from typing import Any

import yaml

from reference_pages import markdown

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "jobs"

_HEAD = """# Recipes

Each runs as `ray-retrieval run jobs/NAME.yaml`, or `ray-retrieval run NAME` where no clone is at hand: the
package brings them along. Those of published experiments name their source and end in a table of measured
against published. What a field means stands in the [reference](recipe.md).
"""


def names() -> list[str]:
    """The recipes by name; `serve` is a server's file and no recipe."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "serve")


def page() -> str:
    """All of them with their comments."""
    return "\n".join([_HEAD, *map(_section, names())])


def _section(name: str) -> str:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    title = re.sub(r"^# ", "", text.splitlines()[0]).strip() if text.startswith("#") else ""
    return f"## {name}\n\n{markdown.prose(title)}\n\n```yaml\n{text.rstrip()}\n```\n"


def published(methods: list[str]) -> str:
    """A table of what the recipes of some methods are held against, a row for each source of each recipe."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names():
        recipe = _read(name)
        for entry in recipe.get("published", []) if recipe["method"]["name"] in methods else []:
            sizes = ", ".join(f"{size}: {value:.3f}" for size, value in entry["values"].items())
            measured = f"{entry.get('benchmark', 'any')} `{entry['metric']}` {sizes}"
            found.setdefault((name, entry["source"]), []).append(measured)
    rows = [
        [f"[{name}](../reference/recipes.md#{name})", "; ".join(values), markdown.prose(source)]
        for (name, source), values in found.items()
    ]
    return markdown.table(["recipe", "published, by bits or dimensions", "source"], rows)


def _read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))
