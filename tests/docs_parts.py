"""What documentation consists of, read from its Markdown: blocks of code, links, anchors."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reference_pages import PAGES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
"""The pages that are written by hand."""

_FENCED = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: relative to the repository.
        language: as it is marked; empty for one that is indented.
        mark: what a comment before it says.
    """

    page: str
    language: str
    code: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.code.splitlines()[0][:40]}"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks_of(path: Path) -> list[Block]:
    """Fenced blocks and indented ones, in no particular order."""
    text, page = path.read_text(encoding="utf-8"), name_of(path)
    fenced = [
        Block(page, found["language"], found["code"], found["mark"] or "") for found in _FENCED.finditer(text)
    ]
    rest = _FENCED.sub("", text)
    indented = re.findall(r"(?:^|\n\n)((?:    .*\n)(?:(?:    .*)?\n)*)", rest + "\n")
    return fenced + [Block(page, "", re.sub(r"^    ", "", code, flags=re.M), "") for code in indented]


def blocks() -> list[Block]:
    """All blocks of all pages that are written by hand."""
    return [block for path in WRITTEN for block in blocks_of(path)]


def command_lines(block: Block) -> list[list[str]]:
    """The words of each line that calls `ray-retrieval`, without comments; continued lines are one."""
    joined = re.sub(r"\\\n\s*", " ", block.code)
    return [
        shlex.split(line, comments=True)[1:]
        for line in joined.splitlines()
        if line.startswith("ray-retrieval ")
    ]


def without_blocks(text: str) -> str:
    """A page's prose and tables."""
    return re.sub(r"^    .*$", "", _FENCED.sub("", text), flags=re.M)


def links_in(text: str) -> Iterator[str]:
    """Where the links and pictures of a page lead, code left out."""
    yield from _LINK.findall(re.sub(r"`[^`\n]*`", "", without_blocks(text)))


def text_of(page: Path) -> str | None:
    """The Markdown of a page, written or made; None where there is none."""
    if page.is_file():
        return page.read_text(encoding="utf-8") if page.suffix == ".md" else ""
    made = PAGES.get(page.relative_to(DOCS).as_posix()) if page.is_relative_to(DOCS) else None
    return None if made is None else made()


def anchors(text: str) -> set[str]:
    """The anchors of its headings, as MkDocs makes them, or as they are given."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M):
        given = re.search(r"\{ #(\S+)", heading)
        found.add(given[1] if given else _slug(heading))
    return found


def _slug(heading: str) -> str:
    plain = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)
