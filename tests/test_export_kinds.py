"""Exports of vectors and local features, and exports at work in the place of the model."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from export_parts import SETTINGS, made, prepared, saved
from samples import coloured_table

from ray_retrieval import engines, export, model
from ray_retrieval.descriptors import Codes, Local, Vectors
from ray_retrieval.engines import graphs, parity
from ray_retrieval.errors import ArtefactError, ModelError, RecipeError
from ray_retrieval.layers.backbones import BackboneConfig, build_feature_map, least_side, side_for_cells
from ray_retrieval.methods import METHODS
from ray_retrieval.methods.gem import scaled_side
from ray_retrieval.methods.hashing import HashingMethod
from ray_retrieval.model import Encoder
from ray_retrieval.storage import Folder

TABLE = coloured_table(12, mixed_sizes=True)
LARGE = coloured_table(6, size=57)
SEVERAL_SIZES = ["gem", "delf"]
NAMES = ["greedyhash", "xbm", *SEVERAL_SIZES]  # the other methods of hashing: test_export.py


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of each method with its export to ONNX in its folder, and what was said of it."""
    folder = tmp_path_factory.mktemp("exported")
    said = {}
    for name in NAMES:
        source = saved(folder / name, made(name, TABLE))
        said[name] = export.export(source, form="onnx", images=None if name == "gem" else TABLE)
    return folder, said


def test_every_method_has_settings_here():
    assert set(SETTINGS) == set(METHODS)
    hashing = {name for name, (_, method) in METHODS.items() if issubclass(method, HashingMethod)}
    assert set(NAMES) | hashing == set(METHODS)


def assert_alike(found, wanted):
    """Equal but for rounding; of local features in the same order, too."""
    assert type(found) is type(wanted)
    if isinstance(wanted, Codes):
        np.testing.assert_array_equal(found.data, wanted.data)
    elif isinstance(wanted, Vectors):
        np.testing.assert_allclose(found.data, wanted.data, atol=2e-5)
    else:
        np.testing.assert_array_equal(found.offsets, wanted.offsets)
        np.testing.assert_array_equal(found.sizes, wanted.sizes)
        np.testing.assert_allclose(found.locations, wanted.locations, atol=1e-4)
        np.testing.assert_allclose(found.scales, wanted.scales)
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
        np.testing.assert_allclose(found.data, wanted.data, atol=2e-3)
        np.testing.assert_allclose(found.vectors, wanted.vectors, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_with_the_engine_gives_what_the_model_gives(exported, name):
    folder, _ = exported
    own, other = Encoder(str(folder / name), device="cpu"), Encoder(str(folder / name), engine="onnx")
    for table in (TABLE, LARGE):
        wanted, _ = own.encode_table(table)
        found, failures = other.encode_table(table)
        assert not failures
        assert_alike(found, wanted)
    broken, failures = other.encode([b"no image", TABLE.image_bytes(0)])
    assert (list(failures), len(broken)) == ([0], 2)
    assert other.fingerprint == own.fingerprint
    own.close()
    other.close()


@pytest.mark.parametrize("name", NAMES)
def test_what_it_says_fits_the_file(exported, name):
    import onnxruntime

    folder, said = exported
    session = onnxruntime.InferenceSession(folder / name / "onnx" / "model.onnx")
    written = json.loads((folder / name / "onnx" / "export.json").read_text())
    assert written["parity"] == json.loads(json.dumps(said[name]["parity"]))
    types = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
    for ports, stated in ((session.get_inputs(), "inputs"), (session.get_outputs(), "outputs")):
        assert [port.name for port in ports] == [port["name"] for port in written[stated]]
        for port, one in zip(ports, written[stated], strict=True):
            assert types[port.type] == one["dtype"]
            for size, wanted in zip(port.shape, one["shape"], strict=True):
                assert size == wanted or isinstance(wanted, str)
    errors = written["parity"]["outputs"]
    assert all(error["max_absolute_error"] <= error["allowed_error"] for error in errors.values())


@pytest.mark.parametrize("name", SEVERAL_SIZES)
def test_any_number_of_images_of_any_size_goes_through(exported, name):
    folder, said = exported
    method = made(name, TABLE)
    graph = graphs.graph_of(method)
    run = engines.open_onnx(folder / name / "onnx" / "model.onnx")
    generator = np.random.default_rng(0)
    least = graph.least_side
    for count, height, width in ((1, least, least), (3, least, least + 7), (2, 45, 31), (1, 97, 130)):
        pixels = generator.integers(0, 256, (count, 3, max(height, least), max(width, least)))
        pixels = pixels.astype(graph.input.dtype)
        for found, wanted in zip(run(pixels), graphs.answers(graph, pixels), strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert len(said[name]["parity"]["sides"]) > 1


@pytest.mark.parametrize("name", SEVERAL_SIZES)
def test_images_smaller_than_the_graph_takes_go_through_the_model(exported, name):
    folder, _ = exported
    own, other = Encoder(str(folder / name), device="cpu"), Encoder(str(folder / name), engine="onnx")
    table = coloured_table(2, size=9)
    assert_alike(other.encode_table(table)[0], own.encode_table(table)[0])


GEMS = {
    "exponent of scales": {"whitening": {"name": "none"}, "dimension": None},
    "average and projection": {"pooling": "average", "projection": True, "scales": [1.0]},
    "exponents, whitening not learned": {"pooling": "gemmp", "local_whitening": True, "scales": [1.0]},
    "maximum of scales": {"pooling": "max", "combine": "max", "scales": [1.0, 2.0]},
    "superglobal": {"describe_with": "superglobal", "scales": [1.0]},
    "squares by regions": {
        "pooling": "rmac",
        "regional": True,
        "image": {**SETTINGS["gem"]["image"], "shapes": "pad"},
        "scales": [1.0],
    },
}


QUICK_GEMS = ("maximum of scales", "squares by regions")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK_GEMS else pytest.param(kind, marks=pytest.mark.long) for kind in GEMS]
)
def test_every_pooling_of_gem_is_exported(kind, tmp_path):
    method = made("gem", **GEMS[kind])
    if kind.endswith("not learned"):
        method.whitened.fill_(0)
    said = export.export(saved(tmp_path / "model", method), tmp_path / "out", form="torch")
    assert said["parity"]["outputs"]["vectors"]["allowed_error"] < 1e-3


def test_a_grid_of_regions_is_no_graph_for_several_sizes(tmp_path):
    source = saved(tmp_path / "model", made("gem", pooling="rmac"))
    with pytest.raises(ModelError, match=r"pooling by regions.*shapes=pad"):
        export.export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "side"), [("resnet18", 33), ("alexnet", 47), ("vgg16", 32), ("small", 16)])
def test_the_least_side_is_that_of_maps_of_two_cells(name, side):
    network, _ = build_feature_map(BackboneConfig(name=name, weights="none"))
    assert side_for_cells(network.eval(), 2) == side
    assert side_for_cells(network, 1) >= least_side(name)


def test_a_residual_network_is_one_graph_for_all_sides():
    method = made("gem", backbone=BackboneConfig(name="resnet18", weights="none"), scales=[1.0])
    graph = graphs.trace(method).module()
    for sides in ((33, 64), (47, 90)):
        images = torch.randint(0, 256, (1, 3, *sides), dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(graph(images)[0], method.vectors(images), atol=1e-5, rtol=0)


DELFS = {
    "without a global head": {"global_head": None},
    "by an autoencoder, few and apart": {
        "reduction": {"name": "autoencoder"},
        "pyramid": {"scales": [1.0, 2.0], "max_features": 9, "nms_iou": 0.4},
    },
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param("without a global head", marks=pytest.mark.long), "by an autoencoder, few and apart"],
)
def test_every_kind_of_delf_is_exported(kind, tmp_path):
    method = made("delf", **DELFS[kind])
    method.threshold.fill_(0.1)
    source = saved(tmp_path / "model", method)
    said = export.export(source, tmp_path / "out", form="torch", images=TABLE)
    assert said["pyramid"]["threshold"] == pytest.approx(0.1)
    run = engines.FORMS["torch"].open(tmp_path / "out" / "model.pt2")
    exported = engines.Exported(method, run)
    for _, images in prepared(LARGE, method.preprocessing).groups:
        with torch.inference_mode():
            assert_alike(exported.describe(images), method.describe(images))


def test_a_network_that_was_only_tuned_is_not_exported(tmp_path):
    source = saved(tmp_path / "model", made("delf", stage="tuning"))
    with pytest.raises(ModelError, match="only tuned"):
        export.export(source, tmp_path / "out")


def test_the_pyramid_can_be_repeated_from_the_description(exported):
    """Features of one image by the file and what the description says, in numpy but for the resizing."""
    folder, said = exported
    about, method = said["delf"]["pyramid"], made("delf")
    run = engines.open_onnx(folder / "delf" / "onnx" / "model.onnx")
    (image,) = prepared(LARGE, method.preprocessing).groups[0][1][:1]
    height, width = image.shape[1:]
    field, found = about["receptive_field"], []
    for scale in about["scales"]:
        sides = round(height * scale), round(width * scale)
        if min(sides) < about["min_side"]:
            continue
        resized = torch.nn.functional.interpolate(
            image[None].float(), size=sides, mode="bilinear", antialias=True
        )
        cells, scores, _ = run(resized.numpy())
        for i in range(cells.shape[1]):
            for j in range(cells.shape[2]):
                x = (j * field["stride"] + field["offset"] + 0.5) / (sides[1] / width) - 0.5
                y = (i * field["stride"] + field["offset"] + 0.5) / (sides[0] / height) - 0.5
                found.append((-scores[0, i, j], x, y, cells[0, i, j]))
    found.sort(key=lambda one: one[0])
    found = found[: about["max_features"]]
    wanted = method.describe(image[None])
    assert len(wanted.data) == len(found)
    np.testing.assert_allclose([one[1:3] for one in found], wanted.locations, atol=1e-3)
    np.testing.assert_allclose([one[3] for one in found], wanted.data, atol=2e-3)


@pytest.mark.parametrize("scale", [1.0, 0.7071, 0.5, 0.25, 1.4142, 2**-0.5, 2**0.5])
def test_sides_times_scales_are_cut_as_ever(scale):
    assert all(scaled_side(side, scale) == int(side * scale) for side in range(1, 4097))


def test_vectors_of_another_model_are_refused(tmp_path, monkeypatch):
    written = engines.FORMS["torch"]

    def careless(program, graph, path):
        program.state_dict["method.embedding.bias"].data += 0.1
        return written.write(program, graph, path)

    monkeypatch.setitem(
        engines.FORMS, "torch", engines.Form(written.file, written.packages, careless, written.open)
    )
    source = saved(tmp_path / "model", made("xbm"))
    with pytest.raises(ModelError, match="other descriptors than the model: vectors differ by up to"):
        export.export(source, tmp_path / "out", form="torch")
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_refused():
    method = made("xbm")
    samples = parity.synthetic_samples(method.preprocessing)

    def run(images):
        found = method.vectors(torch.from_numpy(images)).detach().numpy().copy()
        if len(images) == 7:
            found[3, 2] = np.nan
        return [found]

    with pytest.raises(ModelError, match="vectors differ by up to nan"):
        parity.compare(run, method, samples, precision="float32", where="the file")


# Where exports are looked for


def test_an_export_is_found_in_the_model_and_beside_it(exported, tmp_path):
    folder, _ = exported
    shutil.copytree(folder / "xbm", tmp_path / "model")
    Encoder(str(tmp_path / "model"), engine="onnx").close()
    shutil.move(tmp_path / "model" / "onnx", tmp_path / "anything")
    Encoder(str(tmp_path / "model"), engine="onnx").close()


def test_without_an_export_it_is_said_what_to_type(exported, tmp_path):
    folder, _ = exported
    shutil.copytree(folder / "xbm", tmp_path / "my model")
    shutil.rmtree(tmp_path / "my model" / "onnx")
    with pytest.raises(ArtefactError, match="no export of model") as caught:
        Encoder(str(tmp_path / "my model"), engine="onnx")
    assert caught.value.mend == f"make it: ray-retrieval export '{tmp_path}/my model'"
    with pytest.raises(ArtefactError, match="--int8 --images IMAGES"):
        Encoder(str(folder / "xbm"), engine="onnx-int8")


def test_the_export_of_another_model_is_refused_and_named(exported, tmp_path):
    folder, said = exported
    saved(tmp_path / "model", made("gem"))
    shutil.copytree(folder / "xbm" / "onnx", tmp_path / "model" / "onnx")
    with pytest.raises(ArtefactError, match=f"onnx is of model {said['xbm']['model']}"):
        Encoder(str(tmp_path / "model"), engine="onnx")


def test_a_damaged_export_is_refused(exported, tmp_path):
    folder, _ = exported
    shutil.copytree(folder / "xbm", tmp_path / "model")
    path = tmp_path / "model" / "onnx" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="damaged"):
        Encoder(str(tmp_path / "model"), engine="onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format version 2, this program reads version 1"),
        ({"file": {"file": "../model.onnx", "bytes": 1, "sha256": ""}}, r"names the file '\.\./model\.onnx'"),
        ({"file": None}, "names the file None"),
    ],
    ids=["newer", "another folder", "no file"],
)
def test_an_export_that_cannot_be_used_is_named_with_the_reason(exported, tmp_path, change, message):
    folder, _ = exported
    shutil.copytree(folder / "xbm", tmp_path / "model")
    path = tmp_path / "model" / "onnx" / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtefactError, match=f"onnx cannot be used, .*{message}"):
        Encoder(str(tmp_path / "model"), engine="onnx")


def test_an_engine_is_looked_for_before_the_model_is_loaded(exported, monkeypatch):
    folder, _ = exported

    def loaded(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(model, "load", loaded)
    for engine, error in (("tensorrt", RecipeError), ("onnx-int8", ArtefactError)):
        with pytest.raises(error):
            Encoder(str(folder / "xbm"), engine=engine)


def test_engines_that_cannot_be_are_refused(exported, monkeypatch):
    folder, _ = exported
    source = str(folder / "xbm")
    for device in ("auto", "cuda"):
        with pytest.raises(RecipeError, match="unknown engine 'tensorrt', known are: torch, onnx, onnx-int8"):
            Encoder(source, engine="tensorrt", device=device)
    with pytest.raises(RecipeError, match="runs on the processor, not on cuda"):
        Encoder(source, engine="onnx", device="cuda")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RecipeError, match=r"needs onnxruntime.*ray_retrieval\[export\]"):
        Encoder(source, engine="onnx")
    with pytest.raises(RecipeError, match="needs onnxruntime"):  # before anything is started
        engines.find_export(Folder(source), "any", "onnx")


def test_class_probabilities_are_the_models_own(exported):
    folder, _ = exported
    images = [TABLE.image_bytes(row) for row in range(3)]
    found = [
        Encoder(str(folder / "greedyhash"), engine=engine).class_probabilities(images)[0]
        for engine in ("torch", "onnx")
    ]
    np.testing.assert_allclose(*found, atol=1e-6)


def test_local_features_and_models_are_what_encoders_hold(exported):
    folder, _ = exported
    encoder = Encoder(str(folder / "delf"), engine="onnx")
    assert isinstance(encoder.encode_table(LARGE)[0], Local)
    assert encoder.fingerprint == model.load(str(folder / "delf")).fingerprint
