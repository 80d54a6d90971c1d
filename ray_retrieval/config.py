"""The base of every configuration: typed, strict, and clear about what is wrong."""

import difflib
import itertools
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ray_retrieval.errors import RecipeError

ConfigType = TypeVar("ConfigType", bound="Config")
EngineName = Literal["torch", "onnx", "onnx-int8"]
"""What computes descriptors: the model itself, or an export of it on the processor; see `engines`."""


class Config(BaseModel):
    """A configuration that refuses unknown keys, checks defaults, and cannot be changed once made."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )


def validate(kind: type[ConfigType], values: Any, *, where: object = None) -> ConfigType:
    """Build a configuration from plain values.

    Raises:
        RecipeError: naming the first wrong key, and the nearest known one where a key is unknown.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(error, kind, values, where) from None


def _explain(error: ValidationError, kind: type[Config], values: Any, where: object) -> RecipeError:
    # Unknown keys first: they are usually the cause of the errors that follow.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    key = ".".join(str(part) for part in _recipe_location(first["loc"], values))
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(kind, first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        mend = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
        return RecipeError(f"unknown key '{key}'{more}", where=where, mend=mend)
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
    head = f"'{key}': " if key else ""
    return RecipeError(f"{head}{message[:1].lower()}{message[1:]}{given}{more}", where=where)


def _recipe_location(location: tuple[int | str, ...], values: Any) -> list[int | str]:
    """The location in the file: pydantic also names the member of a union, which no file contains."""
    parts: list[int | str] = []
    here = values
    for part in location:
        if parts and isinstance(part, str) and not isinstance(here, dict | list):
            continue
        if isinstance(here, dict) and part not in here and part in here.values() and part != location[-1]:
            continue
        parts.append(part)
        if isinstance(here, list) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        else:
            here = here.get(part) if isinstance(here, dict) else None
    return parts


def _known_keys(kind: type[Config], location: tuple[int | str, ...]) -> list[str]:
    """The keys that may stand where an unknown one was found."""
    here: Any = kind
    names = [part for part in location if isinstance(part, str)]  # a place in a list has the list's keys
    for part, following in itertools.pairwise(names):
        members = _configs_in(here.model_fields[part].annotation) if part in here.model_fields else [here]
        named = [member for member in members if part == _tag(member)]
        here = (named or members or [here])[0]
        tagged = [member for member in members if _tag(member) == following]
        here = tagged[0] if tagged else here
    return sorted(here.model_fields)


def _tag(kind: type[Config]) -> str | None:
    field = kind.model_fields.get("name")
    return None if field is None else str(field.default)


def _configs_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [kind for argument in getattr(annotation, "__args__", ()) for kind in _configs_in(argument)]
