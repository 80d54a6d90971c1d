"""What a user can do wrong ends in one line and exit code 2."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer.main
from PIL import Image
from pyarrow import fs
from reference_pages import command_line
from samples import coloured_table, write_run

import ray_retrieval
from ray_retrieval import cli, model, search, storage
from ray_retrieval.answers import Answer, Hit
from ray_retrieval.cli.tables import print_answers
from ray_retrieval.data.table import open_images
from ray_retrieval.data.transforms import prepare
from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.errors import RecipeError
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.methods.greedyhash import GreedyHash, GreedyHashConfig
from ray_retrieval.model import Encoder
from ray_retrieval.query import Searcher
from ray_retrieval.run_folder import mark
from ray_retrieval.search import embeddings
from ray_retrieval.storage import Folder

QUICKSTART = Path(__file__).parents[1] / "jobs" / "quickstart.yaml"
KEYS = ("--set", "api_keys=keys.txt")


def save_model(folder, seed=0):
    torch.manual_seed(seed)
    backbone = BackboneConfig(name="small", weights="none")
    config = GreedyHashConfig(bits=16, backbone=backbone, image={"size": 16})
    made = GreedyHash(config, classes=3)
    model.save(
        Folder(folder),
        config=config.model_dump(mode="json"),
        weights=made.state_dict(),
        classes=3,
        class_names=["red", "green", "blue"],
        precision="float32",
        training={"epoch": 1},
        metrics={},
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A model, and an index of 30 images in two shards beside it."""
    folder = tmp_path_factory.mktemp("built")
    save_model(folder / "model")
    table = coloured_table(30)
    encoder = Encoder(str(folder / "model"))
    codes, failures = encoder.encode([table.image_bytes(row) for row in range(30)])
    assert not failures
    write_embeddings(folder / "embeddings", table, codes, encoder.fingerprint)
    search.build(folder / "embeddings", folder / "index", shards=2)
    (folder / "query.png").write_bytes(table.image_bytes(7))
    return folder


def write_embeddings(folder, table, codes, fingerprint, **more):
    where = Folder(folder)
    part = embeddings.part_table(table.table, codes, first_row=0, skip={})
    embeddings.finish(
        where,
        model=fingerprint,
        form=Form.of(codes),
        classes=3,
        class_names=["red", "green", "blue"],
        parts=[embeddings.write_part(where, 0, part, key="k", errors=[])],
        source=table.fingerprint,
        **more,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["run", QUICKSTART, "train.epoch=3"], "did you mean 'epochs'?"),
        (["run", QUICKSTART, "method.bits=0"], "'method.bits'"),
        (["train", QUICKSTART, "train.epochs=few"], "'train.epochs'"),
        (["search", "nowhere", "a.png"], "nowhere"),
        (["index", "info", "nowhere"], "nowhere"),
        (["index", "verify", "nowhere"], "nowhere"),
        (["index", "build", "nowhere", "--out", "x"], "nowhere"),
        (["encode", "nowhere", "also-nowhere", "--out", "x"], "nowhere"),
        (["serve", "nowhere"], "nowhere"),
        (["compare", "nowhere"], "nowhere: no finished run here: no such folder (check the path)"),
        (["predict", "nowhere", "a.png"], "nowhere"),
        (["predict", "nowhere", "a.png", "--picture", "a.gif"], "a picture cannot be saved as '.gif'"),
        (["search", "nowhere", "a.png", "--picture", "a.gif"], "a picture cannot be saved as '.gif'"),
        (["match", "nowhere", "a.png", "b.png", "--picture", "a"], "a picture cannot be saved as 'a'"),
        (["compare", "nowhere", "--figure", "a.gif"], "a figure cannot be saved as 'gif'"),
        (["match", "nowhere", "a.png", "b.png"], "a.png: nothing is there (check the path)"),
        (["index", "info", __file__], "test_cli.py: no index here: a folder is expected, this is a file"),
        (["index", "info", str(Path(__file__).parent)], "no index here: CURRENT is missing (build one"),
        (["index", "build", __file__, "--out", "x"], "its name ends in '.py' (known are .npy, "),
        (
            ["embed", "nowhere", str(Path(__file__).parent), "--root", "x"],
            "--root: it is for the paths in lists",
        ),
        (["embed", "nowhere", "a.png", "--root", "x"], "--root: it is for the paths in lists and tables"),
        (["gldv2", "download", "x", "--remove-tars"], "--remove-tars: it is for the archives of --tars"),
        (["serve", "nowhere", "--scope", "write"], "--scope: it is for --new-key"),
        (["serve", "nowhere", "--new-key", "anna", *KEYS], "INDEX: it is for a server, and --new-key only"),
        (["serve", "--port", "9000", "--new-key", "anna", *KEYS], "--port: it is for a server"),
        (["serve", "--print-config", "--new-key", "anna", *KEYS], "--print-config: it is for a server"),
        (["tune", "tune_digits", "--fresh", "--retry"], "--fresh: it deletes the trials that --retry is to"),
        (["submit", "--patience", "9", "--", "run", QUICKSTART], "--patience: it is for --cpus and --gpus"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(cli_call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli_call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(cli_call):
    code, _, err = cli_call("--debug", "run", "nowhere.yaml")
    assert code == 2
    assert "Traceback" in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serch x", r"No such command 'serch'.* \(see ray-retrieval --help\)"),
        ("index bild x", r"No such command 'bild'.* \(see ray-retrieval index --help\)"),
        ("run", r"Missing argument 'RECIPE' \(see ray-retrieval run --help\)"),
        ("serve INDEX --ngine onnx", r"No such option: --ngine.* \(see ray-retrieval serve --help\)"),
        (
            "search INDEX a.jpg -k ten",
            r"Invalid value for '-k' .*valid integer.* \(see ray-retrieval search --help\)",
        ),
        ("submit list --json=1", "Option '--json' does not take a value"),
        ("export MODEL --format", "Option '--format' requires an argument"),
    ],
)
def test_a_wrong_command_line_is_said_in_one_line(cli_call, line, said):
    code, out, err = cli_call(*line.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: {said}\n", err)


def test_every_command_says_a_wrong_option_in_one_line(cli_call):
    found = list(command_line.commands(typer.main.get_command(cli.app)))
    assert len(found) > 20
    for path, _ in found:
        code, out, err = cli_call(*path, "--nosuch")
        assert (code, out) == (2, ""), path
        assert re.fullmatch(r"error: No such option: --nosuch.*\n", err), path


@pytest.mark.parametrize("words", [(), ("index",), ("submit",)])
def test_a_group_without_a_verb_prints_its_help(cli_call, words):
    code, out, err = cli_call(*words)
    assert (code, err) == (2, "")
    assert "Usage: " in out


@pytest.mark.parametrize("error", [KeyboardInterrupt, typer.Abort])
def test_what_is_interrupted_says_so(cli_call, monkeypatch, error):
    def interrupted(*_):
        raise error

    monkeypatch.setattr("ray_retrieval.recipe.load_study", interrupted)
    code, _, err = cli_call("run", "quickstart")
    if error is KeyboardInterrupt:
        assert (code, err) == (130, "interrupted; the same command goes on where this one stopped\n")
    else:
        assert (code, err) == (1, "aborted\n")


def test_search_prints_the_nearest_first(cli_call, built):
    code, out, _ = cli_call("search", built / "index", built / "query.png", "-k", 3)
    assert code == 0
    assert "image-0007" in out
    assert "green" in out


@pytest.mark.parametrize("terminal", [False, True])
def test_ids_and_paths_of_hits_are_printed_whole(capsys, monkeypatch, terminal):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    name, path = "id-" + "0123456789" * 9, "/photos/" + "abcdefghij" * 20
    answer = Answer([Hit(1, name, 3.0, 0.5, ["green"], path, row=0)], notes=[])
    print_answers("image", ["q.jpg"], [answer], Form(DescriptorKind.CODES, 16), as_json=False)
    out = capsys.readouterr().out
    assert "…" not in out
    columns = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert ["".join(column) for column in zip(*columns, strict=True)][-2:] == [name, path]
    assert (len(columns) > 1) == terminal


def test_search_as_json(cli_call, built):
    code, out, _ = cli_call("search", built / "index", built / "query.png", "-k", 3, "--json")
    found = json.loads(out)["queries"][0]["hits"]
    assert code == 0
    assert [hit["rank"] for hit in found] == [1, 2, 3]
    assert found[0]["distance"] == 0
    assert "image-0007" in [hit["id"] for hit in found if hit["distance"] == 0]


def test_an_image_alone_is_one_query(built):
    searcher, path = Searcher(str(built / "index"), threads=1), built / "query.png"
    several = searcher.search([path], k=3)
    assert searcher.search(path, k=3) == searcher.search(str(path), k=3) == several
    assert searcher.search(path.read_bytes(), k=3) == several


def test_search_for_a_part_of_an_image(cli_call, built, tmp_path):
    """The part that is another image is found as that image is."""
    table, path = coloured_table(30), tmp_path / "both.png"
    both = Image.new("RGB", (32, 16))
    for place, row in ((0, 3), (16, 4)):
        both.paste(Image.open(io.BytesIO(table.image_bytes(row))), (place, 0))
    both.save(path)
    for row, box in ((3, (0, 0, 16, 16)), (4, (16, 0, 32, 16))):
        code, out, _ = cli_call("search", built / "index", path, "-k", 30, "--box", *box, "--json")
        assert code == 0
        found = json.loads(out)["queries"][0]["hits"]
        assert table.ids[row] in [hit["id"] for hit in found if hit["distance"] == 0]
    for box in ((90, 0, 99, 9), ("nan", 0, 9, 9), ("inf", 0, "inf", 9), (9, 0, 0, 9), (0.2, 0, 0.4, 9)):
        code, _, err = cli_call("search", built / "index", path, "--box", *box)
        assert code == 2
        assert "nothing of the image, 32 × 16, is in the box" in err
    wide = [
        cli_call("search", built / "index", path, "--box", *box, "--json")[1]
        for box in (("-inf", "-inf", 16, "inf"), (0, 0, 16, 16))
    ]
    assert wide[0] == wide[1]


def test_search_saves_a_picture(cli_call, built, tmp_path):
    code, _, _ = cli_call("search", built / "index", built / "query.png", "--picture", tmp_path / "grid.png")
    assert code == 0
    assert (tmp_path / "grid.png").stat().st_size > 1000
    code, _, err = cli_call(
        "search", built / "index", built / "query.png", "--picture", tmp_path / "grid.xyz"
    )
    assert code == 2
    assert "grid.xyz" in err


def test_a_query_may_be_a_uri(cli_call, built):
    query = built / "query.png"
    one, other = (
        json.loads(cli_call("search", built / "index", image, "--json")[1])["queries"][0]["hits"]
        for image in (query, query.as_uri())
    )
    assert one == other
    code, _, err = cli_call("search", built / "index", f"{built.as_uri()}/missing.jpg")
    assert code == 2
    assert f"{built.as_uri()}/missing.jpg: the file is missing" in err


def test_a_query_that_is_no_image_is_named(cli_call, built, tmp_path):
    (tmp_path / "words.jpg").write_text("not an image")
    code, _, err = cli_call("search", built / "index", tmp_path / "words.jpg")
    assert code == 2
    assert "words.jpg" in err
    code, _, err = cli_call("search", built / "index", tmp_path / "missing.jpg")
    assert code == 2
    assert "missing.jpg: no such image file" in err


def test_an_index_of_another_model_is_refused_with_both_named(cli_call, built, tmp_path):
    save_model(tmp_path / "other", seed=1)
    mine, other = (model.read_model_description(Folder(f))[1] for f in (built / "model", tmp_path / "other"))
    code, _, err = cli_call("search", built / "index", built / "query.png", "--model", tmp_path / "other")
    assert code == 2
    assert mine in err
    assert other in err


def test_a_damaged_shard_is_named(cli_call, built, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    victim = sorted((tmp_path / "copy" / "index").rglob("codes.bin"))[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 255
    victim.write_bytes(data)
    code, _, err = cli_call("index", "verify", tmp_path / "copy" / "index")
    assert code == 2
    assert str(victim) in err
    assert cli_call("index", "verify", built / "index")[0] == 0


def test_info_as_json(cli_call, built):
    code, out, _ = cli_call("index", "info", built / "index", "--json")
    info = json.loads(out)
    assert code == 0
    assert info["rows"] == 30
    assert info["bits"] == 16


def test_compare_prints_writes_and_draws(cli_call, tmp_path):
    for bits, value in ((16, 0.70), (32, 0.60)):
        write_run(tmp_path / "study" / f"{bits}bits", value, bits=bits)
    figure, out = tmp_path / "curves.svg", tmp_path / "out"
    code, shown, _ = cli_call("compare", tmp_path / "study", "--out", out, "--figure", figure)
    assert code == 0
    assert "0.7000" in shown
    assert "\nmap@all: mean over 9 queries by Hamming distance of the run's bits.\n" in shown
    assert re.search(r"Cao et al., 2017 +study-32bits +map@all +32 +0.7184 +0.6000 +-0.1184 +no", shown)
    assert {path.name for path in out.iterdir()} == {"comparison.json", "comparison.html"}
    assert figure.stat().st_size > 1000
    code, shown, _ = cli_call(
        "compare", tmp_path / "study" / "16bits", tmp_path / "study" / "32bits", "--json"
    )
    assert code == 0
    assert json.loads(shown) == json.loads((out / "comparison.json").read_text())


def test_compare_says_where_its_page_is_in_a_store(cli_call, tmp_path, monkeypatch):
    """As of Ceph and MinIO, whose URIs have options, which say at which address the store is."""
    (tmp_path / "bucket").mkdir()
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "store_at", lambda uri: (store, storage.split_query(uri)[0].removeprefix("s3://"))
    )
    write_run(tmp_path / "run", 0.70)
    options = "?endpoint_override=http%3A%2F%2Fhost%3A9000"
    code, out, _ = cli_call("compare", tmp_path / "run", "--out", f"s3://bucket/out{options}")
    assert code == 0
    assert out.splitlines()[-1] == f"report  s3://bucket/out/comparison.html{options}"
    assert (tmp_path / "bucket" / "out" / "comparison.html").exists()


def test_compare_names_what_is_no_run(cli_call, tmp_path):
    code, _, err = cli_call("compare", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert f"{tmp_path}: no finished run here" in err
    (tmp_path / "metrics.csv").write_text("map")
    code, _, err = cli_call("compare", tmp_path / "metrics.csv")
    assert code == 2
    assert f"{tmp_path}/metrics.csv: " in err
    assert not (tmp_path / "out").exists()


def test_a_study_is_checked_before_its_first_run(cli_call, tmp_path):
    output = f"output={tmp_path}/out"
    code, _, err = cli_call("run", QUICKSTART, "method.bits=[16, 16]", output)
    assert (code, "more than once" in err) == (2, True)
    (tmp_path / "out" / "32bits").mkdir(parents=True)
    (tmp_path / "out" / "32bits" / "letter.txt").write_text("dear")
    mark(Folder(tmp_path / "out" / "16bits"))
    code, _, err = cli_call("run", QUICKSTART, "method.bits=[16, 32]", output, "--fresh")
    assert (code, "32bits: the output folder holds something that is no run" in err) == (2, True)
    assert (tmp_path / "out" / "16bits" / "run.json").exists()
    code, _, err = cli_call("evaluate", QUICKSTART, "seed=[1, 2]", output)
    assert (code, "seed1: no trained model here" in err) == (2, True)


def test_predict_gives_the_nearest_image_and_the_likeliest_classes(cli_call, built, tmp_path):
    picture = tmp_path / "nearest.png"
    query = built / "query.png"
    code, shown, _ = cli_call("predict", built / "index", query, "--picture", picture, "--json")
    found = json.loads(shown)
    assert code == 0
    assert found["nearest"] == Searcher(built / "index").search([query], k=1)[0][0].as_json()
    assert found["nearest"]["distance"] == 0
    loaded = model.load(str(built / "model"))
    pixels = torch.from_numpy(prepare(query.read_bytes(), loaded.preprocessing))[None]
    with torch.no_grad():
        expected = loaded.method(pixels)["logits"].softmax(dim=1)[0].tolist()
    names = ["red", "green", "blue"]
    ranked = sorted(range(3), key=lambda number: -expected[number])
    assert [(guess["number"], guess["name"]) for guess in found["classes"]] == [(n, names[n]) for n in ranked]
    assert [guess["probability"] for guess in found["classes"]] == pytest.approx(
        [expected[n] for n in ranked], abs=1e-5
    )
    assert found["notes"] == []  # its pixels are in the index, but not this file
    assert Image.open(picture).width > 2 * 128
    code, shown, _ = cli_call("predict", built / "index", query)
    assert code == 0
    assert "distance 0 bits" in shown
    assert names[ranked[0]] in shown


def test_predict_says_if_the_image_itself_is_in_the_index(cli_call, built, tmp_path):
    folder_of_images(tmp_path / "photos", {"red": 4, "green": 4})
    table = open_images(str(tmp_path / "photos"))
    encoder = Encoder(str(built / "model"))
    codes, _ = encoder.encode_table(table)
    write_embeddings(tmp_path / "embeddings", table, codes, encoder.fingerprint)
    search.build(tmp_path / "embeddings", tmp_path / "index")
    image = tmp_path / "photos" / "red" / "2.png"
    code, shown, _ = cli_call("predict", tmp_path / "index", image, "--model", built / "model", "--json")
    assert code == 0
    assert json.loads(shown)["notes"] == [f"the image itself is in the index, as {table.ids[6]}"]
    (tmp_path / "copy.png").write_bytes(image.read_bytes())
    code, shown, _ = cli_call(
        "predict", tmp_path / "index", tmp_path / "copy.png", "--model", built / "model"
    )
    assert code == 0
    assert "in the index" not in shown


def test_predict_without_a_class_head_gives_the_nearest_image_alone(built, monkeypatch):
    monkeypatch.setattr(GreedyHash, "class_probabilities", lambda self, images: None)
    assert Searcher(built / "index").predict(built / "query.png").classes is None


def test_class_probabilities_of_several_batches_leave_broken_images_out(built):
    table = coloured_table(7)
    images = [*(table.image_bytes(row) for row in range(7)), b"no image"]
    whole, failures = Encoder(str(built / "model")).class_probabilities(images)
    parts, again = Encoder(str(built / "model"), batch_size=3).class_probabilities(images)
    assert whole.shape == (8, 3)
    assert whole.dtype == "float32"
    assert list(failures) == list(again) == [7]
    assert whole[:7].sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert whole[7].tolist() == [0, 0, 0]
    assert parts == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "message"), [("words.jpg", "words.jpg: "), ("gone.jpg", "no such image file")]
)
def test_predict_names_an_image_that_it_cannot_use(cli_call, built, tmp_path, name, message):
    (tmp_path / "words.jpg").write_text("not an image")
    code, _, err = cli_call("predict", built / "index", tmp_path / name, "--picture", tmp_path / "p.png")
    assert code == 2
    assert message in err
    assert not (tmp_path / "p.png").exists()


def folder_of_images(folder, counts):
    """Class folders with so many images each."""
    table = coloured_table(sum(counts.values()))
    row = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(table.image_bytes(row))
            row += 1
    return folder


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, "nothing is there"),
        ({}, "no image"),
        ({"one": 20}, "one class"),
        ({"one": 20, "two": 1}, "'two'"),
    ],
)
def test_folders_that_cannot_be_trained_on(cli_call, tmp_path, counts, message):
    images = tmp_path / "photos"
    if counts is not None:
        images.mkdir()
        folder_of_images(images, counts)
    data = f"data={{name: images, database: {images}}}"
    code, _, err = cli_call("run", QUICKSTART, data, f"output={tmp_path / 'out'}")
    print(err)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_named_before_anything_starts(cli_call, tmp_path):
    code, _, err = cli_call(
        "run",
        QUICKSTART,
        "method.backbone={name: resnet18, weights: nowhere.pth}",
        f"output={tmp_path / 'out'}",
    )
    assert code == 2
    assert "nowhere.pth: no such weights file" in err
    assert not (tmp_path / "out").exists()


def test_fresh_deletes_nothing_that_is_no_run(cli_call, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    code, _, err = cli_call("run", QUICKSTART, f"output={tmp_path}", "--fresh")
    assert code == 2
    assert "is no run" in err
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_parameters_are_told_as_the_options_of_the_command_and_others_by_their_names(cli_call, monkeypatch):
    def refuse(*_, **__):
        raise RecipeError("`form` is wrong", where="`normalise`", mend="leave out `fresh` or `nothing`")

    monkeypatch.setattr("ray_retrieval.search.Index.open", refuse)
    said = "error: `normalise`: --format is wrong (leave out `fresh` or `nothing`)\n"
    assert cli_call("index", "export", "x", "--out", "y") == (2, "", said)


def test_the_version_is_that_of_the_package(cli_call):
    assert cli_call("--version") == (0, f"ray_retrieval {ray_retrieval.__version__}\n", "")
