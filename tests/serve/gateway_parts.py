"""A gateway over functions of this process, in the place of encoders, groups of shards and the writer."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from serving_parts import AverageHash, Served, picture

from ray_retrieval.serve.answers import SearchAnswer
from ray_retrieval.serve.backend import ImageExample, SearchRequest
from ray_retrieval.serve.behind import Addition, PartError, Parts, Removal, Written
from ray_retrieval.serve.config import ServeConfig, ServedIndex
from ray_retrieval.serve.deployments import asking_here
from ray_retrieval.serve.encoders import EncoderFactory, EncoderReplica
from ray_retrieval.serve.gateway import Gateway
from ray_retrieval.serve.shards import ShardGroup
from ray_retrieval.serve.versions import current_key
from ray_retrieval.serve.wire import Encoded, EncodeJob, GroupAnswer, GroupQuery, ModelKey, VersionKey
from ray_retrieval.serve.writing import written_by
from ray_retrieval.storage import Folder


def image(seed: int, *, box: Any = None) -> ImageExample:
    return ImageExample(picture(seed), "PNG", 16, 16, box)


def soon(seconds: float = 60) -> float:
    return time.monotonic() + seconds


@dataclass
class Behind:
    """What stands behind the gateway; groups can be made to fail.

    Attributes:
        down: numbers of groups that do not answer.
        prepared: versions that the groups were told to open.
        models: that the encoder was told to load.
        refusing: why versions cannot be opened.
        changes: that were asked for.
    """

    groups: list[ShardGroup]
    encoder: EncoderReplica
    down: set[int] = field(default_factory=set)
    slow: dict[int, float] = field(default_factory=dict)
    prepared: list[int] = field(default_factory=list)
    asked: list[GroupQuery] = field(default_factory=list)
    models: list[ModelKey] = field(default_factory=list)
    refusing: list[str] = field(default_factory=list)
    changes: list[Addition | Removal] = field(default_factory=list)

    def group(self, number: int) -> Callable[[GroupQuery, float], Awaitable[GroupAnswer]]:
        ask = asking_here(self.groups[number])

        async def search(query: GroupQuery, timeout_s: float) -> GroupAnswer:
            self.asked.append(query)
            if number in self.down:
                raise PartError("group", "dead")
            if wait := self.slow.get(number):
                await asyncio.sleep(min(wait, timeout_s))
                if wait >= timeout_s:
                    raise PartError("group", "late")
            found: GroupAnswer = await ask(query, timeout_s)
            return found

        return search

    def ping(self, number: int) -> Callable[[float], Awaitable[int]]:
        async def ping(timeout_s: float) -> int:
            if number in self.down:
                raise PartError("group", "dead")
            return number

        return ping

    async def prepare(self, key: VersionKey, models: Sequence[ModelKey]) -> list[float | str]:
        self.prepared.append(key.number)
        self.models += models
        loaded = [await self.encoder.prepare(model) for model in models]
        opened = [await group.prepare((key, len(self.groups))) for group in self.groups]
        return [*(one for one in loaded if isinstance(one, str)), *self.refusing, *opened]


def gateway_over(
    served: Served,
    *,
    groups: int = 2,
    config: ServeConfig | None = None,
    encoder: EncoderFactory = AverageHash,
) -> tuple[Gateway, Behind]:
    """A gateway of the index `x`, made on the running loop."""
    config = config or ServeConfig()
    config = config.model_copy(update={"shard_groups": groups})
    uri = Folder(served.index).uri
    replica = EncoderReplica(ModelKey(Folder(served.model).uri, current_key(uri).model), encoder, config)
    behind = Behind([ShardGroup(number, groups, config) for number in range(groups)], replica)

    async def encode(job: EncodeJob, timeout_s: float) -> Encoded:
        found = await asyncio.wait_for(replica.encode(job), timeout_s)
        assert isinstance(found, Encoded)
        return found

    thread = ThreadPoolExecutor(1)

    async def write(request: Addition | Removal, timeout_s: float) -> Written:
        behind.changes.append(request)
        return await written_by(thread, request)

    pings = {f"group {number}": behind.ping(number) for number in range(groups)}
    parts = Parts(
        encode, [behind.group(number) for number in range(groups)], behind.prepare, write, pings=pings
    )
    given = ServedIndex(index=served.index, model=served.model)
    return Gateway({"x": given}, {"x": parts}, config), behind


async def search(gateway: Gateway, *examples: Any, k: int = 10, **more: Any) -> SearchAnswer:
    return await gateway.search(SearchRequest(examples, k=k, **more), deadline=soon())


def rows(answer: SearchAnswer) -> list[int]:
    return [hit.row for hit in answer.hits]
