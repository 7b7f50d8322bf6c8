"""The OpenAPI schema where FastAPI cannot know it from signatures: errors, streams of lines, bytes, names of operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from ..api import Event
from .wire import Json

JSON_LINES, OCTETS = "application/jsonl", "application/octet-stream"
_REFERENCE = "#/components/schemas/{model}"
_components: Json = {}
Responses = dict[int | str, dict[str, Any]]


@dataclass
class ErrorDetail:
    """What went wrong: the exception's class, its message, and what else it carries (``users`` of a busy layer, say)."""

    type: str
    message: str
    fields: dict[str, Any]


@dataclass
class Failure:
    """The body of every answer that is no success."""

    error: ErrorDetail


def _schema_of(kind: Any) -> Json:
    """The JSON schema of a type, what it refers to being put among the components."""
    schema = TypeAdapter(kind).json_schema(ref_template=_REFERENCE, mode="serialization")
    _components.update(schema.pop("$defs", {}))
    return schema


def _component(kind: type) -> Json:
    """A reference to a type's schema among the components."""
    _components[kind.__name__] = _schema_of(kind)
    return {"$ref": _REFERENCE.format(model=kind.__name__)}


def _failure(description: str) -> Json:
    return {"description": description, "content": {"application/json": {"schema": _component(Failure)}}}


_DESCRIPTIONS = {
    400: "What was asked for cannot be: a name, a size, an address, a file that is not what it should be",
    401: "Over TCP: no token, or a wrong one",
    403: "Not permitted: it needs root, the file's permissions forbid it, or (over TCP) another site asks",
    404: "There is no such layer (any more), image, container or file",
    409: "In the way: it exists already, is in use, is sealed, or is of another kind",
    411: "A body whose length was not told",
    413: "A body of more than 64 MiB",
    416: "Past the end of the layer",
    422: "Not what this schema says",
    500: "The disk, a program of the host, or the server failed",
    502: "The registry cannot be reached, or refused",
    503: "The server is about to stop: connect again",
    507: "The pool's capacity, a layer's quota, or the host's disk is used up",
}


def failures(*statuses: int) -> Responses:
    """Responses of a route that may fail so; those that any route may give are among them."""
    return {status: _failure(_DESCRIPTIONS[status]) for status in sorted({*statuses, 400, 401, 403, 411, 413, 422, 500, 503})}


def lines_of(result: Any, item: str = "progress") -> Responses:
    """The 200 of a route that streams: lines of ``item`` (``progress`` or ``items``), then one of ``result`` or ``error``."""
    items: Json = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
    if item == "items":
        triple = [{"type": "integer"}, {"type": "integer"}, {"enum": ["data", "hole"]}]
        items = {"type": "array", "items": {"type": "array", "prefixItems": triple, "minItems": 3, "maxItems": 3}}
    description = f"JSON lines: any number of `{item}`, then one of `result` or `error`. A stream that ends without was cut off"
    return _lines(description, **{item: items, "result": _schema_of(result), "error": _component(ErrorDetail)})


def _lines(description: str, **kinds: Json) -> Responses:
    line = {"oneOf": [{"type": "object", "properties": {name: kind}, "required": [name], "additionalProperties": False} for name, kind in kinds.items()]}
    return {200: {"description": description, "content": {JSON_LINES: {"itemSchema": line}}}}


EVENTS = _lines("JSON lines: `event` each; the last is `result`, when the server stops", event=_component(Event), result={"type": "null"})
BYTES_BODY: Json = {"requestBody": {"required": True, "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}}}}
BYTES: Responses = {200: {"description": "The bytes", "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}}}}


def operation_id(route: APIRoute) -> str:
    """Like ``layer_clone``: what the route is about, and its function's name."""
    return f"{route.tags[0]}_{route.name}"


def describe(app: FastAPI) -> Json:
    """The schema of all routes; made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, openapi_version="3.2.0", description=app.description, routes=app.routes)
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {}).update(_components)
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer", "description": "Over TCP; none is needed on the Unix socket."}}
        schema["security"] = [{"token": []}, {}]
        app.openapi_schema = schema
    return app.openapi_schema
