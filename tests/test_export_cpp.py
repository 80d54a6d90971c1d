"""The program of docs/export.md in C++: what it prepares, and, where ONNX Runtime is, what it prints.

`ONNXRUNTIME` names the folder of an unpacked release of ONNX Runtime (include/, lib/).
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from export_parts import made, saved
from PIL import Image
from samples import png

from ray_retrieval import export
from ray_retrieval.data.transforms import Preprocessing, prepare
from ray_retrieval.engines.graphs import graph_of
from ray_retrieval.storage import Folder

SOURCES = Path(__file__).parents[1] / "docs" / "cpp"
COMPILER = shutil.which("g++") or shutil.which("clang++")
MAIN = """
#include <cstdio>
#include "prepare.hpp"
int main(int, char** given) try {
    for (int at = 2; given[at]; ++at) {
        const Picture made = prepared(read_ppm(given[at]), read_preprocessing(given[1]));
        std::printf("%d %d\\n", made.height, made.width);
        std::fwrite(made.pixels.data(), 1, made.pixels.size(), stdout);
    }
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\\n", error.what());
    return 2;
}
"""
KINDS = [
    {"size": 16},
    {"size": 16, "resize_to": 21},
    {"size": 16, "resize": "short_side", "resize_to": 19},
    {"size": 32, "resize": "long_side"},
    {"size": 32, "resize": "long_side", "shapes": "buckets"},
    {"size": 70, "resize": "long_side", "shapes": "buckets"},
    {"size": 33, "resize": "long_side", "shapes": "pad", "mean": (0.25, 0.1, 0.5)},
]
SIDES = [(50, 37), (37, 50), (9, 14), (16, 16), (200, 31), (21, 21), (40, 33), (64, 41), (90, 7)]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no compiler of C++")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "main.cpp").write_text(MAIN)
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(SOURCES)]
    subprocess.run([COMPILER, *options, "main.cpp", "-o", "main"], cwd=folder, check=True)
    return folder / "main"


def describe_in(folder, how, given=None):
    """The parts of an export's description that the program reads."""
    words = export.preprocessing_in_words(how)
    body = {"inputs": [given or {"dtype": "uint8"}], "outputs": [], "preprocessing": words}
    Folder(folder).write_json("export.json", body)


def refused(program, *given):
    found = subprocess.run([program, *given], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    return found.stderr


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_it_prepares_pictures_byte_for_byte(program, settings, tmp_path):
    how = Preprocessing(**settings)
    describe_in(tmp_path, how)
    generator = np.random.default_rng(0)
    names, wanted = [], b""
    for width, height in SIDES:
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        names.append(str(tmp_path / f"{width}x{height}.ppm"))
        Image.fromarray(pixels).save(names[-1])
        one = prepare(png(pixels), how)
        wanted += f"{one.shape[1]} {one.shape[2]}\n".encode() + one.tobytes()
    found = subprocess.run([program, tmp_path / "export.json", *names], capture_output=True, check=True)
    assert found.stdout == wanted


def test_what_is_no_picture_ends_with_a_word(program, tmp_path):
    (tmp_path / "broken.ppm").write_bytes(b"P6\n4 4\n255\nshort")
    describe_in(tmp_path, Preprocessing())
    assert "cut short" in refused(program, tmp_path / "export.json", tmp_path / "broken.ppm")


def test_local_features_and_pictures_too_small_for_a_model_are_refused(program, tmp_path):
    for name in ("delf", "gem"):
        (tmp_path / name).mkdir()
        graph = graph_of(made(name))
        describe_in(tmp_path / name, graph.preprocessing, graph.input.as_json())
    Image.new("RGB", (40, 30)).save(tmp_path / "whole.ppm")
    Image.new("RGB", (40, 3)).save(tmp_path / "narrow.ppm")
    said = refused(program, tmp_path / "delf" / "export.json", tmp_path / "whole.ppm")
    assert "local features" in said
    taken = [program, tmp_path / "gem" / "export.json", tmp_path / "whole.ppm"]
    subprocess.run(taken, capture_output=True, check=True)
    said = refused(program, tmp_path / "gem" / "export.json", tmp_path / "narrow.ppm")
    assert re.search(r"too small: the model takes sides from [0-9]+ pixels", said)


@pytest.mark.parametrize("name", ["greedyhash", "gem"])
def test_it_prints_what_embed_prints(name, tmp_path):
    runtime = Path(os.environ.get("ONNXRUNTIME", "/usr"))
    include = next(runtime.glob("include/**/onnxruntime_cxx_api.h"), None)
    if COMPILER is None or include is None:
        pytest.skip("no headers of ONNX Runtime; name its folder in ONNXRUNTIME")
    library = runtime / "lib"
    options = ["-std=c++17", "-O1", "-I", str(include.parent), "-L", str(library), f"-Wl,-rpath,{library}"]
    command = [COMPILER, str(SOURCES / "describe.cpp"), *options, "-lonnxruntime", "-o", "describe"]
    subprocess.run(command, cwd=tmp_path, check=True)
    method = made(name)
    export.export(saved(tmp_path / "model", method), tmp_path / "exported")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.ppm")
    found = subprocess.run(
        ["./describe", "exported", "photo.ppm"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()
    wanted = method.describe(torch.from_numpy(prepare(png(pixels), method.preprocessing))[None]).data[0]
    if name == "greedyhash":
        assert found == wanted.tobytes().hex()
    else:
        np.testing.assert_allclose([float(value) for value in found.split()], wanted, atol=1e-4)
