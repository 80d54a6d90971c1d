import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from serving_parts import AverageHash, Served, write_model

from ray_retrieval.errors import ArtefactError, ClusterError, RecipeError
from ray_retrieval.search import Index
from ray_retrieval.serve.app import _divide, _wait_for_signal, build, from_args, run
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.storage import Folder


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray_retrieval.serve.app.connect", refuse)


def test_an_index_of_another_model_is_refused_before_anything_starts(
    indexed: Served, tmp_path: Path, nothing_starts: None
) -> None:
    other = write_model(Folder(tmp_path), note="another")
    with pytest.raises(ArtefactError) as caught, run(indexed.index, str(tmp_path), encoder=AverageHash):
        pass
    assert other in str(caught.value)
    assert Index.open(indexed.index).model in str(caught.value)


def test_a_missing_index_or_model_is_refused_before_anything_starts(
    indexed: Served, tmp_path: Path, nothing_starts: None
) -> None:
    for index, model in ((str(tmp_path), indexed.model), (indexed.index, str(tmp_path))):
        with pytest.raises(ArtefactError), run(index, model, encoder=AverageHash):
            pass


def test_a_taken_port_is_refused_before_anything_starts(indexed: Served, nothing_starts: None) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ClusterError, match=f"port {port}") as caught,
            run(indexed.index, indexed.model, ServeConfig(port=port), encoder=AverageHash),
        ):
            pass
        assert "another port" in str(caught.value.mend)


def test_more_groups_than_shards_are_refused(indexed: Served) -> None:
    with pytest.raises(RecipeError, match="shard_groups is 4, the index has 3"):
        build(indexed.index, indexed.model, ServeConfig(shard_groups=4), encoder=AverageHash)


def test_the_arguments_of_a_configuration_file_are_checked(indexed: Served) -> None:
    args = {"index": indexed.index, "model": indexed.model}
    assert from_args({**args, "shard_groups": 2}) is not None
    with pytest.raises(RecipeError, match="did you mean 'shard_groups'"):
        from_args({**args, "shard_group": 2})
    with pytest.raises(RecipeError, match="'model' is missing"):
        from_args({"index": indexed.index})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_blocking_server_ends_with_a_signal(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    _wait_for_signal()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_groups_share_the_shards_out_evenly(shards: int, groups: int) -> None:
    parts = _divide(shards, min(groups, shards))
    assert [shard for part in parts for shard in part] == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_default_server_fits_on_two_cores_and_leaves_one() -> None:
    assert ServeConfig().cpus == 1.0
    assert ServeConfig(encoder_replicas=2, shard_groups=3).cpus == 2.0
