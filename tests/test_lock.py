"""One writer of a folder at a time, whatever it does there; the index's own cases are in tests/search."""

import errno
import os

import pytest
from samples import coloured_table, write_run

from ray_retrieval import lock
from ray_retrieval import recipe as recipes
from ray_retrieval.encode import EncodeConfig, EncodeJob, encode
from ray_retrieval.errors import ArtefactError, ConflictError, RecipeError
from ray_retrieval.lock import clear, writing_alone
from ray_retrieval.run import Run
from ray_retrieval.run.checks import delete_runs
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
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "weights").write_text("")
    (tmp_path / "run" / "recipe.yaml").write_text("")
    (tmp_path / "run" / "half.tmp-0123456789ab").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "lost").symlink_to(tmp_path / "nowhere")
    with writing_alone(Folder(tmp_path / "run"), "run"):
        clear(Folder(tmp_path / "run"), "run", last="recipe.yaml")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert (tmp_path / "elsewhere" / "kept").is_file()


def test_nothing_is_cleared_where_somebody_works_within(tmp_path):
    (tmp_path / "run" / "index").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("")
    with writing_alone(Folder(tmp_path / "run" / "index"), "add"):
        with pytest.raises(ConflictError, match=BUSY.format("add")):
            delete_runs([Folder(tmp_path / "run")])
        assert (tmp_path / "run" / "recipe.yaml").is_file()
    delete_runs([Folder(tmp_path / "run")])
    assert not list((tmp_path / "run").iterdir())


def test_of_a_study_all_members_are_deleted_or_none(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name)
    with writing_alone(Folder(tmp_path / "b"), "run"), pytest.raises(ConflictError):
        delete_runs([Folder(tmp_path / "a"), Folder(tmp_path / "b")])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("")
    with pytest.raises(RecipeError, match="no run, so `fresh` does not delete it"):
        delete_runs([Folder(tmp_path / "a"), Folder(tmp_path / "c")])
    assert (tmp_path / "a" / "metrics.json").is_file()


def test_what_became_another_run_meanwhile_is_left_as_it_is(tmp_path):
    run = Run(recipes.load("quickstart", [f"output={tmp_path}"]))
    other = recipes.load("quickstart", [f"output={tmp_path}", "train.optimizer.lr=0.5"])
    (tmp_path / "recipe.yaml").write_text(recipes.dump(other))
    with pytest.raises(RecipeError, match=r"train.optimizer.lr: 0.5 → "):
        run.all()


def test_the_lock_that_another_user_left_can_be_taken(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("{}")
    opened = os.open

    def open_as_another(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_as_another)
    with writing_alone(Folder(tmp_path), "run") as held:
        assert held
        with pytest.raises(ConflictError):
            lock._locked(Folder(tmp_path))
    with pytest.raises(ArtefactError, match="Permission denied"), writing_alone(Folder(tmp_path), "run"):
        pass  # there is none that could be opened, and none may be made
