"""One local Ray for all tests of a process that need it, and the order of all tests."""

import os
from functools import partialmethod

import pytest

# Before anything imports ray: tests start many small things, and wait for nothing that they do not need.
os.environ.update(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
)


@pytest.fixture(scope="session")
def local_ray():
    """A Ray with more logical processors than the machine may have, so that nothing waits for a place."""
    import ray
    from ray._private.parameter import RayParams

    any_port = partialmethod(RayParams.__init__, dashboard_agent_listen_port=0)
    with pytest.MonkeyPatch.context() as patch:
        # Jobs are taken at a port that Ray does not let one choose here: of several on a machine, one has it.
        patch.setattr(RayParams, "__init__", any_port)
        ray.init(
            address="local",  # whatever others run on this machine
            num_cpus=4,
            num_gpus=0,
            object_store_memory=256 << 20,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield
    ray.shutdown()


_LONG = ("tests/cluster/", "tests/serve/", "tests/browser/")
"""Folders of what starts a Ray, a server or a browser."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: of several processes none is left with one in the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))
