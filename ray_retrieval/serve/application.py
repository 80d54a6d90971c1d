"""The server as one Ray Serve application: which deployments there are, and how they are bound together.

Nothing is started here: `app.run` does, or Ray Serve with the file that `serve_config` makes.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from ray_retrieval.compute import ONE_ARENA
from ray_retrieval.data import location
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.engines import find_export
from ray_retrieval.errors import RecipeError
from ray_retrieval.model import Encoder
from ray_retrieval.search import Index
from ray_retrieval.search.rerank import GeometricVerificationConfig
from ray_retrieval.serve.config import ServeConfig, ServedIndex
from ray_retrieval.serve.deployments import GatewayReplica, Handles
from ray_retrieval.serve.encoders import EncoderFactory, EncoderReplica
from ray_retrieval.serve.front import GATEWAY, NAME
from ray_retrieval.serve.keys import check_exposure, read_keys
from ray_retrieval.serve.rerankings import beside, check_offered
from ray_retrieval.serve.rolling import model_key
from ray_retrieval.serve.shards import ShardGroup
from ray_retrieval.serve.versions import current_key, key_of
from ray_retrieval.serve.wire import ModelKey, VersionKey
from ray_retrieval.serve.writers import WriterReplica
from ray_retrieval.storage import Folder

_log = logging.getLogger(__name__)
LATER_S = 10.0
"""So much later than the gateway gives up, Ray does: the gateway says so in JSON."""

VARIABLES = {
    # All that takes long is done in threads here, so one event loop does, and no request changes threads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Proxies ask gateways by gRPC instead of tasks of actors, which cost more.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # Requests and answers are bounded here.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}
"""The environment of Ray Serve's own processes, which the server's processes inherit; without it a server
does the same, and slower."""

SHORT_WAY = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ray_retrieval.serve.front:middlewares"}
"""Likewise, where every process of Ray Serve can import this package; without that no proxy would start."""

SELDOM = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5"}
"""Likewise, where the server starts Ray Serve itself: its controller's usual ten looks a second take a sixth
of a core, which searches may need."""

_SLACK = 64
"""Requests that a gateway takes beside its searches: the page, thumbnails, health, and refusals in JSON."""
_NAME = re.compile(r"[\w-][\w.-]*")


def build(
    indexes: Mapping[str, ServedIndex],
    config: ServeConfig | None = None,
    *,
    encoder: EncoderFactory = Encoder,
) -> Application:
    """The application that serves indices through the models that made them. Nothing is started yet.

    Args:
        indexes: by the names that clients know them by; the first is searched where none is named.
        config: ports, processes and limits.
        encoder: what encodes queries, called as `encoder(model_uri, threads=…, batch_size=…, engine=…)`.

    Raises:
        ArtefactError: if an index or its model is missing or damaged, they do not belong together, a
            re-ranking suits no index, or there is no export of a model for the engine.
        RecipeError: if there are fewer shards than groups of shards, or others may reach the server and
            nothing guards it.
    """
    return bound(check(indexes, config), encoder=encoder)


@dataclass(frozen=True)
class Checked:
    """A server that was found to be in order, before anything of it is started.

    Attributes:
        config: of it.
        indexes: by their names.
        beside: the models of local features by which indices of vectors are verified, by those of these.
    """

    config: ServeConfig
    indexes: "Mapping[str, _Checked]"
    beside: Mapping[str, ModelKey]

    @property
    def models(self) -> dict[str, ModelKey]:
        """All models that are loaded, by their fingerprints."""
        return {
            model.fingerprint: model
            for model in (*self.beside.values(), *(one.model for one in self.indexes.values()))
        }


def check(indexes: Mapping[str, ServedIndex], config: ServeConfig | None = None) -> Checked:
    """Look whether all is there that a server needs; arguments and errors are those of `build`."""
    config = config or ServeConfig()
    check_exposure(config)
    if config.api_keys is not None:
        read_keys(config.api_keys)
    found = {name: _checked(name, served, config) for name, served in indexes.items()}
    if not found:
        raise RecipeError("no index is named", where="indexes", mend="name one")
    check_offered(config, {name: one.kind for name, one in found.items()})
    checked = Checked(config, found, _beside(found.values(), config))
    if config.engine != "torch":
        for model in checked.models.values():
            find_export(Folder(model.uri), model.fingerprint, config.engine)
    return checked


def bound(checked: Checked, *, encoder: EncoderFactory = Encoder) -> Application:
    """The application of a server that was checked."""
    config, found = checked.config, checked.indexes
    writer = _writer(config) if config.writable else None
    encoders: dict[str, Application] = {}
    for name, one in found.items():
        if one.model.fingerprint not in encoders:
            encoders[one.model.fingerprint] = _encoder(name, one.model, one.key.uri, config, encoder)
    for index, model in checked.beside.items():
        if model.fingerprint not in encoders:
            named = f"local-{model.fingerprint[:8]}"
            encoders[model.fingerprint] = _encoder(named, model, index, config, encoder)
    handles = {
        name: Handles(
            encoders[one.model.fingerprint],
            [_group(name, number, one.key, config) for number in range(config.shard_groups)],
            writer,
        )
        for name, one in found.items()
    }
    # By their folders, where another model may lie some day.
    others = {model.uri: encoders[model.fingerprint] for model in checked.beside.values()}
    requests = config.max_ongoing + config.max_queued
    gateways = _deployment(GatewayReplica, GATEWAY, config.gateway_cpus, 1, config.gateway_replicas)
    gateways = gateways.options(
        max_ongoing_requests=requests + _SLACK,
        max_queued_requests=requests + _SLACK,
        max_surge_percent=config.surge_percent,
    )
    served = {name: ServedIndex(index=one.key.uri, model=one.given) for name, one in found.items()}
    return gateways.bind(served, handles, others, config)


def named(indexes: Sequence[str], model: str | None = None) -> dict[str, ServedIndex]:
    """Indices as the command line names them: `NAME=INDEX`, or `INDEX`, which is called as its run.

    Args:
        indexes: `runs/quickstart/index` is called `quickstart`, `big/faces` is called `faces`.
        model: that made them; None: each is looked for beside its index.

    Raises:
        RecipeError: if two have the same name.
    """
    found: dict[str, ServedIndex] = {}
    for one in indexes:
        name, equals, uri = one.partition("=")
        if not equals or "/" in name:
            uri = one
            folder = Folder(uri)
            name = location.name_of(
                folder.parent.uri if location.name_of(folder.uri) == "index" else folder.uri
            )
        if name in found:
            raise RecipeError(f"two indices are called '{name}'", where=one, mend=f"name it: OTHER={uri}")
        found[name] = ServedIndex(index=uri, model=model)
    return found


def serve_config(indexes: Mapping[str, ServedIndex], config: ServeConfig) -> dict[str, Any]:
    """What `serve deploy` takes, as plain values: this server on a cluster."""
    given = {
        name: {
            "index": Folder(one.index).uri,
            **({} if one.model is None else {"model": Folder(one.model).uri}),
        }
        for name, one in indexes.items()
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": config.host,
            "port": config.port,
            "request_timeout_s": config.request_timeout_s + LATER_S,
        },
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "controller_options": {"runtime_env": {"env_vars": dict(VARIABLES)}},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": "ray_retrieval.serve.app:from_args",
                "args": {"indexes": given, **_settings(_anywhere(config))},
            }
        ],
    }


def _settings(config: ServeConfig) -> dict[str, Any]:
    """What is set otherwise than by default, as plain values; steps of re-ranking keep their names."""
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"port"})
    if config.rerank:
        settings["rerank"] = {
            name: [
                {"name": step.name, **step.model_dump(mode="json", exclude_defaults=True)} for step in steps
            ]
            for name, steps in config.rerank.items()
        }
    return settings


def _anywhere(config: ServeConfig) -> ServeConfig:
    """The same with whole paths: processes on a cluster run in folders of their own."""
    rerank = {
        name: tuple(
            step.model_copy(update={"local": Folder(step.local).uri})
            if isinstance(step, GeometricVerificationConfig) and step.local
            else step
            for step in steps
        )
        for name, steps in config.rerank.items()
    }
    keys = None if config.api_keys is None else os.path.abspath(config.api_keys)
    return config.model_copy(update={"rerank": rerank, "api_keys": keys})


@dataclass(frozen=True)
class _Checked:
    """An index that was found to be in order: where its model was said to be, and what both are."""

    given: str | None
    key: VersionKey
    model: ModelKey
    kind: DescriptorKind


def _checked(name: str, served: ServedIndex, config: ServeConfig) -> _Checked:
    if _NAME.fullmatch(name) is None:
        raise RecipeError(
            f"'{name}' is no name for an index",
            where=served.index,
            mend="take letters, digits, '-', '_' and, not at the beginning, '.': NAME=INDEX",
        )
    index = Index.open(Folder(served.index))
    unmeasured = index.manifest.otherwise_encoded(config.engine)
    if unmeasured is not None:
        _log.warning("%s: %s", name, unmeasured)
    key = key_of(Folder(served.index).uri, index.manifest)
    model = model_key(served, key)
    shards = len(index.manifest.shards)
    if config.shard_groups > shards:
        raise RecipeError(
            f"shard_groups is {config.shard_groups}, the index has {shards} shards",
            where=served.index,
            mend=f"set shard_groups to {shards} at most, or build the index with more shards",
        )
    given = None if served.model is None else Folder(served.model).uri
    return _Checked(given, key, model, index.form.kind)


def _beside(found: Iterable[_Checked], config: ServeConfig) -> dict[str, ModelKey]:
    """The models of local features by which indices of vectors are verified, by those of these."""
    uris = {Folder(uri).uri for one in found for uri in beside(config, one.kind)}
    return {uri: model_key(ServedIndex(index=uri), current_key(uri)) for uri in sorted(uris)}


def _encoder(
    name: str, model: ModelKey, index: str, config: ServeConfig, factory: EncoderFactory
) -> Application:
    requests = config.max_ongoing + config.max_queued
    # Named after the index and not the model: one that is deployed anew takes over from the one before.
    deployment = _deployment(
        EncoderReplica,
        f"Encoder-{name}",
        config.encoder_cpus,
        config.encoder_threads,
        config.encoder_replicas,
        gpus=config.encoder_gpus,
        up_to=config.encoder_replicas_max,
        target=config.encoder_target_ongoing,
        variables=ONE_ARENA,  # they encode in another thread than the first
    ).options(
        max_ongoing_requests=max(config.max_ongoing, 2 * config.encoder_batch),
        max_queued_requests=requests,
        max_surge_percent=0 if config.encoder_gpus else config.surge_percent,
    )
    return deployment.bind(model, factory, config, index)


def _group(name: str, number: int, key: VersionKey, config: ServeConfig) -> Application:
    requests = config.max_ongoing + config.max_queued
    deployment = _deployment(
        ShardGroup, f"Shards-{name}-{number}", config.shard_cpus, config.shard_threads, config.shard_replicas
    ).options(
        max_ongoing_requests=2 * requests,
        max_queued_requests=requests,
        max_surge_percent=config.surge_percent,
    )
    return deployment.bind(number, config.shard_groups, config, key)


def _writer(config: ServeConfig) -> Application:
    deployment = _deployment(WriterReplica, "Writer", 0, 1, 1)
    # Ray takes no queue of none, and counts in it whatever is on its way.
    requests = config.max_ongoing + config.max_queued
    return deployment.options(max_ongoing_requests=config.max_ongoing, max_queued_requests=requests).bind()


def _deployment(
    kind: type,
    name: str,
    cpus: float,
    threads: int,
    replicas: int,
    *,
    gpus: float = 0,
    up_to: int | None = None,
    target: float = 1.0,
    variables: Mapping[str, str] | None = None,
) -> "serve.Deployment":
    environment = {
        **(variables or {}),
        "OMP_NUM_THREADS": str(threads),
        # Waiting threads that spin take the cores from the other processes of the server.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Ray shows the GPUs of a node to everybody on it, also to those that have booked none.
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        # Of a controller that runs already they may be others.
        **VARIABLES,
    }
    plain: Any = serve.deployment(kind)
    many: dict[str, Any] = {"num_replicas": replicas}
    if up_to is not None:
        many = {
            "autoscaling_config": {
                "min_replicas": replicas,
                "max_replicas": up_to,
                "target_ongoing_requests": target,
            }
        }
    deployment: serve.Deployment = plain.options(
        name=name,
        **many,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        # A search takes milliseconds: nobody needs to wait long for the last ones.
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=10,
        # A replica that hangs is replaced; one that dies is noticed anyway.
        health_check_period_s=5,
        health_check_timeout_s=20,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": environment}},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    return deployment
