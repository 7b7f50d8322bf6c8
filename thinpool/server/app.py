"""The HTTP application: the library's interface as routes, over one open pool.

Every route calls one method of the pool or of a layer, in a thread; the engine lets go of the GIL, so requests run side
by side. Errors travel as JSON (``wire``) with a fitting status. Nothing passes a closed :class:`~.state.Gate`. ``schema`` says what
``/openapi.json`` has beyond the routes' own signatures.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .. import errors
from ..pool import Pool
from . import layer_routes, metrics, page, pool_routes, schema, verb_routes
from .answers import failure, refusal
from .state import Gate, LayerTable
from .tcp import TcpListeners
from .transport import STOPPING
from .wire import API, BODY_BYTES_MAX, STATE_HEADER, encode_error

# The first that fits counts.
_STATUS: dict[type[Exception], int] = {
    errors.LayerNotFound: 404,
    errors.ImageNotFound: 404,
    errors.ContainerNotFound: 404,
    errors.LayerDeleted: 404,
    errors.LayerExists: 409,
    errors.LayerBusy: 409,
    errors.ImageBusy: 409,
    errors.BackupHeld: 409,
    errors.LayerState: 409,
    errors.LayerSealed: 409,
    errors.NeedsRoot: 403,
    errors.OutOfRange: 416,
    errors.PoolClosed: STOPPING,
    errors.RegistryError: 502,
    FileNotFoundError: 404,
    PermissionError: 403,
    FileExistsError: 409,
    RequestValidationError: 422,
    ValueError: 400,
    TypeError: 400,
}
_STATUS_OF_ERRNO = {
    **dict.fromkeys(errors.NO_SPACE_ERRNOS, 507),
    **dict.fromkeys((errno.EINVAL, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EADDRINUSE, errno.EADDRNOTAVAIL), 400),
}


def _status_of(error: Exception) -> int:
    by_kind = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
    return _STATUS_OF_ERRNO.get(error.errno, by_kind) if isinstance(error, OSError) and error.errno is not None else by_kind


class _Gatekeeper:
    """ASGI middleware: turns requests away at a closed gate, and counts the others until their last byte is sent. Each answer says what is committed."""

    def __init__(self, app: Any, gate: Gate, pool: Pool, identity: str) -> None:
        self._app = app
        self._gate = gate
        self._pool, self._identity = pool, identity

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._gate.closed:
            await refusal(STOPPING, "ServerStopping", "the server is about to stop: connect again")(scope, receive, send)
        else:
            with self._gate.at_work():
                await (_body_refused(dict(scope["headers"])) or self._app)(scope, receive, partial(self._send, send))

    async def _send(self, send: Any, message: Any) -> None:
        if message["type"] == "http.response.start":
            info = self._pool.engine.info()
            needed = info.txn if info.dirty else info.txn - 1  # which may be being committed
            state = f"{self._identity} {needed} {info.durable_txn}"
            message["headers"].append((STATE_HEADER.lower().encode(), state.encode()))
        await send(message)


def _body_refused(headers: Mapping[bytes, bytes]) -> Response | None:
    """The answer to a body that is too long, or may be."""
    if b"transfer-encoding" in headers:
        return refusal(411, "LengthRequired", "a request says how long its body is")
    if int(headers.get(b"content-length", b"0")) > BODY_BYTES_MAX:
        return refusal(413, "BodyTooLarge", f"a request's body has up to {BODY_BYTES_MAX} bytes: send it in pieces")
    return None


async def _answer_error(_request: Request, error: Exception) -> Response:
    return failure(_status_of(error), encode_error(error))


async def _answer_bad_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return refusal(422, "TypeError", f"{where}: {first['msg']}" if where else first["msg"])


async def _answer_no_route(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, "NoSuchRoute" if error.status_code in (404, 405) else "ValueError", str(error.detail), error.headers)


def create_app(pool: Pool, gate: Gate, tcp: TcpListeners, identity: str = "") -> FastAPI:
    """The application that serves ``pool`` behind ``gate``; ``tcp``: where it can be asked to be served too; ``identity``: of this server."""
    app = FastAPI(
        title="thinpool",
        version=API.removeprefix("/"),
        description="A thinpool pool: layers, images and containers. Sizes and offsets are bytes, times seconds since 1970.",
        docs_url=None,
        redoc_url=None,
    )
    app.state.pool = pool
    app.state.gate = gate
    app.state.tcp = tcp
    app.state.layers = LayerTable(pool)
    for module in (layer_routes, pool_routes, verb_routes, metrics, page):  # one list: FastAPI's included routers are searched twice, each to its end
        app.router.routes.extend(module.router.routes)
    app.add_exception_handler(RequestValidationError, _answer_bad_request)
    app.add_exception_handler(HTTPException, _answer_no_route)
    for kind in (errors.ThinpoolError, OSError, ValueError, TypeError, ClientDisconnect):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(Exception, _answer_error)  # a bug of ours, which uvicorn logs besides
    app.add_middleware(_Gatekeeper, gate=gate, pool=pool, identity=identity)
    app.openapi = partial(schema.describe, app)  # type: ignore[method-assign]
    return app
