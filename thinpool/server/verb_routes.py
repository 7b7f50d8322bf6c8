"""Routes of images and containers: a method of their interface is a verb, and its arguments are the request's body.

Which methods can be asked for is said here; which arguments they take is what :mod:`thinpool.api` says. Verbs that tell
their progress are streamed (``streams``), and stop when their client goes away.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from ..api import ContainersAPI, Credentials, ImagesAPI, PoolAPI, Progress
from .state import GateOf, PoolOf
from .streams import work_lines
from .wire import Json, encode_result

_VERBS: dict[str, tuple[Callable[..., Any], ...]] = {
    "images": (
        ImagesAPI.load,
        ImagesAPI.pull,
        ImagesAPI.push,
        ImagesAPI.save,
        ImagesAPI.commit,
        ImagesAPI.get,
        ImagesAPI.list,
        ImagesAPI.inspect,
        ImagesAPI.history,
        ImagesAPI.tag,
        ImagesAPI.untag,
        ImagesAPI.remove,
        ImagesAPI.gc,
    ),
    "containers": (
        ContainersAPI.create,
        ContainersAPI.get,
        ContainersAPI.list,
        ContainersAPI.remove,
        ContainersAPI.reset,
        ContainersAPI.resize,
        ContainersAPI.diff,
        ContainersAPI.copy_out,
        ContainersAPI.copy_in,
        ContainersAPI.configuration,
    ),
}
_SIGNATURES = {(api, method.__name__): inspect.signature(method) for api, methods in _VERBS.items() for method in methods}

router = APIRouter()


@router.post("/{api}/{verb}")
async def do(gate: GateOf, pool: PoolOf, api: str, verb: str, arguments: Annotated[Json, Body()]) -> Response:
    """Does it."""
    signature = _SIGNATURES.get((api, verb))
    if signature is None:
        raise HTTPException(404)
    signature.bind(None, **arguments)  # raises TypeError
    if arguments.get("credentials") is not None:
        arguments["credentials"] = Credentials(**arguments["credentials"])

    def work(**progress: Progress) -> Any:
        return encode_result(getattr(_target(pool, api), verb)(**arguments, **progress))

    if "progress" in signature.parameters:
        return work_lines(gate, lambda progress: work(progress=progress))
    return JSONResponse(await run_in_threadpool(work))


def _target(pool: PoolAPI, api: str) -> ImagesAPI | ContainersAPI:
    return pool.images if api == "images" else pool.containers
