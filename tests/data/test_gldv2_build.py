"""Google Landmarks v2 in miniature: which photographs go where, and the shards that come of it."""

import csv
import hashlib
import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ray_retrieval.cli import app
from ray_retrieval.data import shards
from ray_retrieval.data.datasets.gldv2_build import build, verify
from ray_retrieval.data.datasets.gldv2_plan import Gldv2BuildConfig, plan
from ray_retrieval.data.table import open_images
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.yaml_text import read_yaml

SIZES = {40: 1, 7: 2, 12: 5, 3: 9, 100: 10, 55: 11, 9: 1}
"""Landmark → photographs."""


def ids_of(landmark):
    return [
        hashlib.md5(f"{landmark}/{number}".encode()).hexdigest()[:16] for number in range(SIZES[landmark])
    ]


LANDMARK_OF = {name: landmark for landmark in SIZES for name in ids_of(landmark)}


def path_of(name):
    return f"train/{name[0]}/{name[1]}/{name[2]}/{name}.jpg"


def write_lists(root, landmarks=tuple(SIZES)):
    root.mkdir(parents=True, exist_ok=True)
    lines = [f"{landmark},{' '.join(ids_of(landmark))}" for landmark in landmarks]
    (root / "train_clean.csv").write_text("\n".join(["landmark_id,images", *lines, ""]))
    rows = [f'{name},"http://x.org/a,b.jpg",{landmark}' for name, landmark in LANDMARK_OF.items()]
    (root / "train.csv").write_text("\n".join(["id,url,landmark_id", *rows, ""]))


@pytest.fixture(scope="session")
def jpeg(make_image):
    return {name: make_image(16, 12, seed=row, kind="JPEG") for row, name in enumerate(LANDMARK_OF)}


def write_images(root, jpeg, names=tuple(LANDMARK_OF)):
    for name in names:
        (root / path_of(name)).parent.mkdir(parents=True, exist_ok=True)
        (root / path_of(name)).write_bytes(jpeg[name])


@pytest.fixture
def source(tmp_path, jpeg):
    write_lists(tmp_path / "gldv2")
    write_images(tmp_path / "gldv2", jpeg)
    return tmp_path / "gldv2"


def planned(source, **settings):
    return plan(str(source), Gldv2BuildConfig(**settings))


def names_in(found, part):
    return [name.decode() for name in found.ids[found.parts[part]].tolist()]


def sizes_in(found, part):
    return Counter(LANDMARK_OF[name] for name in names_in(found, part))


class TestPlan:
    def test_labels_are_the_ranks_of_the_landmarks(self, tmp_path):
        write_lists(tmp_path)
        found = planned(tmp_path)
        assert found.landmarks.tolist() == sorted(SIZES)
        assert {
            name.decode(): sorted(SIZES)[label] for name, label in zip(found.ids, found.labels, strict=True)
        } == (LANDMARK_OF)

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.0])
    @pytest.mark.parametrize("lone", ["train", "validation"])
    def test_a_share_of_each_class_is_validated_on(self, tmp_path, share, lone):
        write_lists(tmp_path)
        found = planned(tmp_path, validation=share, lone=lone)
        held = sizes_in(found, "validation")
        for landmark, size in SIZES.items():
            wanted = max(1, int(share * size)) if share else 0
            if size == 1 and lone == "train":
                wanted = 0
            assert held[landmark] == wanted
        assert sorted(names_in(found, "train") + names_in(found, "validation")) == sorted(LANDMARK_OF)

    def test_the_draw_depends_on_ids_and_seed_alone(self, tmp_path):
        write_lists(tmp_path / "a")
        write_lists(tmp_path / "b", tuple(reversed(SIZES)))
        one, other, third = planned(tmp_path / "a"), planned(tmp_path / "b"), planned(tmp_path / "a", seed=1)
        full = planned(tmp_path / "a", subset="full")
        for part in ("train", "validation"):
            assert names_in(one, part) == names_in(other, part) == names_in(full, part)
            assert names_in(one, part) != names_in(third, part)
        assert names_in(one, "train") != sorted(names_in(one, "train"))

    def test_small_classes_and_all_but_the_largest_are_left_out(self, tmp_path):
        write_lists(tmp_path)
        assert planned(tmp_path, min_images=5).landmarks.tolist() == [3, 12, 55, 100]
        assert planned(tmp_path, max_classes=3).landmarks.tolist() == [3, 55, 100]
        # Of two classes of one image the lower number stays.
        assert planned(tmp_path, max_classes=6).landmarks.tolist() == [3, 7, 9, 12, 55, 100]
        with pytest.raises(DataError, match="two classes are needed, 1 are left"):
            planned(tmp_path, min_images=11)

    def test_a_photograph_that_stands_twice_counts_once(self, tmp_path):
        write_lists(tmp_path)
        with open(tmp_path / "train_clean.csv", "a") as stream:
            stream.write(f"7,{ids_of(55)[0]}\n")
        found = planned(tmp_path)
        assert found.repeated == 1
        assert len(found.ids) == len(LANDMARK_OF)
        assert found.labels[found.ids.tolist().index(ids_of(55)[0].encode())] == sorted(SIZES).index(55)

    def test_classes_are_called_by_their_categories(self, tmp_path):
        write_lists(tmp_path)
        assert planned(tmp_path).names == [str(landmark) for landmark in sorted(SIZES)]
        wiki = "http://commons.wikimedia.org/wiki/Category:"
        lines = [
            f"3,{wiki}Eiffel_Tower",
            f"7,{wiki}Twice",
            f"9,{wiki}Twice",
            f"8,{wiki}No_such",
            f'12,"{wiki}A,_b"',
        ]
        (tmp_path / "train_label_to_category.csv").write_text("\n".join(["landmark_id,category", *lines]))
        assert planned(tmp_path).names == [
            "Eiffel Tower",
            "Twice (7)",
            "Twice (9)",
            "A, b",
            "40",
            "55",
            "100",
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("landmark_id,photographs\n3,0123456789abcdef\n", "images"),
            (
                "landmark_id,images\n3,../../etc/passwd\n",
                "an id is 16 hexadecimal digits, got '../../etc/passwd'",
            ),
            ("landmark_id,images\n3,0123456789ABCDEF\n", "got '0123456789ABCDEF'"),
            ("landmark_id,images\n3,0123456789abcdef  0123456789abcdee\n", "got ''"),
            ("landmark_id,images\nthree,0123456789abcdef\n", "three"),
            ("landmark_id,images\n,0123456789abcdef\n", "an empty place"),
            ("landmark_id,images\n3\n", "not the CSV file that is expected"),
            ("landmark_id,images\n", "lists no photograph"),
            ("", "not the CSV file that is expected"),
        ],
    )
    def test_damage_is_told_in_one_line(self, tmp_path, text, message):
        (tmp_path / "train_clean.csv").write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            planned(tmp_path)
        assert "\n" not in str(caught.value)

    def test_a_missing_list_is_told(self, tmp_path):
        with pytest.raises(DataError, match=r"train\.csv: the file is missing"):
            planned(tmp_path, subset="full")


def built(source, out, threads=2, **settings):
    return build(planned(source, shards=3, **settings), str(out), threads=threads)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestBuild:
    def test_shards_hold_the_files_as_they_are(self, source, tmp_path, jpeg):
        before = files_of(source)
        made = built(source, tmp_path / "out")
        assert files_of(source) == before
        seen = {}
        for part in ("train", "validation"):
            pieces = sorted((tmp_path / "out" / "shards").glob(f"{part}-*-of-00003.parquet"))
            assert len(pieces) == 3
            rows = [row for piece in pieces for row in pq.read_table(piece).to_pylist()]
            assert [row["id"] for row in rows] == names_in(planned(source), part)
            assert made["parts"][part]["images"] == len(rows)
            seen |= {row["id"]: row for row in rows}
        assert {name: row["image"]["bytes"] for name, row in seen.items()} == jpeg
        assert all(row["image"]["path"] == path_of(name) for name, row in seen.items())
        assert {name: sorted(SIZES)[row["label"]] for name, row in seen.items()} == LANDMARK_OF

    def test_lists_lead_to_single_images(self, source, tmp_path, jpeg):
        built(source, tmp_path / "out")
        table = open_images(str(tmp_path / "out" / "validation.parquet"))
        assert table.ids == names_in(planned(source), "validation")
        assert all(table.image_bytes(row) == jpeg[name] for row, name in enumerate(table.ids))
        assert (table.inline_lengths() == -1).all()

    def test_the_map_of_labels_is_written_as_the_port_writes_it(self, source, tmp_path):
        built(source, tmp_path / "out")
        lines = [f"{new},{old}" for new, old in enumerate(sorted(SIZES))]
        assert (tmp_path / "out" / "relabeling.csv").read_text() == "\n".join(
            ["new_label,old_label", *lines, ""]
        )

    def test_threads_do_not_show(self, source, tmp_path):
        built(source, tmp_path / "a", threads=1)
        built(source, tmp_path / "b", threads=5)
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")

    def test_what_is_missing_is_left_out_and_told(self, source, tmp_path, jpeg):
        gone, empty, damaged, cut = ids_of(55)[3], ids_of(12)[0], ids_of(9)[0], ids_of(7)[1]
        (source / path_of(gone)).unlink()
        (source / path_of(cut)).write_bytes(jpeg[cut][:-40])  # its header is sound
        (source / path_of(empty)).write_bytes(b"")
        (source / path_of(damaged)).write_bytes(b"<html>")
        made = built(source, tmp_path / "out")
        assert (made["images"], made["missing"], made["classes"]) == (len(LANDMARK_OF) - 4, 4, len(SIZES))
        header, *lines = csv.reader((tmp_path / "out" / "missing.csv").read_text().splitlines())
        assert header == ["id", "landmark_id", "reason"]
        told = {name: rest for name, *rest in lines}
        assert told[gone] == ["55", "missing"]
        assert told[empty] == ["12", "the file is empty"]
        assert told[damaged][0] == "9"
        assert told[cut][1].startswith("the image cannot be decoded")
        assert (source / path_of(damaged)).exists()
        ids = [
            name
            for part in ("train", "validation")
            for name in open_images(f"{tmp_path}/out/{part}.parquet").ids
        ]
        assert sorted(ids) == sorted(set(LANDMARK_OF) - {gone, empty, damaged, cut})

    def test_a_killed_build_goes_on(self, source, tmp_path, monkeypatch):
        whole = built(source, tmp_path / "whole")
        written, write = [], shards.write

        def killed(folder, name, groups):
            if len(written) == 4:
                raise KeyboardInterrupt
            written.append(name)
            write(folder, name, groups)

        with monkeypatch.context() as patch:
            patch.setattr(shards, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                built(source, tmp_path / "out")
            assert not (tmp_path / "out" / "gldv2.json").exists()
            assert len(written) == 4
            written.clear()
            assert built(source, tmp_path / "out") == whole
            assert written == [f"shards/validation-0000{number}-of-00003.parquet" for number in (1, 2)]
            written.clear()
            built(source, tmp_path / "out")
            assert not written
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")

    @pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"<html>")])
    def test_photographs_that_come_later_are_added(self, source, tmp_path, jpeg, spoil):
        whole = built(source, tmp_path / "whole")
        late = ids_of(100)[4]
        spoil(source / path_of(late))
        assert built(source, tmp_path / "out")["missing"] == 1
        kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "shards").iterdir()}
        write_images(source, jpeg, [late])
        assert built(source, tmp_path / "out") == whole
        new = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "shards").iterdir()}
        assert len([name for name in kept if new[name] != kept[name]]) == 1

    def test_a_shard_of_another_size_is_written_anew(self, source, tmp_path):
        whole = built(source, tmp_path / "out")
        shard = tmp_path / "out" / "shards" / "train-00001-of-00003.parquet"
        shard.write_bytes(shard.read_bytes()[:-1])
        assert built(source, tmp_path / "out") == whole
        assert verify(str(tmp_path / "out")) == 6 + 5

    def test_damage_is_found_by_checksums(self, source, tmp_path):
        built(source, tmp_path / "out")
        shard = tmp_path / "out" / "shards" / "train-00001-of-00003.parquet"
        data = bytearray(shard.read_bytes())
        data[100] ^= 1
        shard.write_bytes(data)
        with pytest.raises(ArtefactError, match=r"train-00001-of-00003\.parquet: damaged: its checksum"):
            verify(str(tmp_path / "out"))

    def test_a_folder_is_of_one_build(self, source, tmp_path):
        built(source, tmp_path / "out")
        with pytest.raises(DataError, match="holds a build with min_images = 1, asked is 2"):
            built(source, tmp_path / "out", min_images=2)
        with pytest.raises(DataError, match="the folder is not empty"):
            built(source, source)
        with pytest.raises(DataError, match="goes to a local folder"):
            built(source, "s3://bucket/gldv2")

    def test_a_part_without_rows_has_no_shards(self, source, tmp_path):
        made = built(source, tmp_path / "out", validation=0)
        assert made["parts"]["validation"] == {"images": 0, "classes": 0, "shards": []}
        assert pq.read_table(tmp_path / "out" / "validation.parquet").num_rows == 0

    def test_no_photograph_at_all_is_an_error(self, tmp_path):
        write_lists(tmp_path / "gldv2")
        with pytest.raises(DataError, match="there is no folder 'train'"):
            built(tmp_path / "gldv2", tmp_path / "out")
        (tmp_path / "gldv2" / "train").mkdir()
        with pytest.raises(DataError, match=f"none of the {len(LANDMARK_OF)} photographs is there"):
            built(tmp_path / "gldv2", tmp_path / "out")
        assert not (tmp_path / "out" / "gldv2.json").exists()


def test_the_commands_build_and_verify(source, tmp_path):
    (source / path_of(ids_of(3)[0])).unlink()
    words = ["gldv2", "build", str(source), "--out", str(tmp_path / "out"), "shards=2", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "folder": str(tmp_path / "out"),
        "images": len(LANDMARK_OF) - 1,
        "classes": len(SIZES),
        "missing": 1,
    }
    result = CliRunner().invoke(app, ["gldv2", "verify", str(tmp_path / "out")])
    assert result.stdout == "ok      9 files\n"
    said = CliRunner().invoke(app, words[:-1]).stdout
    assert f"missing     1 image: {tmp_path}/out/missing.csv\n" in said
    assert "train " in said
    assert said.splitlines()[-1] == f"next        data: {{name: gldv2, root: {tmp_path}/out}}"


def test_the_block_of_a_recipe_that_a_build_prints_names_its_folder(source, tmp_path):
    out = tmp_path / "a, b: {#1"
    said = CliRunner().invoke(app, ["gldv2", "build", str(source), "--out", str(out), "shards=1"]).stdout
    block = said.splitlines()[-1].removeprefix("next ")
    assert read_yaml(block, where="stdout") == {"data": {"name": "gldv2", "root": str(out)}}
