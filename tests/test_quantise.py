"""A backbone in 8 bits, what it costs, and when it is refused."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from export_parts import made, saved
from pyarrow import fs
from samples import coloured_benchmark, coloured_table

from ray_retrieval import export, storage
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.descriptors import Codes, Local, Vectors
from ray_retrieval.engines import graphs, int8_loss, parity, quantise
from ray_retrieval.errors import ArtefactError, ModelError, RecipeError
from ray_retrieval.metrics import hamming
from ray_retrieval.metrics.metric import Metric
from ray_retrieval.model import Encoder
from ray_retrieval.storage import Folder

TABLE = coloured_table(40, size=24)


def unlabelled(table):
    rows = table.table.drop_columns(["label"])
    return ImageTable(rows, name=table.name)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A model of vectors with its export in 8 bits, and what was said of it."""
    source = saved(tmp_path_factory.mktemp("int8") / "xbm", made("xbm"))
    return source, export.export(source, images=TABLE, int8=True)


def test_the_loss_is_measured_and_said(eight):
    source, said = eight
    int8 = said["int8"]
    assert (said["precision"], said["form"]["name"]) == ("int8", "onnx")
    assert int8["metric"] == "recall@1"
    assert int8["measured_on"].startswith("8 queries and a database of 32, of 40 images of ")
    assert int8["measured_on"].endswith(", 40 of them calibrated on")
    assert int8["compared_on"] == "32 images calibrated on"
    assert "parity" not in said
    assert said["parity_before_int8"]["images"] == 40
    assert int8["loss"] == int8["model"] - min(int8["int8"], int8["int8_queries"])
    assert int8["loss"] <= int8["max_loss"] == quantise.MAX_LOSS
    assert int8["agreement"] > 0.99
    assert int8["layers"] >= 6
    written = json.loads((Folder(source) / "onnx-int8").read_bytes("export.json"))
    assert written["int8"] == int8


def test_the_file_computes_in_8_bits_and_is_small(eight):
    import onnx

    source, said = eight
    graph = onnx.load(f"{source}/onnx-int8/model.onnx").graph
    convolved = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    assert {made_by[name] for name in convolved} == {"DequantizeLinear"}
    weights = {entry.name: entry for entry in graph.initializer}
    values = [onnx.numpy_helper.to_array(weights[name]) for name in weights if name.endswith("_quantized")]
    weights_of_8_bits = [value for value in values if value.dtype == np.int8]
    assert len(weights_of_8_bits) == len(convolved)
    assert max(np.abs(value.astype(int)).max() for value in weights_of_8_bits) <= 64  # 7 bits
    assert said["file"]["bytes"] < 0.4 * Folder(source).size("model.safetensors")


def test_an_encoder_runs_it_when_asked_and_only_then(eight):
    source, _ = eight
    wanted, _ = Encoder(source, device="cpu").encode_table(TABLE)
    found, _ = Encoder(source, engine="onnx-int8").encode_table(TABLE)
    assert isinstance(found, Vectors)
    cosines = (wanted.data * found.data).sum(axis=1)
    assert 0.99 < cosines.min() < 1 - 1e-7
    with pytest.raises(ArtefactError, match="no export of model"):
        Encoder(source, engine="onnx")


def test_a_loss_above_the_bound_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    source = saved(tmp_path / "model", made("greedyhash", TABLE))
    values = iter([0.9, 0.8, 0.85])

    def metric(*_, **__):
        return Metric("map", next(values), "as told")

    monkeypatch.setattr(int8_loss, "field_metric", metric)
    with pytest.raises(ModelError, match=r"8 bits cost 0\.1000 of map, more than 0\.05: .*`max_loss`"):
        export.export(source, images=TABLE, int8=True, max_loss=0.05)
    assert not (Folder(source) / "onnx-int8").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", ["gem", "delf"])
def test_methods_of_several_sizes_take_it_too(name, tmp_path):
    table = coloured_table(12, mixed_sizes=True)
    simpler = {"scales": [1.0]} if name == "gem" else {"global_head": None}
    source = saved(tmp_path / "model", made(name, **simpler))
    said = export.export(source, images=unlabelled(table), int8=True)
    assert said["int8"]["metric"] is None
    encoder = Encoder(source, engine="onnx-int8")
    found, failures = encoder.encode_table(table)
    assert not failures
    assert isinstance(found, Vectors if name == "gem" else Local)


def test_what_cannot_be_is_refused_before_anything_is_loaded():
    with pytest.raises(RecipeError, match="for the format onnx, not torch"):
        export.export("nowhere", form="torch", int8=True, images=TABLE)
    with pytest.raises(RecipeError, match=r"`max_loss`: .*add `int8`"):
        export.export("nowhere", images=TABLE, max_loss=0.1)
    for wrong in (5, -1, float("nan")):
        with pytest.raises(RecipeError, match="`max_loss`: a share from 0 to 1"):
            export.export("nowhere", int8=True, images=TABLE, max_loss=wrong)
    with pytest.raises(ArtefactError, match="no model here"):
        export.export("nowhere", int8=True)


@pytest.mark.parametrize("labelled", [0, 9])
def test_a_bound_that_cannot_be_measured_is_refused(eight, labelled):
    source, _ = eight
    table = unlabelled(TABLE) if labelled == 0 else TABLE.take(np.arange(9))
    with pytest.raises(RecipeError, match=f"and {labelled or 'none'} of the images have any.*`max_loss`"):
        export.export(source, int8=True, images=table, max_loss=0.1)


def test_a_spoilt_file_is_refused_without_labels_too(eight, tmp_path, monkeypatch):
    import onnx

    source, _ = eight
    write = quantise._write

    def spoil(given, target, samples, parts):
        layers = write(given, target, samples, parts)
        made = onnx.load(target)
        for entry in made.graph.initializer:
            if entry.name.endswith("_quantized"):
                entry.raw_data = (
                    np.random.default_rng(0).permutation(list(entry.raw_data)).astype(np.uint8).tobytes()
                )
        onnx.save(made, target)
        return layers

    monkeypatch.setattr(quantise, "_write", spoil)
    with pytest.raises(ModelError, match=r"agrees by .* with float32 .*less than 0\.8"):
        export.export(source, tmp_path / "out", int8=True, images=unlabelled(TABLE))
    assert not (tmp_path / "out").exists()


def test_agreement_is_the_share_of_equal_bits_or_the_mean_cosine():
    samples = parity.Samples([np.zeros((3, 8, 8), np.uint8)] * 2, ["a", "b"], "zeros")
    codes = graphs.graph_of(made("hashnet"))

    def answer(byte, value=1.0):
        return lambda _: [np.array([[byte, 0]], np.uint8), np.full((1, 13), value, np.float32)]

    assert int8_loss.agreement(answer(3), answer(3), codes, samples) == 1
    assert int8_loss.agreement(answer(0), answer(3), codes, samples) == pytest.approx(11 / 13)
    assert np.isnan(int8_loss.agreement(answer(3), answer(3, np.nan), codes, samples))
    cells = np.array([[1, 0], [0, 1]], np.float32)
    one, other = (lambda _: [cells]), (lambda _: [cells[[0, 0]]])
    assert int8_loss.agreement(one, other, graphs.graph_of(made("xbm")), samples) == 0.5


def test_images_come_from_the_recipe_beside_the_model(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe beside the model.*`images`"):
        export.benchmark_of(Folder(tmp_path / "model"))
    small = Preprocessing(size=8)
    found = export._samples(Folder(tmp_path / "model"), None, small)
    assert found.source == "20 synthetic images (no recipe beside the model says what it was trained on)"
    recipe = (
        "name: x\noutput: runs/x\ndata: {name: digits}\nmethod: {name: greedyhash, backbone: {name: small}}\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    benchmark = export.benchmark_of(Folder(tmp_path / "model"))
    table, held_out = export._recipe_images(Folder(tmp_path / "model"))
    assert table.ids == benchmark.train.ids
    assert held_out is not None
    assert held_out.ids == benchmark.validation_queries.ids
    assert len(held_out) >= 100
    found = export._samples(Folder(tmp_path / "model"), None, small)
    assert found.source == f"64 of {len(table)} images of {table.name}"


def test_they_come_from_a_recipe_in_a_store_too(tmp_path, monkeypatch):
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "store_at", lambda uri: (store, uri.removeprefix("s3://")))
    (tmp_path / "bucket" / "run").mkdir(parents=True)
    (tmp_path / "bucket" / "run" / "recipe.yaml").write_text(
        "name: x\noutput: runs/x\ndata: {name: digits}\nmethod: {name: greedyhash, backbone: {name: small}}\n"
    )
    table, _ = export._recipe_images(Folder("s3://bucket/run/model"))
    assert table.name == "digits: database"


def test_a_recipe_that_only_measures_gives_no_images(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(
        "name: x\noutput: runs/x\ndata: {name: roxford5k}\nmethod: {name: gem, backbone: {name: small}}\n"
    )
    none = replace(coloured_benchmark(6), untrainable="it has no images to learn from")
    monkeypatch.setattr(export.datasets, "load", lambda *_, **__: none)
    with pytest.raises(RecipeError, match=r"coloured: it has no images to learn from \(give `images`\)"):
        export._recipe_images(Folder(tmp_path / "model"))
    found = export._samples(Folder(tmp_path / "model"), None, Preprocessing(size=8))
    assert found.source == "20 synthetic images (it has no images to learn from)"


def test_metrics_are_those_of_the_field():
    generator = np.random.default_rng(0)
    labels, asked = np.arange(6) % 3, np.arange(9) % 3
    one, other = (Codes(generator.integers(0, 256, (n, 2), dtype=np.uint8), 16) for n in (6, 9))
    wanted = hamming.mean_average_precision(one.data, labels, other.data, asked, ties="expected", bits=16)
    assert int8_loss.field_metric(one, labels, other, asked) == wanted
    vectors = np.eye(3, dtype=np.float32)
    found = int8_loss.field_metric(
        Vectors(vectors[labels]), labels, Vectors(vectors[np.roll(asked, 1)]), asked
    )
    assert (found.name, found.value) == ("recall@1", 0)
    found = int8_loss.field_metric(
        Vectors(vectors[labels]), labels, Vectors(vectors[np.roll(asked, 1)]), asked, vectors_by="map"
    )
    assert found.name.startswith("map")


def test_local_features_count_where_the_most_votes_go():
    def sets(units):
        units = np.array(units, np.float16)
        count = len(units)
        return Local(
            np.arange(count + 1),
            units,
            np.zeros((count, 2), np.float32),
            np.ones(count, np.float32),
            np.ones(count, np.float32),
            np.full((count, 2), 9, np.int32),
            np.zeros((count, 0), np.float32),
        )

    queries, database = sets([[1, 0], [0, 1]]), sets([[0, 1], [1, 0], [-1, 0]])
    found = int8_loss.field_metric(queries, np.array([5, 7]), database, np.array([6, 5, 7]))
    assert (found.name, found.value) == ("recall@1", 0.5)
    several = np.array([[1, 0], [0, 1]]), np.array([[0, 1], [1, 1], [0, 0]])
    assert int8_loss.field_metric(queries, several[0], database, several[1]).value == 1


@pytest.mark.parametrize(("count", "rows"), [(40, 40), (227, 227), (228, 100), (1500, 999)])
def test_the_loss_is_measured_on_images_that_were_not_calibrated_on_where_there_are_enough(count, rows):
    table = coloured_table(3).take(np.arange(count) % 3)
    calibrated = parity.spread(count, 128)
    found = int8_loss.measured_rows(table, calibrated)
    assert len(found) == rows
    assert (np.diff(found) > 0).all()
    assert (count < 228) or not len(np.intersect1d(found, calibrated))


@pytest.mark.parametrize(("classes", "each"), [(11318, 5), (1000, 3), (100, 58), (7, 1)])
def test_a_loss_is_measured_by_queries_that_have_something_to_find(classes, each):
    """Of many small classes whole ones are taken: of rows evenly spread each would be alone in its class."""
    labels = np.repeat(np.arange(classes), each)
    image = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    ids = [str(row) for row in range(len(labels))]
    table = pa.table({"id": ids, "image": pa.nulls(len(ids), image), "label": labels})
    rows = int8_loss.measured_rows(ImageTable(table, name="made"), np.zeros(0, np.int64))
    assert len(rows) <= 1000
    queries, database = int8_loss._divided(labels[rows])
    assert np.isin(labels[rows][queries], labels[rows][database]).all()
    assert (len(queries) >= 150) == (each > 1)
    assert len(queries) + len(database) <= len(rows)


def test_files_for_phones_answer_the_same(eight, tmp_path):
    """The two commands of docs/export.md, in this process."""
    import onnx
    import onnxruntime
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    source, _ = eight
    model = onnx.load(f"{source}/onnx-int8/model.onnx")
    make_dim_param_fixed(model.graph, "n", 1)
    onnx.save(model, tmp_path / "one.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "one.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(tmp_path / "one.onnx", options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 24, 24), dtype=np.uint8)
    whole = onnxruntime.InferenceSession(f"{source}/onnx-int8/model.onnx").run(None, {"images": images})
    small = onnxruntime.InferenceSession(tmp_path / "one.ort")
    assert small.get_inputs()[0].shape == [1, 3, 24, 24]
    np.testing.assert_allclose(small.run(None, {"images": images})[0], whole[0], atol=1e-6)
