"""What Tune starts, what trials tell of errors and epochs, and what is deleted for a new search."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.tune.execution.class_cache import _ActorClassCache
from samples import write_images
from tuning_parts import SPACE, recipes

from ray_retrieval import tune
from ray_retrieval.errors import (
    ArtefactError,
    DataError,
    MetricError,
    ModelError,
    RecipeError,
    RetrievalError,
    StoreError,
    would_fail_alike,
)
from ray_retrieval.layers.backbones import SmallNet
from ray_retrieval.recipe import template
from ray_retrieval.run import images
from ray_retrieval.storage import Folder
from ray_retrieval.tune import Search, trial
from ray_retrieval.tune.following import settings
from ray_retrieval.tuning.ledger import Trial
from ray_retrieval.tuning.reports import Untold


def environment_of_trials():
    class Thing:
        pass

    return _ActorClassCache().get(Thing)._default_options["runtime_env"]["env_vars"]


def test_keys_are_not_handed_to_trials_which_would_write_them_into_logs(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    assert "hush" in environment_of_trials().values(), "Tune's own way, which the settings are for"
    with settings():
        given = environment_of_trials()
    assert "hush" not in given.values()
    assert given["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.3"
    assert "hush" in environment_of_trials().values(), "and it is as it was"


@pytest.mark.parametrize(
    ("error", "alike"),
    [
        (RecipeError("the loss is not finite"), True),
        (DataError("an image is gone"), True),
        (MetricError("a vector is not finite"), True),
        (StoreError("the store does not answer"), False),
        (ArtefactError("the store refuses"), False),
        (ModelError("weights are missing"), False),
        (MemoryError(), False),
    ],
)
def test_what_may_have_been_an_accident_is_tried_again(error, alike):
    assert would_fail_alike(error) == alike


def test_every_epoch_is_told_once_however_far_the_history_has_come(tmp_path):
    made = recipes(tmp_path)({})
    history = Path(made.output) / "history.jsonl"
    history.parent.mkdir()

    def written(epochs):
        records = [
            {"epoch": epoch, "step": epoch, "validation": {"map": 0.1 * epoch}}
            for epoch in range(1, epochs + 1)
        ]
        history.write_text("".join(json.dumps(record) + "\n" for record in records))

    untold, seen = Untold(made), []
    for epoch in range(1, 6):
        written(epoch + 1)  # the next one is there when the controller hears of this one
        seen += [report.epoch for report in untold.take(epoch)]
    assert seen == [1, 2, 3, 4, 5]
    written(9)
    assert [report.epoch for report in untold.take()] == [6, 7, 8, 9]
    assert untold.take() == []


def test_a_trial_of_several_workers_is_looked_after_on_its_own_node(monkeypatch):
    node, chosen = 28 * "4f", {}

    class Beside:
        def options(self, **options):
            chosen.update(options)
            raise KeyboardInterrupt

    context = SimpleNamespace(gcs_address="head:6379", get_node_id=lambda: node)
    fake = SimpleNamespace(get_runtime_context=lambda: context, remote=lambda **_: lambda _: Beside())
    monkeypatch.setattr(trial, "ray", fake)
    with pytest.raises(KeyboardInterrupt):
        trial._train_with_workers(None, None)
    where = chosen["scheduling_strategy"]
    assert (where.node_id, where.soft) == (node, False)


class TestFresh:
    """What an earlier search left is deleted once it is clear that the new one can begin."""

    @pytest.fixture(autouse=True)
    def without_ray(self, monkeypatch):
        monkeypatch.setattr(tune, "connect", nullcontext)
        monkeypatch.setattr(tune.nodes, "for_work", lambda: {"here": {"CPU": 2.0}})
        monkeypatch.setattr(tune.nodes, "require_shared", lambda _: None)

    @pytest.fixture
    def out(self, tmp_path, monkeypatch):
        """A search with a trial and a model, and with a file of the user's."""
        folder = Folder(tmp_path / "out")
        self.search(folder, monkeypatch, tmp_path)
        folder.write_text("trials/0000/model/model.json", "{}")
        folder.write_text("model/model.json", "{}")
        folder.write_text("letter.txt", "dear")
        return folder

    def search(self, folder, monkeypatch, tmp_path, *settings, fresh=False):
        """Search up to the first trial; returns the number of images that are trained on."""
        if not (tmp_path / "photos").exists():
            write_images(tmp_path / "photos", 60)
        trained = []

        def train(_, __, benchmark):
            trained.append(len(benchmark.train))
            raise KeyboardInterrupt

        monkeypatch.setattr(Search, "_train", train)
        given = [f"output={folder}", f"tune={{space: {json.dumps(SPACE)}}}", "method.image={size: 8}"]
        data = f"data={{name: images, database: {tmp_path}/photos}}"
        with pytest.raises(KeyboardInterrupt):
            Search(template("quickstart", [data, *given, *settings]), fresh=fresh).all()
        return trained[0]

    @pytest.mark.parametrize(
        ("setting", "refused"),
        [
            ("train.start=${output}/trials/0000/model", "train.start: `fresh` would delete .*/0000/model"),
            ("data={name: images, database: /nowhere}", "nowhere: nothing is there"),
            ("data.validation_queries_per_class=0", "no validation queries, by which trials are compared"),
            ("method.backbone={name: resnet18, weights: nowhere.pth}", "nowhere.pth"),
        ],
    )
    def test_nothing_is_deleted_for_a_search_that_cannot_begin(
        self, out, tmp_path, monkeypatch, setting, refused
    ):
        before = {name: out.read_bytes(name) for name in out.files()}
        with pytest.raises(RetrievalError, match=refused):
            self.search(out, monkeypatch, tmp_path, setting, fresh=True)
        assert {name: out.read_bytes(name) for name in out.files()} == before

    def test_a_search_whose_file_of_weights_was_replaced_does_not_go_on(self, tmp_path, monkeypatch):
        folder, file = Folder(tmp_path / "out"), tmp_path / "small.pth"
        given = (folder, monkeypatch, tmp_path, f"method.backbone={{name: small, weights: {file}}}")
        weights = SmallNet().state_dict()
        torch.save(weights, file)
        assert self.search(*given) == self.search(*given)
        parameters = {"train.optimizer.lr": 0.1, "method.bits": 8}
        folder.write_text("trials.jsonl", json.dumps(asdict(Trial(0, parameters))) + "\n")
        assert self.search(*given)
        torch.save({name: 2 * value for name, value in weights.items()}, file)
        with pytest.raises(
            RecipeError, match="weights to start from are not those that the search was begun"
        ):
            self.search(*given)

    def test_what_no_search_writes_stays_and_images_are_looked_at_once(self, out, tmp_path, monkeypatch):
        (tmp_path / "photos" / "red" / "000.png").write_bytes(b"no image")
        looked = []
        check = images.check_images

        def noted(table, **settings):
            if len(table) > 1:  # the broken one is looked at again, as it may have been mended
                looked.append(table.name)
            return check(table, **settings)

        monkeypatch.setattr(images, "check_images", noted)
        assert self.search(out, monkeypatch, tmp_path, "seed=3", fresh=True)
        assert len(looked) == len(set(looked)) > 0
        assert out.names() == ["images", "letter.txt", "study.json"]
