"""The reference of recipes and of the server's settings, from the models that check them."""

import types
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ray_retrieval.config import Config
from ray_retrieval.recipe import Recipe
from ray_retrieval.serve.config import ServeConfig
from reference_pages import markdown

_RECIPE = """# Recipe

A recipe is one YAML file that states a whole experiment; [ready-made ones](recipes.md) show how it looks.
This page is made from the models that check it: every field, its type, its default, and what it does. Any
field can be set from the command line by its dotted key (`train.optimizer.lr=0.01`); one field can refer to
another (`${method.bits}`); paths may use `~` and environment variables. An unknown key is an error that
names the nearest known one, and a key that stands twice is one that names both lines. A date is text.

Where a section has a `name`, the name says which of several it is, and what else can be set. `method.bits`,
`method.dimension` and `seed` may be lists: then the recipe is a study of several runs. A section that is
set as a whole (`data='{name: images, database: photos}'`) replaces the old one.
"""

_SERVER = """# Settings of the server

What `ray-retrieval serve INDEX --set KEY=VALUE` takes, and what stands under `args` in the file that
`--print-config` prints. See [serving](../guides/serving.md).
"""


def recipe_page() -> str:
    """The fields of a recipe, one section a model."""
    return _RECIPE + "\n" + _sections(Recipe)


def server_page() -> str:
    """The settings of `serve`, one section a model."""
    return _SERVER + "\n" + _sections(ServeConfig)


def anchor(kind: type[Config]) -> str:
    """Where a model's section is on its page."""
    return kind.__name__.lower()


def _sections(root: type[Config]) -> str:
    """A section for each model that can be reached, in the order of the fields, each once."""
    places = _places(root)
    return "\n".join(_section(kind, where) for kind, where in places.items())


def _places(root: type[Config]) -> dict[type[Config], list[str]]:
    """The dotted keys at which each model stands, depth first."""
    found: dict[type[Config], list[str]] = {}

    def visit(kind: type[Config], place: str) -> None:
        first = kind not in found
        found.setdefault(kind, []).append(place)
        if not first:
            return
        for name, field in kind.model_fields.items():
            for inner, suffix in _configs(field.annotation):
                visit(inner, f"{place}.{name}{suffix}".lstrip("."))

    visit(root, "")
    return found


def _configs(annotation: Any, suffix: str = "") -> list[tuple[type[Config], str]]:
    """The models within a type; a `[]` after those that are items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [(annotation, suffix)]
    origin = get_origin(annotation)
    if origin is Annotated:
        return _configs(get_args(annotation)[0], suffix)
    inner = "[]" if origin in (tuple, list) else ".*" if origin is dict else suffix
    return [pair for argument in get_args(annotation) for pair in _configs(argument, inner)]


def _section(kind: type[Config], places: list[str]) -> str:
    tag = _tag(kind)
    first = places[0]
    title = (f"`{first}`" if first else "The whole") + (f", {tag}" if tag else "")
    level = "##" if first.count(".") == 0 else "###"
    parts = [
        f'{level} {title} {{ #{anchor(kind)} data-toc-label="{first or "all"}{f": {tag}" if tag else ""}" }}'
    ]
    others = [place for place in dict.fromkeys(places) if place != first]
    if others:
        parts.append("Also at " + ", ".join(f"`{place}`" for place in others) + ".")
    parts.append(markdown.docstring(kind.__doc__))
    rows = [
        [
            f"`{key}`",
            _type(field.annotation, field.metadata),
            _default(field),
            markdown.prose(field.description or ""),
        ]
        for key, field in kind.model_fields.items()
    ]
    parts.append(markdown.table(["field", "type", "default", "what"], rows))
    return "\n\n".join(parts) + "\n"


def _type(annotation: Any, metadata: list[Any]) -> str:
    limits = ", ".join(found for found in map(_limit, metadata) if found)
    return _kind(annotation) + (f", {limits}" if limits else "")


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], list(arguments[1:]))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        named = [_kind(argument) for argument in arguments if argument is not types.NoneType]
        return " or ".join(dict.fromkeys(named)) + (" or null" if types.NoneType in arguments else "")
    if origin in (tuple, list):
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return "[" + ", ".join(map(_kind, arguments)) + "]"
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    if isinstance(annotation, type):
        if issubclass(annotation, Config):
            return f"[{_tag(annotation) or 'section'}](#{anchor(annotation)})"
        if issubclass(annotation, Enum):
            return " or ".join(f"`{member.value}`" for member in annotation)
    plain = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", Any: "anything"}
    return plain.get(annotation, markdown.prose(getattr(annotation, "__name__", str(annotation))))


def _tag(kind: type[Config]) -> str | None:
    """The one `name` that makes a section this one; None where it has none, or several to choose among."""
    names = get_args(kind.model_fields["name"].annotation) if "name" in kind.model_fields else ()
    return str(names[0]) if len(names) == 1 else None


def _limit(constraint: Any) -> str:
    match constraint:
        case Ge(ge=bound):
            return f"≥ {bound}"
        case Gt(gt=bound):
            return f"\\> {bound}"
        case Le(le=bound):
            return f"≤ {bound}"
        case Lt(lt=bound):
            return f"&lt; {bound}"
        case MinLen(min_length=1):
            return "not empty"
        case MinLen(min_length=bound):
            return f"at least {bound} long"
        case MaxLen(max_length=bound):
            return f"at most {bound} long"
        case Interval():
            return ", ".join(filter(None, map(_limit, constraint)))
        case FieldInfo(metadata=inner):
            return ", ".join(filter(None, map(_limit, inner)))
    pattern = getattr(constraint, "pattern", None)
    return f"of the form `{markdown.prose(pattern)}`" if pattern else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "needed"
    return _value(value)


def _value(value: Any) -> str:
    if isinstance(value, Config):
        name = getattr(value, "name", None)
        return f"[{name or 'its defaults'}](#{anchor(type(value))})"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if value != "" else '`""`'
