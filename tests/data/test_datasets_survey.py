"""What `ray-retrieval datasets` says."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_retrieval.cli import app
from ray_retrieval.data.datasets import CONFIGS
from ray_retrieval.data.datasets.lists import ListsConfig
from ray_retrieval.data.datasets.survey import about, every_config, kind_and_settings, survey
from ray_retrieval.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def asked(*words):
    result = CliRunner().invoke(app, ["datasets", *words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_benchmark_is_known():
    assert {config.name for config in every_config()} | {"images", "lists"} == set(CONFIGS)
    for config in every_config():
        known = about(config)
        assert known.images
        assert known.name


def test_all_are_listed_without_any_file():
    found = asked()
    names = [entry["name"] for entry in found]
    assert "COCO 2014 (clean)" in names
    assert len(names) == len(set(names))
    by_name = {entry["name"]: entry for entry in found}
    assert by_name["digits"]["complete"]
    assert not by_name["ImageNet-100"]["complete"]
    assert by_name["ImageNet-100"]["counts"] == {"train": 13_000, "queries": 5_000, "database": 128_503}


def test_lists_are_described_without_their_images(tmp_path):
    (tmp_path / "train.txt").write_text("a.jpg 1 0\nb.jpg 0 0\nb.jpg 0 1\n")
    (tmp_path / "test.txt").write_text("c.jpg 1 1\nb.jpg 0 1\n")
    found = survey(ListsConfig(root=str(tmp_path)))
    assert not found["complete"]
    assert [entry["found"] for entry in found["files"]] == [True, True, False]
    train = found["parts"]["train"]
    assert (train["images"], train["duplicates"], train["without_label"]) == (3, 1, 1)
    assert train["labels_an_image"] == pytest.approx(2 / 3)
    assert train["positive_pair_rate"] == pytest.approx(2 / 9)
    assert train["positive_weight"] == pytest.approx(4.5)
    assert found["overlaps"] == [{"parts": ["train", "queries"], "images": 1}]


def test_lists_without_labels_are_described_too(tmp_path):
    (tmp_path / "train.txt").write_text("a.jpg\nb.jpg\n")
    facts = survey(ListsConfig(root=str(tmp_path)))["parts"]["train"]
    assert (facts["images"], facts["without_label"], facts["positive_weight"]) == (2, 2, None)


def test_images_are_looked_for_by_a_sample(tmp_path):
    for name in ("train", "test", "database"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{n}.jpg {n % 2}\n" for n in range(5)))
    found = survey(ListsConfig(root=str(tmp_path)))
    assert found["sampled"] == {"images": 3, "missing": ["0.jpg", "2.jpg", "4.jpg"]}
    assert not found["complete"]
    for n in (0, 2, 4):
        (tmp_path / f"{n}.jpg").touch()
    assert survey(ListsConfig(root=str(tmp_path)))["complete"]


def test_a_variant_can_stand_in_the_name():
    assert kind_and_settings("coco-clean") == (CONFIGS["coco"], ["protocol=clean"])
    assert asked("nuswide-21")["name"] == "NUS-WIDE (21)"
    with pytest.raises(DataError, match=r"no benchmark is called 'digit' \(did you mean 'digits'\?\)"):
        kind_and_settings("digit")
    with pytest.raises(DataError, match=r"no benchmark is called 'mnist' \(known are: "):
        kind_and_settings("mnist")


def test_the_table_and_the_page_of_one_are_printed(tmp_path):
    everything = CliRunner().invoke(app, ["datasets"])
    assert "VOC 2012" in everything.stdout
    one = CliRunner().invoke(app, ["datasets", "voc2012", f"root={tmp_path}"])
    assert f"missing    {tmp_path}/JPEGImages" in one.stdout
    assert "host.robots.ox.ac.uk" in one.stdout


@pytest.mark.skipif(not (SHARED / "coco_lists").is_dir(), reason="COCO's lists are not here")
def test_the_lists_of_coco_in_use():
    found = asked("coco", f"lists={SHARED / 'coco_lists'}")
    assert {part: facts["images"] for part, facts in found["parts"].items()} == {
        "train": 10_000,
        "queries": 5_000,
    }
    assert round(found["parts"]["train"]["positive_pair_rate"], 3) == 0.350
    assert found["overlaps"] == [{"parts": ["train", "queries"], "images": 0}]
