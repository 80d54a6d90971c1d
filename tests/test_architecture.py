"""The floors of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ray_retrieval"
FILES = sorted(PACKAGE.rglob("*.py"))
GROUND = {"commands", "errors", "config", "cores", "storage", "lock", "descriptors", "words", "workers"}
NOUNS = {"layers", "losses", "data", "search", "metrics"}
USES_RAY = {"train", "tune", "encode", "cluster", "serve"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms_imported(path: Path) -> set[str]:
    inside = {name for name in imports(path) if name.startswith("ray_retrieval.")}
    names = {name.split(".")[1] for name in inside}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_edges_import_ray(path: Path) -> None:
    uses = any(name == "ray" or name.startswith("ray.") for name in imports(path))
    assert not uses or room(path) in USES_RAY


@pytest.mark.parametrize("noun", sorted(NOUNS | {"methods", "loop"}))
def test_imports_go_down_only(noun: str) -> None:
    allowed = {
        "search": GROUND | {"metrics"},
        "methods": GROUND | NOUNS,
        "loop": GROUND | NOUNS | {"methods", "compute"},
    }.get(noun, GROUND)
    for path in FILES:
        if room(path) == noun:
            above = rooms_imported(path) - allowed - {noun}
            assert not above, f"{path.name} imports {above}"


def test_ground_floor_stands_alone() -> None:
    for name in GROUND:
        assert rooms_imported(PACKAGE / f"{name}.py") <= GROUND


def test_public_names_are_few_and_exist() -> None:
    import ray_retrieval

    assert 0 < len(ray_retrieval.__all__) <= 12
    for name in ray_retrieval.__all__:
        assert getattr(ray_retrieval, name) is not None
