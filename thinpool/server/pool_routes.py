"""Routes of the pool itself: one per method of :class:`thinpool.api.PoolAPI`."""

from __future__ import annotations

import os
import pathlib
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from ..api import Attachment, Backup, Compacted, Healed, LayerAPI, Policy, PoolUsage, Progress
from ..metrics import PoolMetrics
from .endpoints import call, change
from .schema import EVENTS, failures, lines_of, operation_id
from .state import (
    CredentialsByName,
    Flag,
    GateOf,
    Labels,
    LayersOf,
    LocalPoolOf,
    Name,
    NameOrId,
    OptionalNames,
    OptionalPath,
    Path,
    Paths,
    PolicyBody,
    PoolOf,
    SizeField,
    TcpOf,
)
from .streams import event_lines, extent_lines, work_lines
from .wire import API, Greeting, LayerRecord, records_of

router = APIRouter(prefix=API, tags=["pool"], responses=failures(), generate_unique_id_function=operation_id)


@router.get("/pool")
async def greet(pool: PoolOf) -> Greeting:
    """Who serves which pool: a client's first request."""
    return Greeting(str(pool.path), pool.chunk_size, os.getpid())


@router.get("/pool/usage")
@call
def usage(pool: PoolOf) -> PoolUsage:
    """What the pool takes."""
    return pool.usage()


@router.get("/pool/metrics")
@call
def metrics(pool: PoolOf) -> PoolMetrics:
    """What it has counted and timed since it was opened."""
    return pool.metrics()


@router.post("/pool/capacity")
@call
def set_capacity(pool: PoolOf, capacity: SizeField) -> None:
    """Sets the most that chunks may take."""
    pool.set_capacity(capacity)  # type: ignore[arg-type]  # a float is refused there, as in the library


@router.get("/pool/policy")
@call
def policy(pool: PoolOf) -> Policy:
    """What happens as it fills up."""
    return pool.policy()


@router.post("/pool/policy")
@change
def set_policy(pool: PoolOf, policy: PolicyBody) -> None:
    """Sets what happens as it fills up."""
    pool.set_policy(policy)


@router.get("/events", response_class=Response, responses=EVENTS)
async def events(gate: GateOf, pool: LocalPoolOf) -> Response:
    """How its space is now, and then each event, as JSON lines, until either side goes away."""
    return event_lines(gate, pool)


@router.post("/pool/commit")
@call
def commit(pool: PoolOf) -> None:
    """Makes everything so far durable."""
    pool.commit()


@router.post("/pool/reclaim")
@call
def reclaim(pool: PoolOf) -> None:
    """Gives the space of what was deleted back to the host."""
    pool.reclaim()


@router.post("/pool/compact", response_class=Response, responses=lines_of(Compacted) | failures(409, 507))
async def compact(gate: GateOf, pool: PoolOf) -> Response:
    """Makes the data file as short as its content allows, while all of it is in use."""
    return await work_lines(gate, lambda progress: asdict(pool.compact(progress)))


@router.post("/pool/heal", response_class=Response, responses=lines_of(Healed) | failures(404, 409, 502, 507))
async def heal(
    gate: GateOf, pool: PoolOf, sources: Paths, images: OptionalNames = None, credentials: CredentialsByName = None, insecure: Flag = None
) -> Response:
    """Heals chunks that are not what their checksums say: from other pools, raw images and devices of the server's host, then from images in registries."""

    def work(progress: Progress) -> Any:
        return asdict(pool.heal(sources, images=images or (), credentials=credentials, insecure=bool(insecure), progress=progress))

    return await work_lines(gate, work)


@router.post("/pool/digests", response_class=Response, responses=lines_of(None))
async def compute_digests(gate: GateOf, pool: PoolOf) -> Response:
    """Computes the content digests that sealed layers lack."""
    return await work_lines(gate, pool.compute_digests)


@router.get("/backups")
@call
def backups(pool: PoolOf) -> list[Backup]:
    """The metadata backups, the newest first."""
    return list(pool.backups())


@router.post("/backups", responses=failures(507))
@call
def make_backup(pool: PoolOf, hold: Flag = None) -> Backup:
    """Copies the metadata; what it names is kept until it is dropped, if it is to be held."""
    return pool.make_backup(hold=bool(hold))


@router.delete("/backups/{name}", responses=failures(404, 409))
@call
def drop_backup(pool: PoolOf, name: str) -> None:
    """Removes a metadata backup; of a held one, what nothing else needs is freed."""
    pool.drop_backup(name)


@router.post("/pool/nbd", responses=failures(404, 409))
@call
def serve_nbd(pool: PoolOf, address: Name, certificates: OptionalPath = None, keys: OptionalPath = None, verify_peer: Flag = None) -> str:
    """Serves all layers over NBD too."""
    return pool.serve_nbd(address, certificates=certificates, keys=keys, verify_peer=bool(verify_peer))


@router.get("/pool/nbd")
@call
def nbd_addresses(pool: PoolOf) -> list[str]:
    """Where NBD clients are served."""
    return list(pool.nbd_addresses())


@router.post("/pool/http", responses=failures(404))
async def serve_http(tcp: TcpOf, address: Name, certificates: OptionalPath = None, verify_peer: Flag = None) -> str:
    """Serves this interface over TCP too, to those who have the pool's token."""
    return await tcp.serve_at(address, None if certificates is None else pathlib.Path(certificates), verify_peer=bool(verify_peer))


@router.get("/pool/http")
async def http_addresses(tcp: TcpOf) -> list[str]:
    """Where this interface is served over TCP."""
    return tcp.addresses()


@router.get("/attachments")
@call
def attachments(pool: PoolOf) -> list[Attachment]:
    """The layers in use."""
    return list(pool.attachments())


@router.get("/layers")
@call
def layers(pool: PoolOf, label: str | None = None, with_usage: bool = False) -> list[LayerRecord]:
    """All layers, or those that have the label."""
    return records_of(pool, label, with_usage=with_usage)


@router.get("/layer", responses=failures(404))
@call
def layer(pool: PoolOf, layers: LayersOf, name: str) -> LayerRecord:
    """The layer of a name."""
    return layers.describe(pool.layer(name))


@router.post("/layers", responses=failures(409))
@change
def create_layer(pool: PoolOf, layers: LayersOf, name: Name, size: SizeField, labels: Labels = None) -> LayerRecord:
    """Makes an empty writable layer."""
    return layers.describe(pool.create_layer(name, size, labels=labels))  # type: ignore[arg-type]


@router.post("/diff", response_class=Response, responses=lines_of(None, "items") | failures(404))
async def diff(pool: PoolOf, layers: LayersOf, from_layer: NameOrId, to_layer: NameOrId) -> Response:
    """The ranges in which two layers may differ."""

    def end(given: str | int) -> str | LayerAPI:
        return given if isinstance(given, str) else layers.get(given)

    return await extent_lines(lambda: pool.diff(end(from_layer), end(to_layer)))


@router.post("/import/raw", response_class=Response, responses=lines_of(LayerRecord) | failures(404, 409, 507))
async def import_raw(gate: GateOf, pool: PoolOf, layers: LayersOf, path: Path, name: Name, labels: Labels = None) -> Response:
    """Takes in a raw image of the server's host."""
    return await work_lines(gate, lambda progress: layers.describe(pool.import_raw(path, name, labels=labels, progress=progress)).to_json())


@router.post("/import/rootfs", response_class=Response, responses=lines_of(LayerRecord) | failures(404, 409, 507))
async def import_rootfs(
    gate: GateOf, pool: PoolOf, layers: LayersOf, path: Path, name: Name, size: SizeField, filesystem: Name, labels: Labels = None
) -> Response:
    """Takes in a root file system tarball of the server's host."""
    options = {"size": size, "filesystem": filesystem, "labels": labels}
    return await work_lines(gate, lambda progress: layers.describe(pool.import_rootfs(path, name, **options, progress=progress)).to_json())  # type: ignore[arg-type]
