"""The server's processes on Ray that take requests."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from fastapi import FastAPI
from ray import serve

from ray_retrieval.serve import front, maps
from ray_retrieval.serve.asking import Ask, answered, asking, everywhere, pinging
from ray_retrieval.serve.behind import PartError, Parts
from ray_retrieval.serve.config import ServeConfig, ServedIndex
from ray_retrieval.serve.gateway import Gateway
from ray_retrieval.serve.http import create_app
from ray_retrieval.serve.limits import all_of
from ray_retrieval.serve.replica import limit_threads
from ray_retrieval.serve.shards import ShardGroup
from ray_retrieval.serve.wire import Encoded, EncodeJob, GroupAnswer, GroupQuery, ModelKey, VersionKey

_PREPARE_S = 120.0


@dataclass(frozen=True)
class Handles:
    """Handles of the deployments behind one index.

    Attributes:
        encoder: of those that encode by its model.
        groups: of its groups of shards; none where gateways search themselves.
        writer: of the one that changes it; None where it may not be changed.
    """

    encoder: Any
    groups: list[Any]
    writer: Any = None


@serve.ingress()
class GatewayReplica:
    """Takes HTTP requests.

    Args:
        indexes: what is served, by name.
        handles: of what stands behind each.
        encoders: handles of those that encode by other models than the indices', by the folder of each.
        config: limits.
    """

    def __init__(
        self,
        indexes: Mapping[str, ServedIndex],
        handles: Mapping[str, Handles],
        encoders: Mapping[str, Any],
        config: ServeConfig,
    ) -> None:
        limit_threads(1)
        parts = {name: parts_of(handles[name], encoders, config) for name in indexes}
        self._gateway = Gateway(indexes, parts, config)

        # The proxy of Ray Serve names each request and its answer.
        self._app = create_app(self._gateway, config, self._gateway.measured.request, names_answers=False)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def whole(self, asked: dict[str, Any], body: bytes) -> front.Whole:
        """The answer to a request that came by the short way, see `front`."""
        return await front.whole(self._app, asked, body)


def parts_of(handles: Handles, encoders: Mapping[str, Any], config: ServeConfig) -> Parts:
    """What stands behind one index, as functions."""
    # A process may have died of the very image: once more, and no other dies of it.
    own = asking(direct(handles.encoder).encode, "encoder", again=1)
    others = {uri: asking(direct(one).encode, "encoder", again=1) for uri, one in encoders.items()}

    async def encode(job: EncodeJob, timeout_s: float) -> Encoded:
        found: Encoded = await others.get(job.model.uri, own)(job, timeout_s)
        return found

    pings = {"encoder": pinging(handles.encoder.ping, "encoder")}
    groups: list[Ask] = [asking(direct(group).search, "group") for group in handles.groups]
    pings |= {f"group {number}": pinging(group.ping, "group") for number, group in enumerate(handles.groups)}
    here = None
    if not groups:
        here = ShardGroup(0, 1, config)
        groups = [asking_here(here)]
    if handles.writer is not None:
        pings["writer"] = pinging(handles.writer.ping, "writer")

    async def prepare(key: VersionKey, models: Sequence[ModelKey]) -> list[float | str]:
        # The encoders first: of what has no model nothing needs to be opened.
        own, *beside = models
        loading = [everywhere(handles.encoder, "prepare", own, _PREPARE_S)]
        for model in beside:
            handle = encoders.get(model.uri, handles.encoder)
            loading.append(everywhere(handle, "prepare", model, _PREPARE_S))
        loaded = await all_of(loading)
        division = key, max(1, len(handles.groups))
        asked = (everywhere(group, "prepare", division, _PREPARE_S) for group in handles.groups)
        searching = await all_of(asked)
        if here is not None:
            searching.append([await here.prepare(division)])
        problems = [one for some in loaded for one in some if isinstance(one, str)]
        return [*problems, *(one for some in searching for one in some)]

    return Parts(
        encode=encode,
        groups=groups,
        prepare=prepare,
        write=None if handles.writer is None else asking(handles.writer.write, "writer", again=0),
        lay_out=_laid_out,
        pings=pings,
    )


def direct(handle: Any) -> Any:
    """A handle that asks by gRPC: it costs less than tasks of actors, whose answers are objects of Ray."""
    return handle.options(_by_reference=False)


def asking_here(group: ShardGroup) -> Ask:
    """Asks a group of shards of this process."""

    async def ask(query: GroupQuery, timeout_s: float) -> GroupAnswer:
        try:
            found: GroupAnswer = answered(await asyncio.wait_for(group.search(query), timeout_s), "group")
            return found
        except asyncio.TimeoutError:
            raise PartError("group", "late") from None

    return ask


async def _laid_out(data: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """`maps.places` in a process of its own: it would hold up the requests here."""
    try:
        found: npt.NDArray[np.float32] = await _places.remote(data)
        return found
    except ray.exceptions.RayError:
        raise PartError("map", "dead") from None


@ray.remote(num_cpus=0, max_retries=1)
def _places(data: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    os.nice(10)
    return maps.places(data)
