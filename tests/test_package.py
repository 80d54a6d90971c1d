"""The wheel: what a stranger installs holds all that the package reads, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel; of a copy, since building writes beside the sources."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml builds with setuptools 77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ray_retrieval", "jobs"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    subprocess.run([sys.executable, "-c", BUILD, out], cwd=source, check=True, capture_output=True)
    (built,) = out.glob("ray_retrieval-*-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def sources(pattern):
    return {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern) if path.is_file()}


def test_the_wheel_holds_all_that_the_package_reads(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = sources("ray_retrieval/**/*.py")
    data = sources("ray_retrieval/templates/*") | sources("ray_retrieval/serve/page/*")
    recipes = {f"ray_retrieval/{name}" for name in sources("jobs/*.yaml")}
    assert min(len(modules), len(data), len(recipes)) > 5
    assert names == modules | data | recipes | {"ray_retrieval/py.typed"}
    for name in recipes:
        assert wheel.read(name) == (ROOT / name.removeprefix("ray_retrieval/")).read_bytes()


def test_the_wheel_brings_its_command_and_licence(wheel):
    said = {name.partition(".dist-info/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "ray-retrieval = ray_retrieval.cli:main" in wheel.read(said["entry_points.txt"]).decode()
    assert wheel.read(said["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    about = wheel.read(said["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in about
    assert "Requires-Python: >=3.10" in about
