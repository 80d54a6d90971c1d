"""Everything on an S3 store: runs, a search for hyperparameters, data, an index, errors."""

import io
import json
import os
import re
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from here_parts import encoding_in_this_process
from s3_parts import BUCKET, CLOSED, KEY, SECRET, Server, commands, python
from samples import coloured_table, write_images

from ray_retrieval import model, storage
from ray_retrieval import recipe as recipes
from ray_retrieval.data import datasets, location
from ray_retrieval.data.datasets import sop
from ray_retrieval.data.datasets.disjoint import Count
from ray_retrieval.data.table import open_images
from ray_retrieval.errors import ArtefactError, RetrievalError
from ray_retrieval.run import Run
from ray_retrieval.search import Index
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.storage import Folder, digest
from ray_retrieval.submit import prepare
from ray_retrieval.tuning.here import train_here

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
SHORT = [
    *(str(QUICKSTART), "method.image={size: 8}", "encode.workers=1"),
    *("train.batch_size=16", "train.precision=float32", "train.threads=1"),
]
RUN = [
    *("run", *SHORT, "train.epochs=6", "train.checkpoint.min_seconds=0"),
    f"data={{name: images, database: 's3://{BUCKET}/photos.parquet'}}",
]
SEARCH = [
    *("tune", *SHORT, "train.epochs=1", "method.bits=8"),
    f"data={{name: images, database: 's3://{BUCKET}/photos'}}",
    f"output=s3://{BUCKET}/search",
    "tune={space: {train.optimizer.lr: {uniform: [0.01, 0.1]}}, scheduler: none, evaluate: false}",
]


@pytest.fixture(scope="module")
def temporary():
    """A folder with a short path: the names of Ray's sockets have a length that the system limits."""
    folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def server(temporary, tmp_path_factory):
    """The store, which this process finds and is let into."""
    tmp_path_factory.getbasetemp()  # it asks for the folder of temporary files
    with pytest.MonkeyPatch.context() as patch, Server() as made:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in made.variables.items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", str(temporary))
        storage._client.cache_clear()
        yield made
        storage._client.cache_clear()


@pytest.fixture(scope="module")
def photos(server, tmp_path_factory):
    """The same images as files and as a Parquet file, all on the store; the folder they come from."""
    folder = write_images(tmp_path_factory.mktemp("photos") / "photos", 60)
    server.put_folder("photos", folder)
    table = io.BytesIO()
    pq.write_table(coloured_table(60).table, table)
    server.put("photos.parquet", table.getvalue())
    return folder


@contextmanager
def running(lines, environment, log):
    """Commands in processes that are gone after the block; it gets a function that waits for something."""
    process = commands(lines, environment, log)
    deadline = time.monotonic() + 400

    def until(moment):
        while not moment(process):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    try:
        yield until
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def run(local_ray, server, photos):
    """What a run left that trained and encoded in this process. One on Ray: the one that is killed."""
    output = f"s3://{BUCKET}/run"
    recipe = recipes.load(RUN[1], [*RUN[2:], f"output={output}"])
    with encoding_in_this_process():
        Run(recipe, training=partial(train_here, threads=1)).all()
    return Folder(output)


def whole(lines, environment, log):
    """Run commands to their end."""
    with running(lines, environment, log) as until:
        until(lambda process: process.poll() is not None)


@pytest.mark.long
def test_a_killed_run_goes_on_from_its_checkpoint_on_the_store(server, photos, temporary):
    log, environment = temporary / "log of the killed", server.environment(temporary)
    command = [*RUN, f"output=s3://{BUCKET}/killed"]
    server.gate.held = f"/{BUCKET}/killed/model/"  # however fast it is, it is killed before it has a model
    with running([command], environment, log) as until:

        def has_checkpoint(process):
            assert process.poll() is None, log.read_text()
            # Ray Train writes it when a checkpoint counts.
            return server.read("killed/checkpoints/checkpoint_manager_snapshot.json") is not None

        until(has_checkpoint)
        before = server.read("killed/history.jsonl")
    server.gate.held = None
    whole([command], environment, log)
    lines = [json.loads(line) for line in server.read("killed/history.jsonl").splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 7))
    # The seconds that it took are no others: it was not done again.
    assert lines[0] == json.loads(before.splitlines()[0])
    assert model.load(f"s3://{BUCKET}/killed/model").description["training"]["of_epochs"] == 6
    files = [file for file in temporary.rglob("*") if file.is_file()]
    assert log in files
    assert any("session_" in str(file) for file in files)
    assert not with_a_key(server, files), "neither the commands nor Ray write one anywhere"


def test_a_run_leaves_every_artefact_on_the_store(server, run):
    assert {"recipe.yaml", "metrics.json", "report.html", "timings.json", "split"} <= set(run.names())
    metrics = run.read_json("metrics.json")
    assert metrics["models"]["best"]["test"][0]["value"] > 0.5
    assert Embeddings.open(run / "embeddings" / "queries", check="content").rows == 6
    assert len(Index.open(run / "index").verify()) >= 4
    assert server.read("run/report.html").startswith(b"<!doctype html>")


@pytest.mark.long
def test_a_search_on_the_store_goes_on_with_another_trial(server, photos, temporary):
    log, environment = temporary / "log of the search", server.environment(temporary)
    model_file = {"Bucket": BUCKET, "Key": "search/trials/0000/model/model.safetensors"}
    whole([[*SEARCH, "tune.trials=1"]], environment, log)
    before = server.client.head_object(**model_file)
    whole([[*SEARCH, "tune.trials=2"]], environment, log)
    trials = [json.loads(line) for line in server.read("search/trials.jsonl").splitlines()]
    assert [trial["state"] for trial in trials] == ["finished", "finished"]
    after = server.client.head_object(**model_file)
    assert (after["ETag"], after["LastModified"]) == (before["ETag"], before["LastModified"])
    best = max(trials, key=lambda trial: trial["values"]["map"])
    kept, trial = (Folder(f"s3://{BUCKET}/search{place}/model") for place in ("", f"/{_folder(best)}"))
    assert model.load(kept).fingerprint == model.load(trial).fingerprint
    assert b"Trials across the space" in server.read("search/report.html")


def _folder(trial):
    return f"trials/{trial['number']:04d}"


def test_no_key_is_written_anywhere(server, run):
    assert not with_a_key(server)


def with_a_key(server, files=()):
    """The objects on the store and the files that a key stands in."""
    secrets = (SECRET.encode(), KEY.encode())
    found = [key for key in server.objects() if any(secret in server.read(key) for secret in secrets)]
    return found + [file for file in files if any(secret in file.read_bytes() for secret in secrets)]


def test_an_index_on_the_store_is_searched_from_a_copy_that_is_fetched_once(
    server,
    run,
    cli_call,
    tmp_path,
):
    uri = f"s3://{BUCKET}/run/index"
    (tmp_path / "digit.png").write_bytes(Index.open(uri).image_bytes(42))
    begun = len(server.gate.requests)
    code, out, _ = cli_call("search", uri, tmp_path / "digit.png", "-k", "5", "--json")
    assert code == 0
    hits = json.loads(out)["queries"][0]["hits"]
    assert len(hits) == 5
    assert hits[0]["distance"] == 0
    read = {path for method, path in server.gate.requests[begun:] if method == "GET"}
    assert f"/{BUCKET}/run/model/model.safetensors" in read
    assert not [path for path in read if "/shards/" in path]


def test_an_index_is_built_from_the_store_into_the_store(server, run, cli_call):
    source, target = f"s3://{BUCKET}/run/embeddings/database", f"s3://{BUCKET}/two"
    code, out, _ = cli_call("index", "build", source, "--out", target, "--shards", "2", "--json")
    assert (code, json.loads(out)["shards"]) == (0, 2)
    queries = Embeddings.open(f"s3://{BUCKET}/run/embeddings/queries").descriptors
    one, two = (Index.open(uri).search(queries, 20) for uri in (f"s3://{BUCKET}/run/index", target))
    np.testing.assert_array_equal(two.rows, one.rows)
    server.put(next(key for key in server.objects("two/shards") if key.endswith("codes.bin")), b"x")
    with pytest.raises(ArtefactError, match=rf"s3://{BUCKET}/two/shards/\w+/codes.bin: damaged"):
        Index.open(target)


def test_descriptors_of_images_on_the_store_are_saved_there(server, run, photos, cli_call):
    images, out = f"s3://{BUCKET}/photos.parquet", f"s3://{BUCKET}/codes.parquet"
    code, said, _ = cli_call("embed", f"s3://{BUCKET}/run/model", images, "--out", out, "--json")
    assert (code, json.loads(said)["rows"]) == (0, 60)
    assert pq.read_table(io.BytesIO(server.read("codes.parquet"))).column_names == ["id", "path", "code"]


# Data


def test_images_on_the_store_are_those_of_a_folder(server, photos):
    here, there = open_images(str(photos)), open_images(f"s3://{BUCKET}/photos")
    assert (there.ids, there.class_names) == (here.ids, here.class_names)
    assert there.labels.tolist() == here.labels.tolist()
    assert [there.image_bytes(row) for row in (0, 59)] == [here.image_bytes(row) for row in (0, 59)]
    table = open_images(f"s3://{BUCKET}/photos.parquet")
    assert table.image_bytes(7) == coloured_table(60).image_bytes(7)


def test_the_address_of_a_server_may_stand_in_the_uri(server, photos, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    where = f"?endpoint_override={server.address.replace(':', '%3A')}&scheme=http"
    server.put("list.txt", b"photos/red/000.png 0\nphotos/green/001.png 1\n")
    listed = open_images(f"s3://{BUCKET}/list.txt{where}")
    assert listed.image_bytes(1) == (photos / "green" / "001.png").read_bytes()
    assert open_images(f"s3://{BUCKET}/photos{where}").ids[0] == "blue/002.png"
    assert len(open_images(f"s3://{BUCKET}/photos.parquet{where}")) == 60
    assert len(open_images(f"s3://{BUCKET}/photos/*/*.png{where}")) == 60
    folder = Folder(f"s3://{BUCKET}/own{where}") / "inside"
    folder.write_text("a", "b")
    assert folder.parent.names() == ["inside"]
    assert server.read("own/inside/a") == b"b"


def test_a_benchmark_lies_on_the_store(server, monkeypatch, tmp_path):
    searched = (Count(30, 10),)
    monkeypatch.setattr(sop, "COUNTS", {"train": (Count(60, 20),), "queries": searched, "database": searched})
    for part, classes in (("train", range(1, 21)), ("test", range(21, 31))):
        rows = [f"{c} {c} {c % 2} chair_final/{c}_{n}.JPG" for c in classes for n in range(3)]
        server.put(f"sop/Ebay_{part}.txt", "\n".join(["image_id class_id super path", *rows]).encode())
    server.put("sop/chair_final/21_0.JPG", b"an image")
    found = datasets.load(sop.SopConfig(root=f"s3://{BUCKET}/sop"), seed=0, splits=Folder(tmp_path))
    assert len(found.queries) == 30
    assert found.queries.image_bytes(found.queries.ids.index("chair_final/21_0.JPG")) == b"an image"


# What is written


def test_names_are_those_of_the_objects(server):
    folder = Folder(f"s3://{BUCKET}/a folder") / "50%25"
    folder.write_text("x y", "z")
    assert server.objects("a folder") == ["a folder/50%25/x y"]
    assert location.read_bytes(folder.uri_of("x y"), 9) == b"z"


def test_an_upload_that_is_killed_leaves_what_was_there(server, temporary):
    folder = Folder(f"s3://{BUCKET}/killed")
    folder.write_text("a", "old")
    code = f"""
import time
from ray_retrieval.storage import Folder
with Folder("s3://{BUCKET}/killed").writing("a") as stream:
    stream.write(bytes(24 << 20))
    time.sleep(300)
"""
    process = python(code, server.environment(temporary))
    try:
        deadline = time.monotonic() + 60
        while not server.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads"):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    assert server.objects("killed") == ["killed/a"]
    assert folder.read_bytes("a") == b"old"


def test_a_failed_write_leaves_what_was_there_and_litter_is_swept(server, monkeypatch):
    folder = Folder(f"s3://{BUCKET}/failed")
    folder.write_text("a", "old")

    def fail():
        with folder.writing("a") as stream:
            stream.write(bytes(24 << 20))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert folder.read_bytes("a") == b"old"
    assert server.objects("failed") == ["failed/a"]
    server.put("failed/b.tmp-0123456789ab", b"half")
    assert folder.names() == ["a"]
    folder.sweep()
    assert server.objects("failed") == ["failed/a", "failed/b.tmp-0123456789ab"]  # somebody may be writing it
    monkeypatch.setattr(storage, "_DAY_NS", -(10**9))
    folder.sweep()
    assert server.objects("failed") == ["failed/a"]
    folder.remove()
    assert not folder.exists()


def test_a_file_that_the_store_cannot_copy_is_renamed_all_the_same(server, monkeypatch):
    monkeypatch.setattr(storage, "_COPIED_AT_ONCE", 1 << 20)
    folder, data = Folder(f"s3://{BUCKET}/large"), os.urandom(12 << 20)
    folder.write_bytes("a", data)
    folder.write_bytes("b", b"small")
    assert server.objects("large") == ["large/a", "large/b"]
    assert folder.checksum("a") == digest(data)
    assert folder.local_path("a").read_bytes() == data


# Errors


NO_INDEX, DENIED = "no index here", "the store refuses: .*ACCESS_DENIED"


@pytest.mark.parametrize(
    ("verb", "argument", "said"),
    [
        ("index info", "s3://nosuch/index", f"s3://nosuch/index: {NO_INDEX}"),
        ("index info", f"s3://{BUCKET}/none", f"s3://{BUCKET}/none: {NO_INDEX}"),
        ("index info", f"s3://{CLOSED}/index", f"s3://{CLOSED}/index/CURRENT: {DENIED}"),
        ("run", "output=s3://nosuch/run", r"s3://nosuch/run/\S+: the store refuses: .*'nosuch'"),
        ("run", f"output=s3://{CLOSED}/run", rf"s3://{CLOSED}/run\S*: {DENIED}"),
        ("tune", f"output=s3://{CLOSED}/x", rf"s3://{CLOSED}/x\S*: {DENIED}"),
        ("train", "data={name: images, database: 's3://nosuch/p'}", "s3://nosuch/p: nothing is there"),
        (
            "train",
            f"data={{name: images, database: 's3://{CLOSED}/p'}}",
            f"s3://{CLOSED}/p: the store cannot be reached: .*ACCESS_DENIED",
        ),
    ],
)
def test_a_wrong_bucket_a_missing_object_and_a_denied_one_are_told_in_a_line(
    server,
    cli_call,
    tmp_path,
    verb,
    argument,
    said,
):
    recipe = {"run": QUICKSTART, "train": QUICKSTART, "tune": QUICKSTART.parent / "tune_digits.yaml"}
    given = [recipe[verb], f"output={tmp_path}/run"] if verb in recipe else []
    code, _, err = cli_call(*verb.split(), *given, argument)
    assert code == 2, err
    assert re.search(said, err), err
    assert err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "use",
    [
        Folder,
        open_images,
        lambda uri: prepare(["run", str(QUICKSTART), f"output={uri}"]),
        lambda uri: prepare(["encode", "s3://b/model", uri, "--out", "s3://b/x"]),
    ],
)
def test_a_key_in_a_uri_is_refused_and_not_repeated(use):
    with pytest.raises(RetrievalError, match=r"s3://…@bucket: a key or password does not belong") as caught:
        use(f"s3://{KEY}:{SECRET}@bucket/run?scheme=http")
    assert SECRET not in str(caught.value)
    assert KEY not in str(caught.value)


READ = f"""
from ray_retrieval.storage import Folder
print(Folder("s3://{BUCKET}/profile").read_bytes("a").decode())
"""


def test_keys_may_come_from_a_profile_and_without_any_a_store_refuses(server, temporary):
    server.put("profile/a", b"by profile")
    file = temporary / "credentials"
    file.write_text(f"[retrieval]\naws_access_key_id = OTHERKEY\naws_secret_access_key = {SECRET}x\n")
    none = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    profile = {"AWS_PROFILE": "retrieval", "AWS_SHARED_CREDENTIALS_FILE": str(file)}
    before = set(server.gate.keys)
    both = [python(READ, server.environment(temporary, **none, **more)) for more in (profile, {})]
    (out, _), (_, err) = (process.communicate(timeout=120) for process in both)
    file.unlink()
    assert out == "by profile\n"
    assert server.gate.keys - before >= {"OTHERKEY"}
    assert f"s3://{BUCKET}/profile/a: the store refuses: " in err
