"""What the server and its client say to each other, as JSON: errors, layers, extents, images, containers.

An answer is one JSON value, or a stream of JSON lines, each an object with one key: ``items`` (a batch of a listing),
``progress`` (``[done, total]`` of long work), and last either ``result`` or ``error``. A stream that ends without one of
the two was cut off.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import IO, Any, Literal, TypeVar

from .. import errors
from ..api import Extent, Healed, LayerAPI, Limits, PoolAPI, Range, Usage

SOCKET_NAME = "server.sock"
LOG_NAME = "server.log"
TOKEN_NAME = "token"
STATE_HEADER = "Thinpool-State"
"""Of every answer: the server's identity, which changes where what was not committed may be lost; the transaction that must be durable for all that was
answered to be so; the last one that is."""
LogFormat = Literal["text", "json"]
API = "/v1"
BODY_BYTES_MAX = 64 << 20  # of one request, and of what one reads

Json = dict[str, Any]
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Greeting:
    """Who serves which pool."""

    path: str
    chunk_size: int
    pid: int


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A layer at one moment; ``usage`` only when it was asked for. Sizes in bytes, ``created`` in seconds since 1970."""

    id: int
    name: str
    size: int
    sealed: bool
    created: float
    labels: Mapping[str, str]
    digests: Mapping[str, str]
    parent_id: int | None
    parent: str | None
    limits: Limits = field(default_factory=Limits)
    usage: Usage | None = None

    def to_json(self) -> Json:
        """The record as JSON takes it."""
        return {**asdict(self), "labels": dict(self.labels), "digests": dict(self.digests)}

    @classmethod
    def from_json(cls, data: Json) -> LayerRecord:
        """The record that :meth:`to_json` wrote."""
        usage, limits = data.pop("usage"), Limits(**data.pop("limits"))
        return cls(**data, limits=limits, usage=None if usage is None else Usage(**usage))


def record_of(layer: LayerAPI, *, with_usage: bool = False) -> LayerRecord:
    """What there is to say about a layer now."""
    parent, parent_name = _parent_of(layer)
    return LayerRecord(
        id=layer.id,
        name=layer.name,
        size=layer.size,
        sealed=layer.sealed,
        created=layer.created,
        labels=dict(layer.labels),
        digests=dict(layer.digests),
        parent_id=None if parent is None else parent.id,
        parent=parent_name,
        limits=layer.limits,
        usage=layer.usage() if with_usage else None,
    )


def _parent_of(layer: LayerAPI) -> tuple[LayerAPI | None, str | None]:
    """A layer's parent and its name; one that is deleted between the two is none, and does not make the layer a deleted one."""
    parent = layer.parent
    try:
        return parent, None if parent is None else parent.name
    except errors.LayerDeleted:
        return None, None


def records_of(pool: PoolAPI, label: str | None = None, *, with_usage: bool = False) -> list[LayerRecord]:
    """A record for each layer of the pool, or each that has the label; one that is deleted meanwhile is left out."""
    records = []
    for layer in pool.layers(label):
        try:
            records.append(record_of(layer, with_usage=with_usage))
        except errors.LayerDeleted:
            continue
    return records


def encode_extents(extents: list[Extent]) -> list[list[Any]]:
    """Extents as short JSON arrays."""
    return [[extent.offset, extent.length, extent.kind] for extent in extents]


def decode_extents(items: list[list[Any]]) -> list[Extent]:
    """What :func:`encode_extents` wrote."""
    return [Extent(*item) for item in items]


def encode_result(value: Any) -> Any:
    """What a verb of images or containers gives, as JSON takes it: dataclasses and lists of them become objects and arrays."""
    if isinstance(value, (list, tuple)):
        return [encode_result(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def decode_record(kind: type[Record], data: Json) -> Record:
    """A dataclass of :mod:`thinpool.api` from what :func:`encode_result` made of it; in these a sequence is a tuple."""
    fields: Json = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    if "usage" in fields:
        fields["usage"] = Usage(**data["usage"])
    return kind(**fields)


def decode_healed(data: Json) -> Healed:
    """What healing came to, from its JSON object."""
    healed, left = (tuple(Range(**one) for one in data[name]) for name in ("healed", "left"))
    return Healed(data["chunks"], healed, left, tuple(data["differ"]))


def encode_error(error: BaseException) -> Json:
    """An exception as JSON: its class, its message and what else it carries."""
    if isinstance(error, errors.ThinpoolError):
        fields = {name: value for name, value in vars(error).items() if name not in ("message", "__notes__")}
        return {"type": type(error).__name__, "message": error.message, "fields": fields}
    if isinstance(error, OSError) and error.errno is not None:
        return {"type": "OSError", "message": error.strerror, "fields": {"errno": error.errno, "filename": error.filename}}
    return {"type": type(error).__name__, "message": str(error), "fields": {}}


def decode_error(data: Json) -> Exception:
    """The exception that :func:`encode_error` wrote; a :class:`~thinpool.errors.ServerError` for one unknown here."""
    name, message, fields = data["type"], data["message"], data["fields"]
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.ThinpoolError):
        return kind(message, **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
    if name == "OSError" and fields:
        return OSError(fields["errno"], message, fields["filename"])
    if name in ("ValueError", "TypeError", "KeyError", "NotImplementedError"):
        error: Exception = getattr(builtins, name)(message)
        return error
    return errors.ServerError(f"the pool's server failed: {name}: {message} (its {LOG_NAME} says more)")


def tell(on_ready: IO[str], news: Json) -> None:
    """Tells the starter how the start went, once."""
    try:
        with on_ready:
            json.dump(news, on_ready)
    except BrokenPipeError:  # the starter has gone; others can still use the server
        pass
