"""A model in one file answers as the model does, or there is no file."""

import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import export_parts
import numpy as np
import pytest
import torch
from export_parts import saved
from PIL import Image
from samples import coloured_table, png

from ray_retrieval import engines, export, model
from ray_retrieval.data.table import ImageTable, open_images
from ray_retrieval.data.transforms import Preprocessing, prepare
from ray_retrieval.engines import graphs, parity
from ray_retrieval.errors import ArtefactError, DataError, ModelError, RecipeError
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.layers.sign import pack_signs
from ray_retrieval.methods import METHODS, build
from ray_retrieval.methods.greedyhash import GreedyHashConfig
from ray_retrieval.methods.hashing import HashingMethod
from ray_retrieval.model import Encoder
from ray_retrieval.storage import Folder, check_file, read_description

HASHING = [name for name, (_, method) in METHODS.items() if issubclass(method, HashingMethod)]
SIZE = 16
IMAGES = coloured_table(10, size=23)  # not the network's size


def made(name="greedyhash", bits=16):
    """A method whose codes are balanced over `IMAGES`."""
    return export_parts.made(name, IMAGES, bits=bits)


def run_file(folder, images):
    """What a stranger gets who has nothing but the folder: codes and relaxed values of uint8 images."""
    said = json.loads((folder / "export.json").read_text())
    path, name = folder / said["file"]["file"], said["inputs"][0]["name"]
    if said["form"]["name"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run([output["name"] for output in said["outputs"]], {name: images})
    with torch.no_grad():
        outputs = torch.export.load(path).module()(torch.from_numpy(images))
    return [output.numpy() for output in outputs]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A model directory."""
    return saved(tmp_path_factory.mktemp("model"), made())


CASES = [
    *((name, 13, "torch") for name in HASHING),
    ("hashnet", 12, "onnx"),
    ("greedyhash_unsupervised", 13, "onnx"),
    ("greedyhash", 64, "onnx"),
]
PACKED_ALIKE = [pytest.param("hashnet", bits, "torch", marks=pytest.mark.long) for bits in (12, 16, 64)]


def test_every_method_is_exported_in_every_form():
    assert {(name, form) for name, _, form in CASES} == {(n, f) for n in HASHING for f in engines.FORMS}


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize(("name", "bits", "form"), [*CASES, *PACKED_ALIKE])
def test_the_file_answers_as_the_encoder_does_for_any_number_of_images(name, bits, form, tmp_path):
    source = saved(tmp_path / "model", made(name, bits))
    said = export.export(source, tmp_path / "out", form=form)
    encoder = Encoder(source, device="cpu")
    wanted, failures = encoder.encode_table(IMAGES)
    assert not failures
    assert len(np.unique(wanted.data, axis=0)) >= 5
    prepared = np.stack([prepare(IMAGES.image_bytes(row), encoder.preprocessing) for row in range(10)])
    for first, last in ((0, 1), (1, 3), (3, 10)):
        codes, relaxed = run_file(tmp_path / "out", prepared[first:last])
        assert codes.dtype == np.uint8
        assert np.array_equal(codes, wanted.data[first:last])
        assert relaxed.shape == (last - first, bits)
        assert np.array_equal(np.packbits(relaxed >= 0, axis=1), codes)
    assert said["parity"]["differing_bits"] == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["export.json", engines.FORMS[form].file]


def test_the_description_says_what_goes_in_and_out(tmp_path):
    source = saved(tmp_path / "model", made(bits=13))
    said = export.export(source, tmp_path / "out", form="torch")
    folder = Folder(tmp_path / "out")
    written = read_description(folder, "export.json", kind="export", version=1)
    assert {key: value for key, value in written.items() if key not in ("format", "version")} == said
    check_file(folder, written["file"], content=True)
    assert said["model"] == model.read_model_description(Folder(source))[1]
    assert (said["bits"], said["kind"], said["method"], said["precision"]) == (
        *(13, "codes", "greedyhash", "float32"),
    )
    (given,) = said["inputs"]
    assert (given["name"], given["dtype"], given["shape"]) == ("images", "uint8", ["n", 3, SIZE, SIZE])
    outputs = [(output["name"], output["dtype"], output["shape"]) for output in said["outputs"]]
    assert outputs == [("codes", "uint8", ["n", 2]), ("relaxed", "float32", ["n", 13])]
    assert said["class_names"] == ["red", "green", "blue"]


@pytest.mark.parametrize("form", engines.FORMS)
def test_the_file_says_nothing_of_the_machine_that_wrote_it(form, digits, tmp_path):
    export.export(digits, tmp_path, form=form)
    path = tmp_path / engines.FORMS[form].file
    if form == "torch":
        with zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    else:
        content = path.read_bytes()
    assert len(content) > 1_000_000
    for place in (Path(torch.__file__).parent, Path(export.__file__).parent):
        assert str(place).encode() not in content


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 12, 64, 70])
def test_packing_in_the_graph_is_that_of_the_model(bits):
    relaxed = torch.randn(5, bits, generator=torch.Generator().manual_seed(bits))
    relaxed[0, 0], relaxed[1, 0], relaxed[2, -1], relaxed[3, -1] = 0.0, -0.0, float("nan"), float("inf")
    found = graphs.packed(relaxed)
    assert torch.equal(found, pack_signs(relaxed))
    assert np.array_equal(found.numpy(), np.packbits(relaxed.numpy() >= 0, axis=1))


def test_dropout_and_batch_statistics_are_off_whatever_state_the_method_is_in():
    method = made()
    method.backbone.append(torch.nn.Dropout(0.9))
    images = torch.from_numpy(np.stack(parity.synthetic_samples(Preprocessing(size=SIZE)).images))
    with torch.no_grad():
        wanted = method.eval().relaxed(images)
        method.train()
        graph = graphs.trace(method).module()
        first, second = graph(images)[1], graph(images)[1]
    assert torch.equal(first, second)
    assert torch.allclose(first, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(size=16),
        Preprocessing(size=16, resize_to=21),
        Preprocessing(size=16, resize="short_side", resize_to=19),
    ],
    ids=["squash", "squash and crop", "short side"],
)
def test_preprocessing_can_be_repeated_from_the_description(preprocessing):
    said = json.loads(json.dumps(export.preprocessing_in_words(preprocessing)))
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    side, size = said["resize_to"], said["size"]
    width = side if said["resize"] == "squash" else side * 50 // 37
    resized = np.asarray(Image.fromarray(pixels).resize((width, side), Image.Resampling.BILINEAR))
    left, top = round((width - size) / 2), round((side - size) / 2)
    wanted = resized[top : top + size, left : left + size].transpose(2, 0, 1)
    assert np.array_equal(prepare(png(pixels), preprocessing), wanted)
    words = " ".join(said["steps"])
    assert f"both sides are at least {side} pixels" in words
    assert f"[3, {size}, {size}]" in words


# Parity


BIASES = [1.0, -2.0, 1e-9, 0.5, -0.25]


@pytest.fixture
def constant():
    """A method of five bits whose relaxed values are `BIASES`, whatever the image."""
    method = made(bits=5).eval()
    with torch.no_grad():
        method.hash_layer.weight.zero_()
        method.hash_layer.bias.copy_(torch.tensor(BIASES))
    return method


SAMPLES = parity.Samples(np.zeros((12, 3, SIZE, SIZE), np.uint8), [f"image {n}" for n in range(12)], "zeros")


def answers(change=lambda codes, relaxed: None):
    """An engine that answers `BIASES`, changed."""

    def run(images):
        relaxed = np.tile(np.array(BIASES, np.float32), (len(images), 1))
        codes = np.packbits(relaxed >= 0, axis=1)
        changed = change(codes, relaxed)
        return (codes, relaxed) if changed is None else changed

    return run


def compare(engine, method, samples=SAMPLES, precision="float32"):
    return parity.compare(engine, method, samples, precision=precision, where="the file")


def test_equal_answers_are_equal(constant):
    found = compare(answers(), constant)
    assert (found.bits, found.differing_bits) == (60, 0)
    assert found.batch_sizes == [1, 2, 7]
    assert found.outputs == {"relaxed": parity.Difference(0, 0, 16 * 2.0**-23 * 2)}
    assert (found.trained_in, found.differing_from_trained) == ("float32", 0)


def test_a_bit_may_turn_where_its_value_is_within_rounding_of_zero(constant):
    def turn(codes, relaxed):
        codes ^= 0b00100000
        relaxed[:, 2] = -1e-9

    found = compare(answers(turn), constant)
    assert found.differing_bits == 12
    assert found.outputs["relaxed"].max_absolute_error == pytest.approx(2e-9)


def test_another_bit_is_refused_and_named(constant):
    def turn(codes, relaxed):
        if len(codes) == 2:  # images 1 and 2, 10 and 11
            codes[1] ^= 0b00010000

    with pytest.raises(ModelError, match="codes differ") as caught:
        compare(answers(turn), constant)
    assert str(caught.value).startswith("the file: ")
    assert caught.value.problem.endswith(": image 2 at 3; image 11 at 3")


def test_a_bit_beyond_the_code_is_refused(constant):
    def fill(codes, relaxed):
        codes |= 1

    with pytest.raises(ModelError, match=r"image 0 at 7; image 1 at 7; .*; 9 more"):
        compare(answers(fill), constant)


@pytest.mark.parametrize("wrong", [1e-3, np.nan, np.inf])
def test_another_value_is_refused_and_named(constant, wrong):
    def shift(codes, relaxed):
        relaxed[0, 4] += wrong

    with pytest.raises(ModelError, match=r"relaxed values differ by up to .*: image 0 at 4; image 1"):
        compare(answers(shift), constant)


@pytest.mark.parametrize(
    "change",
    [
        lambda codes, relaxed: (codes[:, :0], relaxed),
        lambda codes, relaxed: (codes.astype(np.int32), relaxed),
        lambda codes, relaxed: (codes, relaxed[:-1]),
    ],
    ids=["codes too short", "type", "image missing"],
)
def test_answers_of_another_shape_or_type_are_refused(constant, change):
    with pytest.raises(ModelError, match=r"gives .*, the model "):
        compare(answers(change), constant)


def test_a_model_without_finite_values_is_refused(constant):
    constant.hash_layer.bias.data[0] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        compare(answers(), constant)


def test_few_images_are_run_in_batches_of_several_sizes_all_the_same(constant):
    one = dataclasses.replace(SAMPLES, images=SAMPLES.images[:1], names=["only"])
    found = compare(answers(), constant, one)
    assert (found.images, found.batch_sizes, found.bits) == (1, [1, 2, 7], 50)


def test_what_the_model_gives_in_its_own_precision_is_told():
    # One bit of the mean red: 1.001 · 1 − 1.003 is below 0 in float32; in bfloat16 both factors are 1.
    white = {"size": SIZE, "mean": [0, 0, 0], "std": [1, 1, 1]}
    config = GreedyHashConfig(bits=1, backbone=BackboneConfig(name="small", weights="none"), image=white)
    method = build(config, classes=3).eval()
    method.backbone = torch.nn.Sequential(torch.nn.AvgPool2d(SIZE), torch.nn.Flatten())
    method.hash_layer = torch.nn.Linear(3, 1)
    with torch.no_grad():
        method.hash_layer.weight.copy_(torch.tensor([[1.001, 0, 0]]))
        method.hash_layer.bias.fill_(-1.003)
    images = np.full((10, 3, SIZE, SIZE), 255, np.uint8)
    images[:4] = 0

    def engine(pixels):
        with torch.no_grad():
            relaxed = method.relaxed(torch.from_numpy(pixels)).numpy()
        return np.packbits(relaxed >= 0, axis=1), relaxed

    samples = parity.Samples(images, ["image"] * 10, "white and black")
    found = compare(engine, method, samples, precision="bf16")
    assert (found.differing_bits, found.trained_in, found.differing_from_trained) == (0, "bf16", 6)
    assert compare(engine, method, samples).differing_from_trained == 0


def test_images_of_a_table_are_spread_over_it_and_failures_counted():
    table = coloured_table(9, size=SIZE).table
    rows = table.to_pylist()
    rows[4]["image"]["bytes"] = b"no image"
    broken = ImageTable(type(table).from_pylist(rows, schema=table.schema), name="nine")
    found = parity.table_samples(broken, Preprocessing(size=SIZE), limit=5)
    assert found.names == [f"image 'image-{row:04d}'" for row in (0, 2, 6, 8)]
    assert (found.left_out, found.source) == (1, "5 of 9 images of nine")
    with pytest.raises(DataError, match="none of 1 images can be decoded"):
        parity.table_samples(broken.take(np.array([4])), Preprocessing(size=SIZE))
    with pytest.raises(DataError, match="the table is empty"):
        parity.table_samples(broken.take(np.array([], np.int64)), Preprocessing(size=SIZE))


# What is left behind


def test_an_export_that_packs_otherwise_is_refused_and_leaves_nothing(digits, tmp_path, monkeypatch):
    def backwards(relaxed):
        return pack_signs_of(relaxed.flip(1))

    pack_signs_of = graphs.packed
    monkeypatch.setattr(graphs, "packed", backwards)
    with pytest.raises(ModelError, match="computes other descriptors than the model: codes differ"):
        export.export(digits, tmp_path / "out", form="torch")
    assert not (tmp_path / "out").exists()


def test_an_export_with_other_weights_is_refused_and_an_earlier_one_stays(digits, tmp_path, monkeypatch):
    export.export(digits, tmp_path, form="torch")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = engines.FORMS["torch"]

    def careless(program, graph, path):
        program.state_dict["method.hash_layer.bias"].data += 0.01
        return written.write(program, graph, path)

    monkeypatch.setitem(engines.FORMS, "torch", dataclasses.replace(written, write=careless))
    with pytest.raises(ModelError, match=r"relaxed values differ by up to 0\.01"):
        export.export(digits, tmp_path, form="torch")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_export_leaves_nothing(digits, tmp_path, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "check_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.export(digits, tmp_path / "out", form="torch")
    assert not (tmp_path / "out").exists()
    (tmp_path / "model").mkdir()
    for name in os.listdir(digits):
        shutil.copy(Path(digits) / name, tmp_path / "model")
    before = sorted(os.listdir(digits))
    with pytest.raises(KeyboardInterrupt):
        export.export(str(tmp_path / "model"), tmp_path / "model", form="torch")
    assert sorted(os.listdir(tmp_path / "model")) == before


def test_a_folder_that_holds_anything_else_is_refused_at_once(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load", None)  # what is wrong is said before the model is read
    for name in ("CURRENT", "embeddings.json", "notes.txt", "model.pt2"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text("kept")
        with pytest.raises(ArtefactError, match=rf"holds something that is no export of a model \({name}\)"):
            export.export(digits, out, form="torch")
        assert os.listdir(out) == [name]


@pytest.mark.parametrize("form", ["torch", pytest.param("onnx", marks=pytest.mark.long)])
def test_an_earlier_export_stays_where_the_store_is_full(form, digits, tmp_path, monkeypatch):
    export.export(digits, tmp_path, form="torch")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_source, target, _chunk):
        target.write(b"the beginning")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export.shutil, "copyfileobj", full)
    with pytest.raises(ArtefactError, match="No space left on device"):
        export.export(digits, tmp_path, form=form)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


KILLED = """
import os, signal, sys
from ray_retrieval import export
export.check_file = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
export.export(sys.argv[1], sys.argv[2], form="torch")
"""


def test_a_killed_export_does_not_count_and_is_done_again(digits, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    died = subprocess.run([sys.executable, "-c", KILLED, digits, str(out)], env=environment, check=False)
    assert died.returncode == -signal.SIGKILL
    with pytest.raises(ArtefactError, match=r"export\.json is missing"):
        read_description(Folder(out), "export.json", kind="export", version=1)
    (out / "model.pt2.tmp-0123456789ab").write_bytes(b"half a file")
    export.export(digits, out, form="torch")
    assert sorted(os.listdir(out)) == ["export.json", "model.pt2"]


def test_an_export_replaces_one_of_another_form_but_no_other_artefact(digits, tmp_path):
    export.export(digits, tmp_path, form="onnx")
    export.export(digits, tmp_path, form="torch")
    assert sorted(os.listdir(tmp_path)) == ["export.json", "model.pt2"]
    said = json.loads((tmp_path / "export.json").read_text())
    said["file"]["file"] = "../victim.pt2"
    (tmp_path / "export.json").write_text(json.dumps(said))
    (tmp_path.parent / "victim.pt2").write_text("not ours")
    with pytest.raises(ArtefactError, match=r"names the file '\.\./victim\.pt2'"):
        export.export(digits, tmp_path, form="torch")
    assert (tmp_path.parent / "victim.pt2").read_text() == "not ours"
    (tmp_path / "export.json").write_text(json.dumps({"format": "something else"}))
    with pytest.raises(ArtefactError, match="does not describe a export"):
        export.export(digits, tmp_path, form="torch")


def test_missing_packages_are_named_with_the_extra(digits, tmp_path, monkeypatch):
    found = export.importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(RecipeError, match="needs onnxscript") as caught:
        export.export(digits, tmp_path / "out", form="onnx")
    assert "ray_retrieval[export]" in str(caught.value)
    assert not (tmp_path / "out").exists()
    export.export(digits, tmp_path / "out", form="torch")  # which needs none of them


# The command


def test_the_command_exports_with_parity_on_the_images_given(cli_call, tmp_path):
    source = saved(tmp_path / "model", made(), precision="bf16")
    (tmp_path / "images").mkdir()
    for row in range(10):
        stream = io.BytesIO()
        Image.open(io.BytesIO(IMAGES.image_bytes(row))).save(stream, format="JPEG")
        (tmp_path / "images" / f"{row}.jpg").write_bytes(stream.getvalue())
    arguments = (source, "--format", "torch", "--out", tmp_path / "out", "--images", tmp_path / "images")
    code, out, _ = cli_call("export", *arguments)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"export  {tmp_path}/out/model.pt2, 1.3 MB")
    assert lines[1].startswith("parity  0 of 160 bits differ")
    assert "10 of 10 images of" in lines[1]
    assert lines[2].startswith("note    the model describes images in bf16, the export in float32: ")
    code, out, _ = cli_call("export", *arguments, "--json")
    said = json.loads(out)
    assert code == 0
    assert said.pop("folder") == str(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert {"format": "ray_retrieval/export", "version": 1, **said} == written
    assert len(open_images(str(tmp_path / "images"))) == said["parity"]["images"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "x"], "no model here"),
        (["MODEL", "--out", "x", "--format", "tensorrt"], "'tensorrt', known are: torch, onnx"),
        (["MODEL", "--out", "x", "--images", "nothing"], "nothing"),
        (["MODEL", "--out", "x", "--root", "nothing"], "--root: it is for the paths of --images"),
        (["MODEL", "--out", "x", "--max-loss", "0.1"], "--max-loss: it bounds what 8 bits cost"),
        (["MODEL", "--out", "x", "--int8", "--format", "torch"], "8 bits are for the format onnx"),
        (["MODEL", "--out", "x", "--int8", "--format", "tensorrt"], "'tensorrt', known are: torch, onnx"),
        (["nowhere", "--int8"], "no model here"),
        (["MODEL", "--out", "x", "--int8"], "no recipe beside the model"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(cli_call, digits, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [digits if argument == "MODEL" else argument for argument in arguments]
    code, out, err = cli_call("export", *given)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
