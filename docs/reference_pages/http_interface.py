"""The reference of the HTTP interface, from the schema that the server gives at /openapi.json."""

from typing import Any
from unittest.mock import create_autospec

from ray_retrieval.serve.backend import Backend
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.http import create_app
from reference_pages import markdown

_HEAD = """# HTTP interface

Made from the schema that a server gives at `/openapi.json`; `/docs` on a server is the same for that
server, with its limits. How to ask, with `curl` and from Python: [asking a server](../guides/asking.md).

Whatever goes wrong is `{"error": {"problem", "where", "mend", "status"}}`, with that status.
"""


def schema() -> dict[str, Any]:
    """The OpenAPI schema; no index is opened for it."""
    return create_app(create_autospec(Backend, instance=True), ServeConfig()).openapi()


def page() -> str:
    """Every route with what it takes and gives, then the objects."""
    found = schema()
    routes = [
        _route(method, path, operation)
        for path, operations in found["paths"].items()
        for method, operation in operations.items()
    ]
    objects = found.get("components", {}).get("schemas", {})
    named = [
        _object(name, described) for name, described in sorted(objects.items()) if "properties" in described
    ]
    return "\n".join([_HEAD, *routes, "## Objects\n", *named])


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"## {method.upper()} {path}", markdown.docstring(operation.get("description"))]
    rows = [
        [
            f"`{one['name']}`",
            one["in"],
            _type(one.get("schema", {})),
            markdown.prose(one.get("description", "")),
        ]
        for one in operation.get("parameters", [])
    ]
    if rows:
        parts.append(markdown.table(["parameter", "in", "type", "what"], rows))
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"*Body, {media}*: {_type(content.get('schema', {}))}")
        fields = _fields(content.get("schema", {}))
        if fields:
            parts.append(fields)
    answers = [
        f"* {status}: {markdown.prose(answer.get('description', ''))}"
        + "".join(f", {_type(content.get('schema', {}))}" for content in answer.get("content", {}).values())
        for status, answer in operation.get("responses", {}).items()
    ]
    parts.append("*Answers*\n\n" + "\n".join(answers))
    return "\n\n".join(part for part in parts if part) + "\n"


def _object(name: str, described: dict[str, Any]) -> str:
    text = markdown.docstring(described.get("description"))
    return f"### {name} {{ #{name.lower()} }}\n\n{text}\n\n{_fields(described)}\n"


def _fields(described: dict[str, Any]) -> str:
    needed = set(described.get("required", []))
    rows = [
        [
            f"`{name}`" + (" (needed)" if name in needed else ""),
            _type(field),
            markdown.prose(str(field.get("description", ""))),
        ]
        for name, field in described.get("properties", {}).items()
    ]
    return markdown.table(["field", "type", "what"], rows) if rows else ""


def _type(described: dict[str, Any]) -> str:
    if "$ref" in described:
        name = described["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in described:
            return " or ".join(dict.fromkeys(_type(one) for one in described[key]))
    if "enum" in described:
        return " or ".join(f"`{value}`" for value in described["enum"])
    if "const" in described:
        return f"`{described['const']}`"
    kind = described.get("type", "anything")
    if kind == "array":
        return f"list of {_type(described.get('items', {}))}"
    if described.get("format") in ("binary", "byte") or "contentMediaType" in described:
        return "file"
    return {"integer": "whole number", "string": "text", "boolean": "true or false"}.get(kind, str(kind))
