"""retrieval-SfM and GL18 in miniature: the published numbers are swapped for small ones."""

import pickle

import numpy as np
import pytest

from ray_retrieval.config import validate
from ray_retrieval.data import datasets
from ray_retrieval.data.datasets import landmarks, sfm
from ray_retrieval.data.datasets.sfm import SfmConfig, path_of, read
from ray_retrieval.data.datasets.survey import kind_and_settings, survey
from ray_retrieval.descriptors import Vectors
from ray_retrieval.errors import DataError, RetrievalError
from ray_retrieval.loop.validation import measure
from ray_retrieval.storage import Folder

PART = {"train": "a", "val": "b"}


def cids_of(part, count):
    return [f"{PART[part]}{number:025x}abcdef" for number in range(count)]


def content_of(train=12, val=6):
    """Clusters of three; every first of one asks for the second (twice) and the third."""
    content = {}
    for part, count in (("train", train), ("val", val)):
        firsts = range(0, count, 3)
        content[part] = {
            "cids": cids_of(part, count),
            "cluster": [100 * (part == "val") + 7 * (row // 3) for row in range(count)],
            "qidxs": [row for row in firsts for _ in range(3)],
            "pidxs": [row + step for row in firsts for step in (2, 1, 1)],
        }
    return content


def write(root, content=None, *, variant="retrieval-SfM-120k", images=True):
    content = content or content_of()
    folder = root / "train" / variant
    folder.mkdir(parents=True, exist_ok=True)
    name = "db_gl18" if variant == "gl18" else variant
    (folder / f"{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))
    if images:
        for part in content.values():
            for cid in part.get("cids", []):
                if variant == "gl18":
                    path = folder / "jpg" / f"{cid}.jpg"
                else:
                    path = root / "train/retrieval-SfM-120k/ims" / cid[-2:] / cid[-4:-2] / cid[-6:-4] / cid
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    return root


@pytest.fixture(autouse=True)
def few(monkeypatch):
    counts = {"retrieval-SfM-120k": {"train": (12, 12), "val": (6, 6)}}
    monkeypatch.setattr(sfm, "COUNTS", {**sfm.COUNTS, **counts})


def config_of(root, **fields):
    return validate(SfmConfig, {"name": "sfm", "root": str(root), **fields})


def loaded(root, **fields):
    return datasets.load(config_of(root, **fields), seed=0, splits=Folder(root / "split"))


def test_the_published_numbers_are_asserted(tmp_path, monkeypatch):
    monkeypatch.undo()
    assert sfm.COUNTS["retrieval-SfM-120k"] == {"train": (91_642, 181_697), "val": (6_403, 1_691)}
    with pytest.raises(DataError, match="91,642 photographs and 181,697 pairs are expected, there are 12"):
        loaded(write(tmp_path))


def test_groups_of_letters_are_reversed_and_letters_are_not():
    assert path_of("0123456789abcdef0123456789abcdef") == "ef/cd/ab/0123456789abcdef0123456789abcdef"


def test_labels_are_clusters_and_positives_are_rows(tmp_path):
    benchmark = loaded(write(tmp_path))
    train = benchmark.train
    assert train.ids == cids_of("train", 12)
    assert train.labels.tolist() == [row // 3 for row in range(12)]
    assert [train.class_name(label) for label in sorted(set(train.labels.tolist()))] == ["0", "7", "14", "21"]
    positives = train.table["positives"].to_pylist()
    assert positives == [[row + 1, row + 2] if row % 3 == 0 else [] for row in range(12)]
    assert all(train.paths[row].endswith(f"ims/ef/cd/ab/{train.ids[row]}") for row in range(12))
    assert any("8 different pairs of 4 queries" in note for note in benchmark.notes)


def pairs_of(table):
    lists = table.column("positives").to_pylist()
    return {(table.ids[row], table.ids[other]) for row, others in enumerate(lists) for other in others}


def test_pairs_stay_the_same_photographs_where_one_is_left_out(tmp_path):
    train = loaded(write(tmp_path)).train
    assert len(pairs_of(train)) == 8
    for broken in range(12):
        part = train.take(np.setdiff1d(np.arange(12), broken))
        assert pairs_of(part) == {pair for pair in pairs_of(train) if train.ids[broken] not in pair}


def test_validation_asks_with_its_queries_in_all_its_photographs(tmp_path):
    benchmark = loaded(write(tmp_path))
    assert benchmark.validation_database.ids == cids_of("val", 6)
    assert benchmark.validation_queries.ids == [cids_of("val", 6)[row] for row in (0, 3)]
    assert benchmark.queries is benchmark.validation_queries
    assert benchmark.database is benchmark.validation_database
    assert benchmark.queries_in_database
    assert any("no test of its own" in note for note in benchmark.notes)


def test_a_validation_query_does_not_count_for_itself(tmp_path):
    benchmark = loaded(write(tmp_path))
    # The nearest other photograph is of the other cluster.
    vectors = np.eye(6, dtype=np.float32)
    vectors[0, 3] = vectors[3, 0] = 0.5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = measure(
        Vectors(vectors[[0, 3]]),
        benchmark.validation_queries,
        Vectors(vectors),
        benchmark.validation_database,
        k=None,
        threads=1,
    )
    assert found["recall@1"] == 0


def test_images_of_30k_are_those_of_120k(tmp_path):
    benchmark = loaded(write(tmp_path, variant="retrieval-SfM-30k"), variant="retrieval-SfM-30k")
    assert "/train/retrieval-SfM-120k/ims/" in benchmark.train.paths[0]


def gl18(boxes="queries"):
    """As SOLAR's script writes it: landmarks are text, positives are lists, boxes are those of queries."""
    content = {}
    for part, count in (("train", 7), ("val", 5)):
        queries = list(range(0, count - 1))
        content[part] = {
            "cids": cids_of(part, count),
            "cluster": [str(row // 2) for row in range(count)],
            "qidxs": queries,
            "pidxs": [[row ^ 1] for row in queries],
            "bbxs": [None if row % 2 else [0.1, 0.2, 0.8, row] for row in queries],
        }
        content[part]["pidxs"][0] = [1, 1]
        if boxes == "all":
            content[part]["bbxs"].append(None)
    return content


@pytest.mark.parametrize("boxes", ["queries", "all"])
def test_gl18_has_lists_of_positives_and_boxes(tmp_path, boxes):
    benchmark = loaded(write(tmp_path, gl18(boxes), variant="gl18"), variant="gl18")
    train = benchmark.train
    assert train.table["positives"].to_pylist() == [[1], [0], [3], [2], [5], [4], []]
    assert train.table["bbx"].to_pylist()[:3] == [[0.1, 0.2, 0.8, 0], None, [0.1, 0.2, 0.8, 2]]
    assert train.table["bbx"].to_pylist()[6] is None
    assert train.paths[0].endswith(f"train/gl18/jpg/{train.ids[0]}.jpg")
    assert len(benchmark.queries) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part.pop("cluster"), "'cluster' is missing"),
        (lambda part: part["cluster"].pop(), "12 photographs have 11 clusters"),
        (lambda part: part["qidxs"].pop(), "11 queries have 12 positives"),
        (lambda part: part["pidxs"].__setitem__(3, 12), r"pair \[3, 12\] names a photograph outside 0…11"),
        (lambda part: part["qidxs"].__setitem__(0, -1), r"pair \[-1, 2\]"),
        (lambda part: part["qidxs"].__setitem__(0, "x"), "not all numbers"),
        (lambda part: part.update(bbxs=[None] * 5), "have 5 boxes"),
        (lambda part: part["cids"].__setitem__(0, part["cids"][1]), "ids stand more than once"),
    ],
)
def test_damage_is_told(tmp_path, change, message):
    content = content_of()
    change(content["train"])
    with pytest.raises(DataError, match=message) as caught:
        loaded(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_a_photograph_is_never_its_own_positive(tmp_path):
    content = content_of()
    content["train"]["pidxs"][0] = 0
    pairs = read(config_of(write(tmp_path, content)))["train"].pairs
    assert pairs[:2].tolist() == [[0, 1], [3, 4]]


def test_a_pickle_that_runs_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    root = write(tmp_path, images=False)
    (root / "train/retrieval-SfM-120k/retrieval-SfM-120k.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="print"):
        loaded(root)


def test_missing_files_and_photographs_are_told(tmp_path):
    with pytest.raises(DataError, match="the file is missing"):
        loaded(tmp_path)
    write(tmp_path)
    gone = next(path for path in (tmp_path / "train").rglob("*abcdef") if path.name == cids_of("val", 6)[2])
    gone.unlink()
    with pytest.raises(DataError, match=f"1 of 18 images are missing, the first is .*{gone.name}"):
        loaded(tmp_path)


def test_downloads_that_cannot_be_are_told(tmp_path, monkeypatch):
    with pytest.raises(RetrievalError, match="not offered for download"):
        loaded(tmp_path, variant="gl18", download=True)
    asked = []
    monkeypatch.setattr(landmarks, "fetch", lambda sources, root, say: asked.append((len(sources), root)))
    loaded(write(tmp_path), download=True)
    assert asked == [(2, tmp_path)]
    with pytest.raises(DataError, match=r"test/rparis6k/gnd_rparis6k\.pkl: the file is missing"):
        loaded(tmp_path, download=True, test="rparis6k")
    assert asked[1:] == [(2, tmp_path), (3, tmp_path)]


def test_survey_tells_what_is_there(tmp_path):
    found = survey(config_of(tmp_path))
    assert not found["complete"]
    assert [file["file"].rsplit("/", 1)[1] for file in found["files"]] == ["retrieval-SfM-120k.pkl", "ims"]
    found = survey(config_of(write(tmp_path)))
    assert found["complete"]
    assert {part: facts["images"] for part, facts in found["parts"].items()} == {"train": 12, "validation": 6}
    assert found["parts"]["train"]["classes"] == 4
    assert kind_and_settings("sfm-gl18") == (SfmConfig, ["variant=gl18"])
    assert kind_and_settings("sfm-retrieval-SfM-30k") == (SfmConfig, ["variant=retrieval-SfM-30k"])
