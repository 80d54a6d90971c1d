"""The interface as a page for people, made of the same description that programs read. It runs no script."""

import base64
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

_TITLES = {
    "search": "Search",
    "indexes": "What is served",
    "changes": "Changes of an index",
    "server": "The server itself",
}
_COMMANDS = {
    "/v1/search": "-F image=@photo.jpg -F k=5",
    "/v1/search/batch": """--json '{"searches": [{"examples": [{"id": "ID"}]}]}'""",
    "/v1/embed": "-F image=@photo.jpg",
    "/v1/match": "-F first=@one.jpg -F second=@other.jpg",
    "/v1/indexes/{name}/images": "-F image=@photo.jpg -F id=new",
    "/v1/indexes/{name}/remove": """--json '{"ids": ["ID"]}'""",
}


_BASE = "http://server.invalid"
"""Stands in a page for the address of the server until somebody reads it."""


@dataclass(frozen=True)
class DocsPage:
    """The page of an interface, all but the address of the server.

    Attributes:
        text: of the page.
        policy: what a browser may load for it.
    """

    text: str
    policy: str

    def at(self, base: str) -> HTMLResponse:
        """The page for who knows the server by an address."""
        text = self.text.replace(_BASE, str(escape(base.rstrip("/"))))
        return HTMLResponse(text, headers={"Content-Security-Policy": self.policy})


def docs_page(schema: dict[str, Any]) -> DocsPage:
    """The page of an interface, which takes some milliseconds to make.

    Args:
        schema: its OpenAPI description.
    """
    environment = _environment()
    style = environment.get_template("style.css").render() + environment.get_template("docs.css").render()
    page = environment.get_template("docs.html").render(
        title=schema["info"]["title"],
        summary=schema["info"]["summary"],
        groups=_groups(schema),
        schemas=[
            {"name": name, "about": one.get("description", "").replace("`", ""), "fields": _fields(one)}
            for name, one in sorted(schema["components"]["schemas"].items())
        ],
        style=Markup(style),  # ours, and part of what its hash below allows
    )
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return DocsPage(page, policy)


@lru_cache(1)
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("ray_retrieval"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _groups(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Operations under the titles of their tags."""
    groups: dict[str, list[dict[str, Any]]] = {tag: [] for tag in _TITLES}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            groups[operation["tags"][0]].append(_operation(path, method, operation))
    return [{"title": title, "name": tag, "operations": groups[tag]} for tag, title in _TITLES.items()]


def _operation(path: str, method: str, operation: dict[str, Any]) -> dict[str, Any]:
    bodies = operation.get("requestBody", {}).get("content", {})
    answers = operation["responses"].get("200", {}).get("content", {})
    needed = [
        one["name"] for one in operation.get("parameters", []) if one["in"] == "query" and one["required"]
    ]
    query = "?" + "&".join(f"{name}={name.upper()}" for name in needed) if needed else ""
    return {
        "path": path,
        "method": method.upper(),
        "about": operation["description"].replace("`", ""),
        "parameters": [
            {
                "name": one["name"],
                "kind": _kind(one["schema"]),
                "about": one.get("description", "").replace("`", ""),
                "required": one["required"],
            }
            for one in operation.get("parameters", [])
        ],
        "bodies": [
            {"type": kind, "kind": _kind(body["schema"]), "fields": _fields(body["schema"])}
            for kind, body in bodies.items()
        ],
        "answers": [{"type": kind, "kind": _kind(body["schema"])} for kind, body in answers.items()],
        "command": " ".join(filter(None, ["curl", _COMMANDS.get(path), f"'{_BASE}{path}{query}'"])),
    }


def _fields(schema: dict[str, Any]) -> list[dict[str, Any]]:
    required = schema.get("required", [])
    return [
        {
            "name": name,
            "kind": _kind(one),
            "about": one.get("description", ""),
            "required": name in required,
        }
        for name, one in schema.get("properties", {}).items()
    ]


def _kind(schema: dict[str, Any]) -> Markup:
    """A type in words, linked to the schemas that it names."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return Markup('<a href="#{0}">{0}</a>').format(name)
    if "anyOf" in schema:
        return Markup(" or ").join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return Markup(" or ").join(Markup("<code>{}</code>").format(one) for one in schema["enum"])
    if schema.get("type") == "array":
        return Markup("list of {}").format(_kind(schema.get("items", {})))
    return Markup("{}").format("file" if schema.get("format") == "binary" else schema.get("type", "anything"))
