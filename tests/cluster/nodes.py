"""A Ray cluster of several nodes on this machine, in a process of its own: nodes join it and are lost.

    nodes = Nodes(folder)                          # a head without processors for work
    first = nodes.add()                            # the id of a node with one
    job = nodes.start("train", run=…, log=…)       # as the driver of the cluster, on the head
    nodes.kill(first)
    job.wait()

The process is told what to do in lines of JSON, and answers so. It goes with the one that started it, and the
cluster with it.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

_TESTS = Path(__file__).parents[1]
_STORE = 80 << 20
"""Bytes of a node's object store."""


class JobError(Exception):
    """A job ended with an error; the text is `kind: message`."""


class Nodes:
    """The cluster, as the tests see it.

    Args:
        folder: where its log goes.
    """

    def __init__(self, folder):
        # Short, as sockets lie in it; and not where a Ray that starts by itself looks for a cluster to join.
        self._temporary = tempfile.TemporaryDirectory(prefix="rr-", ignore_cleanup_errors=True)
        self._pids, self._answers, self._asked = {}, {}, 0
        outside = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with (folder / "cluster.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={
                    **outside,
                    "RAY_TMPDIR": self._temporary.name,
                    "PYTHONPATH": os.pathsep.join(map(str, (_TESTS, Path(__file__).parent))),
                },
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def add(self, cpus=1):
        """Let a node join; its id."""
        answer = self.start("add", cpus=cpus).wait(200)
        self._pids[answer["node"]] = answer["pid"]
        return answer["node"]

    def hold(self, count):
        """Let nodes join until there are so many; the ids of all."""
        while len(self._pids) < count:
            self.add()
        return list(self._pids)

    def kill(self, node):
        """Lose a node as if its machine were gone: all of its processes end at once, without a word."""
        raylet = psutil.Process(self._pids.pop(node))
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def start(self, what, **arguments):
        """Begin something; see `_JOBS`."""
        self._asked += 1
        job = self._answers[self._asked] = Job()
        line = json.dumps({"number": self._asked, "do": what, "with": arguments})
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return job

    def close(self):
        """End all of it."""
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._temporary.cleanup()

    def _listen(self):
        for line in self._process.stdout:
            answer = json.loads(line)
            self._answers[answer.pop("number")].put(answer)


class Job(queue.SimpleQueue):
    """Something that the cluster's process does."""

    def wait(self, seconds=400):
        """What it gave.

        Raises:
            JobError: if it failed.
            queue.Empty: if it takes longer.
        """
        answer = self.get(timeout=seconds)
        if "error" in answer:
            raise JobError(answer["error"])
        return answer

    @property
    def ended(self):
        return not self.empty()


def await_true(condition, what, *, job=None, seconds=300):
    """Wait until a condition holds, while a job goes on; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert job is None or not job.ended, f"it ended before {what}: {job.wait(0)}"
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return value


def _train(run, log, workers, epochs, seconds):
    from watched import training

    from ray_retrieval.storage import Folder
    from ray_retrieval.train import train

    method, config, benchmark = training(log, workers=workers, epochs=epochs, seconds=seconds)
    train(method, config, benchmark, seed=1, run=Folder(run), provenance={})
    return {}


def _encode(model, count, out, log, rows_per_part, seconds):
    from samples import coloured_table
    from watched import WatchedTable

    from ray_retrieval.encode import EncodeConfig, EncodeJob, encode
    from ray_retrieval.storage import Folder

    table = WatchedTable.over(coloured_table(count), log, seconds)
    config = EncodeConfig(workers=2, rows_per_part=rows_per_part)
    return {"encoded": encode([EncodeJob(Folder(model), table, Folder(out))], config)}


_JOBS = {"train": _train, "encode": _encode}


def _serve():
    """Do what the lines of stdin say, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is for the log
    from ray.cluster_utils import Cluster

    from ray_retrieval.cluster import connect

    def answer(number, **values):
        answers.write(json.dumps({"number": number, **values}) + "\n")

    def work(number, job, arguments):
        try:
            answer(number, **job(**arguments))
        except BaseException as error:
            answer(number, error=f"{type(error).__name__}: {error}")
            raise

    any_port = {"dashboard_port": None, "dashboard_agent_listen_port": 0}
    head = {"num_cpus": 0, "object_store_memory": _STORE, "include_dashboard": True, **any_port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    os.environ["RAY_ADDRESS"] = cluster.address
    with connect():
        for line in sys.stdin:
            asked = json.loads(line)
            number, what, arguments = asked["number"], asked["do"], asked["with"]
            if what == "add":  # by the main thread: a node ends with the thread that started it
                node = cluster.add_node(num_cpus=arguments["cpus"], object_store_memory=_STORE)
                pid = node.all_processes["raylet"][0].process.pid
                answer(number, node=node.node_id, pid=pid)
            else:
                threading.Thread(target=work, args=(number, _JOBS[what], arguments), daemon=True).start()
    cluster.shutdown()


if __name__ == "__main__":
    _serve()
