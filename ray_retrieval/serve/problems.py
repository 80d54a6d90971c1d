"""What goes wrong, as the server says it: {"error": {"problem", "where", "mend", "status"}}."""

import logging
import math

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import ErrorAnswer, Problem
from ray_retrieval.serve.changing import ChangeError
from ray_retrieval.serve.limits import RateError

_log = logging.getLogger(__name__)


def add_handlers(app: FastAPI) -> None:
    """Let all errors of an application be answered so."""
    app.add_exception_handler(QueryError, _answer_query_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)


def answer_of(error: QueryError) -> JSONResponse:
    """The answer for a refusal."""
    answer = _answer(error.status, error.problem, error.where, error.mend)
    if isinstance(error, RateError):
        answer.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.status == 503 and not isinstance(error, ChangeError):
        answer.headers["Retry-After"] = "1"
    elif error.status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def answer_of_bug(method: str, path: str, error: BaseException) -> JSONResponse:
    """The answer where the server itself is wrong."""
    # What went wrong inside may name files of this machine: that is for its log, not for the client.
    _log.error("%s %r failed", method, path, exc_info=error)
    return _answer(500, "the server failed to answer", None, "see the log of the server")


def _answer(status: int, problem: str, where: str | None, mend: str | None) -> JSONResponse:
    body = Problem(problem=problem, where=where, mend=mend, status=status)
    return JSONResponse(ErrorAnswer(error=body).model_dump(), status_code=status)


async def _answer_query_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, QueryError)
    return answer_of(error)


async def _answer_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    message = str(first["msg"])
    return _answer(422, message[:1].lower() + message[1:], str(first["loc"][-1])[:200], "see /docs")


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = _answer(error.status_code, str(error.detail), request.scope["path"][:200], "see /docs")
    answer.headers.update(error.headers or {})
    return answer


async def _answer_disconnect(_: Request, __: Exception) -> Response:
    return _answer(400, "the client went away while it was sending", None, None)
