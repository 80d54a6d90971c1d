import dataclasses
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from serving_parts import NotedHash, Served, make_index

SETTINGS: dict[str, Any] = {
    "shard_groups": 2,
    "encoder_replicas": 2,
    "encoder_cpus": 0.25,
    "max_upload_bytes": 500_000,
    "writable": True,
    "poll_s": 0.5,
    "request_timeout_s": 90,  # a busy machine takes long to start a process anew
}


@pytest.fixture(scope="session")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """An index that is not served."""
    return make_index(tmp_path_factory.mktemp("indexed"))


@pytest.fixture
def settings() -> dict[str, Any]:
    """Of the server that `served` starts."""
    return SETTINGS


@pytest.fixture(scope="module")
def served(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An index and its model behind a running server of two groups of shards, which may change them."""
    import ray.cloudpickle
    import serving_parts

    from ray_retrieval.serve.app import run
    from ray_retrieval.serve.config import ServeConfig, ServedIndex

    # Replicas cannot import what lies in the tests' folder.
    ray.cloudpickle.register_pickle_by_value(serving_parts)  # type: ignore[no-untyped-call]
    folder = tmp_path_factory.mktemp("served")
    own = make_index(folder, encoder=NotedHash)
    config = ServeConfig(port=free_port(), **SETTINGS)
    given = {"x": ServedIndex(index=own.index, model=own.model)}
    with run(given, config, encoder=NotedHash) as url:
        yield dataclasses.replace(own, url=url)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
