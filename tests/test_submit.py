"""What travels with a job, what is refused before it does, and how it is followed. No cluster."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer

from ray_retrieval import submit
from ray_retrieval.cli import app
from ray_retrieval.cli import submit as cli_submit
from ray_retrieval.cluster import Needs, jobs
from ray_retrieval.cluster.jobs import Job
from ray_retrieval.errors import ClusterError, RecipeError

JOBS = Path(__file__).parents[1] / "jobs"
QUICKSTART, DIGITS = JOBS / "quickstart.yaml", JOBS / "tune_digits.yaml"
OUT = "output=s3://bucket/run"


def job(status, exit_code=None, message=""):
    return Job("a-job", status, "run x", exit_code, message, started_ms=0, ended_ms=None)


@dataclass
class Server:
    """A server whose connection breaks as told: what a job writes, and where each connection ends."""

    text: str = "one\ntwo\nthree\n"
    breaks: list[int] = field(default_factory=list)
    last: Job = field(default_factory=lambda: job("SUCCEEDED", 0))
    silent: int = 0  # how many times it does not answer
    address: str = "http://there:8265"
    stopped: list[str] = field(default_factory=list)
    submitted: list[dict] = field(default_factory=list)

    def follow(self, name, show, *, seen=0):
        end = self.breaks.pop(0) if self.breaks else len(self.text)
        show(self.text[seen:end])
        return max(seen, end)

    def job(self, name):
        if self.silent:
            self.silent -= 1
            raise ClusterError("nothing there")
        return job("RUNNING") if self.breaks else self.last

    def logs(self, name):
        return self.text

    def stop(self, name):
        self.stopped.append(name)
        return True

    def submit(self, entrypoint, *, folder, **told):
        found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
        self.submitted.append({"entrypoint": entrypoint, "files": found, **told})


def test_the_recipe_travels_and_is_named_by_its_place_there(tmp_path):
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text(QUICKSTART.read_text())
    made = submit.prepare(["run", str(recipe), OUT, "method.bits=48"])
    assert made.arguments == ("run", "recipes/my recipe.yaml", OUT, "method.bits=48")
    assert shlex.split(made.entrypoint()) == ["python", "-m", "ray_retrieval.cli", *made.arguments]
    assert made.name.startswith("run-my-recipe-")
    assert made.warnings == ()
    with made.staged() as folder:
        assert (folder / "recipes" / "my recipe.yaml").read_bytes() == recipe.read_bytes()
        assert not any(part == "__pycache__" for file in folder.rglob("*") for part in file.parts)
        # What is uploaded runs by itself: nothing else of the repository is needed.
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", "import ray_retrieval.config as c; print(c.__file__)"]
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        assert ran.stdout.startswith(str(folder))
    assert not folder.exists()


def test_the_package_travels_whole():
    package = Path(submit.__file__).parent
    with submit.prepare(["run", str(QUICKSTART), OUT]).staged() as folder:
        sent = {
            f.relative_to(folder / package.name) for f in (folder / package.name).rglob("*") if f.is_file()
        }
    there = {  # `jobs` is a link to the recipes beside the package
        Path(folder, name).relative_to(package)
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }
    assert sent == there
    assert Path("jobs/quickstart.yaml") in sent


def test_too_much_to_upload_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(submit, "_MOST_BYTES", 1000)
    with pytest.raises(ClusterError, match=r"ray_retrieval/.*\.py: .* MB to upload, 0 MB at most"):
        submit.prepare(["run", str(QUICKSTART), OUT]).staged().__enter__()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no verb to submit"),
        (["--fresh"], "no verb to submit"),
        (["run", "nowhere.yaml", OUT], "nowhere.yaml: no such recipe"),
        (["run", str(QUICKSTART), OUT, "train.epoch=2"], "unknown key 'train.epoch' .*'epochs'"),
        (["run", str(QUICKSTART)], "output=runs/quickstart: a relative path .*s3://"),
        (["run", "--fresh", str(QUICKSTART)], "output=runs/quickstart: a relative path .*s3://"),
        (["tune", str(DIGITS), OUT, "tune.space={method.bit: {choice: [8]}}"], "unknown key"),
        (["tune", str(QUICKSTART), OUT], "tune: the recipe states no search"),
        (["search", "s3://b/index", "s3://b/x.jpg", "--picture", "x.png"], "--picture=x.png: a relative"),
        (
            ["run", str(QUICKSTART), "output=runs/x", "method.bits=[16,32]"],
            "output=runs/x/16bits: a relative",
        ),
        (["encode", "s3://b/model", "s3://b/images", "--out", "codes"], "--out=codes: a relative path"),
        (["index", "build", "s3://b/codes", "--out=index"], "--out=index: a relative path"),
        (
            ["index", "add", "s3://b/index", "s3://b/x", "--embeddings", "e"],
            "--embeddings=e: a relative path",
        ),
        (["gldv2", "download", "--tars", "0-3", "made"], r"FOLDER=made: .* \(give an absolute path"),
        (["gldv2", "build", "/mnt/gldv2", "--out", "made"], r"--out=made: .* \(give an absolute path"),
        (["gldv2", "download", "--remove-tars", "made"], r"FOLDER=made: .* \(give an absolute path"),
    ],
)
def test_what_could_only_fail_there_is_refused_here(arguments, told):
    with pytest.raises(RecipeError, match=told):
        submit.prepare(arguments)


def test_every_option_that_says_where_something_goes_is_looked_at():
    def options(command):
        for inner in getattr(command, "commands", {}).values():
            yield from options(inner)
        for option in command.params:
            if re.match(
                r"Where .* goe?s?\b|Save |Keep the emb|A file for|A folder for",
                getattr(option, "help", "") or "",
            ):
                yield from (name for name in option.opts if name.startswith("--"))

    assert set(options(typer.main.get_command(app))) | {"output"} == submit._OUTPUTS
    made = submit.prepare(["gldv2", "download", "/mnt/gldv2", "--tars", "0-3"])
    assert made.arguments[1:] == ("download", "/mnt/gldv2", "--tars", "0-3")


def test_a_recipe_travels_whatever_its_name_ends_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text(QUICKSTART.read_text())
    Path("quickstart").write_text(DIGITS.read_text())
    made = submit.prepare(["run", "mine.txt", OUT])
    assert (made.arguments, list(made.recipes)) == (("run", "recipes/mine.txt", OUT), ["recipes/mine.txt"])
    assert submit.prepare(["train", "--fresh", "quickstart", OUT]).recipes
    assert not submit.prepare(["search", "s3://bucket/index", "mine.txt"]).recipes


def test_a_text_that_is_too_long_for_a_path_is_none():
    condition = " or ".join(f"price = {number}" for number in range(100))
    arguments = ["search", "s3://bucket/index", "s3://bucket/q.jpg", "--where", condition]
    made = submit.prepare([*arguments, f"{condition}.yaml"])
    assert (made.recipes, made.warnings) == ({}, ())


def test_two_recipes_of_one_name_are_not_mixed_up(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.yaml").write_text("x: 1\n")
    with pytest.raises(RecipeError, match=r"r.yaml: two files of that name"):
        submit.prepare(["compare", str(tmp_path / "a/r.yaml"), str(tmp_path / "b/r.yaml")])


def test_paths_that_a_cluster_may_not_see_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    settings = ["data={name: images, database: photos}", "train.start=~/model"]
    made = submit.prepare(["run", str(QUICKSTART), OUT, *settings])
    assert made.warnings == (
        "data.database: photos is here, but does not travel with the job: give a URI (s3://…)",
        "train.start: ~/model has to be there on every node, or be a URI (s3://…)",
    )
    # A study of three says it once.
    study = submit.prepare(["run", str(QUICKSTART), "output=/mnt/runs", "train.start=/mnt/m", "seed=[0,1,2]"])
    assert [warning.split(":")[0] for warning in study.warnings] == ["output", "train.start"] + ["output"] * 2
    made = submit.prepare(["search", "/mnt/index", "photos", "-k", "5"])
    assert [warning.split(" ")[0] for warning in made.warnings] == ["/mnt/index", "photos"]


def test_a_jobs_name_is_its_own():
    names = {submit.prepare(["run", str(QUICKSTART), OUT], name="night").name for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith("night-") for name in names)
    with pytest.raises(RecipeError, match="got 'a b'"):
        submit.prepare(["run", str(QUICKSTART), OUT], name="a b")


def test_variables_come_from_here_or_as_given(monkeypatch):
    monkeypatch.setenv("HERE", "1=2")
    assert submit.variables(["HERE", "THERE=x=y", "EMPTY="]) == {"HERE": "1=2", "THERE": "x=y", "EMPTY": ""}
    monkeypatch.delenv("HERE")
    with pytest.raises(RecipeError, match="HERE: this variable is not set here"):
        submit.variables(["HERE"])


def test_a_job_is_followed_through_lost_connections():
    for breaks in ([], [3], [0, 4, 4, 9]):
        shown = []
        server = Server(breaks=breaks, silent=2)
        assert submit.follow(server, "a-job", shown.append, pause_s=0) == 0
        assert "".join(shown) == server.text


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (job("SUCCEEDED", 0), 0),
        (job("FAILED", 2), 2),
        (job("FAILED", 137), 137),
        (job("FAILED", -9), 137),
        (job("STOPPED"), 130),
    ],
)
def test_the_exit_code_is_the_jobs(last, code):
    assert submit.follow(Server(last=last), "a-job", lambda text: None, pause_s=0) == code


def test_a_job_that_was_lost_and_a_cluster_that_was_lost_are_errors(monkeypatch):
    lost = job("FAILED", None, "\nJob supervisor actor died\nmore")
    with pytest.raises(
        ClusterError, match="a-job: the job did not run to its end: Job supervisor actor died"
    ):
        submit.follow(Server(last=lost), "a-job", lambda text: None)
    monkeypatch.setattr(submit, "_LOST_S", 0)
    with pytest.raises(ClusterError, match=r"answers no more \(nothing there\).*submit logs a-job --follow"):
        submit.follow(Server(silent=9), "a-job", lambda text: None, pause_s=0)


@pytest.fixture
def server(monkeypatch):
    """The command line talks to this server."""
    made = Server()
    monkeypatch.setattr(jobs, "JobServer", lambda address: made)
    return made


def test_the_command_line_submits_and_returns_the_exit_code(cli_call, server):
    server.last = job("FAILED", 1)
    code, out, err = cli_call(
        "submit", "--env", "A=b", "--gpus", "4", "--", "run", QUICKSTART, OUT, "--fresh", "--json"
    )
    (told,) = server.submitted
    assert (code, out) == (1, server.text)
    assert (
        told["entrypoint"] == f"python -m ray_retrieval.cli run recipes/quickstart.yaml {OUT} --fresh --json"
    )
    assert told["variables"] == {"A": "b", "RAY_RETRIEVAL_AWAIT": "CPU=0,GPU=4,seconds=1800"}
    assert {"recipes/quickstart.yaml", "ray_retrieval/cli/__main__.py"} <= told["files"]
    assert told["name"] in err


def test_without_waiting_the_name_is_all_that_is_printed(cli_call, server):
    code, out, _ = cli_call("submit", "start", "--no-wait", "--name", "n", "--debug", "run", QUICKSTART, OUT)
    assert (code, out.strip()) == (0, server.submitted[0]["name"])
    assert server.submitted[0]["entrypoint"].endswith(" --debug")
    code, out, _ = cli_call("submit", "--no-wait", "--json", "--", "run", QUICKSTART, OUT)
    assert json.loads(out) == {"job": server.submitted[1]["name"], "address": server.address}


def test_the_list_of_jobs_names_them_whole(cli_call, server, monkeypatch):
    listed = [Job(f"{number}-{'name' * 30}", "RUNNING", "run" * 60, None, "", 0, None) for number in (1, 2)]
    server.jobs = lambda: listed
    _, out, _ = cli_call("submit", "list")
    assert all(any(one.name in line and one.command in line for line in out.splitlines()) for one in listed)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")  # 80 characters, no colours
    _, out, _ = cli_call("submit", "list")
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


@pytest.mark.parametrize("wrong", [["rum"], ["run"], ["run", QUICKSTART, "--frsh"], ["index", "buid"]])
def test_a_line_that_the_verb_would_refuse_is_not_submitted(cli_call, server, wrong):
    code, _, _ = cli_call("submit", "--", *wrong)
    assert code == 2
    assert server.submitted == []


@pytest.mark.parametrize(
    ("answer", "code"), [(None, 3), ("y\n", 3), ("\n", 3), ("n\n", 130)], ids=["nobody", "yes", "enter", "no"]
)
def test_an_interrupt_asks_whether_the_job_goes_on(cli_call, server, monkeypatch, answer, code):
    def interrupted(name, show, *, seen=0):
        raise KeyboardInterrupt

    server.follow = interrupted
    monkeypatch.setattr(sys.stdin, "isatty", lambda: answer is not None, raising=False)
    monkeypatch.setattr(
        cli_submit.typer, "confirm", lambda *a, default, **b: {"n\n": False}.get(answer, default)
    )
    found, _, err = cli_call("submit", "--", "run", QUICKSTART, OUT)
    assert found == code
    assert bool(server.stopped) == (code == 130)
    assert ("goes on; ray-retrieval submit logs" in err) == (code == 3)


def test_no_verb_is_called_like_a_command_about_jobs():
    from ray_retrieval.cli import app

    verbs = {group.name for group in app.registered_groups} | {
        command.name or command.callback.__name__ for command in app.registered_commands
    }
    about = {c.name or c.callback.__name__ for c in cli_submit.submit_app.registered_commands}
    assert not verbs & about
    assert set(submit.TAKES_RECIPE) <= verbs


def test_nobody_at_the_address_is_found_out_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # what is said goes before what the environment has
    with pytest.raises(ClusterError, match=rf"http://127.0.0.1:{port}: no cluster answers: .*`address`"):
        jobs.JobServer(f"127.0.0.1:{port}/")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "asks for a token .*RAY_AUTH_MODE=token"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "does not accept the token"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "no cluster answers: 500"),
        (b"nonsense", "no cluster answers"),
    ],
    ids=["no-token", "wrong-token", "broken", "no-http"],
)
def test_what_a_server_refuses_with_is_told(answer, told):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    if connection.recv(4096):
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ClusterError, match=told):
            jobs.JobServer(f"http://127.0.0.1:{listening.getsockname()[1]}")


def test_what_to_wait_for_is_read_as_it_is_written():
    for needs in (Needs(8, 4, 60), Needs(), Needs(gpus=1)):
        assert Needs.read(str(needs)) == needs
    assert Needs.read("GPU=2") == Needs(gpus=2)
    for wrong in ("GPU=two", "TPU=1", "GPU=1;CPU=2", "GPU=1,GPU=2"):
        with pytest.raises(RecipeError, match="CPU=8,GPU=8,seconds=1800"):
            Needs.read(wrong)
