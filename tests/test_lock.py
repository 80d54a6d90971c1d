"""One writer of a folder at a time, whatever it does there; the index's own cases are in tests/search."""

import errno
import os
from contextlib import nullcontext

import pytest
from samples import coloured_table, write_run

from ray_retrieval import lock, run
from ray_retrieval import recipe as recipes
from ray_retrieval.encode import EncodeConfig, EncodeJob, encode
from ray_retrieval.errors import ArtefactError, ConflictError, RecipeError
from ray_retrieval.lock import clear, writing_alone
from ray_retrieval.run import Run
from ray_retrieval.run_folder import begin
from ray_retrieval.storage import Folder
from ray_retrieval.study import Study
from ray_retrieval.tune import Search


class BegunError(Exception):
    """In place of a training."""


@pytest.fixture
def begins(monkeypatch):
    """What is raised when a run begins to train, without Ray."""

    def train(*_):
        raise BegunError

    monkeypatch.setattr(run, "connect", nullcontext)
    monkeypatch.setattr(run, "worker_resources", lambda _: {})
    monkeypatch.setattr(Run, "train", train)
    return BegunError


BUSY = r"another writer is at work: '{}', process \d+ on .+wait for it to end"


@pytest.mark.parametrize("verb", ["all", "only_train", "only_measure"])
def test_a_run_that_is_at_work_is_left_alone(tmp_path, monkeypatch, verb):
    run = Run(recipes.load("quickstart", [f"output={tmp_path}"]))
    monkeypatch.setattr(run, "require_model", lambda: None)
    with writing_alone(Folder(tmp_path), "run"), pytest.raises(ConflictError, match=BUSY.format("run")):
        getattr(run, verb)()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("within", [".", "index"])
def test_nor_is_it_deleted(tmp_path, begins, within):
    (write_run(tmp_path / "run") / "index").mkdir()
    run = Run(recipes.load("quickstart", [f"output={tmp_path / 'run'}"]), fresh=True)
    with writing_alone(Folder(tmp_path / "run" / within), "add"), pytest.raises(ConflictError):
        run.only_train()
    assert (tmp_path / "run" / "metrics.json").is_file()
    with pytest.raises(begins):
        run.only_train()
    assert not (tmp_path / "run" / "metrics.json").exists()


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
        written = {"model", "recipe.yaml", "checkpoints", "lost"}
        clear(Folder(tmp_path / "run"), "run", last="recipe.yaml", only=written)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert (tmp_path / "elsewhere" / "kept").is_file()


def test_what_says_what_a_folder_is_goes_last(tmp_path, monkeypatch):
    removed = []
    for name in "abc":
        (tmp_path / name).write_text("")
    monkeypatch.setattr(Folder, "remove", lambda _, name="": removed.append(name))
    clear(Folder(tmp_path), "run", last="a", only={"a", "b", "c"})
    assert sorted(removed) == ["a", "b", "c"]
    assert removed[-1] == "a"


def test_of_a_study_all_members_are_deleted_or_none(tmp_path, begins):
    for name in ("8bits", "12bits"):
        write_run(tmp_path / name)
    settings = ["method.bits=[8,12]", f"output={tmp_path}"]
    study = Study(recipes.load_study("quickstart", settings), fresh=True)
    with writing_alone(Folder(tmp_path / "12bits"), "run"), pytest.raises(ConflictError):
        study.train()
    assert (tmp_path / "8bits" / "metrics.json").is_file()
    with pytest.raises(begins):
        study.train()
    assert not list(tmp_path.glob("*/metrics.json"))
    (tmp_path / "12bits" / "run.json").unlink()
    with pytest.raises(RecipeError, match=r"no run .*, so `fresh` does not delete it"):
        Study(recipes.load_study("quickstart", settings), fresh=True)


def test_what_became_another_run_meanwhile_is_left_as_it_is(tmp_path):
    run = Run(recipes.load("quickstart", [f"output={tmp_path}"]))
    other = recipes.load("quickstart", [f"output={tmp_path}", "train.optimizer.lr=0.5"])
    begin(Folder(tmp_path), other)
    with pytest.raises(RecipeError, match=r"train.optimizer.lr: 0.5 → "):
        run.all()


def test_a_lock_that_was_given_up_while_it_was_taken_is_taken_anew(tmp_path, monkeypatch):
    opened, files = lock._opened, []

    def opened_late(path):
        files.append(opened(path))
        if len(files) == 1:  # its holder is done, and the next one has begun
            path.unlink()
            path.touch()
        return files[-1]

    monkeypatch.setattr(lock, "_opened", opened_late)
    second = writing_alone(Folder(tmp_path), "add")
    with writing_alone(Folder(tmp_path), "run"), pytest.raises(ConflictError), second:
        pass
    assert len(files) == 3


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
