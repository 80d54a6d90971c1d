"""YAML as recipes and settings are written in: plain values, and each key of a mapping once."""

import re
from typing import Any

import yaml

from ray_retrieval.errors import RecipeError

_DATE = "tag:yaml.org,2002:timestamp"
_TEXT = "tag:yaml.org,2002:str"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_NOT_AS_IT_LOOKS = re.compile("[-+]?0[0-9_]+|.*:.*")
"""Numbers that YAML 1.1 reads with eight digits, or with sixty: `010` would be 8, and `1:30` be 90."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has already. Dates are text: nothing that is configured is one.

    Numbers with a nought before them are text too, which a field that takes a number reads as decimal.
    """

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return _TEXT if tag in _NUMBERS and _NOT_AS_IT_LOOKS.fullmatch(value) else tag

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Not where mappings are built: by then `<<` has brought in what the keys beside it replace.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"line {line} has the key '{key.value}' of line {lines[name]} again")
            lines[name] = line
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _DATE]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, *, where: object) -> Any:
    """The plain value that a text of YAML stands for.

    Raises:
        RecipeError: if it is no YAML, a key stands twice in a mapping, or a value cannot be read as what its
            form or its tag says.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise RecipeError("not valid YAML: too deeply nested", where=where) from None
    # PyYAML leaves it to Python to refuse `0b_` and `!!int ''`.
    except (yaml.YAMLError, ValueError, LookupError) as error:
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())}", where=where) from None
