"""A change of an index, from the gateway that is asked for it: written, published and served, or what not."""

import asyncio

from ray_retrieval.errors import QueryError, RetrievalError
from ray_retrieval.serve.behind import Addition, PartError, Removal, Write, Written
from ray_retrieval.serve.rolling import Live
from ray_retrieval.serve.searching import Call

BEGUN = 0.8
"""Share of the time that is left after which a change is not begun."""
_ANSWERED = 0.95
"""Share of it after which it is given up here, so that clients are told what may have become of it."""


class ChangeError(QueryError):
    """A change whose sending again does not help: it has been published, or may have been."""


async def published(call: Call, write: Write, request: Addition | Removal) -> tuple[Written, Live]:
    """A change that is written, and the version that is served with it.

    Raises:
        ChangeError: 503 if it may have been published, or was and is not served.
        QueryError: if it is refused.
    """
    try:
        written = await write(request, _ANSWERED * call.left())
    except PartError as error:
        if error.why == "busy":
            raise
        raise ChangeError(
            "no word of the change: it may still be published", mend="look before you try again", status=503
        ) from None
    unserved = ChangeError(
        f"published as version {written.number}, not served",
        mend="do not send it again; it is served as soon as every part of the server can open it",
        status=503,
    )
    try:
        now = await asyncio.wait_for(call.rolling.refresh(force=True), _ANSWERED * call.left())
    except (RetrievalError, asyncio.TimeoutError, TimeoutError):
        raise unserved from None
    if now.key.number < written.number:
        raise unserved
    return written, now
