"""Routes of the pool itself: one per method of :class:`thinpool.api.PoolAPI`."""

from __future__ import annotations

import os
from dataclasses import asdict

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from ..api import LayerAPI
from .state import Flag, GateOf, Labels, LayersOf, Name, NameOrId, OptionalName, PoolOf, SizeField
from .streams import extent_lines, work_lines
from .wire import Json, records_of

router = APIRouter()


@router.get("/pool")
async def greet(pool: PoolOf) -> Json:
    """Who serves which pool: a client's first request."""
    return {"path": str(pool.path), "chunk_size": pool.chunk_size, "pid": os.getpid()}


@router.get("/pool/usage")
def usage(pool: PoolOf) -> Json:
    """What the pool takes."""
    return asdict(pool.usage())


@router.get("/pool/metrics")
def metrics(pool: PoolOf) -> Json:
    """What it has counted and timed since it was opened."""
    return asdict(pool.metrics())


@router.post("/pool/capacity")
def set_capacity(pool: PoolOf, capacity: SizeField) -> None:
    """Sets the most that chunks may take."""
    pool.set_capacity(capacity)  # type: ignore[arg-type]  # a float is refused there, as in the library


@router.post("/pool/commit")
def commit(pool: PoolOf) -> None:
    """Makes everything so far durable."""
    pool.commit()


@router.post("/pool/reclaim")
def reclaim(pool: PoolOf) -> None:
    """Gives the space of what was deleted back to the host."""
    pool.reclaim()


@router.post("/pool/digests")
async def compute_digests(gate: GateOf, pool: PoolOf) -> StreamingResponse:
    """Computes the content digests that sealed layers lack."""
    return work_lines(gate, pool.compute_digests)


@router.post("/pool/nbd")
def serve_nbd(pool: PoolOf, address: Name, certificates: OptionalName = None, keys: OptionalName = None, verify_peer: Flag = None) -> str:
    """Serves all layers over NBD too."""
    return pool.serve_nbd(address, certificates=certificates, keys=keys, verify_peer=bool(verify_peer))


@router.get("/pool/nbd")
def nbd_addresses(pool: PoolOf) -> list[str]:
    """Where NBD clients are served."""
    return list(pool.nbd_addresses())


@router.get("/attachments")
def attachments(pool: PoolOf) -> list[Json]:
    """The layers in use."""
    return [asdict(attachment) for attachment in pool.attachments()]


@router.get("/layers")
def layers(pool: PoolOf, label: str | None = None, with_usage: bool = False) -> list[Json]:
    """All layers, or those that have the label."""
    return [record.to_json() for record in records_of(pool, label, with_usage=with_usage)]


@router.get("/layer")
def layer(pool: PoolOf, layers: LayersOf, name: str) -> Json:
    """The layer of a name."""
    return layers.describe(pool.layer(name))


@router.post("/layers")
def create_layer(pool: PoolOf, layers: LayersOf, name: Name, size: SizeField, labels: Labels = None) -> Json:
    """Makes an empty writable layer."""
    return layers.describe(pool.create_layer(name, size, labels=labels))  # type: ignore[arg-type]


@router.post("/diff")
async def diff(pool: PoolOf, layers: LayersOf, from_layer: NameOrId, to_layer: NameOrId) -> StreamingResponse:
    """The ranges in which two layers may differ."""

    def end(given: str | int) -> str | LayerAPI:
        return given if isinstance(given, str) else layers.get(given)

    return extent_lines(lambda: pool.diff(end(from_layer), end(to_layer)))


@router.post("/import/raw")
async def import_raw(gate: GateOf, pool: PoolOf, layers: LayersOf, path: Name, name: Name, labels: Labels = None) -> StreamingResponse:
    """Takes in a raw image of the server's host."""
    return work_lines(gate, lambda progress: layers.describe(pool.import_raw(path, name, labels=labels, progress=progress)))


@router.post("/import/rootfs")
async def import_rootfs(
    gate: GateOf, pool: PoolOf, layers: LayersOf, path: Name, name: Name, size: SizeField, filesystem: Name, labels: Labels = None
) -> StreamingResponse:
    """Takes in a root file system tarball of the server's host."""
    options = {"size": size, "filesystem": filesystem, "labels": labels}
    return work_lines(gate, lambda progress: layers.describe(pool.import_rootfs(path, name, **options, progress=progress)))  # type: ignore[arg-type]
