"""The documentation: every command line is one that there is, every block is sound, every link leads on."""

import csv
import functools
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import docs_parts as parts
import pytest
import torch
import typer.main
import yaml
from methods import test_contract
from ray.serve.schema import ServeDeploySchema
from reference_pages import PAGES, command_line, http_interface, recipes
from typer._click.exceptions import ClickException

import ray_retrieval
from ray_retrieval.cli import app
from ray_retrieval.config import validate
from ray_retrieval.data.table import open_images
from ray_retrieval.errors import RecipeError
from ray_retrieval.methods import METHODS
from ray_retrieval.recipe import from_settings, load_study, ready_made
from ray_retrieval.serve.application import SHORT_WAY
from ray_retrieval.serve.config import ServeConfig

ROOT = parts.ROOT
BLOCKS = parts.blocks()
LINES = [
    pytest.param(words, id=f"{block.page}: {' '.join(words)}"[:90])
    for block in BLOCKS
    for words in parts.command_lines(block)
]
TAKE_RECIPES = {"run", "train", "evaluate", "tune"}


def parse(command: Any, words: list[str], called: str) -> tuple[Any, dict[str, Any]]:
    """The command that words call, and what its parameters become; raises what the parser raises."""
    context = command.make_context(called, list(words))
    if not hasattr(command, "commands"):
        return command, dict(context.params)
    rest = [*context._protected_args, *context.args]
    name, inner, arguments = command.resolve_command(context, rest)
    return parse(inner, arguments, f"{called} {name}")


def check_command(words: list[str]) -> None:
    """That the program takes these words; of a recipe and its settings, that they are valid."""
    root = typer.main.get_command(app)
    if words[0] == "submit" and "--" in words:
        check_command(words[words.index("--") + 1 :])
    command, given = parse(root, words, "ray-retrieval")
    if command.name in TAKE_RECIPES and words[0] in TAKE_RECIPES and not given["recipe"].isupper():
        load_study(recipe_file(given["recipe"]), list(given["overrides"] or []))
    if command.name == "serve":
        from_settings(ServeConfig, list(given["settings"] or []))


def recipe_file(named: str) -> str:
    return str(ROOT / named) if named.startswith("jobs/") else named


@pytest.mark.parametrize("words", LINES)
def test_the_program_takes_each_command_line(words):
    check_command(words)


def test_there_are_command_lines_of_nearly_all_verbs():
    """So that the test above does not pass by finding none."""
    root = typer.main.get_command(app)
    called = {parse(root, line.values[0], "ray-retrieval")[0].name for line in LINES}
    assert {path[-1] for path, _ in command_line.commands(root)} - called <= {"status", "logs"}


@pytest.mark.parametrize(
    "line",
    [
        "ray-retrieval serch INDEX a.jpg",
        "ray-retrieval search INDEX a.jpg --wher x",
        "ray-retrieval index bild EMBEDDINGS --out INDEX",
        "ray-retrieval index build EMBEDDINGS",
        "ray-retrieval run jobs/quickstart.yaml train.epoch=3",
        "ray-retrieval submit -- run jobs/quickstart.yaml train.epoch=3",
        "ray-retrieval serve INDEX --set shard_group=2",
        "ray-retrieval run jobs/quickstrat.yaml",
    ],
)
def test_a_command_line_that_is_wrong_is_found(line):
    (words,) = parts.command_lines(parts.Block("", "sh", line, ""))
    with pytest.raises((ClickException, RecipeError)):
        check_command(words)


@pytest.mark.parametrize("page", parts.WRITTEN, ids=parts.name_of)
def test_commands_and_options_that_prose_names_exist(page):
    """`ray-retrieval index info` in a sentence; of options, that some command has them."""
    root = typer.main.get_command(app)
    options = {
        option for _, one in command_line.commands(root) for given in one.params for option in given.opts
    }
    for line in re.findall(r"`ray-retrieval ([^`]+)`", parts.without_blocks(page_text(page))):
        command = root
        for word in line.split():
            if not hasattr(command, "commands") or word == "--":
                break
            if re.fullmatch(r"[a-z0-9]+", word):
                assert word in command.commands, line
                command = command.commands[word]
        assert set(re.findall(r"(?<=\s)--[a-z-]+", f" {line}")) <= options | {
            "--debug",
            "--help",
            "--version",
        }, line


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: block.name)
def test_a_program_compiles(block):
    compile(block.code, block.page, "exec")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == "run"], ids=lambda block: block.name)
def test_a_program_that_is_marked_so_runs(block, tmp_path):
    made = subprocess.run(
        [sys.executable, "-c", block.code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(
    "block",
    [
        b
        for b in BLOCKS
        if b.language == "yaml" and not b.mark.startswith(("settings of the method", "part of"))
    ],
    ids=lambda block: block.name,
)
def test_a_part_of_a_recipe_is_valid_in_the_recipe_that_is_named_for_it(block):
    """`<!-- recipe: FILE -->` before it says in which; the part takes the place of the sections it has."""
    assert block.mark.startswith("recipe: "), f"say over which recipe: {block.name}"
    sections = yaml.safe_load(block.code)
    settings = [f"{key}={yaml.safe_dump(value)}" for key, value in sections.items()]
    load_study(ROOT / block.mark.removeprefix("recipe: "), settings)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "csv"], ids=lambda block: block.name)
def test_a_table_of_images_is_read(block, tmp_path):
    (tmp_path / "images.csv").write_text(block.code)
    with open(tmp_path / "images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        (tmp_path / row["path"]).parent.mkdir(exist_ok=True)
        (tmp_path / row["path"]).touch()
    table = open_images(str(tmp_path / "images.csv"))
    assert table.ids == [row["path"] for row in rows]
    named = [[table.class_names[one] for one in label] for label in table.table["label"].to_pylist()]
    assert named == [row["label"].split("|") for row in rows]


def test_a_part_of_a_file_for_ray_serve_names_the_short_way():
    (block,) = [block for block in BLOCKS if block.mark == "part of serve.yaml"]
    whole = yaml.safe_load((ROOT / "jobs/serve.yaml").read_text()) | yaml.safe_load(block.code)
    known = ServeDeploySchema.model_validate(whole).model_dump(exclude_unset=True, mode="json")
    assert known["controller_options"]["runtime_env"]["env_vars"] == SHORT_WAY


@pytest.fixture(scope="module")
def csq(tmp_path_factory) -> ModuleType:
    """The method of the page on adding one, from a file as a reader would have it."""
    (block,) = [block for block in BLOCKS if block.mark == "method: csq"]
    file = tmp_path_factory.mktemp("added") / "csq.py"
    file.write_text(block.code)
    spec = importlib.util.spec_from_file_location("added_csq", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["added_csq"] = module  # where pydantic looks up the types of its fields
    spec.loader.exec_module(module)
    yield module
    del sys.modules["added_csq"]


CONTRACT = {name: test for name, test in vars(test_contract).items() if name.startswith("test_")}


@pytest.mark.parametrize("contract", CONTRACT)
def test_the_method_of_the_page_keeps_the_contract(contract, csq, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "csq", (csq.CsqConfig, csq.Csq))
    test = CONTRACT[contract]
    test("csq", **({"tmp_path": tmp_path} if "tmp_path" in inspect.signature(test).parameters else {}))


def test_the_settings_of_the_method_of_the_page_are_valid(csq):
    (block,) = [block for block in BLOCKS if block.mark == "settings of the method: csq"]
    made = validate(csq.CsqConfig, yaml.safe_load(block.code)["method"])
    assert (made.name, made.bits) == ("csq", 32)


def test_the_method_of_the_page_has_centres_that_are_far_apart(csq):
    centres = csq.centres(classes=40, bits=32)
    products = centres @ centres.T
    assert set(products[~torch.eye(40, dtype=torch.bool)].tolist()) == {0.0, -32.0}
    assert torch.equal(csq.centres(5, 13), csq.centres(5, 13))


@functools.cache
def page_text(page: Path) -> str | None:
    return parts.text_of(page)


PAGES_WITH_LINKS = [*parts.WRITTEN, *(parts.DOCS / name for name in PAGES)]


@pytest.mark.parametrize("page", PAGES_WITH_LINKS, ids=parts.name_of)
def test_links_lead_somewhere(page):
    text = page_text(page)
    for link in parts.links_in(text):
        address = urlsplit(link)
        if address.scheme:
            assert address.scheme == "https", link
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", address.hostname or ""), link
            continue
        target = Path(os.path.normpath(page.parent / address.path)) if address.path else page
        there = page_text(target)
        assert there is not None or target.is_dir(), f"{link}: {target} is not there"
        if address.fragment:
            assert address.fragment in parts.anchors(there), f"{link}: no such heading"


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    written = {path.relative_to(parts.DOCS).as_posix() for path in parts.DOCS.rglob("*.md")}
    assert listed == written | set(PAGES)


def test_the_reference_has_every_field_command_route_and_name():
    text = {name: page() for name, page in PAGES.items()}
    for kind, _ in METHODS.values():
        section = text["reference/recipe.md"].split(f"{{ #{kind.__name__.lower()} ")[1].split("\n#")[0]
        assert all(f"| `{field}` |" in section for field in kind.model_fields)
    for path, _ in command_line.commands(typer.main.get_command(app)):
        assert f"\n## {' '.join(command_line.shown_as(path))}\n" in text["reference/command_line.md"]
    for route in http_interface.schema()["paths"]:
        assert f" {route}\n" in text["reference/http.md"]
    assert all(f"### {name} {{" in text["reference/python.md"] for name in ray_retrieval.__all__)
    assert all(f"| `{field}` |" in text["reference/server.md"] for field in ServeConfig.model_fields)
    assert set(recipes.names()) == set(ready_made())


def test_the_reference_says_which_options_are_numbers():
    text = PAGES["reference/command_line.md"]()
    box = "--box NUMBER NUMBER NUMBER NUMBER"
    for said in ("-k NUMBER`, `--k NUMBER", box, "--max-loss NUMBER", "--port NUMBER", "--where TEXT"):
        assert f"| `{said}` |" in text


def test_the_reference_names_one_section_of_several_only_where_there_are_several():
    text = PAGES["reference/recipe.md"]()
    assert "| `backbone` | [section](#backboneconfig) | [alexnet](#backboneconfig) |" in text
    assert "## `train.optimizer` { #optimizerconfig" in text
    assert "## `train.schedule`, linear { #linearschedule" in text
    for title, others in re.findall(r"^#+ (`\S+`).*\n\nAlso at (.*)\.$", text, re.M):
        assert title not in others


@pytest.mark.parametrize("page", ["reference/recipe.md", "reference/server.md", "reference/python.md"])
def test_the_reference_needs_no_look_into_the_code(page):
    assert not re.findall(
        r".*(?: at 0x[0-9a-f]+|the head of the module|[Aa]s in `|see `choosing|`ImportConfig|`GroundTruth).*",
        PAGES[page](),
    )


def test_published_numbers_are_those_of_the_recipes():
    table = recipes.published(["xbm"])
    row = "| [xbm_sop](../reference/recipes.md#xbm_sop) | Stanford Online Products `recall@1` 128: 0.806 |"
    assert row in table
    pages = (parts.DOCS / "methods").glob("*.md")
    marks = [re.findall(r"<!-- published: (.*?) -->", page_text(page)) for page in pages]
    named = [name for found in marks for mark in found for name in mark.split(", ")]
    assert sorted(named) == sorted(METHODS)


@pytest.mark.long
def test_the_documentation_builds_without_a_warning(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "site" / "reference" / "recipe.html").is_file()


def test_each_method_is_served_after_at_most_four_commands():
    """A clone and `make install` are two of them."""
    section = (ROOT / "README.md").read_text().partition("\n## Five methods")[2].partition("\n## ")[0]
    found = re.findall(r"^\*\*\[(\w+)\]\(docs/methods/\w+\.md\)\*\*.*?\n\n((?:    .*\n)+)", section, re.M)
    assert [name for name, _ in found] == ["GreedyHash", "HashNet", "XBM", "GeM", "DELF"]
    for name, code in found:
        lines = parts.command_lines(parts.Block("README.md", "", re.sub(r"^    ", "", code, flags=re.M), ""))
        assert len(lines) <= 2
        (recipe,) = load_study(lines[0][1], lines[0][2:])
        assert recipe.method.name == name.lower()
        assert lines[-1][:2] == ["serve", f"{recipe.output}/index"]
