"""The HTTP application: the library's interface as routes, over one open pool.

Every route calls one method of the pool or of a layer, in a thread; the engine lets go of the GIL, so requests run side
by side. Errors travel as JSON (``wire``) with a fitting status. Nothing passes a closed :class:`~.state.Gate`.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from .. import errors
from ..api import PoolAPI
from . import layer_routes, metrics, page, pool_routes, verb_routes
from .state import Gate, LayerTable
from .transport import STOPPING
from .wire import API, encode_error

_STATUS: dict[type[Exception], int] = {
    errors.LayerNotFound: 404,
    errors.ImageNotFound: 404,
    errors.ContainerNotFound: 404,
    errors.LayerDeleted: 410,
    errors.LayerExists: 409,
    errors.LayerBusy: 409,
    errors.ImageBusy: 409,
    errors.LayerState: 409,
    errors.LayerSealed: 409,
    errors.NeedsRoot: 403,
    errors.OutOfRange: 416,
    errors.OutOfSpace: 507,
    ValueError: 400,
    TypeError: 400,
}


class _Gatekeeper:
    """ASGI middleware: turns requests away at a closed gate, and counts the others until their last byte is sent."""

    def __init__(self, app: Any, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._gate.closed:
            await JSONResponse({}, status_code=STOPPING)(scope, receive, send)
        else:
            with self._gate.at_work():
                await self._app(scope, receive, send)


async def _answer_error(_request: Request, error: Exception) -> JSONResponse:
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
    return JSONResponse({"error": encode_error(error)}, status_code=status)


async def _answer_bad_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return await _answer_error(request, TypeError(f"{where}: {first['msg']}"))


def create_app(pool: PoolAPI, gate: Gate) -> FastAPI:
    """The application that serves ``pool`` behind ``gate``."""
    app = FastAPI(title="thinpool", docs_url=None, redoc_url=None)
    app.state.pool = pool
    app.state.gate = gate
    app.state.layers = LayerTable(pool)
    app.include_router(pool_routes.router, prefix=API)
    app.include_router(layer_routes.router, prefix=API)
    app.include_router(verb_routes.router, prefix=API)
    app.include_router(metrics.router)
    app.include_router(page.router)
    app.add_exception_handler(RequestValidationError, _answer_bad_request)
    for kind in (errors.ThinpoolError, OSError, ValueError, TypeError):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(Exception, _answer_error)  # a bug of ours, which uvicorn logs besides
    app.add_middleware(_Gatekeeper, gate=gate)
    return app
