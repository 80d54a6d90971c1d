"""What Tune starts, and what trials tell of errors and epochs."""

import json
from pathlib import Path

import pytest
from ray.tune.execution.class_cache import _ActorClassCache
from tuning_parts import recipes

from ray_retrieval.errors import (
    ArtefactError,
    DataError,
    ModelError,
    RecipeError,
    StoreError,
    would_fail_alike,
)
from ray_retrieval.tune.following import settings
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
