"""Questions to other processes of the server: bounded in time, asked again where a process died."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc  # type: ignore[import-untyped]
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from ray_retrieval.serve.behind import PartError
from ray_retrieval.serve.limits import give_up
from ray_retrieval.serve.wire import Gone, GoneError, Late, Wrong

_NOBODY = (ReplicaUnavailableError, DeploymentUnavailableError)
_GONE = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, grpc.aio.AioRpcError, *_NOBODY)
_AGAIN_S = 0.1

Ask = Callable[[Any, float], Awaitable[Any]]


def asking(method: Any, part: str, *, again: float = math.inf) -> Ask:
    """A function that asks a deployment's method.

    Args:
        method: of a deployment's handle.
        part: `encoder` or `group` or what else it is, for errors.
        again: how often a question whose process died is asked again at most: never if it has effects, and
            not often if it may be what the process died of. Where there was no process, it was not asked.

    Returns:
        A function of the question and the seconds that an answer is waited for. It raises PartError without
        an answer, GoneError where a version is no longer there, and QueryError if the question is wrong.
    """

    async def ask(question: Any, timeout_s: float) -> Any:
        deadline, left = time.monotonic() + timeout_s, again
        while True:
            response = method.remote(question)
            try:
                answer = await _result(response, max(0.0, deadline - time.monotonic()))
                break
            except BackPressureError:
                raise PartError(part, "busy") from None
            except _GONE as error:
                # Another replica may be there, or this one again in some seconds.
                left -= not isinstance(error, _NOBODY)
                if again == 0 or left < 0 or time.monotonic() + _AGAIN_S > deadline:
                    raise PartError(part, "dead") from None
                await asyncio.sleep(_AGAIN_S)
            except asyncio.TimeoutError:
                raise PartError(part, "late") from None
        return answered(answer, part)

    return ask


def answered(answer: Any, part: str) -> Any:
    """An answer, if it is one.

    Raises:
        PartError: if it came too late for the part that was asked.
        GoneError: if what was asked for is no longer there.
        RetrievalError: if the question was wrong.
    """
    if isinstance(answer, Late):
        raise PartError(part, "late")
    if isinstance(answer, Gone):
        raise GoneError(answer.why)
    if isinstance(answer, Wrong):
        raise answer.error
    return answer


async def _result(response: Any, timeout_s: float) -> Any:
    """The answer; whoever works for it is told where it is no longer waited for.

    Raises:
        TimeoutError: if there is none in time.
        RayActorError: among others, if the process that worked for it broke it off.
    """
    answer = asyncio.ensure_future(response)
    try:
        await asyncio.wait({answer}, timeout=timeout_s)
        if answer.cancelled():
            # Nobody here has done so: a process that ends breaks off what it works on.
            raise RayActorError
        if not answer.done():
            raise asyncio.TimeoutError
        return answer.result()
    finally:
        give_up(answer, response)


def pinging(method: Any, part: str) -> Callable[[float], Awaitable[Any]]:
    """A function that asks for a sign of life within some seconds; it raises PartError without one."""

    async def ping(timeout_s: float) -> Any:
        try:
            return await _result(method.remote(), timeout_s)
        except BackPressureError:
            raise PartError(part, "busy") from None
        except _GONE:
            raise PartError(part, "dead") from None
        except asyncio.TimeoutError:
            raise PartError(part, "late") from None

    return ping


async def everywhere(handle: Any, method: str, question: Any, timeout_s: float) -> list[Any]:
    """What each replica that is there answers, or why not all have; those that die meanwhile are left out."""
    try:
        answers = await handle.broadcast(method, question).results_async(
            timeout_s=timeout_s, return_exceptions=True
        )
    except _GONE:
        return []
    except (TimeoutError, asyncio.TimeoutError):
        return [f"not every process is ready for it within {timeout_s:g} s"]
    return [answer for answer in answers if not isinstance(answer, BaseException)]
