"""Google Landmarks v2 as a benchmark, from a small build; and its download from a local server."""

import functools
import hashlib
import http.server
import io
import itertools
import tarfile
import threading

import numpy as np
import pytest

from ray_retrieval.config import validate
from ray_retrieval.data import datasets
from ray_retrieval.data.datasets import landmarks
from ray_retrieval.data.datasets.gldv2 import Gldv2Config
from ray_retrieval.data.datasets.gldv2_build import build
from ray_retrieval.data.datasets.gldv2_download import fetch, parse_range
from ray_retrieval.data.datasets.gldv2_plan import Gldv2BuildConfig, plan
from ray_retrieval.data.datasets.landmarks import LandmarksTest
from ray_retrieval.data.datasets.survey import kind_and_settings, survey
from ray_retrieval.data.source import ImageSource
from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.errors import ArtefactError, DataError, RecipeError, RetrievalError
from ray_retrieval.storage import Folder

SIZES = [10, 1, 12, 5, 9, 15]


def name_of(landmark, number):
    return hashlib.md5(f"{landmark}/{number}".encode()).hexdigest()[:16]


NAMES = [[name_of(landmark, number) for number in range(size)] for landmark, size in enumerate(SIZES)]
CLEAN = "landmark_id,images\n" + "".join(f"{7 * row},{' '.join(names)}\n" for row, names in enumerate(NAMES))


def path_of(name):
    return f"{name[0]}/{name[1]}/{name[2]}/{name}.jpg"


@pytest.fixture(scope="session")
def jpeg(make_image):
    names = enumerate(itertools.chain.from_iterable(NAMES))
    return {name: make_image(32, 24, seed=row, kind="JPEG") for row, name in names}


@pytest.fixture(scope="module")
def root(tmp_path_factory, jpeg):
    source = tmp_path_factory.mktemp("gldv2")
    (source / "train_clean.csv").write_text(CLEAN)
    for name, data in jpeg.items():
        (source / "train" / path_of(name)).parent.mkdir(parents=True, exist_ok=True)
        (source / "train" / path_of(name)).write_bytes(data)
    out = tmp_path_factory.mktemp("built") / "clean"
    build(plan(str(source), Gldv2BuildConfig(shards=2)), str(out), threads=2)
    return out


def config_of(root, **fields):
    return validate(Gldv2Config, {"name": "gldv2", "root": str(root), **fields})


def loaded(root, **fields):
    return datasets.load(config_of(root, **fields), seed=0, splits=Folder(root / "split"))


class TestBenchmark:
    def test_photographs_come_from_the_shards_when_they_are_asked_for(self, root, jpeg):
        benchmark = loaded(root)
        train = benchmark.train
        assert (train.inline_lengths() == -1).all()
        assert all(train.image_bytes(row) == jpeg[name] for row, name in enumerate(train.ids))
        with ImageSource(train, Preprocessing(size=16), memory_bytes=0, threads=2) as source:
            assert source.batch(np.array([5, 0])).shape == (2, 3, 16, 16)

    def test_a_build_is_read_from_a_store_as_from_a_disk(self, root):
        one, other = (
            loaded(root),
            datasets.load(config_of(f"file://{root}"), seed=0, splits=Folder(root / "split")),
        )
        assert other.train.paths == [f"file://{path}" for path in one.train.paths]
        assert [other.train.image_bytes(row) for row in range(5)] == [
            one.train.image_bytes(row) for row in range(5)
        ]

    def test_labels_are_all_landmarks_in_both_parts(self, root):
        benchmark = loaded(root)
        assert benchmark.train.classes == benchmark.validation_database.classes == len(SIZES)
        landmark_of = {name: landmark for landmark, names in enumerate(NAMES) for name in names}
        for table in (benchmark.train, benchmark.validation_database):
            assert table.labels.tolist() == [landmark_of[name] for name in table.ids]
        assert benchmark.train.class_name(2) == "14"
        assert len(benchmark.train) + len(benchmark.validation_database) == sum(SIZES)

    def test_queries_have_something_to_find(self, root):
        benchmark = loaded(root)
        # int(0.2 n) of 10, 12 and 15; one of 5 and of 9.
        database = benchmark.validation_database
        assert np.bincount(database.labels).tolist() == [2, 0, 2, 1, 1, 3]
        assert np.bincount(benchmark.validation_queries.labels).tolist() == [2, 0, 2, 0, 0, 3]
        assert set(benchmark.validation_queries.ids) <= set(database.ids)
        assert benchmark.queries_in_database
        assert benchmark.decoded  # by the build
        assert not [note for note in benchmark.notes if "no relevant image" in note]
        assert [note for note in benchmark.notes if "no test of its own" in note]

    def test_a_sample_of_the_validation_is_of_whole_classes_and_fixed(self, root):
        whole = np.bincount(loaded(root).validation_database.labels, minlength=6)
        for limit in (3, 5, 8):
            one, other = loaded(root, validation=limit), loaded(root, validation=limit)
            assert one.validation_database.ids == other.validation_database.ids
            assert len(one.validation_database) <= limit
            kept = np.bincount(one.validation_database.labels, minlength=6)
            assert all(count in (0, all_of_it) for count, all_of_it in zip(kept, whole, strict=True))
        assert len(loaded(root, validation=None).validation_database) == whole.sum() == 9
        assert any("8 of 9 photographs" in note or "7 of 9" in note for note in one.notes)

    def test_it_is_tested_on_landmarks(self, root, make_table, monkeypatch):
        table = make_table([None] * 3, name="ROxford5k")
        lists = ({"easy": np.array([0]), "hard": np.array([1]), "junk": np.array([2])},) * 3
        test = LandmarksTest("ROxford5k", table, table, lists, "revisited", ["a note"])
        asked = []
        monkeypatch.setattr(landmarks, "read_test", lambda *given: asked.append(given) or test)
        monkeypatch.setattr(landmarks, "fetch_sources", lambda *given: asked.append(given))
        benchmark = loaded(root, test="roxford5k", test_root="elsewhere", download=True)
        assert asked == [("roxford5k", "elsewhere"), ("roxford5k", "elsewhere", None)]
        assert (benchmark.name, benchmark.protocol, benchmark.ks) == ("ROxford5k", "revisited", (1, 5, 10))
        assert benchmark.queries is table
        assert len(benchmark.train) == sum(SIZES) - 9
        assert "a note" in benchmark.notes
        # A model can be measured without what it learned from.
        assert loaded(root / "none", test="roxford5k").untrainable.startswith("there is no complete build")

    def test_a_missing_or_damaged_build_is_told(self, root, tmp_path):
        with pytest.raises(DataError, match=r"gldv2\.json is missing.*gldv2 build"):
            loaded(tmp_path)
        shard = root / "shards" / "validation-00000-of-00002.parquet"
        data = shard.read_bytes()
        shard.write_bytes(data[:-1])
        try:
            with pytest.raises(ArtefactError, match=r"validation-00000-of-00002\.parquet: damaged"):
                loaded(root)
        finally:
            shard.write_bytes(data)

    def test_distractors_need_a_test(self, root):
        with pytest.raises(RetrievalError, match="searched in a 'test', which is none"):
            config_of(root, distractors="photos")

    def test_survey_tells_what_is_there(self, root, tmp_path):
        assert not survey(config_of(tmp_path))["complete"]
        found = survey(config_of(root))
        assert found["complete"]
        facts = {part: (one["images"], one["duplicates"]) for part, one in found["parts"].items()}
        assert facts == {"train": (sum(SIZES) - 9, 0), "validation": (9, 0)}
        tested = survey(config_of(root, test="oxford5k", test_root=str(tmp_path)))
        assert [entry["found"] for entry in tested["files"]] == [True, False, False]
        assert tested["files"][1]["file"] == f"{tmp_path}/test/oxford5k/gnd_oxford5k.pkl"
        assert kind_and_settings("gldv2") == (Gldv2Config, [])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A folder, and the address at which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as opened:
        threading.Thread(target=opened.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{opened.server_port}"
        opened.shutdown()


def publish(folder, jpeg, *, archives=2, extra=None):
    """The collection as its publisher lays it out."""
    for name in ("metadata", "train", "md5sum/train"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "metadata" / "train_clean.csv").write_text(CLEAN)
    (folder / "metadata" / "train.csv").write_text("id,url,landmark_id\n")
    (folder / "metadata" / "train_label_to_category.csv").write_text("landmark_id,category\n")
    names = sorted(jpeg)
    for number in range(archives):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            members = {path_of(name): jpeg[name] for name in names[number::archives]}
            for path, data in {**members, **(extra or {})}.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        write_tar(folder, number, stream.getvalue())


def write_tar(folder, number, data):
    tar = f"images_{number:03d}.tar"
    (folder / "train" / tar).write_bytes(data)
    digest = hashlib.md5(data).hexdigest()
    (folder / "md5sum" / "train" / f"md5.images_{number:03d}.txt").write_text(f"{digest}  {tar}\n")


def pictures_in(root):
    return {path.stem: path.read_bytes() for path in (root / "train").rglob("*.jpg")}


class TestDownload:
    def test_archives_are_fetched_unpacked_and_kept(self, server, tmp_path, jpeg):
        publish(server[0], jpeg)
        root, said = tmp_path / "data", []
        fetch(root, range(2), address=server[1], say=said.append)
        assert pictures_in(root) == jpeg
        assert (root / "train_clean.csv").read_text() == CLEAN
        assert (root / "tars" / "images_001.tar").exists()
        assert any(line.startswith("images_001.tar: unpacking into") for line in said)
        # All is there: nothing is asked for.
        fetch(root, range(2), address="http://127.0.0.1:9", remove_tars=True)
        assert not list((root / "tars").glob("*.tar"))
        fetch(root, range(2), address="http://127.0.0.1:9")
        made = build(plan(str(root), Gldv2BuildConfig(shards=1)), str(tmp_path / "out"), threads=1)
        assert made["images"] == len(jpeg)

    def test_some_archives_can_be_fetched_alone(self, server, tmp_path, jpeg):
        publish(server[0], jpeg)
        fetch(tmp_path / "data", address=server[1])
        assert not (tmp_path / "data" / "train").exists()
        fetch(tmp_path / "data", parse_range("1"), address=server[1])
        assert sorted(pictures_in(tmp_path / "data")) == sorted(jpeg)[1::2]

    def test_the_folder_is_a_local_one_below_home_or_a_variable(self, server, tmp_path, jpeg, monkeypatch):
        publish(server[0], jpeg)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("HERE", str(tmp_path))
        for root in ("~/home", "$HERE/variable"):
            fetch(root, address=server[1])
        assert {path.parent.name for path in tmp_path.rglob("train_clean.csv")} >= {"home", "variable"}
        with pytest.raises(RecipeError, match="archives are unpacked into a local folder"):
            fetch("s3://bucket/gldv2", address=server[1])

    def test_a_wrong_checksum_leaves_nothing(self, server, tmp_path, jpeg):
        publish(server[0], jpeg, archives=1)
        (server[0] / "train" / "images_000.tar").write_bytes(b"something else")
        with pytest.raises(DataError, match="another checksum"):
            fetch(tmp_path / "data", [0], address=server[1])
        assert not (tmp_path / "data" / "train").exists()
        (server[0] / "md5sum" / "train" / "md5.images_000.txt").write_text("<html>")
        (tmp_path / "data" / "tars" / "md5.images_000.txt").unlink()
        with pytest.raises(DataError, match="no MD5 sum is in it"):
            fetch(tmp_path / "data", [0], address=server[1])

    def test_no_member_leaves_the_folder(self, server, tmp_path, jpeg):
        publish(server[0], jpeg, archives=1, extra={"../../outside.jpg": b"x"})
        with pytest.raises(DataError, match="outside"):
            fetch(tmp_path / "data", [0], address=server[1], remove_tars=True)
        assert not list(tmp_path.rglob("outside.jpg"))
        # What is not unpacked whole is kept, and not taken for done.
        assert (tmp_path / "data" / "tars" / "images_000.tar").exists()
        assert not (tmp_path / "data" / "tars" / "images_000.unpacked").exists()

    def test_ranges(self):
        assert parse_range("0-499") == range(500)
        assert parse_range("7") == range(7, 8)
        for wrong in ("", "500", "3-2", "a-b", "-1", "1-2-3", "0-500"):
            with pytest.raises(RecipeError, match="a range of archives is expected"):
                parse_range(wrong)
