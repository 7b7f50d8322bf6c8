"""Routes of images and containers: a method of their interface is a route, and its arguments are the request's body.

Which methods can be asked for is said here; which arguments they take and what they give is what :mod:`thinpool.api` says. Methods
that tell their progress are streamed (``streams``), and stop when their client goes away.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from fastapi import APIRouter, Body
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, create_model

from ..api import ContainersAPI, Credentials, ImagesAPI, PoolAPI, Progress
from .remote import RemoteContainers, RemoteImages
from .schema import failures, lines_of, operation_id
from .state import Gate, GateOf, HostPath, PoolOf, SizeValue
from .streams import work_lines
from .wire import API, encode_result

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
# How the types of arguments are taken from JSON; all others as they are.
_TAKEN_AS: dict[Any, Any] = {
    str | Path: HostPath,
    int | str: SizeValue,
    int | str | None: SizeValue | None,
    Credentials | None: Annotated[Credentials, BeforeValidator(TypeAdapter(Credentials).validate_python)] | None,
}
_WITH_REGISTRIES = (ImagesAPI.pull, ImagesAPI.push)
_DOCUMENTED = {"images": RemoteImages, "containers": RemoteContainers}

router = APIRouter(prefix=API, generate_unique_id_function=operation_id)


def _body_model(about: str, method: Callable[..., Any], hints: dict[str, Any]) -> type[BaseModel]:
    """The request's body: the method's arguments."""
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(method).parameters.items():
        if name in hints:
            kind = _TAKEN_AS.get(hints[name], hints[name])
            if get_origin(kind) is Literal:  # what else it may not be is for the library to say
                kind = Annotated[str, Field(json_schema_extra={"enum": list(get_args(kind))})]
            fields[name] = (kind, ... if parameter.default is parameter.empty else parameter.default)
    name = f"{about}_{method.__name__}".title().replace("_", "")
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _endpoint(about: str, verb: str, body: type[BaseModel], *, streamed: bool) -> Callable[..., Any]:
    """What answers the route."""

    def work(pool: PoolAPI, arguments: BaseModel, **progress: Progress) -> Any:
        given = {name: getattr(arguments, name) for name in body.model_fields}
        return encode_result(getattr(getattr(pool, about), verb)(**given, **progress))

    async def stream(gate: Gate, pool: PoolAPI, arguments: BaseModel) -> Response:
        return await work_lines(gate, lambda progress: work(pool, arguments, progress=progress))

    async def answer(pool: PoolAPI, arguments: BaseModel) -> Response:
        return JSONResponse(await run_in_threadpool(work, pool, arguments))

    optional = all(not field.is_required() for field in body.model_fields.values())
    kinds: dict[str, Any] = {"gate": GateOf} if streamed else {}
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in (kinds | {"pool": PoolOf}).items()]
    default = Body(default_factory=body) if optional else inspect.Parameter.empty
    parameters.append(inspect.Parameter("arguments", inspect.Parameter.KEYWORD_ONLY, annotation=body, default=default))
    endpoint: Any = stream if streamed else answer
    endpoint.__signature__ = inspect.Signature(parameters)
    return cast(Callable[..., Any], endpoint)


def _add(about: str, method: Callable[..., Any]) -> None:
    """The route of one method."""
    verb = method.__name__
    hints = get_type_hints(method)
    result = hints.pop("return")
    streamed = hints.pop("progress", None) is not None
    router.add_api_route(
        f"/{about}/{verb}",
        _endpoint(about, verb, _body_model(about, method, hints), streamed=streamed),
        methods=["POST"],
        name=verb,
        tags=[about],
        description=inspect.getdoc(getattr(_DOCUMENTED[about], verb)),
        response_model=None if streamed else result,
        response_class=Response if streamed else JSONResponse,
        responses=failures(404, 409, 507, *((502,) if method in _WITH_REGISTRIES else ())) | (lines_of(result) if streamed else {}),
    )


for _about, _methods in _VERBS.items():
    for _method in _methods:
        _add(_about, _method)
