"""Nodes with addresses of their own, each in a network namespace: one is cut off and comes back."""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from nodes import await_true

from ray_retrieval.loop.steplog import read_steps
from ray_retrieval.storage import Folder
from ray_retrieval.train import read_history

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
EPOCHS = 5


class Hosts:
    """Two network namespaces that a cable joins, with Ray on each."""

    def __init__(self, folder):
        self._folder = folder
        self._names = [f"rr-{os.getpid()}-{number}" for number in (1, 2)]
        self._started = {}
        # Short, as sockets lie in it.
        self._temporary = tempfile.TemporaryDirectory(prefix="rr-", ignore_cleanup_errors=True)

    def lay(self):
        """Make the namespaces; False where that is not allowed."""
        first, second = self._names
        steps = [
            *(["netns", "add", name] for name in self._names),
            ["link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second],
        ]
        for number, name in enumerate(self._names):
            steps += [
                ["-n", name, "address", "add", f"{address(number)}/24", "dev", "eth0"],
                ["-n", name, "link", "set", "lo", "up"],
                ["-n", name, "link", "set", "eth0", "up"],
            ]
        with suppress(FileNotFoundError):
            return all(not _ip(*step).returncode for step in steps)
        return False

    def start(self, number):
        """Start Ray on a host; the first is the head."""
        where = ["--head", "--port=6379"] if number == 0 else [f"--address={address(0)}:6379"]
        ray = Path(sys.executable).parent / "ray"
        self._started[number] = self.run(
            number,
            *(sys.executable, ray, "start", "--block", "--disable-usage-stats", "--num-cpus=1", *where),
            *(f"--node-ip-address={address(number)}", f"--object-store-memory={80 << 20}"),
            log=f"ray-{number}.log",
        )

    def run(self, number, *command, log, **variables):
        """Start a command on a host."""
        temporary = Path(self._temporary.name) / str(number)
        temporary.mkdir(exist_ok=True)
        environment = {
            **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            "RAY_TMPDIR": str(temporary),
            # As cluster-onpremise.yaml has it: a host's name may stand for an address of its own alone.
            "GLOO_SOCKET_IFNAME": "eth0",
            # The head takes a host for lost after a second, not half a minute.
            "RAY_health_check_period_ms": "300",
            "RAY_health_check_timeout_ms": "300",
            **variables,
        }
        allowed = sorted(os.sched_getaffinity(0))
        core = str(allowed[number % len(allowed)])  # a host has processors of its own
        with (self._folder / log).open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._names[number], "taskset", "-c", core, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=environment,
            )

    def cut(self, number):
        """Take a host off the network, and what runs there with it: nobody is told."""
        _ip("-n", self._names[number], "link", "set", "eth0", "down")
        end(self._started.pop(number))

    def join(self, number):
        """Bring a host back."""
        _ip("-n", self._names[number], "link", "set", "eth0", "up")
        self.start(number)

    def close(self):
        for process in self._started.values():
            end(process)
        for name in self._names:
            _ip("netns", "delete", name)
        self._temporary.cleanup()


def address(number):
    return f"10.123.45.{number + 1}"


def _ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, check=False)


def end(process):
    """Kill a process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


@pytest.fixture
def hosts(tmp_path):
    made = Hosts(tmp_path)
    try:
        if not made.lay():
            pytest.skip("no network namespaces here")
        made.start(0)
        made.start(1)
        yield made
    finally:
        made.close()


def test_a_host_that_is_cut_off_is_given_up_and_taken_back(hosts, tmp_path):
    run = tmp_path / "run"
    command = hosts.run(
        0,
        *(sys.executable, "-m", "ray_retrieval.cli", "train", QUICKSTART, f"output={run}"),
        *("method.image={size: 16}", "train.workers=2", f"train.epochs={EPOCHS}", "train.log.every=1"),
        *(
            "train.batch_size=200",
            "train.checkpoint.min_seconds=0",
            "train.precision=float32",
            "train.threads=1",
        ),
        log="train.log",
        RAY_ADDRESS=f"{address(0)}:6379",
        RAY_RETRIEVAL_AWAIT="CPU=2,seconds=60",
    )
    try:

        def epochs():
            assert command.poll() is None, (tmp_path / "train.log").read_text()
            return len(read_history(Folder(run)))

        await_true(lambda: epochs() >= 2, "two epochs")
        hosts.cut(1)
        hosts.join(1)
        assert command.wait(400) == 0, (tmp_path / "train.log").read_text()
    finally:
        end(command)
    history = read_history(Folder(run))
    assert [record["epoch"] for record in history] == list(range(1, EPOCHS + 1))
    assert [line["step"] for line in read_steps(Folder(run))] == list(range(1, history[-1]["step"] + 1))
    assert history[-1]["loss"] < history[0]["loss"]
    assert (run / "model" / "model.json").is_file()
