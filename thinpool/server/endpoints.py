"""Endpoints of routes that are one call of the library: in one thread from the call to the bytes of its answer.

Handing work to a thread and back costs more than most calls do, so it happens once a request, the commit of a durable one and the encoding of
the result included.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, get_args, get_type_hints

from fastapi import Query
from fastapi.params import Depends
from fastapi.responses import Response
from pydantic import TypeAdapter

from .state import PoolOf

_THREADS = ThreadPoolExecutor(40, "thinpool-request")  # half of what FastAPI's take, which can be cancelled
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
    wanted = kinds | ({"committing": PoolOf} if changes else {})
    dependencies = {name: dependency for name, kind in wanted.items() if (dependency := _dependency(kind))}
    own = [parameter.replace(annotation=kinds[name]) for name, parameter in signature.parameters.items() if name not in dependencies]
    if changes:
        own.append(inspect.Parameter("durable", inspect.Parameter.KEYWORD_ONLY, annotation=_Durable, default=False))
    needs = {name: inspect.signature(dependency, eval_str=True).parameters for name, dependency in dependencies.items()}
    parameters = {one.name: one for one in (*(one for each in needs.values() for one in each.values()), *own)}

    def work(arguments: dict[str, Any], durable_in: Any) -> bytes:
        result = encode(function(**arguments))
        if durable_in is not None:
            durable_in.commit()
        return result

    @functools.wraps(function)
    async def endpoint(**given: Any) -> Response:
        arguments = {one.name: given[one.name] for one in own}
        for name, dependency in dependencies.items():
            arguments[name] = await dependency(**{need: given[need] for need in needs[name]})
        durable_in = arguments.pop("committing") if changes else None
        if changes and not arguments.pop("durable"):
            durable_in = None
        return Response(await asyncio.get_running_loop().run_in_executor(_THREADS, work, arguments, durable_in), media_type="application/json")

    keyword_only = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters.values()]
    endpoint.__signature__ = signature.replace(parameters=keyword_only)  # type: ignore[attr-defined]
    return endpoint


def _dependency(kind: Any) -> Callable[..., Any] | None:
    """What gets a parameter of that type. It is called here, as FastAPI's preparations for such calls take a good part of a request."""
    return next((one.dependency for one in get_args(kind)[1:] if isinstance(one, Depends)), None)
