"""Routes of a layer, known by its id: one per method of :class:`thinpool.api.LayerAPI`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from ..api import Attachment, Sparsified, Usage
from .endpoints import call, change
from .schema import BYTES, BYTES_BODY, OCTETS, failures, lines_of, operation_id
from .state import BodyOf, Flag, GateOf, Labels, LayerOf, LayersOf, LimitsBody, Name, Number, OptionalName, OptionalSize, Path, SizeField, ViaField
from .streams import extent_lines, work_lines
from .wire import API, BODY_BYTES_MAX, LayerRecord, record_of

router = APIRouter(prefix=f"{API}/layers/{{layer_id}}", tags=["layer"], responses=failures(404, 409), generate_unique_id_function=operation_id)


@router.get("")
@call
def describe(layer: LayerOf) -> LayerRecord:
    """What there is to say about it."""
    return record_of(layer)


@router.delete("")
@change
def delete(layer: LayerOf, layers: LayersOf, layer_id: int) -> None:
    """Deletes it."""
    layer.delete()
    layers.forget(layer_id)


@router.get("/children")
@call
def children(layer: LayerOf) -> list[int]:
    """The ids of what branched from it."""
    return [child.id for child in layer.children]


@router.get("/data", response_class=Response, responses=BYTES | failures(416))
def read(layer: LayerOf, offset: int, length: Annotated[int, Query(le=BODY_BYTES_MAX)]) -> Response:
    """Its bytes."""
    return Response(layer.pread(length, offset), media_type=OCTETS)


@router.put("/data", openapi_extra=BYTES_BODY, responses=failures(416, 507))
@change
def write(layer: LayerOf, offset: int, data: BodyOf) -> int:
    """Writes the body."""
    return layer.pwrite(data, offset)


@router.post("/write_zeroes", responses=failures(416, 507))
@change
def write_zeroes(layer: LayerOf, offset: Number, length: Number) -> None:
    """Makes a range read as zeros."""
    layer.write_zeroes(offset, length)


@router.post("/discard", responses=failures(416, 507))
@change
def discard(layer: LayerOf, offset: Number, length: Number) -> None:
    """Makes a range read as zeros, and gives its space back."""
    layer.discard(offset, length)


@router.post("/sparsify", response_class=Response, responses=lines_of(Sparsified))
async def sparsify(gate: GateOf, layer: LayerOf) -> Response:
    """Makes holes of what reads as zeros, while others use it."""
    return await work_lines(gate, lambda progress: asdict(layer.sparsify(progress)))


@router.post("/flush")
@call
def flush(layer: LayerOf) -> None:
    """Makes what was written durable."""
    layer.flush()


@router.post("/snapshot")
@change
def snapshot(layer: LayerOf, layers: LayersOf, name: Name, labels: Labels = None) -> LayerRecord:
    """A sealed layer of the present content."""
    return layers.describe(layer.snapshot(name, labels=labels))


@router.post("/clone")
@change
def clone(layer: LayerOf, layers: LayersOf, name: Name, size: OptionalSize = None, labels: Labels = None) -> LayerRecord:
    """A writable layer of the present content."""
    return layers.describe(layer.clone(name, size, labels=labels))  # type: ignore[arg-type]  # see pool_routes


@router.post("/seal")
@change
def seal(layer: LayerOf) -> None:
    """Makes it never change again."""
    layer.seal()


@router.post("/resize", responses=failures(507))
@change
def resize(layer: LayerOf, size: SizeField, allow_shrink: Flag = False) -> None:
    """Changes its size."""
    layer.resize(size, allow_shrink=bool(allow_shrink))  # type: ignore[arg-type]


@router.post("/rename")
@change
def rename(layer: LayerOf, name: Name, labels: Labels = None) -> None:
    """Changes its name, and, where given, its labels in the same step."""
    layer.rename(name, labels=labels)


@router.post("/labels")
@change
def set_labels(layer: LayerOf, labels: Labels) -> None:
    """Replaces its labels."""
    layer.set_labels(labels or {})


@router.post("/limits")
@change
def set_limits(layer: LayerOf, limits: LimitsBody) -> None:
    """Replaces its limits; 0 for none."""
    layer.set_limits(limits)


@router.post("/reset")
@change
def reset(layer: LayerOf, to: OptionalName = None) -> None:
    """Takes another layer's content."""
    layer.reset(to)


@router.get("/extents", response_class=Response, responses=lines_of(None, "items"))
async def extents(layer: LayerOf) -> Response:
    """Its data and holes."""
    return await extent_lines(layer.extents)


@router.get("/usage")
@call
def usage(layer: LayerOf) -> Usage:
    """What it takes."""
    return layer.usage()


@router.post("/export/raw", response_class=Response, responses=lines_of(None) | failures(507))
async def export_raw(gate: GateOf, layer: LayerOf, path: Path) -> Response:
    """Writes it to a file of the server's host."""
    return await work_lines(gate, lambda progress: layer.export_raw(path, progress=progress))


@router.post("/attach")
@call
def attach(layer: LayerOf, sector_size: Number = 512, owner: Number = 0, via: ViaField = "loop") -> Attachment:
    """Makes it a block device."""
    return layer.attach(sector_size=sector_size, owner=owner, via=via)


@router.post("/mount")
@call
def mount(layer: LayerOf, directory: Path, owner: Number = 0, read_only: Flag = None, via: ViaField = "loop") -> Attachment:
    """Mounts its file system."""
    return layer.mount(directory, read_only=read_only, owner=owner, via=via)


@router.post("/detach")
@call
def detach(layer: LayerOf) -> None:
    """Takes its block device away."""
    layer.detach()


@router.post("/unmount")
@call
def unmount(layer: LayerOf) -> None:
    """Unmounts its file system."""
    layer.unmount()
