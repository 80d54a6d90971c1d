import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from serving_parts import AverageHash, Served, write_model
from typer.testing import CliRunner

from ray_retrieval.cli import app as command
from ray_retrieval.errors import ArtefactError, ClusterError, RecipeError
from ray_retrieval.recipe import from_settings
from ray_retrieval.search import Index
from ray_retrieval.serve.app import _is_healthy, _wait_for_signal, from_args, run
from ray_retrieval.serve.application import build, check, named, serve_config
from ray_retrieval.serve.config import ServeConfig, ServedIndex
from ray_retrieval.storage import Folder

ROOT = Path(__file__).parents[2]


def one(served: Served, model: str | None = None) -> dict[str, ServedIndex]:
    return {"x": ServedIndex(index=served.index, model=model or served.model)}


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray_retrieval.serve.app.connect", refuse)


def test_an_index_of_another_model_is_refused_before_anything_starts(
    indexed: Served, tmp_path: Path, nothing_starts: None
) -> None:
    other = write_model(Folder(tmp_path), note="another")
    with pytest.raises(ArtefactError) as caught, run(one(indexed, str(tmp_path)), encoder=AverageHash):
        pass
    assert other in str(caught.value)
    assert Index.open(indexed.index).model in str(caught.value)


def test_a_missing_index_or_model_is_refused_before_anything_starts(
    indexed: Served, tmp_path: Path, nothing_starts: None
) -> None:
    for index, model in ((str(tmp_path), indexed.model), (indexed.index, str(tmp_path))):
        with pytest.raises(ArtefactError), run({"x": ServedIndex(index=index, model=model)}):
            pass


def test_a_taken_port_is_refused_before_anything_starts(indexed: Served, nothing_starts: None) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ClusterError, match=f"port {port}") as caught,
            run(one(indexed), ServeConfig(port=port), encoder=AverageHash),
        ):
            pass
        assert "another port" in str(caught.value.mend)


def test_an_address_that_others_reach_takes_keys(indexed: Served, nothing_starts: None) -> None:
    with pytest.raises(RecipeError, match="key"), run(one(indexed), ServeConfig(host="0.0.0.0")):
        pass
    assert build(one(indexed), ServeConfig(host="0.0.0.0", allow_anonymous=True)) is not None


def test_what_does_not_fit_the_index_is_refused(indexed: Served) -> None:
    with pytest.raises(RecipeError, match="shard_groups is 4, the index has 3"):
        build(one(indexed), ServeConfig(shard_groups=4), encoder=AverageHash)
    rerank: Any = {"qe": [{"name": "query_expansion"}]}
    with pytest.raises(ArtefactError, match="'qe' suits none of the indices: x holds codes"):
        build(one(indexed), ServeConfig.model_validate({"rerank": rerank}))
    with pytest.raises(ArtefactError, match="'nothing' suits none"):
        build(one(indexed), ServeConfig(default_rerank="nothing"))
    for name in ("a/b", "..", ""):
        with pytest.raises(RecipeError, match="no name"):
            build({name: one(indexed)["x"]})


def test_indices_are_called_as_their_runs_or_as_one_says() -> None:
    found = named(
        ["runs/quickstart/index", "big/faces", "mine=runs/other/index", "s3://bucket/runs/sop/index"]
    )
    assert list(found) == ["quickstart", "faces", "mine", "sop"]
    assert found["mine"].index == "runs/other/index"
    with pytest.raises(RecipeError, match="two indices are called 'quickstart'"):
        named(["runs/quickstart/index", "old/quickstart/index"])


def test_the_arguments_of_a_configuration_file_are_checked(indexed: Served) -> None:
    args = {"indexes": {"x": {"index": indexed.index, "model": indexed.model}}}
    assert from_args({**args, "shard_groups": 2}) is not None
    with pytest.raises(RecipeError, match="did you mean 'shard_groups'"):
        from_args({**args, "shard_group": 2})
    with pytest.raises(RecipeError, match="did you mean 'model'"):
        from_args({"indexes": {"x": {"index": indexed.index, "modl": "x"}}})
    with pytest.raises(RecipeError, match="'indexes' is missing"):
        from_args({"index": indexed.index})


def test_the_printed_file_is_one_that_serve_takes_and_starts_the_same_server(indexed: Served) -> None:
    settings = ["--set", "shard_groups=2", "--set", "encoder_replicas_max=4", "--port", "9000"]
    result = CliRunner().invoke(
        command, ["serve", f"x={indexed.index}", "--model", indexed.model, *settings, "--print-config"]
    )
    assert result.exit_code == 0, result.output
    given = yaml.safe_load(result.output)
    # Ray drops unknown keys without a word.
    known = ServeDeploySchema.model_validate(given).model_dump(exclude_unset=True, mode="json")
    assert known == given
    assert given["http_options"]["port"] == 9000
    (application,) = given["applications"]
    assert application["args"] == {
        "indexes": {"x": {"index": indexed.index, "model": indexed.model}},
        "shard_groups": 2,
        "encoder_replicas_max": 4,
    }
    assert from_args(application["args"]) is not None


def test_the_printed_file_names_whole_paths(
    indexed: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    verified: Any = {"name": "geometric_verification"}
    config = ServeConfig.model_validate(
        {
            "api_keys": "keys.txt",
            "rerank": {"near": [{**verified, "local": "runs/delg/index"}], "own": [verified]},
        }
    )
    (application,) = serve_config({"x": ServedIndex(index="index")}, config)["applications"]
    args = application["args"]
    assert args["indexes"]["x"]["index"] == str(tmp_path / "index")
    assert args["api_keys"] == str(tmp_path / "keys.txt")
    assert args["rerank"] == {
        "near": [{**verified, "local": str(tmp_path / "runs/delg/index")}],
        "own": [verified],
    }


def test_the_printed_file_re_ranks_as_the_server_that_it_is_printed_for() -> None:
    rerank: Any = {
        "qe": [{"name": "query_expansion"}, {"name": "k_reciprocal", "k1": 7}],
        "dba": [{"name": "database_augmentation"}],
        "walk": [{"name": "diffusion"}],
        "map": [{"name": "superglobal"}],
        "near": [{"name": "geometric_verification", "local": "/there", "matching": {"ratio": 0.7}}],
    }
    config = ServeConfig.model_validate({"rerank": rerank, "default_rerank": "qe"})
    (application,) = serve_config({"x": ServedIndex(index="/index")}, config)["applications"]
    args = yaml.safe_load(yaml.safe_dump(application["args"]))
    del args["indexes"]
    assert ServeConfig.model_validate(args) == config


@pytest.mark.parametrize(("name", "scheme"), [("cors_origins", "https://"), ("url_hosts", "")])
def test_one_of_several_is_set_as_it_is(name: str, scheme: str) -> None:
    one, other = f"{scheme}a.b:8443", f"{scheme}c.d"
    assert getattr(from_settings(ServeConfig, [f"{name}={one}"]), name) == (one,)
    assert getattr(from_settings(ServeConfig, [f"{name}=['{one}', '{other}']"]), name) == (one, other)
    assert getattr(from_settings(ServeConfig, [f"{name}=[]"]), name) == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cors_origins", "https://a.b/"),
        ("cors_origins", "https://A.b"),
        ("cors_origins", "a.b"),
        ("cors_origins", "https://*.b"),
        ("url_hosts", "https://a.b"),
        ("url_hosts", "a.b/images"),
        ("url_hosts", "'*.b'"),
        ("url_hosts", "''"),
    ],
)
def test_what_nothing_can_come_from_is_no_origin_and_no_host(name: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}'.*such as"):
        from_settings(ServeConfig, [f"{name}={value}"])


def test_the_ready_made_file_is_what_would_be_printed() -> None:
    text = (ROOT / "jobs" / "serve.yaml").read_text()
    given = yaml.safe_load(text)
    ServeDeploySchema.model_validate(given)
    (application,) = given["applications"]
    args = dict(application["args"])
    indexes = {name: ServedIndex.model_validate(one) for name, one in args.pop("indexes").items()}
    assert serve_config(indexes, ServeConfig.model_validate(args)) == given


def test_autoscaling_and_replicas_are_as_configured(indexed: Served) -> None:
    config = ServeConfig(encoder_replicas_max=3, shard_groups=2, shard_replicas=2, writable=True)
    gateway: Any = build(one(indexed), config, encoder=AverageHash)
    handles = gateway._bound_deployment.init_args[1]["x"]
    encoder, *groups = [
        bound._bound_deployment for bound in (handles.encoder, *handles.groups, handles.writer)
    ]
    scaling = encoder._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 16)
    names = [(group.name, group.num_replicas) for group in groups]
    assert names == [("Shards-x-0", 2), ("Shards-x-1", 2), ("Writer", 1)]
    assert encoder.init_args[3] == Folder(indexed.index).uri


def test_a_server_without_a_queue_may_be_written_to(indexed: Served) -> None:
    config = ServeConfig(max_queued=0, max_ongoing=1, shard_groups=1, writable=True)
    assert build(one(indexed), config, encoder=AverageHash) is not None


@pytest.mark.parametrize(("gpus", "more"), [(0, 50), (1, 0)])
def test_another_server_starts_before_this_one_ends_where_there_is_room(
    indexed: Served, gpus: int, more: int
) -> None:
    config = ServeConfig(encoder_gpus=gpus, shard_groups=1, writable=True, surge_percent=50)
    gateway: Any = build(one(indexed), config, encoder=AverageHash)
    handles = gateway._bound_deployment.init_args[1]["x"]
    bound = (gateway, handles.encoder, *handles.groups, handles.writer)
    surges = [part._bound_deployment._deployment_config.max_surge_percent for part in bound]
    assert surges == [50, more, 50, 0]


@pytest.mark.parametrize(("gpus", "hidden"), [(0, [True, True, True]), (0.5, [True, False, True])])
def test_who_has_booked_no_gpu_sees_none(indexed: Served, gpus: float, hidden: list[bool]) -> None:
    gateway: Any = build(one(indexed), ServeConfig(encoder_gpus=gpus, shard_groups=1), encoder=AverageHash)
    handles = gateway._bound_deployment.init_args[1]["x"]
    options = [
        part._bound_deployment.ray_actor_options for part in (gateway, handles.encoder, *handles.groups)
    ]
    found = [option["runtime_env"]["env_vars"].get("CUDA_VISIBLE_DEVICES") == "" for option in options]
    assert found == hidden


def test_an_index_is_opened_once_before_the_start(indexed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, opening = [], Index.open

    def counted(uri: Any, **options: Any) -> Index:
        opened.append(uri)
        return opening(uri, **options)

    monkeypatch.setattr(Index, "open", counted)
    arguments = ["serve", indexed.index, "--model", indexed.model]

    def refuse() -> None:
        raise ClusterError("not now")

    monkeypatch.setattr("ray_retrieval.serve.app.connect", refuse)
    result = CliRunner().invoke(command, [*arguments, "--port", "1"])
    assert result.exit_code != 0
    assert len(opened) == 1


def test_an_engine_without_an_export_is_refused_before_anything_starts(
    indexed: Served, nothing_starts: None
) -> None:
    with (
        pytest.raises(ArtefactError, match="no export of model"),
        run(one(indexed), ServeConfig(engine="onnx"), encoder=AverageHash),
    ):
        pass
    with pytest.raises(ValueError, match="runs on the processor"):
        ServeConfig(engine="onnx", encoder_gpus=1)


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("data.decode", {"torch"}),
        ("serve.thumbnails", {"torch", "numba"}),
        ("serve.writers", {"torch", "fastapi", "ray"}),
        ("serve.shards", {"torch", "fastapi", "ray"}),
    ],
)
def test_processes_load_what_they_need(module: str, without: set[str]) -> None:
    code = f"import sys, ray_retrieval.{module}; print(*({without!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_a_file_of_keys_that_is_missing_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="keys cannot be read"):
        check({}, ServeConfig(api_keys=str(tmp_path / "keys")))


def test_keys_are_made_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    arguments = ["serve", "--new-key", "anna", "--scope", "write", "--set", f"api_keys={file}"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "anna write" in file.read_text()
    assert result.output.strip() not in file.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_blocking_server_ends_with_a_signal(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    _wait_for_signal()
    assert signal.getsignal(number) is before


def test_the_server_is_looked_at_here_and_not_by_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setattr("urllib.request._opener", None)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert _is_healthy(f"http://127.0.0.1:{server.server_port}")


def test_replicas_of_groups_need_a_group() -> None:
    with pytest.raises(ValueError, match="set 'shard_groups' to 1 or more"):
        ServeConfig(shard_replicas=2)


def test_the_default_server_fits_on_two_cores_and_leaves_one() -> None:
    assert ServeConfig().cpus() == 0.75
    assert ServeConfig(shard_groups=1).cpus() == 1.0
    assert ServeConfig(encoder_replicas=2, shard_groups=3).cpus() == 2.0
    assert ServeConfig(shard_groups=1, shard_replicas=2).cpus(indexes=2, models=2) == 2.25
