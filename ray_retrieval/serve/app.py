"""Running the server: here until the `with` block ends, or by Ray Serve with a configuration file.

with run(named(["runs/quickstart/index"]), blocking=True) as url:
    print(url)
"""

import contextlib
import logging
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.schema import ApplicationStatus, LoggingConfig

from ray_retrieval.cluster import connect, resources
from ray_retrieval.cluster.meanwhile import quiet
from ray_retrieval.config import validate
from ray_retrieval.errors import ClusterError, RecipeError
from ray_retrieval.model import Encoder
from ray_retrieval.serve.application import LATER_S, SELDOM, SHORT_WAY, VARIABLES, bound, build, check
from ray_retrieval.serve.config import ServeConfig, ServedIndex
from ray_retrieval.serve.encoders import EncoderFactory
from ray_retrieval.serve.front import NAME

_SHUTDOWN_S = 30.0


def from_args(args: dict[str, Any]) -> Application:
    """The application for a Serve configuration file: `import_path: ray_retrieval.serve.app:from_args`.

    Args:
        args: `indexes`, for each name `index` and perhaps `model`, and any field of ServeConfig. The address
            itself is set in the file: `host` here says who can reach it.

    Raises:
        RecipeError: if a field is unknown or missing.
    """
    rest = dict(args)
    if not isinstance(rest.get("indexes"), dict):
        raise RecipeError("'indexes' is missing", where="args", mend="give it: indexes: {NAME: {index: URI}}")
    indexes = {
        str(name): validate(ServedIndex, values, where=f"args.indexes.{name}")
        for name, values in rest.pop("indexes").items()
    }
    return build(indexes, validate(ServeConfig, rest, where="args"))


@contextmanager
def run(
    indexes: Mapping[str, ServedIndex],
    config: ServeConfig | None = None,
    *,
    blocking: bool = False,
    encoder: EncoderFactory = Encoder,
    starting: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """Serve for as long as the `with` block lasts. Prints nothing.

    Args:
        indexes: by the names that clients know them by.
        config: ports, processes and limits.
        blocking: go on serving after the block until SIGINT (Ctrl-C) or SIGTERM.
        encoder: what encodes queries, as for `build`.
        starting: called once all is checked, before anything is started, which takes a while.

    Yields:
        The server's URL, once every part of it answers.

    Raises:
        ArtefactError: if a model did not make its index.
        ClusterError: if the port is taken, cores are missing or the server does not start.
    """
    config = config or ServeConfig()
    checked = check(indexes, config)
    application, models = bound(checked, encoder=encoder), len(checked.models)
    _check_port(config)
    starting()
    # Ray Serve tells each of its steps on the terminal.
    with connect(), quiet("ray.serve", below=logging.WARNING):
        _check_resources(config, len(indexes), models)
        _check_alone()
        try:
            serve.start(
                http_options={
                    "host": config.host,
                    "port": config.port,
                    # The gateway gives up first and says so in JSON.
                    "request_timeout_s": config.request_timeout_s + LATER_S,
                },
                logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
                controller_options={"runtime_env": {"env_vars": {**VARIABLES, **SHORT_WAY, **SELDOM}}},
            )
            url = _url(config)
            _deploy(application, config, url)
            yield url
            if blocking:
                _wait_for_signal()
        finally:
            _shut_down()


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
    # Not by a proxy of the environment, which knows another 127.0.0.1.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/readyz", timeout=10) as answer:
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


def _check_resources(config: ServeConfig, indexes: int, models: int) -> None:
    # Ray would wait for them without a word.
    there = resources()
    cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
    if config.cpus(indexes, models) > cpus:
        raise ClusterError(
            f"the server books {config.cpus(indexes, models):g} cores, the cluster has {cpus:g}",
            mend="lower encoder_replicas, shard_groups or the shares encoder_cpus, shard_cpus, gateway_cpus",
        )
    if config.gpus(models) > gpus:
        raise ClusterError(
            f"the server books {config.gpus(models):g} GPUs, the cluster has {gpus:g}",
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
