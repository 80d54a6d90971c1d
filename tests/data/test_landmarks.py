"""Oxford and Paris in miniature, in the published layout; and the real ground truth, where it is at hand."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_retrieval.config import validate
from ray_retrieval.data import datasets
from ray_retrieval.data.datasets import landmarks, sfm
from ray_retrieval.data.datasets.landmarks import PUBLISHED, Published, ROxford5kConfig, read_ground_truth
from ray_retrieval.data.datasets.sfm import SfmConfig
from ray_retrieval.data.datasets.survey import survey
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.storage import Folder

SHARED = Path(__file__).parents[3] / "shared" / "data" / "revisited"
DATABASE = [f"image_{number:06d}" for number in range(8)]
QUERIES = ["query_000000", "query_000001"]
GROUND_TRUTH = [
    {"bbx": [4, 2.5, 20.2, 12], "easy": [1, 5], "hard": [0], "junk": [7]},
    {"bbx": [0, 0, 24, 16], "easy": [], "hard": [3], "junk": []},
]
CLASSIC = [
    {"bbx": [4, 2.5, 20.2, 12], "ok": [0, 1, 5], "junk": [7]},
    {"bbx": [0, 0, 24, 16], "ok": [3], "junk": []},
]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    for name, published in PUBLISHED.items():
        lists = {"easy": 2, "hard": 2, "junk": 1} if published.lists else {}
        small = Published(published.title, published.images, published.protocol, 2, (8,), lists)
        monkeypatch.setitem(PUBLISHED, name, small)


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


def write(root, name="roxford5k", content=None, *, images=True):
    classic = name in ("oxford5k", "paris6k")
    gnd, queries = (CLASSIC, DATABASE[:2]) if classic else (GROUND_TRUTH, QUERIES)
    content = content or {"imlist": DATABASE, "qimlist": queries, "gnd": gnd}
    file = root / "test" / name / f"gnd_{name}.pkl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content, protocol=2))
    for number, image in enumerate([*DATABASE, *QUERIES] if images else []):
        write_image(root / PUBLISHED[name].images / f"{image}.jpg", number)
    return root


def loaded(root, name="roxford5k", **fields):
    config = validate(datasets.CONFIGS[name], {"name": name, "root": str(root), **fields})
    return datasets.load(config, seed=0, splits=Folder(root / "split"))


def test_queries_are_boxes_and_the_database_is_in_the_files_order(tmp_path):
    benchmark = loaded(write(tmp_path))
    assert benchmark.name == "ROxford5k"
    assert benchmark.queries.ids == QUERIES
    assert benchmark.queries.box(0) == [4, 2.5, 20.2, 12]
    assert benchmark.database.ids == DATABASE
    assert benchmark.database.box(0) is None
    assert benchmark.database.paths[3] == str(tmp_path / "test/oxford5k/jpg/image_000003.jpg")
    assert benchmark.protocol == "revisited"
    assert benchmark.ks == (1, 5, 10)
    lists = [{name: rows.tolist() for name, rows in one.items()} for one in benchmark.ground_truth]
    assert lists == [{key: value for key, value in one.items() if key != "bbx"} for one in GROUND_TRUTH]
    assert not benchmark.queries.has_labels
    assert len(benchmark.train) == len(benchmark.validation_queries) == 0
    assert "no images to learn from" in benchmark.untrainable


@pytest.mark.parametrize("name", ["oxford5k", "paris6k"])
def test_classic_queries_are_in_the_database_and_that_is_noted(tmp_path, name):
    benchmark = loaded(write(tmp_path, name), name)
    assert benchmark.protocol == "classic"
    assert benchmark.ground_truth[0]["ok"].tolist() == [0, 1, 5]
    assert any("2 of 2 queries are also in database" in note for note in benchmark.notes)


def test_a_photograph_of_two_queries_has_two_ids(tmp_path):
    content = {"imlist": DATABASE, "qimlist": [QUERIES[0]] * 2, "gnd": GROUND_TRUTH}
    assert loaded(write(tmp_path, content=content)).queries.ids == [QUERIES[0], f"{QUERIES[0]}#2"]


@pytest.mark.parametrize("several", [False, True])
def test_distractors_follow_the_database(tmp_path, several):
    write(tmp_path)
    for number in range(3):
        write_image(tmp_path / "further" / str(number % 2) / f"{number}.jpg", 50 + number)
    folders = [str(tmp_path / "further" / part) for part in "01"]
    benchmark = loaded(tmp_path, distractors=folders if several else str(tmp_path / "further"))
    assert benchmark.database.ids[:8] == DATABASE
    assert all(name.startswith("distractor/") for name in benchmark.database.ids[8:])
    assert benchmark.name == "ROxford5k + 3 distractors"
    assert benchmark.database.image_bytes(8)
    with pytest.raises(DataError, match="8 distractors are in the database"):
        loaded(tmp_path, distractors=str(tmp_path / "test/oxford5k/jpg"))


def test_as_many_distractors_as_r1m_has_are_r1m(tmp_path, monkeypatch):
    monkeypatch.setattr(landmarks, "_DISTRACTORS", 1)
    write_image(write(tmp_path) / "further" / "0.jpg", 50)
    assert loaded(tmp_path, distractors=str(tmp_path / "further")).name == "ROxford5k + R1M"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("imlist"), "'imlist' is missing"),
        (lambda content: content["qimlist"].pop(), "there are 1 queries, and a ground truth of 2"),
        (lambda content: content["gnd"][1].pop("hard"), "query 1 has no 'hard'"),
        (lambda content: content["gnd"][1].pop("bbx"), "query 1 has no 'bbx'"),
        (
            lambda content: content["gnd"][1]["hard"].__setitem__(0, "x"),
            "query 1: box or rows are no numbers",
        ),
        (
            lambda content: content["gnd"][1]["hard"].append(4),
            "2 rows listed as hard are expected, there are 3",
        ),
        (lambda content: content["gnd"][1]["hard"].__setitem__(0, 8), "names a row outside 0…7"),
        (lambda content: content["imlist"].pop(), "8 photographs in the database are expected, there are 7"),
        (lambda content: content["gnd"][0]["bbx"].__setitem__(2, 1), "left < right"),
    ],
)
def test_damage_is_told_in_one_line(tmp_path, change, message):
    content = pickle.loads(pickle.dumps({"imlist": DATABASE, "qimlist": QUERIES, "gnd": GROUND_TRUTH}))
    change(content)
    with pytest.raises(DataError, match=message) as caught:
        loaded(write(tmp_path, content=content)).queries.box(0)
    assert "\n" not in str(caught.value)


def test_missing_files_and_photographs_are_told(tmp_path):
    with pytest.raises(DataError, match=r"gnd_roxford5k.pkl: the file is missing"):
        loaded(tmp_path)
    (write(tmp_path) / "test/oxford5k/jpg/image_000002.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 of 10 images are missing, the first is .*image_000002\.jpg"
    ) as caught:
        loaded(tmp_path)
    # It would be taken for whole.
    assert "remove test/oxford5k/jpg, and data.download=true fetches all" in str(caught.value)
    shutil.rmtree(tmp_path / "test/oxford5k/jpg")
    with pytest.raises(DataError, match=r"put them there, or set data\.download=true"):
        loaded(tmp_path)


def test_survey_tells_what_is_there(tmp_path):
    config = ROxford5kConfig(root=str(tmp_path))
    assert not survey(config)["complete"]
    found = survey(ROxford5kConfig(root=str(write(tmp_path))))
    assert found["complete"]
    assert {part: facts["images"] for part, facts in found["parts"].items()} == {"queries": 2, "database": 8}
    needed = survey(SfmConfig(root=str(tmp_path), test="rparis6k"))["files"]
    assert [file["file"].rsplit("/", 2)[-1] for file in needed][2:] == ["gnd_rparis6k.pkl", "jpg"]


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_the_published_ground_truth_has_the_published_counts(tmp_path, monkeypatch, name):
    monkeypatch.undo()
    file = SHARED / f"gnd_{name}.pkl"
    if not file.exists():
        pytest.skip("the ground truth is not at hand")
    (tmp_path / "test" / name).mkdir(parents=True)
    (tmp_path / "test" / name / file.name).write_bytes(file.read_bytes())
    found = read_ground_truth(name, str(tmp_path))
    assert (len(found.queries), len(found.database)) == (70, PUBLISHED[name].database[0])
    assert sum(len(one["easy"]) == 0 for one in found.lists) == (2 if name == "roxford5k" else 0)


def test_the_published_numbers_are_asserted(tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(DataError, match="70 queries are expected, there are 2"):
        loaded(_written_before(tmp_path))


def _written_before(root):
    file = root / "test/roxford5k/gnd_roxford5k.pkl"
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps({"imlist": DATABASE, "qimlist": QUERIES, "gnd": GROUND_TRUTH}))
    return root


class TestWithSfm:
    """Learned from retrieval-SfM, tested on landmarks."""

    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sfm, "COUNTS", {**sfm.COUNTS, "retrieval-SfM-120k": {}})
        part = {
            "train": {"cids": [f"a{row}abcdef" for row in range(6)], "cluster": [0, 0, 1, 1, 2, 2]},
            "val": {"cids": [f"b{row}abcdef" for row in range(4)], "cluster": [7, 7, 8, 8]},
        }
        for one in part.values():
            firsts = range(0, len(one["cids"]), 2)
            one |= {"qidxs": list(firsts), "pidxs": [row + 1 for row in firsts]}
            for number, cid in enumerate(one["cids"]):
                write_image(tmp_path / "train/retrieval-SfM-120k/ims/ef/cd/ab" / cid, number)
        (tmp_path / "train/retrieval-SfM-120k/retrieval-SfM-120k.pkl").write_bytes(pickle.dumps(part))
        return write(tmp_path)

    def of(self, root, **fields):
        config = validate(SfmConfig, {"name": "sfm", "root": str(root), **fields})
        return datasets.load(config, seed=0, splits=Folder(root / "split"))

    def test_train_and_validation_are_of_one_and_the_test_of_the_other(self, root):
        benchmark = self.of(root, test="roxford5k")
        alone = self.of(root)
        for role in ("train", "validation_queries", "validation_database"):
            assert getattr(benchmark, role).fingerprint == getattr(alone, role).fingerprint
        assert benchmark.name == "ROxford5k"
        assert benchmark.queries.ids == QUERIES
        assert benchmark.ground_truth[1]["hard"].tolist() == [3]
        assert not benchmark.untrainable
        assert not benchmark.queries_in_database
        assert any("retrieval-SfM-120k is learned from" in note for note in benchmark.notes)
        assert not any("no test of its own" in note for note in benchmark.notes)
        assert alone.ground_truth is None

    def test_the_test_needs_no_training_images(self, root):
        whole = self.of(root, test="roxford5k")
        (root / "train/retrieval-SfM-120k/ims/ef/cd/ab/a3abcdef").unlink()
        benchmark = self.of(root, test="roxford5k")
        assert "1 of 10 images are missing" in benchmark.untrainable
        assert benchmark.train.fingerprint == whole.train.fingerprint
        with pytest.raises(DataError, match="1 of 10 images are missing"):
            self.of(root)

    def test_the_test_needs_no_pairs(self, root):
        (root / "train/retrieval-SfM-120k/retrieval-SfM-120k.pkl").unlink()
        benchmark = self.of(root, test="roxford5k")
        assert "retrieval-SfM-120k.pkl is missing" in benchmark.untrainable
        assert len(benchmark.train) == 0
        assert len(benchmark.database) == 8

    def test_distractors_need_a_test(self, root):
        write_image(root / "further/0.jpg", 60)
        assert len(self.of(root, test="roxford5k", distractors=str(root / "further")).database) == 9
        with pytest.raises(RecipeError, match="'distractors' are searched in a 'test'"):
            self.of(root, distractors=str(root / "further"))
