"""One writer of a folder at a time, whatever it does there; the index's own cases are in tests/search."""

import pytest
from samples import coloured_table, write_run

from ray_retrieval import recipe as recipes
from ray_retrieval.encode import EncodeConfig, EncodeJob, encode
from ray_retrieval.errors import ConflictError
from ray_retrieval.lock import writing_alone
from ray_retrieval.run import Run
from ray_retrieval.storage import Folder
from ray_retrieval.tune import Search

BUSY = r"another writer is at work: '{}', process \d+ on .+wait for it to end"


@pytest.mark.parametrize("verb", ["all", "only_train", "only_measure"])
def test_a_run_that_is_at_work_is_left_alone(tmp_path, monkeypatch, verb):
    run = Run(recipes.load("quickstart", [f"output={tmp_path}"]))
    monkeypatch.setattr(run, "require_model", lambda: None)
    with writing_alone(Folder(tmp_path), "run"), pytest.raises(ConflictError, match=BUSY.format("run")):
        getattr(run, verb)()
    assert not list(tmp_path.iterdir())


def test_nor_is_it_deleted(tmp_path):
    write_run(tmp_path / "run")
    settings = [f"output={tmp_path / 'run'}"]
    with writing_alone(Folder(tmp_path / "run"), "run"), pytest.raises(ConflictError):
        Run(recipes.load("quickstart", settings), fresh=True)
    assert (tmp_path / "run" / "metrics.json").is_file()
    Run(recipes.load("quickstart", settings), fresh=True)
    assert not list((tmp_path / "run").iterdir())


def test_a_search_for_hyperparameters_too(tmp_path):
    search = Search(recipes.template("tune_digits", [f"output={tmp_path}"]))
    with writing_alone(Folder(tmp_path), "tune"), pytest.raises(ConflictError, match=BUSY.format("tune")):
        search.all()


def test_and_what_is_encoded(tmp_path):
    job = EncodeJob(Folder(tmp_path / "model"), coloured_table(3), Folder(tmp_path / "out"))
    with writing_alone(job.out, "encode"), pytest.raises(ConflictError, match=BUSY.format("encode")):
        encode([job], EncodeConfig())


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with writing_alone(Folder(tmp_path / "new"), "run"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with writing_alone(Folder(tmp_path / "empty"), "run"):
        pass
    assert (tmp_path / "empty").is_dir()
    with writing_alone(Folder(tmp_path / "kept"), "run"):
        (tmp_path / "kept" / "recipe.yaml").write_text("")
        assert Folder(tmp_path / "kept").names() == ["recipe.yaml"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["recipe.yaml"]


def test_a_folder_is_cleared_of_all_but_its_lock(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("")
    (tmp_path / "half.tmp-0123456789ab").write_text("")
    with writing_alone(Folder(tmp_path), "run"):
        Folder(tmp_path).clear()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
