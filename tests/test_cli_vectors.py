"""The command line over vectors and codes that were made elsewhere: build, search, add, export."""

import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import coloured_table
from test_cli import save_model
from test_cli_index import said

from ray_retrieval import embed
from ray_retrieval.cli.vectors import holds_descriptors
from ray_retrieval.model import Encoder
from ray_retrieval.search import Index

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "index_of_images.md"
HEADING = "## An index over vectors that you already have"


def draw(count, dimension=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def nearest(queries, database, k):
    """Rows by cosine, the naive way."""
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, database))
    return np.argsort(-(one @ other.T), axis=1, kind="stable")[:, :k]


def test_the_lines_of_the_page(cli_call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    database, queries, more = draw(40), draw(3, seed=1), draw(5, seed=2)
    np.save("vectors.npy", database)
    np.save("queries.npy", queries)
    Path("ids.txt").write_text("".join(f"item-{row}\n" for row in range(40)))
    Path("labels.txt").write_text("".join(f"{'even' if row % 2 == 0 else 'odd'}\n" for row in range(40)))
    columns = {"id": [f"new-{row}" for row in range(5)], "vector": pa.array(more.tolist())}
    pq.write_table(pa.table(columns), "more.parquet")
    section = PAGE.read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    lines = [line.split("#")[0] for line in section.splitlines() if line.startswith("ray-retrieval ")]
    assert len(lines) == 4
    for line in lines:
        code, _, err = cli_call(*shlex.split(line)[1:])
        assert code == 0, (line, err)
    index = Index.open("index")
    assert (index.rows, index.class_names) == (45, ["even", "odd"])
    answers = said(cli_call, "search", "index", "--vectors", "queries.npy", "--normalise", "-k", 5)["queries"]
    ids = [*(f"item-{row}" for row in range(40)), *columns["id"]]
    expected = nearest(queries, np.concatenate([database, more]), 5)
    assert [answer["vector"] for answer in answers] == ["0", "1", "2"]
    assert [[hit["id"] for hit in answer["hits"]] for answer in answers] == [
        [ids[row] for row in rows] for rows in expected
    ]
    assert json.loads(Path("export/export.json").read_text())["rows"] == 45


def test_an_image_is_no_query_of_vectors_made_elsewhere(cli_call, tmp_path):
    np.save(tmp_path / "codes.npy", np.arange(30, dtype=np.uint8).reshape(10, 3))
    index, named = tmp_path / "index", ["--model-name", "lsh"]
    info = said(cli_call, "index", "build", tmp_path / "codes.npy", "--out", index, *named)
    assert info["model"].startswith("elsewhere:lsh:")
    code, out, _ = cli_call("index", "build", tmp_path / "codes.npy", "--out", index, *named)
    assert out.splitlines()[-1] == f"next    ray-retrieval search {index} --vectors FILE"
    for arguments in (["search", index, "a.png"], ["predict", index, "a.png"], ["serve", index]):
        code, out, err = cli_call(*arguments)
        assert (code, out) == (2, "")
        assert "what it holds was made elsewhere (elsewhere:lsh:" in err
        assert "search with --vectors, or build it anew with the --model" in err
    code, out, _ = cli_call("search", index, "--vectors", tmp_path / "codes.npy", "-k", 1)
    assert code == 0
    assert out.count("0 bits") == 10


def test_what_comes_next_and_what_undoes_it_are_lines_for_a_shell(cli_call, tmp_path):
    np.save(tmp_path / "vectors.npy", draw(10))
    index = f"{tmp_path}/my index & more"
    given = [tmp_path / "vectors.npy", "--normalise", "--model-name", "mine"]
    _, out, _ = cli_call("index", "build", *given, "--out", index)
    told = shlex.split(out.splitlines()[-1])
    assert told == ["next", "ray-retrieval", "search", index, "--vectors", "FILE"]
    code, out, _ = cli_call("index", "remove", index, "3")
    assert code == 0
    assert shlex.split(out.splitlines()[-1]) == ["undo", "ray-retrieval", "index", "rollback", index]


def test_vectors_of_a_model_of_ours_go_on_being_searched_with_images(cli_call, tmp_path):
    """Codes saved by `embed`: in Parquet they say whose they are, of others --model does."""
    save_model(tmp_path / "model")
    table = coloured_table(12)
    made = embed.embed(str(tmp_path / "model"), [table])
    for name in ("codes.parquet", "codes.npy"):
        embed.save(made, tmp_path / name)
    (tmp_path / "query.png").write_bytes(table.image_bytes(5))
    ids = ["--ids", tmp_path / "codes.ids.json", "--model", tmp_path / "model"]
    for name, told in (("codes.parquet", []), ("codes.npy", ids)):
        index = tmp_path / f"index-{name}"
        said(cli_call, "index", "build", tmp_path / name, "--out", index, *told)
        assert Index.open(index).model == Encoder(str(tmp_path / "model")).fingerprint
        hits = said(cli_call, "search", index, tmp_path / "query.png", "-k", 3)["queries"][0]["hits"]
        assert hits[0]["distance"] == 0
        assert table.ids[5] in [hit["id"] for hit in hits if hit["distance"] == 0]
    (tmp_path / "new.json").write_text(json.dumps([f"new-{row}" for row in range(12)]))
    told = ["--ids", tmp_path / "new.json", "--model", tmp_path / "model"]
    assert said(cli_call, "index", "add", index, tmp_path / "codes.npy", *told)["added"] == 12


def test_an_exported_index_is_built_again(cli_call, tmp_path):
    vectors = draw(20)
    np.save(tmp_path / "vectors.npy", vectors)
    (tmp_path / "ids.txt").write_text("".join(f"item-{row}\n" for row in range(20)))
    told = ["--ids", tmp_path / "ids.txt", "--normalise"]
    said(cli_call, "index", "build", tmp_path / "vectors.npy", "--out", tmp_path / "index", *told)
    made = said(cli_call, "index", "export", tmp_path / "index", "--out", tmp_path / "out", "--format", "npy")
    assert (made["content"], made["metric"], made["rows"]) == ("npy", "squared_euclidean", 20)
    _, out, _ = cli_call("index", "export", tmp_path / "index", "--out", tmp_path / "out")
    assert out == f"export  20 rows in {tmp_path / 'out'}: rows.parquet; see export.json\n"
    said(cli_call, "index", "build", tmp_path / "out", "--out", tmp_path / "again")
    one, two = Index.open(tmp_path / "index"), Index.open(tmp_path / "again")
    np.testing.assert_array_equal(one.vectors(), two.vectors())
    assert (one.model, one.row_of("item-7")) == (two.model, two.row_of("item-7"))


def test_all_hits_may_be_asked_for_by_any_large_number(cli_call, tmp_path):
    np.save(tmp_path / "vectors.npy", draw(20))
    np.save(tmp_path / "queries.npy", draw(3, seed=1))
    said(cli_call, "index", "build", tmp_path / "vectors.npy", "--out", tmp_path / "index", "--normalise")
    asked = ["search", tmp_path / "index", "--vectors", tmp_path / "queries.npy", "--normalise"]
    for steps in ([], ["--rerank", "query_expansion"]):
        all_hits = said(cli_call, *asked, *steps, "-k", 20)["queries"]
        assert [len(answer["hits"]) for answer in all_hits] == [20] * 3
        assert said(cli_call, *asked, *steps, "-k", 10**15)["queries"] == all_hits


def test_an_approximate_search_looks_as_hard_as_is_said(cli_call, tmp_path):
    np.save(tmp_path / "vectors.npy", draw(400))
    np.save(tmp_path / "queries.npy", draw(20, seed=1))
    (tmp_path / "ids.txt").write_text("".join(f"q{row}\n" for row in range(20)))
    told = ["--search", "IVF32,Flat", "--set", "nprobe=1", "--set", "recall_queries=10", "--normalise"]
    said(cli_call, "index", "build", tmp_path / "vectors.npy", "--out", tmp_path / "index", *told)
    asked = ["search", tmp_path / "index", "--vectors", tmp_path / "queries.npy", "--normalise", "-k", 5]
    found = []
    for nprobe in (1, 32):
        answers = said(cli_call, *asked, "--set", f"nprobe={nprobe}", "--ids", tmp_path / "ids.txt")[
            "queries"
        ]
        assert [answer["vector"] for answer in answers] == [f"q{row}" for row in range(20)]
        found.append([[int(hit["id"]) for hit in answer["hits"]] for answer in answers])
    expected = nearest(draw(20, seed=1), draw(400), 5).tolist()
    assert found[1] == expected != found[0]
    code, _, err = cli_call(*asked, "--set", "nprob=3")
    assert (code, "unknown key 'nprob'" in err) == (2, True)


def test_a_table_of_paths_is_one_of_images(tmp_path):
    columns = {"path": ["a.png"], "image": ["a.png"], "vector": [[1.0, 0.0]], "price": [1.0]}
    for names, expected in (
        (["path", "price"], False),
        (["image", "vector"], False),
        (["path", "vector"], True),
        (["vector"], True),
        (["price"], True),
    ):
        pq.write_table(pa.table({name: columns[name] for name in names}), tmp_path / "a.parquet")
        assert holds_descriptors(str(tmp_path / "a.parquet")) == expected, names


def test_vectors_beside_names_of_images_are_added_to_vectors(cli_call, tmp_path):
    """Where a model of ours made the index, the same file is one of images unless `--column` is said."""
    index, file = tmp_path / "index", tmp_path / "a.parquet"
    names = [f"{row}.jpg" for row in range(20)]
    pq.write_table(pa.table({"image": names, "embedding": list(draw(20)), "id": names}), file)
    said(cli_call, "index", "build", file, "--out", index, "--normalise")
    said(cli_call, "index", "add", index, file, "--normalise", "--replace")
    assert Index.open(index).records([25])["image"].to_pylist() == ["5.jpg"]
    assert not holds_descriptors(str(file))
    assert holds_descriptors(str(file), "embedding")


def test_a_local_path_may_hold_a_question_mark():
    assert holds_descriptors("/of/what?.npy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "add", "INDEX", "FILE", "--normalise", "--root", "x"], "--root: it is for images"),
        (["index", "add", "INDEX", "FILE", "--set", "batch_size=3"], "--set: it is for images"),
        (["index", "add", "INDEX", "FILE", "--embeddings", "x"], "--embeddings: it is for images"),
        (
            ["index", "add", "INDEX", "FILE", "--normalise", "--replace", "--model-name", "clip"],
            "--replace: rows without ids",
        ),
        (
            ["search", "INDEX", "--vectors", "FILE", "--normalise", "--model-name", "lsh"],
            "made by something else ('clip'), the queries by something else ('lsh')",
        ),
        (["search", "INDEX", "--vectors", "FILE", "--bits", "8"], "values are no codes"),
        (["search", "INDEX", "--vectors", "FILE", "--set", "nprobe=3"], "the index compares all rows"),
        (
            ["search", "INDEX", "--vectors", "FILE", "--column", "x"],
            "--column: it is for tables and .npz files",
        ),
        (["index", "add", "INDEX", "FILE", "--column", "x"], "--column: it is for tables and .npz files"),
        (
            ["index", "plan", "--rows", "9", "--bits", "8", "--column", "x"],
            "--column: it is for files of desc",
        ),
        (["search", "INDEX", "a.png", "--ids", "x"], "--ids: it is for files of descriptors"),
        (["search", "INDEX"], "queries are images, or --vectors FILE: one of the two"),
        (["search", "INDEX", "a.png", "--vectors", "FILE"], "one of the two"),
        (["search", "INDEX", "--vectors", "FILE", "--picture", "a.png"], "--picture: it is for query images"),
        (["search", "INDEX", "a.png", "--normalise"], "--normalise: it is for files of descriptors"),
        (["search", "INDEX", "--vectors", "FILE"], "is of length"),
        (["search", "INDEX", "--vectors", "nowhere.npy"], "the file is missing"),
        (["index", "build", "FILE", "--out", "OUT"], "divide each by its length with --normalise"),
        (
            ["index", "build", "nowhere", "--out", "OUT", "--bits", "8"],
            "--bits: it is for files of descriptors",
        ),
        (["index", "build", "a.csv", "FILE", "--out", "OUT"], "its name ends in '.csv'"),
        (["index", "add", "INDEX", "FILE", "--normalise"], "as the index does: --model-name"),
        (["index", "add", "INDEX", "photos", "more"], "photos: several places are files of descriptors"),
        (["index", "add", "INDEX", "photos", "--ids", "x"], "--ids: it is for files of descriptors"),
        (["index", "export", "INDEX", "--out", "OUT", "--format", "csv"], "no format 'csv'"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(cli_call, tmp_path, arguments, message):
    np.save(tmp_path / "vectors.npy", 3 * draw(20))
    named = {"INDEX": tmp_path / "index", "FILE": tmp_path / "vectors.npy", "OUT": tmp_path / "out"}
    told = ["--normalise", "--model-name", "clip"]
    said(cli_call, "index", "build", named["FILE"], "--out", named["INDEX"], *told)
    code, out, err = cli_call(*(named.get(word, word) for word in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (named["OUT"] / "CURRENT").exists()
