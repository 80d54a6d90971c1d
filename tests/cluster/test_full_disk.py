"""A disk fills up: the error says so, what was there stays sound, and with space the command goes on."""

import errno
import os
import pickle
import shutil
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from loop_parts import LocalReporter, config, trainer
from ray.train import ControllerError
from samples import write_images
from search_parts import draw_codes, draw_images, draw_vectors, files_in, write
from test_cli import save_model

from ray_retrieval import model
from ray_retrieval.cluster import reraise
from ray_retrieval.errors import ArtefactError
from ray_retrieval.loop.checkpoints import Progress
from ray_retrieval.search import Index, build
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.storage import Folder
from ray_retrieval.train import checkpoint_folder, read_history

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
PAGE = os.sysconf("SC_PAGE_SIZE")
FULL = "No space left on device"


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self, *, leaving=0):
        """Take all the space but so many bytes."""
        with (self.folder / "filling").open("ab") as file:
            size = os.fstat(file.fileno()).st_size
            more = self.free - leaving
            if more > 0:
                os.posix_fallocate(file.fileno(), size, more)

    def make_space(self):
        """Give back what `fill` has taken."""
        (self.folder / "filling").unlink(missing_ok=True)

    @property
    def free(self):
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def disk(mounted):
    yield mounted
    mounted.make_space()


@pytest.mark.long
def test_a_full_disk_during_a_checkpoint(local_ray, disk, cli_call):
    run = disk.folder / "run"
    settings = [
        "method.image={size: 8}",
        "train.epochs=4",
        "train.precision=float32",
        "train.threads=1",
        "train.checkpoint.min_seconds=0",
        "train.max_failures=0",
        f"output={run}",
    ]

    def fill_after_an_epoch():
        while not (run / "checkpoints" / "checkpoints.json").exists():  # the first checkpoint counts
            time.sleep(0.005)
        disk.fill(leaving=8 * PAGE)  # room for the history, not for a checkpoint

    filling = threading.Thread(target=fill_after_an_epoch, daemon=True)
    filling.start()
    code, _, err = cli_call("train", QUICKSTART, *settings)
    assert code == 2, err
    assert FULL in err
    assert f"{run}/checkpoints" in err
    assert len(err.splitlines()[-1]) < 400
    with checkpoint_folder(Folder(run)) as folder:
        done = Progress.read(folder).epoch
        torch.load(folder / "optimizer.pt", weights_only=True)
    assert 1 <= done < 4
    before = read_history(Folder(run))[:done]

    # As if Ray's list of the checkpoints had been what there was no space for.
    (run / "checkpoints" / "checkpoint_manager_snapshot.json").write_bytes(b"")
    disk.make_space()
    code, _, err = cli_call("train", QUICKSTART, *settings)
    assert code == 0, err
    assert read_history(Folder(run))[:done] == before  # the very times: they were not trained again
    assert len(read_history(Folder(run))) == 4
    model.load(str(run / "model"))


def test_a_full_disk_while_a_checkpoint_is_made_says_where(disk):
    reporter = LocalReporter(disk.folder / "checkpoints")
    disk.fill(leaving=8 * PAGE)
    with pytest.raises(ArtefactError, match=FULL) as raised:
        trainer(config()).fit(reporter)
    assert str(disk.folder) in str(raised.value)


def test_a_store_that_refuses_ray_itself_is_named():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sent = pickle.loads(pickle.dumps(ControllerError(ControllerError(full))))
    with pytest.raises(ArtefactError, match=f"run/checkpoints: .*{FULL}"):
        reraise(sent, "training", store="run/checkpoints")


@pytest.mark.long
def test_a_full_disk_while_images_are_encoded(local_ray, disk, cli_call, tmp_path):
    save_model(tmp_path / "model")
    images, out = write_images(tmp_path / "images", 60), disk.folder / "embeddings"
    command = [
        "encode",
        tmp_path / "model",
        images,
        "--out",
        out,
        "--set",
        "rows_per_part=6",
        "--set",
        "workers=1",
    ]
    disk.fill(leaving=10 * PAGE)
    code, _, err = cli_call(*command)
    assert code == 2, err
    assert FULL in err
    assert f"{out}/part-" in err
    assert not (out / "embeddings.json").exists()
    whole = [path for path in out.glob("part-*.parquet") if path.with_suffix(".json").exists()]
    kept = {path: path.stat().st_mtime_ns for path in whole}
    assert 0 < len(kept) < 10

    disk.make_space()
    code, _, err = cli_call(*command)
    assert code == 0, err
    made = Embeddings.open(str(out), check="content")
    assert sorted(made.ids) == made.ids
    assert len(set(made.ids)) == made.rows == 60
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(out.glob("*.tmp-*"))


def test_embeddings_that_are_made_anew_stay_while_nothing_takes_their_place(disk):
    folder = write(disk.folder / "again", draw_codes(100, 12), draw_images(100))
    disk.fill()
    with pytest.raises(ArtefactError, match=rf"{folder}/part-00000.parquet: .*{FULL}"):
        write(folder, draw_codes(100, 12, seed=1), draw_images(100), model="model-b")
    assert Embeddings.open(folder, check="content").model == "model-a"
    disk.make_space()
    write(folder, draw_codes(100, 12, seed=1), draw_images(100), model="model-b")
    assert Embeddings.open(folder, check="content").model == "model-b"


def refused(work):
    """The error of an artefact that some work ends with, or None."""
    try:
        work()
    except ArtefactError as error:
        return error


SEARCHES = {
    "exact": (draw_codes, None, {"codes.bin", "shard.json"}),
    "approximate": (draw_vectors, ApproximateConfig(search="IVF4,Flat"), {"vectors.bin", "0.faiss"}),
}
"""With files of each that a page is missing for at some time."""


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_full_disk_while_an_index_is_written(disk, tmp_path, kind):
    """At every page that is one too few, until it fits."""
    draw, approximate, names = SEARCHES[kind]
    first = write(tmp_path / "first", draw(300, 16), draw_images(300), part_rows=100)
    second = write(tmp_path / "second", draw(330, 16, seed=1), draw_images(330), part_rows=100)
    build(second, tmp_path / "whole", shards=2, approximate=approximate)
    build(first, tmp_path / "before", shards=2, approximate=approximate)
    queries = draw(5, 16, seed=2)
    expected = Index.open(tmp_path / "before").search(queries, 5)
    failed = set()
    for pages in range(100):
        disk.make_space()
        index = (
            disk.folder / f"{kind}-{pages}"
        )  # what the last try has left behind would be collected, and be space
        shutil.copytree(tmp_path / "before", index)
        disk.fill(leaving=pages * PAGE)
        error = refused(partial(build, second, index, shards=2, approximate=approximate))
        if error is None:
            break
        assert FULL in str(error)
        failed.add(Path(error.where).name)
        found = Index.open(index)
        found.verify()
        assert (found.version, found.rows) == (1, 300)
        assert np.array_equal(found.search(queries, 5).rows, expected.rows)
    assert {"rows.arrow", "images.arrow", *names} <= failed
    assert (Index.open(index).version, Index.open(index).rows) == (2, 330)
    shards = {name: data for name, data in files_in(tmp_path / "whole").items() if "manifest" not in name}
    made = files_in(index)
    assert all(made[name] == data for name, data in shards.items() if name != "CURRENT")
