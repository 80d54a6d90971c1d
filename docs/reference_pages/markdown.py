"""Docstrings and cells of tables as Markdown."""

import inspect
import re

_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Reference")
_BARE_MARKUP = re.compile(r"([*_>|\[\]])")


def prose(text: str) -> str:
    """Text on one line, safe in a paragraph and in a cell; what stands in backquotes stays as it is."""
    return "`".join(
        part.replace("|", "\\|") if number % 2 else _BARE_MARKUP.sub(r"\\\1", part.replace("<", "&lt;"))
        for number, part in enumerate(" ".join(text.split()).split("`"))
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def summary(docstring: str | None) -> str:
    """The first paragraph on one line."""
    return " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())


def docstring(text: str | None) -> str:
    """A docstring in Google's style; its sections become lists, indented text a block of code."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text or ""))
    return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs if paragraph.strip())


def _paragraph(text: str) -> str:
    first, _, rest = text.partition("\n")
    name, colon, same_line = first.partition(":")
    if colon and name in _SECTIONS:
        body = inspect.cleandoc(rest) if rest else same_line.strip()
        return f"*{name}*\n\n{_entries(body)}"
    if text.startswith("    "):
        return "```text\n" + inspect.cleandoc(text) + "\n```"
    return prose(text)


def _entries(body: str) -> str:
    """`name: what it is` on lines of their own, with further lines indented, as a list."""
    found: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and found:
            found[-1] += " " + line.strip()
        else:
            found.append(line)
    if not all(re.match(r"^[\w*.\[\], ]+: ", entry) for entry in found):
        return prose(" ".join(found))
    return "\n".join(f"* `{name}`: {prose(what)}" for name, what in (entry.split(": ", 1) for entry in found))
