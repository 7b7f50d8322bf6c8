"""Endpoints of routes that are one call of the library: in one thread from the call to the bytes of its answer.

Handing work to a thread and back costs more than most calls do, so it happens once a request, the commit of a durable one and the encoding of
the result included.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from fastapi import Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import TypeAdapter

from .state import PoolOf

_Durable = Annotated[bool, Query(description="Answer only once it survives a power cut.")]


def call(function: Callable[..., Any]) -> Callable[..., Any]:
    """The endpoint of a route that changes nothing; the result is what the function's annotation says."""
    return _endpoint(function, changes=False)


def change(function: Callable[..., Any]) -> Callable[..., Any]:
    """The endpoint of a route that changes something: takes ``?durable=true`` too."""
    return _endpoint(function, changes=True)


def _endpoint(function: Callable[..., Any], *, changes: bool) -> Callable[..., Any]:
    kinds = get_type_hints(function, include_extras=True)
    encode = TypeAdapter(kinds.pop("return")).dump_json
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=kinds[name], kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in signature.parameters.items()]

    def work(arguments: dict[str, Any], durable_in: Any) -> bytes:
        result = encode(function(**arguments))
        if durable_in is not None:
            durable_in.commit()
        return result

    @functools.wraps(function)
    async def endpoint(**arguments: Any) -> Response:
        durable_in = arguments.pop("committing") if changes else None
        if changes and not arguments.pop("durable"):
            durable_in = None
        return Response(await run_in_threadpool(work, arguments, durable_in), media_type="application/json")

    if changes:
        parameters.append(inspect.Parameter("durable", inspect.Parameter.KEYWORD_ONLY, annotation=_Durable, default=False))
        parameters.append(inspect.Parameter("committing", inspect.Parameter.KEYWORD_ONLY, annotation=PoolOf))
    endpoint.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return endpoint
