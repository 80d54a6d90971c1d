"""What MkDocs calls: adds the pages that are made from the program, and looks at what it has built."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

from reference_pages import PAGES, recipes

_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|(?:url\(|@import)\s*["']?(?:https?:)?//[^"')\s]+"""
)
"""What a browser would fetch from elsewhere by itself."""


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`<!-- published: METHOD, METHOD -->` becomes the table of what their recipes are held against."""
    return re.sub(
        r"<!-- published: (.*?) -->", lambda found: recipes.published(found[1].split(", ")), markdown
    )


def on_post_build(config: Any) -> None:
    """A page that fetches something from elsewhere is an error: what one reads is nobody else's business."""
    for file in Path(config["site_dir"]).rglob("*"):
        if file.suffix in (".html", ".css"):
            found = _FETCHED.search(file.read_text(encoding="utf-8"))
            if found:
                raise PluginError(f"{file} would fetch {found[0]}")
