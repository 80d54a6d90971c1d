"""The `index` commands: an index grows, shrinks and goes back from the command line."""

import json
import shutil

import numpy as np
import pytest
from samples import coloured_table
from search_parts import files_in
from test_cli import save_model, write_embeddings

from ray_retrieval import search
from ray_retrieval.model import Encoder
from ray_retrieval.query import Searcher


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, an index of 24 images beside it, embeddings of 6 more, and 4 images in folders."""
    folder = tmp_path_factory.mktemp("grown")
    save_model(folder / "model")
    table = coloured_table(30)
    encoder = Encoder(str(folder / "model"))
    codes, _ = encoder.encode([table.image_bytes(row) for row in range(30)])
    for name, rows in (("first", range(24)), ("more", range(24, 30))):
        part = table.take(list(rows))
        write_embeddings(folder / name, part, codes.take(list(rows)), encoder.fingerprint)
    search.build(folder / "first", folder / "index", shards=2)
    for row, name in enumerate(("red", "violet")):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(2):
            path = folder / "images" / name / f"{number}.png"
            path.write_bytes(coloured_table(40).image_bytes(36 + 2 * row + number))
    (folder / "query.png").write_bytes(table.image_bytes(7))
    return folder


@pytest.fixture
def index(made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "model")
    return shutil.copytree(made / "index", tmp_path / "index")


def said(cli_call, *arguments):
    """The JSON object that a command prints last, which is all that is on stdout."""
    code, out, err = cli_call(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_round_of_changes(cli_call, made, index, tmp_path):
    ids = coloured_table(30).ids
    change = said(cli_call, "index", "add", index, made / "more", "--shards", 2)
    assert (change["version"], change["operation"], change["rows"]) == (2, "add 6 rows", 30)
    code, _, err = cli_call("index", "add", index, made / "more")
    assert code == 2
    assert "--replace" in err
    assert said(cli_call, "index", "add", index, made / "more", "--skip-duplicates")["skipped"] == 6
    (tmp_path / "gone.txt").write_text(f"{ids[3]}\n\n{ids[4]}\n")
    gone = ["index", "remove", index, ids[28], "--from", tmp_path / "gone.txt"]
    assert said(cli_call, *gone, "--dry-run")["removed"] == 3
    assert cli_call(*gone[:4], "--dry-run")[1] == "1 image would be removed\n"
    code, out, _ = cli_call(*gone)
    assert code == 0
    assert out.splitlines() == [
        "3 images removed",
        "version 3: remove 3 rows; 27 images",
        f"undo    ray-retrieval index rollback {index}",
    ]
    assert said(cli_call, "index", "remove", index, "--where", "label = green", "--dry-run")["removed"] > 3
    assert said(cli_call, "index", "info", index)["deleted"] == 3
    code, out, _ = cli_call("index", "compact", index, "--dry-run")
    assert out.startswith(
        "3 images removed before: no place in the files any more\nwould delete versions: 1, 2;"
    )
    compacted = said(cli_call, "index", "compact", index, "--keep", 3)
    assert (compacted["version"], compacted["rows"], compacted["pruned"]["versions"]) == (4, 27, [1])
    back = said(cli_call, "index", "rollback", index, "--to", 2)
    assert (back["version"], back["operation"], back["rows"]) == (5, "rollback to 2", 30)
    listed = said(cli_call, "index", "versions", index)["versions"]
    assert [(found["version"], found["deleted"]) for found in listed] == [(5, 0), (4, 0), (3, 3), (2, 0)]
    code, out, _ = cli_call("index", "versions", index)
    assert [line.split()[0] for line in out.splitlines() if line[:8].strip().isdigit()] == [
        "5",
        "4",
        "3",
        "2",
    ]
    pruned = said(cli_call, "index", "prune", index, "--keep", 1)
    assert pruned["versions"] == [4, 3, 2]
    code, out, _ = cli_call("index", "prune", index)
    assert out == "deleted versions: none; 0 files, 0.0 MB\n"
    assert said(cli_call, "index", "verify", index)["sound"]


def test_a_recall_to_reach(cli_call, made, tmp_path):
    build = ("index", "build", made / "first", "--out", tmp_path / "index")
    cells = ("--search", "BIVF6", "--set", "recall_queries=24")
    code, _, err = cli_call(*build, *cells, "--set", "nprobe=1", "--recall", "1")
    assert code == 2
    assert "nearest, 1 is asked for (nprobe=" in err
    assert not (tmp_path / "index" / "CURRENT").exists()
    info = said(cli_call, *build, *cells, "--set", "nprobe=6", "--recall", "1")
    assert (info["search"], info["factory"], info["nprobe"]) == ("approximate", "BIVF6", 6)
    assert (info["recall@10"], info["recall_target"]) == (1, 1)
    info = said(cli_call, *build, "--search", "auto", "--memory", "1 MB")
    assert info["search"] == "exact"
    assert "24 rows are searched exactly" in info["why"]


def test_search_under_a_filter(cli_call, made, index):
    found = said(cli_call, "search", index, made / "query.png", "-k", 4, "--where", "label in (green, blue)")
    labels = [hit["labels"] for hit in found["queries"][0]["hits"]]
    assert len(labels) == 4
    assert {name for names in labels for name in names} <= {"green", "blue"}
    none = said(cli_call, "search", index, made / "query.png", "--where", "id = nobody")["queries"][0]
    assert (none["hits"], none["notes"]) == ([], ["no image of the index passes the filter"])
    for text, message in (("label = gren", "did you mean 'green'"), ("colour = 3", "no column 'colour'")):
        code, _, err = cli_call("search", index, made / "query.png", "--where", text)
        assert code == 2
        assert message in err
    searcher = Searcher(index)
    assert [hit.id for hit in searcher.search([made / "query.png"], 3, where="label = red")[0]] == [
        hit.id for hit in searcher.search([made / "query.png"], 24)[0] if hit.labels == ["red"]
    ][:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["remove", "INDEX", "nobody"], "no row of 1 of the ids: 'nobody'"),
        (["remove", "INDEX"], "one of the two"),
        (["remove", "INDEX", "--from", "nowhere.txt"], "cannot be read: No such file or directory (give"),
        (["remove", "INDEX", "--where", "label ="], "expected a value"),
        (["rollback", "INDEX"], "one version only"),
        (["rollback", "INDEX", "--to", "7"], "no version 7; there are: 1"),
        (["add", "INDEX", "nowhere"], "nowhere"),
        (["versions", "nowhere"], "no index here"),
        (["prune", "nowhere"], "no index here"),
        (["compact", "nowhere"], "no index here"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(cli_call, index, arguments, message):
    code, out, err = cli_call("index", *(index if word == "INDEX" else word for word in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.cluster
def test_images_are_encoded_by_the_model_beside_the_index(
    cli_call, made, index, tmp_path, local_ray, encoding_here
):
    change = said(cli_call, "index", "add", index, made / "images")
    assert (change["added"], change["rows"]) == (4, 28)
    opened = search.Index.open(index)
    assert opened.class_names == ["red", "green", "blue", "violet"]
    assert opened.records([24, 25, 26, 27])["label"].to_pylist() == [0, 0, 3, 3]
    assert opened.verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "model"]
    path = made / "images" / "violet" / "1.png"
    assert Searcher(index).search([path], 28, where="label = violet")[0][0].distance == 0


def test_a_plan_says_what_an_index_would_take(cli_call, made, index):
    plan = said(cli_call, "index", "plan", made / "first")
    info = said(cli_call, "index", "info", index)
    assert plan["rows"] == info["rows"] == 24
    assert plan["kinds"][0]["mapped"] == info["descriptor_bytes"] - 64 * info["shards"]
    assert plan["known_bytes"] > 0
    code, out, _ = cli_call("index", "plan", "--rows", 10**9, "--bits", 64)
    assert code == 0
    assert cli_call("index", "plan", "--rows", "1e9", "--bits", 64)[:2] == (0, out)
    for none in ("0", "1.5", "-3", "many", "inf"):
        code, _, err = cli_call("index", "plan", "--rows", none, "--bits", 64)
        assert (code, f"'{none}' is no number" in err) == (2, True)
    assert "8,000.0 MB" in out
    assert "BIVF2048 is trained on 131,072 images drawn at random, 2.1 MB of memory" in out
    assert "megabytes a million" in out
    plan = ("index", "plan", "--rows", 1000, "--dimension", 128)
    assert [kind["kind"] for kind in said(cli_call, *plan, "--memory", "1MB")["kinds"] if kind["auto"]] == [
        "exact"
    ]
    np.save(made / "vectors.npy", np.eye(9, dtype=np.float32))
    elsewhere = ("index", "plan", made / "vectors.npy", "--search", "IVF4,SQ8")
    found = said(cli_call, *elsewhere, "--set", "train_rows=8")
    assert (found["rows"], found["dimension"], found["known_bytes"]) == (9, 9, 0)
    assert [kind["kind"] for kind in found["kinds"] if kind["auto"]] == ["IVF4,SQ8"]
    code, out, _ = cli_call(*elsewhere)
    assert (code, "asked for" in out) == (0, True)
    for wrong in (
        (),
        (made / "first", "--rows", 3),
        ("--rows", 3),
        ("--rows", 3, "--bits", 8, "--dimension", 8),
    ):
        code, _, err = cli_call("index", "plan", *wrong)
        assert code == 2
        assert "--rows with --bits or --dimension" in err


def test_workers_write_the_same_index(cli_call, made, tmp_path, local_ray):
    for workers in (1, 2):
        cli_call(
            "index",
            "build",
            made / "first",
            "--out",
            tmp_path / str(workers),
            "--shards",
            3,
            "--workers",
            workers,
        )
    assert files_in(tmp_path / "1") == files_in(tmp_path / "2")
    assert search.Index.open(tmp_path / "2").verify()
