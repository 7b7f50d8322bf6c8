"""Routes of a layer, known by its id: one per method of :class:`thinpool.api.LayerAPI`."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from .state import Flag, GateOf, Labels, LayerOf, LayersOf, Name, Number, OptionalName, OptionalSize, SizeField, ViaField
from .streams import extent_lines, work_lines
from .wire import Json, record_of

router = APIRouter(prefix="/layers/{layer_id}")


@router.get("")
def describe(layer: LayerOf) -> Json:
    """What there is to say about it."""
    return record_of(layer).to_json()


@router.delete("")
def delete(layer: LayerOf, layers: LayersOf, layer_id: int) -> None:
    """Deletes it."""
    layer.delete()
    layers.forget(layer_id)


@router.get("/children")
def children(layer: LayerOf) -> list[int]:
    """The ids of what branched from it."""
    return [child.id for child in layer.children]


@router.get("/data")
def read(layer: LayerOf, offset: int, length: int) -> Response:
    """Its bytes."""
    return Response(layer.pread(length, offset), media_type="application/octet-stream")


@router.put("/data")
async def write(request: Request, layer: LayerOf, offset: int) -> int:
    """Writes the body."""
    return await run_in_threadpool(layer.pwrite, await request.body(), offset)


@router.post("/write_zeroes")
def write_zeroes(layer: LayerOf, offset: Number, length: Number) -> None:
    """Makes a range read as zeros."""
    layer.write_zeroes(offset, length)


@router.post("/discard")
def discard(layer: LayerOf, offset: Number, length: Number) -> None:
    """Makes a range read as zeros, and gives its space back."""
    layer.discard(offset, length)


@router.post("/flush")
def flush(layer: LayerOf) -> None:
    """Makes what was written durable."""
    layer.flush()


@router.post("/snapshot")
def snapshot(layer: LayerOf, layers: LayersOf, name: Name, labels: Labels = None) -> Json:
    """A sealed layer of the present content."""
    return layers.describe(layer.snapshot(name, labels=labels))


@router.post("/clone")
def clone(layer: LayerOf, layers: LayersOf, name: Name, size: OptionalSize = None, labels: Labels = None) -> Json:
    """A writable layer of the present content."""
    return layers.describe(layer.clone(name, size, labels=labels))  # type: ignore[arg-type]  # see pool_routes


@router.post("/seal")
def seal(layer: LayerOf) -> None:
    """Makes it never change again."""
    layer.seal()


@router.post("/resize")
def resize(layer: LayerOf, size: SizeField, allow_shrink: Flag = False) -> None:
    """Changes its size."""
    layer.resize(size, allow_shrink=bool(allow_shrink))  # type: ignore[arg-type]


@router.post("/rename")
def rename(layer: LayerOf, name: Name) -> None:
    """Changes its name."""
    layer.rename(name)


@router.post("/labels")
def set_labels(layer: LayerOf, labels: Labels) -> None:
    """Replaces its labels."""
    layer.set_labels(labels or {})


@router.post("/reset")
def reset(layer: LayerOf, to: OptionalName = None) -> None:
    """Takes another layer's content."""
    layer.reset(to)


@router.get("/extents")
async def extents(layer: LayerOf) -> StreamingResponse:
    """Its data and holes."""
    return extent_lines(layer.extents)


@router.get("/usage")
def usage(layer: LayerOf) -> Json:
    """What it takes."""
    return asdict(layer.usage())


@router.post("/export/raw")
async def export_raw(gate: GateOf, layer: LayerOf, path: Name) -> StreamingResponse:
    """Writes it to a file of the server's host."""
    return work_lines(gate, lambda progress: layer.export_raw(path, progress=progress))


@router.post("/attach")
def attach(layer: LayerOf, sector_size: Number, owner: Number, via: ViaField = "loop") -> Json:
    """Makes it a block device."""
    return asdict(layer.attach(sector_size=sector_size, owner=owner, via=via))


@router.post("/mount")
def mount(layer: LayerOf, directory: Name, owner: Number, read_only: Flag = None, via: ViaField = "loop") -> Json:
    """Mounts its file system."""
    return asdict(layer.mount(directory, read_only=read_only, owner=owner, via=via))


@router.post("/detach")
def detach(layer: LayerOf) -> None:
    """Takes its block device away."""
    layer.detach()


@router.post("/unmount")
def unmount(layer: LayerOf) -> None:
    """Unmounts its file system."""
    layer.unmount()
