"""The base of every configuration: typed, strict, and clear about what is wrong."""

import difflib
import itertools
import re
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ray_retrieval.errors import RecipeError

ConfigType = TypeVar("ConfigType", bound="Config")
_SCIENTIFIC = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")
EngineName = Literal["torch", "onnx", "onnx-int8"]
"""What computes descriptors: the model itself, or an export of it on the processor; see `engines`."""


class Config(BaseModel):
    """A configuration that refuses unknown keys, checks defaults, and cannot be changed once made."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )


def read_number(value: Any) -> Any:
    """The number that `1e-3` means, which YAML reads as text, because it has no point; all else as it is."""
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def read_count(text: str) -> int:
    """A whole number from 1 on, written as 1000000, 1_000_000 or 1e6.

    Raises:
        ValueError: if it is none.
    """
    try:
        value = float(text)
        count = int(value)
    except (ValueError, OverflowError):
        raise ValueError(f"'{text}' is no number") from None
    if count < 1 or count != value:
        raise ValueError(f"'{text}' is no number that is whole and above 0")
    return count


def validate(kind: type[ConfigType], values: Any, *, where: object = None) -> ConfigType:
    """Build a configuration from plain values.

    Raises:
        RecipeError: naming the first wrong key, and the nearest known key or name where one is unknown.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(error, kind, values, where) from None


def _explain(error: ValidationError, kind: type[Config], values: Any, where: object) -> RecipeError:
    # What is misspelt comes first, and what is missing last: the one is often the cause of the other.
    order = {"extra_forbidden": 0, "union_tag_invalid": 1, "missing": 3}
    problems = sorted(error.errors(), key=lambda problem: order.get(problem["type"], 2))
    first = problems[0]
    missing = first["type"] == "missing"
    key = ".".join(str(part) for part in _recipe_location(first["loc"], values, missing=missing))
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        mend = _nearest(str(first["loc"][-1]), _known_keys(kind, first["loc"]))
        return RecipeError(f"unknown key '{key}'{more}", where=where, mend=mend)
    head = f"'{key}': " if key else ""
    if first["type"] == "union_tag_invalid":
        said = first["ctx"]
        mend = _nearest(said["tag"], re.findall("'([^']*)'", said["expected_tags"]))
        what = said["discriminator"].strip("'")
        return RecipeError(f"{head}unknown {what} '{said['tag']}'{more}", where=where, mend=mend)
    message = first["msg"].removeprefix("Value error, ")
    given = "" if missing or first["type"] == "value_error" else f", got {first['input']!r}"
    return RecipeError(
        f"{head}{message[:1].lower()}{message[1:]}{given}{more}",
        where=where,
        mend="state it" if missing else None,
    )


def _nearest(name: str, known: list[str]) -> str:
    """What to put in the place of an unknown name."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"


def _recipe_location(location: tuple[int | str, ...], values: Any, *, missing: bool) -> list[int | str]:
    """The location in the file: pydantic also names the member of a union, which no file contains.

    Args:
        location: by pydantic.
        values: of the file.
        missing: whether the last part is a key that is not there.
    """
    parts: list[int | str] = []
    here = values
    for number, part in enumerate(location, start=1):
        if parts and isinstance(part, str) and not isinstance(here, dict | list):
            continue
        absent = missing and number == len(location)
        if isinstance(here, dict) and part not in here and part in here.values() and not absent:
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
