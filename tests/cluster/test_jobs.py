"""Jobs of a real cluster: what is uploaded runs there, and its exit code comes back."""

import json
import shlex
import sys
import time
from pathlib import Path

import pytest
import ray

from ray_retrieval.cluster import Needs, await_nodes
from ray_retrieval.cluster.jobs import JobServer
from ray_retrieval.errors import ClusterError
from ray_retrieval.submit import follow, prepare

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
SHORT = ["train.epochs=1", "train.precision=float32", "train.threads=1"]


@pytest.fixture(scope="module")
def server(local_ray):
    return JobServer(ray._private.worker.get_dashboard_url())


@pytest.fixture
def submit(cli_call, server):
    def call(*arguments):
        return cli_call("submit", "--address", server.address, "--python", sys.executable, *arguments)

    return call


@pytest.mark.long
def test_a_job_trains_with_what_was_uploaded(submit, cli_call, server, tmp_path):
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text(QUICKSTART.read_text())
    settings = [*SHORT, f"output={tmp_path / 'run'}"]
    code, out, err = submit("--no-wait", "--name", "digits", "--", "train", recipe, *settings)
    assert code == 0
    [warning] = [line for line in err.splitlines() if line.startswith("warning")]  # Ray may say more
    assert f"output: {tmp_path / 'run'} has to be there on every node" in warning
    name = out.strip()

    code, out, _ = cli_call("submit", "logs", name, "--follow", "--address", server.address)
    assert code == 0, out
    assert "validation map" in out
    assert (tmp_path / "run" / "model" / "model.json").is_file()
    code, out, _ = cli_call("submit", "status", name, "--address", server.address, "--json")
    assert json.loads(out)["status"] == "SUCCEEDED"
    assert json.loads(out)["command"] == shlex.join(["train", str(recipe), *settings])
    assert name in [job.name for job in server.jobs()]


def test_the_exit_code_of_a_job_comes_back(server, tmp_path):
    server.submit("echo no; exit 3", name="fails", command="", folder=tmp_path, variables={})
    shown = []
    assert follow(server, "fails", shown.append) == 3
    assert "no" in "".join(shown).splitlines()  # Ray's own lines stand around it in any order
    assert server.job("fails").message == "Job entrypoint command failed with exit code 3"


def test_a_job_has_the_uploaded_package_and_can_be_stopped(server):
    says = "import ray_retrieval; print(ray_retrieval.__file__, flush=True)"
    command = f"{sys.executable} -c {shlex.quote(says)}; echo $A; sleep 100"
    with prepare(["run", str(QUICKSTART), "output=/mnt/run"]).staged() as folder:
        server.submit(command, name="sleeper", command="", folder=folder, variables={"A": "a variable"})
    deadline = time.monotonic() + 100
    while "a variable\n" not in server.logs("sleeper"):
        assert time.monotonic() < deadline, server.job("sleeper")
        time.sleep(0.1)
    log = server.logs("sleeper")
    assert "/working_dir_files/" in log
    assert server.job("sleeper").status == "RUNNING"

    assert server.stop("sleeper")
    shown = []
    assert server.follow("sleeper", shown.append, seen=log.index("a variable")) >= len(log)
    assert "".join(shown).startswith("a variable")
    assert follow(server, "sleeper", lambda text: None) == 130
    assert not server.stop("sleeper")


def test_a_job_that_is_not_there_is_said_to_be_so(server):
    for ask in (server.job, server.logs, server.stop):
        with pytest.raises(ClusterError, match=r"nobody: no such job \(.*submit list"):
            ask("nobody")


def test_waiting_for_more_than_a_cluster_has_ends_and_leaves_nothing_behind(local_ray):
    await_nodes(Needs(cpus=2))
    with pytest.raises(ClusterError, match=r"9 CPUs and 0 GPUs were not free within 2 s; .* has 4 CPUs"):
        await_nodes(Needs(cpus=9, seconds=2))
    # Not 4: encoders of an earlier test, which end when Python collects them, may still ask for a little.
    await_nodes(Needs(cpus=3))
