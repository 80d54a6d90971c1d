"""Writers, readers and prunings of an index at the same moment, with a lock and without."""

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from search_parts import KilledError, draw_codes, draw_images, flip, write

from ray_retrieval import lock
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search import Index, add, adding, build, changes, compact, prune, remove, rollback
from ray_retrieval.search import manifest as manifests
from ray_retrieval.search.manifest import read_current
from ray_retrieval.search.publishing import publish
from ray_retrieval.search.shard import Shard
from ray_retrieval.storage import Folder

ROWS, BITS, DAY = 20, 16, 24 * 3600


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index of 20 rows, and embeddings of 5 more."""
    folder = tmp_path_factory.mktemp("races")
    build(write(folder / "first", draw_codes(ROWS, BITS), draw_images(ROWS)), folder / "index")
    named = draw_images(5).set_column(0, "id", pa.array([f"new-{row}" for row in range(5)]))
    write(folder / "more", draw_codes(5, BITS, seed=5), named)
    return folder


@pytest.fixture
def index(made, tmp_path):
    return shutil.copytree(made / "index", tmp_path / "index")


@pytest.fixture
def without_locks(monkeypatch):
    """As on a shared file system that has none."""

    def flock(*_):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(lock, "fcntl", SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=flock))


def at_first(monkeypatch, owner, name, act, *, when=lambda *_: True):
    """Something else happens just before the first of some calls."""
    real = getattr(owner, name)

    def slow(*arguments, **options):
        if when(*arguments):
            monkeypatch.setattr(owner, name, real)
            act()
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, slow)


def writes(name):
    return lambda _, written, *__: written.startswith(name)


def sound(index):
    opened = Index.open(index)
    assert opened.verify()
    assert opened.image_bytes(int(opened.living()[-1]))
    return opened


# Two writers


@pytest.mark.usefixtures("without_locks")
def test_a_writer_that_is_overtaken_is_told_and_writes_over_nothing(index, monkeypatch):
    at_first(
        monkeypatch, Folder, "write_bytes", lambda: remove(index, ["image-0001"]), when=writes("manifest-")
    )
    with pytest.raises(ArtefactError, match=r"version 2 was published meanwhile \(run it again\)"):
        remove(index, ["image-0002"])
    opened = sound(index)
    assert (opened.version, opened.removed().tolist()) == (2, [1])
    remove(index, ["image-0002"])
    assert sound(index).removed().tolist() == [1, 2]
    assert prune(index, 9).spared == 2  # manifest and tombstones of the one who was overtaken


@pytest.mark.usefixtures("without_locks")
def test_of_two_that_publish_in_the_same_moment_the_last_one_stays(index, monkeypatch):
    at_first(
        monkeypatch, Folder, "write_bytes", lambda: remove(index, ["image-0001"]), when=writes("CURRENT")
    )
    remove(index, ["image-0002"])
    assert sound(index).removed().tolist() == [2]


@pytest.mark.usefixtures("without_locks")
def test_the_first_of_two_that_publish_in_the_same_moment_is_told(index, monkeypatch):
    before = (index / "CURRENT").read_bytes()
    remove(index, ["image-0001"])
    other = (index / "CURRENT").read_bytes()
    (index / "CURRENT").write_bytes(before)
    real = Folder.write_text

    def then_the_other(folder, name, text):
        real(folder, name, text)
        (index / name).write_bytes(other)

    monkeypatch.setattr(Folder, "write_text", then_the_other)
    with pytest.raises(ArtefactError, match="version 2 was published meanwhile"):
        remove(index, ["image-0002"])
    assert sound(index).removed().tolist() == [1]


def test_another_index_of_the_same_number_is_not_the_one_that_a_writer_began_with(index, tmp_path):
    folder, mine = Folder(index), read_current(Folder(index))
    shutil.rmtree(index)
    build(write(tmp_path / "other", draw_codes(9, BITS, seed=8), draw_images(9)), index)
    for parent in (mine, None):
        with pytest.raises(ArtefactError, match="version 1 was published meanwhile"):
            publish(folder, mine, parent=parent)
    assert sound(index).rows == 9
    shutil.rmtree(index)
    with pytest.raises(ArtefactError, match="it was deleted meanwhile"):
        publish(folder, mine, parent=mine)


# A writer and somebody who prunes


@pytest.mark.usefixtures("without_locks")
def test_pruning_leaves_the_files_of_a_live_writer(made, index, monkeypatch):
    pruned = []
    at_first(monkeypatch, adding, "published", lambda: pruned.append(prune(index, 2)))
    assert add(index, made / "more").manifest.number == 2
    assert pruned[0].spared == 4  # codes, rows, images and description of the shard
    assert sound(index).rows == 25


def test_with_a_lock_nothing_is_spared(made, index, monkeypatch):
    def die():
        raise KilledError

    at_first(monkeypatch, adding, "published", die)
    with pytest.raises(KilledError):
        add(index, made / "more")
    assert (prune(index, 2).files, prune(index, 2).spared) == (4, 0)


@pytest.mark.usefixtures("without_locks")
def test_what_a_resumed_writer_relies_on_may_be_pruned_but_is_not_published_then(made, index, monkeypatch):
    def die():
        raise KilledError

    at_first(monkeypatch, adding, "published", die)
    with pytest.raises(KilledError):
        add(index, made / "more")
    for path in index.rglob("*.*"):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    at_first(monkeypatch, Folder, "write_bytes", lambda: prune(index, 2), when=writes("manifest-"))
    with pytest.raises(ArtefactError, match=r"may have been pruned meanwhile \(run it again\)"):
        add(index, made / "more")
    assert sound(index).rows == 20
    assert add(index, made / "more").changed
    assert sound(index).rows == 25


@pytest.mark.usefixtures("without_locks")
def test_a_version_that_is_pruned_while_it_is_brought_back_is_not_published(made, index, monkeypatch):
    add(index, made / "more")
    compact(index, keep=9, shards=2)
    at_first(monkeypatch, changes, "publish", lambda: prune(index, 1))
    with pytest.raises(ArtefactError, match="may have been pruned meanwhile"):
        rollback(index, 1)
    assert sound(index).version == 3
    with pytest.raises(ArtefactError, match="no version 1; there are: 3"):
        rollback(index, 1)


@pytest.mark.usefixtures("without_locks")
def test_what_is_pruned_at_the_last_moment_is_found_out(made, index, tmp_path, monkeypatch):
    real = Folder.write_text

    def then_pruned(folder, name, text):
        real(folder, name, text)
        monkeypatch.setattr(Folder, "write_text", real)
        (Path(folder.path) / read_current(folder).shards[-1].folder / "rows.arrow").unlink()

    monkeypatch.setattr(Folder, "write_text", then_pruned)
    with pytest.raises(ArtefactError, match=r"rows\.arrow: missing or damaged"):
        add(index, made / "more")
    assert sound(index).version == 1
    monkeypatch.setattr(Folder, "write_text", then_pruned)
    with pytest.raises(ArtefactError, match=r"rows\.arrow: missing or damaged"):
        build(made / "more", tmp_path / "first")
    assert not (tmp_path / "first" / "CURRENT").exists()
    build(made / "more", tmp_path / "first")
    assert sound(tmp_path / "first").version == 1


@pytest.mark.usefixtures("without_locks")
def test_pruning_stops_when_a_version_is_published(index, monkeypatch):
    remove(index, ["image-0001"])
    remove(index, ["image-0002"])
    at_first(monkeypatch, Folder, "remove", lambda: rollback(index, 2))
    with pytest.raises(ArtefactError, match=r"another version was published meanwhile \(run it again\)"):
        prune(index, 1)
    assert sound(index).removed().tolist() == [1]
    assert prune(index, 1).kept == [4]
    assert sound(index).removed().tolist() == [1]


# Readers


def test_a_reader_keeps_all_of_a_version_that_is_pruned(made, index):
    reader, fresh, queries = Index.open(index), Index.open(made / "index"), draw_codes(3, BITS, seed=2)
    remove(index, ["image-0003"])
    compact(index, keep=1)
    assert len(list(index.glob("shards/*"))) == 1
    np.testing.assert_array_equal(reader.search(queries, 9).rows, fresh.search(queries, 9).rows)
    np.testing.assert_array_equal(reader.descriptors().data, fresh.descriptors().data)
    assert reader.records(np.arange(ROWS)) == fresh.records(np.arange(ROWS))
    assert reader.row_of("image-0005") == 5
    assert [reader.image_bytes(row) for row in (3, 19)] == [b"bytes of 3", b"bytes of 19"]


@pytest.mark.parametrize("place", ["pointer", "manifest"])
def test_a_version_pruned_while_it_is_opened_is_opened_anew(index, monkeypatch, place):
    """Once its pointer is read, or once its manifest is."""

    def change():
        remove(index, ["image-0003"])
        compact(index, keep=1)

    if place == "pointer":
        at_first(monkeypatch, manifests, "_read", change)
    else:
        at_first(monkeypatch, Shard, "check_files", change)
    assert Index.open(index).version == 3


# Damage


@pytest.mark.parametrize("name", ["codes.bin", "rows.arrow", "images.arrow", "deletes"])
def test_damage_is_not_written_anew(index, name):
    remove(index, ["image-0001"])
    opened = Index.open(index)
    folder = opened.manifest.shards[0].folder
    path = index / (opened.manifest.deletes.file if name == "deletes" else f"{folder}/{name}")
    flip(path)
    before = sorted(index.rglob("*"))
    with pytest.raises(ArtefactError, match=path.name):
        compact(index, keep=1)
    assert sorted(index.rglob("*")) == before


def test_a_damaged_version_is_in_the_way_of_nothing_but_itself(index):
    for row in (1, 2, 3):
        remove(index, [f"image-000{row}"])
    flip(next(index.glob("manifest-000002-*.json")))
    with pytest.raises(ArtefactError, match=r"manifest-000002-\w+\.json: damaged.*prune .*--keep 2"):
        rollback(index, 1)
    for use in (lambda: compact(index, keep=4), lambda: prune(index, 3), Index.open(index).verify):
        with pytest.raises(ArtefactError, match=r"manifest-000002-\w+\.json: damaged"):
            use()
    assert Index.open(index).version == 4
    assert rollback(index).manifest.number == 5
    assert rollback(index, 4).manifest.number == 6
    assert compact(index, keep=2).pruned.versions == [5, 4, 3, 2, 1]
    assert sound(index).rows == 17
