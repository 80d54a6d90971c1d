"""The server as one Ray Serve application, and the way to run it.

with run("runs/quickstart/index", "runs/quickstart/model", blocking=True) as url:
    print(url)
"""

import contextlib
import itertools
import logging
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.schema import ApplicationStatus, LoggingConfig

from ray_retrieval.cluster import connect, resources
from ray_retrieval.config import validate
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.errors import ArtefactError, ClusterError, RecipeError
from ray_retrieval.model import Encoder, read_model_description
from ray_retrieval.search import Index
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.deployments import EncoderFactory, EncoderReplica, GatewayReplica
from ray_retrieval.serve.shards import ShardGroup
from ray_retrieval.storage import Folder

NAME = "ray-retrieval"
"""Name of the application on Ray Serve."""

_SLACK = 64
"""Requests that a gateway takes beside its searches: the page, thumbnails, health, and refusals in JSON."""
_SHUTDOWN_S = 30.0


def build(
    index_uri: str,
    model_uri: str,
    config: ServeConfig | None = None,
    *,
    encoder: EncoderFactory = Encoder,
) -> Application:
    """The application that serves an index through the model that made it. Nothing is started yet.

    Args:
        index_uri: an index directory.
        model_uri: a model directory.
        config: ports, processes and limits.
        encoder: what encodes queries, called as `encoder(model_uri, threads=…, batch_size=…)`.

    Raises:
        ArtefactError: if either is missing or damaged, or the index was made by another model, or it holds
            local features, which are not served yet.
        RecipeError: if there are fewer shards than groups of shards.
    """
    config = config or ServeConfig()
    index_uri, model_uri = Folder(index_uri).uri, Folder(model_uri).uri
    _, model = read_model_description(Folder(model_uri))
    index = Index.open(index_uri)
    if index.model != model:
        raise ArtefactError(
            f"the index was made by model {index.model}, the model given is {model}",
            where=index_uri,
            mend=f"give the model that made the index, or build an index with {model_uri}",
        )
    if index.form.kind is DescriptorKind.LOCAL:
        raise ArtefactError(
            "an index of local features is not served yet",
            where=index_uri,
            mend=f"ask it on the command line: ray-retrieval search {index_uri} IMAGE",
        )
    shards = len(index.manifest.shards)
    if config.shard_groups > shards:
        raise RecipeError(
            f"shard_groups is {config.shard_groups}, the index has {shards} shards",
            where=index_uri,
            mend=f"set shard_groups to {shards} at most, or build the index with more shards",
        )
    searches = config.max_ongoing + config.max_queued
    encoders = _deployment(
        EncoderReplica,
        config.encoder_replicas,
        config.encoder_cpus,
        config.encoder_threads,
        gpus=config.encoder_gpus,
    ).options(
        max_ongoing_requests=max(config.max_ongoing, 2 * config.encoder_batch), max_queued_requests=searches
    )
    groups = [
        _deployment(ShardGroup, 1, config.shard_cpus, config.shard_threads)
        .options(name=f"ShardGroup-{number}", max_ongoing_requests=2 * searches, max_queued_requests=searches)
        .bind(index_uri, model, numbers, config)
        for number, numbers in enumerate(_divide(shards, config.shard_groups))
    ]
    gateways = _deployment(GatewayReplica, config.gateway_replicas, config.gateway_cpus, 1).options(
        max_ongoing_requests=searches + _SLACK, max_queued_requests=searches + _SLACK
    )
    return gateways.bind(index_uri, model, encoders.bind(model_uri, model, encoder, config), groups, config)


def from_args(args: dict[str, Any]) -> Application:
    """The application for a Serve configuration file: `import_path: ray_retrieval.serve.app:from_args`.

    Args:
        args: `index`, `model`, and any field of ServeConfig. Host and port are set in the file itself.

    Raises:
        RecipeError: if a field is unknown or missing.
    """
    rest = dict(args)
    try:
        index, model = rest.pop("index"), rest.pop("model")
    except KeyError as error:
        raise RecipeError(f"'{error.args[0]}' is missing", where="args", mend="give its URI") from None
    return build(index, model, validate(ServeConfig, rest, where="args"))


@contextmanager
def run(
    index_uri: str,
    model_uri: str,
    config: ServeConfig | None = None,
    *,
    blocking: bool = False,
    encoder: EncoderFactory = Encoder,
) -> Iterator[str]:
    """Serve for as long as the `with` block lasts. Prints nothing.

    Args:
        index_uri: an index directory.
        model_uri: a model directory.
        config: ports, processes and limits.
        blocking: go on serving after the block until SIGINT (Ctrl-C) or SIGTERM.
        encoder: what encodes queries, as for `build`.

    Yields:
        The server's URL, once every part of it answers.

    Raises:
        ArtefactError: if the model did not make the index.
        ClusterError: if the port is taken, cores are missing or the server does not start.
    """
    config = config or ServeConfig()
    application = build(index_uri, model_uri, config, encoder=encoder)
    _check_port(config)
    with connect(), _quiet():
        _check_resources(config)
        _check_alone()
        try:
            serve.start(
                http_options={
                    "host": config.host,
                    "port": config.port,
                    # The gateway gives up first and says so in JSON.
                    "request_timeout_s": config.request_timeout_s + 10,
                },
                logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
            )
            url = _url(config)
            _deploy(application, config, url)
            yield url
            if blocking:
                _wait_for_signal()
        finally:
            _shut_down()


def _deployment(
    kind: type, replicas: int, cpus: float, threads: int, *, gpus: float = 0
) -> "serve.Deployment":
    # Waiting threads that spin take the cores from the other processes of the server.
    variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    plain: Any = serve.deployment(kind)
    deployment: serve.Deployment = plain.options(
        num_replicas=replicas,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        # A search takes milliseconds: nobody needs to wait long for the last ones.
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": variables}},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    return deployment


def _divide(shards: int, groups: int) -> list[list[int]]:
    """Numbers 0 … shards - 1 in `groups` runs of nearly equal length."""
    bounds = [round(group * shards / groups) for group in range(groups + 1)]
    return [list(range(*pair)) for pair in itertools.pairwise(bounds)]


def _deploy(application: Application, config: ServeConfig, url: str) -> None:
    deadline = time.monotonic() + config.start_timeout_s
    target = serve.RunTarget(application, name=NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    while True:
        state = serve.status().applications[NAME]
        if state.status == ApplicationStatus.RUNNING and _is_healthy(url):
            return
        if state.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise ClusterError(
                f"the server does not start: {_reason(state)}", mend="see the log of Ray Serve"
            )
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the server did not start within {config.start_timeout_s:g} s: {_reason(state)}",
                mend="free cores or memory, or raise start_timeout_s",
            )
        time.sleep(0.25)


def _reason(state: Any) -> str:
    messages = [state.message, *(part.message for part in state.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else str(state.status.value)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _url(config: ServeConfig) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _check_port(config: ServeConfig) -> None:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As a server does, so that connections of an earlier run that are still closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ClusterError(
                f"port {config.port} cannot be listened on: {error.strerror or error}",
                where=f"{config.host}:{config.port}",
                mend="stop what listens there, or choose another port (port=8001)",
            ) from None


def _check_resources(config: ServeConfig) -> None:
    # Ray would wait for them without a word.
    there = resources()
    cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
    if config.cpus > cpus:
        raise ClusterError(
            f"the server books {config.cpus:g} cores, the cluster has {cpus:g}",
            mend="lower encoder_replicas, shard_groups or the shares encoder_cpus, shard_cpus, gateway_cpus",
        )
    if config.gpus > gpus:
        raise ClusterError(
            f"the server books {config.gpus:g} GPUs, the cluster has {gpus:g}",
            mend="lower encoder_replicas or encoder_gpus",
        )


def _check_alone() -> None:
    # Address and port belong to the whole of Ray Serve on a cluster: a second server would get the first's.
    if serve.status().applications:
        raise ClusterError(
            "Ray Serve already runs on this cluster",
            mend="shut it down, or deploy there with `serve deploy` and ray_retrieval.serve.app:from_args",
        )


def _shut_down() -> None:
    # `serve.shutdown` waits in a call that the controller's end breaks off, and Ray reports that on the
    # terminal as a failure. So the controller is asked without waiting, and nothing is left for it to do.
    deadline = time.monotonic() + _SHUTDOWN_S
    with contextlib.suppress(ValueError):
        controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        ray.get(controller.graceful_shutdown.remote(wait=False), timeout=_SHUTDOWN_S)
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(0.05)
    serve.shutdown()  # type: ignore[no-untyped-call]


def _wait_for_signal() -> None:
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        asked.wait()
    former = {
        number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        # In short waits: a signal is handled between them, on every platform.
        while not asked.wait(0.2):
            pass
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Ray Serve from telling each of its steps on the terminal."""
    logger = logging.getLogger("ray.serve")
    former = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(former)
