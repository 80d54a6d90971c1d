"""The description of the interface for programs. Bodies are read by hand, so they are described by hand."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ray_retrieval.serve.bodies import (
    AddBody,
    AddSettings,
    BatchBody,
    EmbedBody,
    FormSettings,
    MatchBody,
    RemoveBody,
    SearchBody,
    SearchSettings,
)
from ray_retrieval.serve.middleware import OPEN
from ray_retrieval.serve.uploads import FORM, JSON

_REFERENCE = "#/components/schemas/{model}"
_FILE = {"type": "string", "format": "binary"}
_FILES = {"type": "array", "items": _FILE, "minItems": 1}
_BODIES: tuple[type[BaseModel], ...] = (
    AddBody,
    AddSettings,
    BatchBody,
    EmbedBody,
    FormSettings,
    MatchBody,
    RemoveBody,
    SearchBody,
)


def _reference(body: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(model=body.__name__)}


def _form(
    properties: dict[str, Any], required: list[str], *, encoding: dict[str, Any] | None = None
) -> dict[str, Any]:
    schema = {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }
    return {"schema": schema, **({"encoding": encoding} if encoding else {})}


def _body(json: type[BaseModel], form: dict[str, Any] | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": _reference(json)}}
    if form is not None:
        content[FORM] = form
    return {"requestBody": {"required": True, "content": content}}


_INDEX = {"type": "string", "description": "name of the index; the first one unless told"}
_JSON_FIELD = {"request": {"contentType": JSON}}
_SETTINGS: dict[str, Any] = SearchSettings.model_json_schema()["properties"]
_BOX = {"type": "string", "description": "left,top,right,bottom in pixels of the upright image, of one image"}

SEARCH = _body(
    SearchBody,
    _form(
        {"image": _FILES, "request": _reference(FormSettings), **_SETTINGS, "box": _BOX},
        ["image"],
        encoding=_JSON_FIELD,
    ),
)
BATCH = _body(BatchBody)
EMBED = _body(EmbedBody, _form({"image": _FILES, "index": _INDEX}, ["image"]))
MATCH = _body(MatchBody, _form({"first": _FILE, "second": _FILE, "index": _INDEX}, ["first", "second"]))
ADD = _body(
    AddBody,
    _form(
        {
            "image": _FILES,
            "request": _reference(AddSettings),
            "id": {"type": "array", "items": {"type": "string"}, "description": "one for each image"},
        },
        ["image"],
        encoding=_JSON_FIELD,
    ),
)
REMOVE = _body(RemoveBody)
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"image/png": {"schema": _FILE}},
        "description": "what they have in common, or its drawing",
    }
}
IMAGE_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/*": {"schema": _FILE}}, "description": "the image"},
    304: {"description": "the client has it already"},
}


def describe_by_hand(app: FastAPI) -> None:
    """Let an application describe itself with the bodies above and the keys that it asks for."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


def _schema(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes, tags=app.openapi_tags
    )
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _, bodies = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REFERENCE)
    schemas.update(bodies["$defs"])
    # What a search of a batch is; the server checks each by itself, so the body leaves it open.
    schemas["BatchBody"]["properties"]["searches"]["items"] = _reference(SearchBody)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            if path not in OPEN:
                operation["security"] = [{"key": []}, {}]
            # FastAPI's own errors are answered in the form of all others.
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return schema
