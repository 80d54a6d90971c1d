"""Responses of Ray Serve that nobody answers, and what an event loop has to complain of."""

import asyncio
import gc
from collections.abc import Awaitable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from ray.serve.handle import DeploymentResponse


class Silent(DeploymentResponse[Any]):
    """Ray's own response, to a question that no replica has taken."""

    def __init__(self) -> None:
        metadata: Any = SimpleNamespace(request_id="1")
        super().__init__(Future(), metadata)


async def without_complaints(work: Awaitable[Any]) -> Any:
    """The result of some work, of which no error is left that nobody has looked at."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, said: complaints.append(said["message"]))
    result = await work
    for _ in range(10):
        await asyncio.sleep(0)
    gc.collect(1)
    assert complaints == []
    return result
