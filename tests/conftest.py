"""A local Ray for the tests of a process that need it, who runs which tests, and the command line."""

import os
import sys
from functools import partialmethod
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes, or is drawn, says nothing where other tests have the cores meanwhile.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Before anything imports ray: tests start many small things, and wait for nothing that they do not need.
os.environ.update(
    {
        "RAY_RETRIEVAL_ALONE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",  # what waits for them is as urgent as the tests of the other process
    }
)
# Where it is set, each of Ray's processes compiles the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


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


@pytest.fixture
def encoding_here():
    """Images are encoded in this process."""
    from here_parts import encoding_in_this_process

    with encoding_in_this_process():
        yield


_PLACES = {"tests/cluster/": -4, "tests/serve/": -3, "tests/test_export": -2, "tests/browser/": -1}
"""What starts a Ray, a server, an exporter or a browser: one process runs each, one test after another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first: what is left is so short that the processes end together."""
    items.sort(key=lambda item: _place(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each process whole files, or all of one of the places above."""
    from xdist.scheduler import LoadFileScheduling

    class ByFolderOrFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            place = _place(nodeid)
            return str(place) if place else super()._split_scope(nodeid)

    return ByFolderOrFile(config, log)


def _place(nodeid: str) -> int:
    return next((place for folder, place in _PLACES.items() if nodeid.startswith(folder)), 0)


@pytest.fixture
def cli_call(monkeypatch, capsys):
    """The command line, given the words of a line: exit code, stdout, stderr."""
    from ray_retrieval import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ray-retrieval", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call
