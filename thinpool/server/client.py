"""A pool and its layers through the pool's server: the library's interface over HTTP on a Unix socket.

A :class:`RemoteLayer` is known by its id, as a local one is, so it stays the same layer through a rename. Nothing is
kept here: every property asks the server, and says what is true now.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from ..api import (
    Attachment,
    Backup,
    Buffer,
    Compacted,
    Credentials,
    Event,
    Extent,
    Healed,
    LayerAPI,
    Limits,
    Policy,
    PoolUsage,
    Progress,
    Size,
    Sparsified,
    Usage,
    Via,
)
from ..metrics import PoolMetrics
from .remote import RemoteContainers, RemoteImages, credentials_of, follow
from .transport import Transport
from .wire import LayerRecord, decode_extents, decode_healed

IO_BYTES = 16 << 20  # the most that one request reads or writes


class RemotePool:
    """The pool in ``path``, through its server; a context manager. Raises :class:`ServerError` where none answers."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(os.path.abspath(path))
        self._transport = Transport(self._path)
        try:
            greeting = self._transport.json("GET", "/pool")
        except BaseException:
            self._transport.close()
            raise
        self._chunk_size: int = greeting["chunk_size"]
        self._server_pid: int = greeting["pid"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RemotePool {str(self._path)!r} of server {self._server_pid}>"

    @property
    def path(self) -> Path:
        """The pool's directory."""
        return self._path

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk."""
        return self._chunk_size

    @property
    def images(self) -> RemoteImages:
        """The pool's container images."""
        return RemoteImages(self._transport)

    @property
    def containers(self) -> RemoteContainers:
        """The pool's containers."""
        return RemoteContainers(self._transport)

    @property
    def server_pid(self) -> int:
        """The process id of the pool's server."""
        return self._server_pid

    def create_layer(self, name: str, size: Size, *, labels: Mapping[str, str] | None = None) -> RemoteLayer:
        """Makes an empty writable layer. Raises LayerExists, BadName, BadSize."""
        return self._layer(self._transport.json("POST", "/layers", {"name": name, "size": size, "labels": _plain(labels)}))

    def layer(self, name: str) -> RemoteLayer:
        """The layer of that name. Raises LayerNotFound."""
        return self._layer(self._transport.json("GET", "/layer", name=name))

    def described(self, name: str) -> tuple[RemoteLayer, LayerRecord]:
        """The layer of that name, and what there is to say about it, in one request. Raises LayerNotFound."""
        record = self._transport.json("GET", "/layer", name=name)
        return self._layer(record), LayerRecord.from_json(record)

    def layers(self, label: str | None = None) -> list[RemoteLayer]:
        """All layers, or those that have the label."""
        return [RemoteLayer(self._transport, record.id) for record in self.records(label)]

    def records(self, label: str | None = None, *, with_usage: bool = False) -> list[LayerRecord]:
        """What there is to say about each layer, in one request."""
        query = {} if label is None else {"label": label}
        answer = self._transport.json("GET", "/layers", with_usage=int(with_usage), **query)
        return [LayerRecord.from_json(data) for data in answer]

    def diff(self, from_layer: str | LayerAPI, to_layer: str | LayerAPI) -> Iterator[Extent]:
        """The ranges in which two layers may differ, in order. Raises LayerNotFound."""
        ends = {"from_layer": _name_or_id(from_layer), "to_layer": _name_or_id(to_layer)}
        return _extents(self._transport.lines("POST", "/diff", ends))

    def usage(self) -> PoolUsage:
        """What the pool takes."""
        return PoolUsage(**self._transport.json("GET", "/pool/usage"))

    def metrics(self) -> PoolMetrics:
        """What the server's pool has counted and timed since it was opened, and what it takes."""
        return PoolMetrics.from_json(self._transport.json("GET", "/pool/metrics"))

    def set_capacity(self, capacity: Size) -> None:
        """Sets the most that chunks may take; 0 for no limit. Raises BadSize."""
        self._transport.json("POST", "/pool/capacity", {"capacity": capacity})

    def policy(self) -> Policy:
        """What happens as it fills up."""
        return Policy(**self._transport.json("GET", "/pool/policy"))

    def set_policy(self, policy: Policy) -> None:
        """Sets what happens as it fills up. Raises BadSize."""
        self._transport.json("POST", "/pool/policy", asdict(policy))

    def events(self) -> Iterator[Event]:
        """How its space is now, and then each event, until the server stops."""
        for line in self._transport.lines("GET", "/events"):
            if "event" in line:
                yield Event(**line["event"])

    def import_raw(self, path: str | Path, name: str, *, labels: Mapping[str, str] | None = None, progress: Progress | None = None) -> RemoteLayer:
        """A writable layer with the content of a raw image file or block device. Raises LayerExists, ImportFailed."""
        body = {"path": os.path.abspath(path), "name": name, "labels": _plain(labels)}
        return self._layer(follow(self._transport.lines("POST", "/import/raw", body), progress))

    def import_rootfs(
        self,
        path: str | Path,
        name: str,
        *,
        size: Size = "10G",
        filesystem: str = "ext4",
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> RemoteLayer:
        """A sealed layer with a file system that holds a tarball's tree. Raises LayerExists, ImportFailed."""
        body = {"path": os.path.abspath(path), "name": name, "size": size, "filesystem": filesystem, "labels": _plain(labels)}
        return self._layer(follow(self._transport.lines("POST", "/import/rootfs", body), progress))

    def attachments(self) -> list[Attachment]:
        """The layers in use."""
        return [Attachment(**data) for data in self._transport.json("GET", "/attachments")]

    def commit(self) -> None:
        """Makes all that was done so far survive a power cut.

        Raises ServerError where a server was killed that had answered some of it: look what is there, with the pool connected again.
        """
        self._transport.commit()

    def reclaim(self) -> None:
        """Waits until the space of everything deleted is free and given back to the host."""
        self._transport.json("POST", "/pool/reclaim")

    def compact(self, progress: Progress | None = None) -> Compacted:
        """Makes the data file as short as its content allows, while all of it is in use. Raises BackupHeld, OutOfSpace."""
        return Compacted(**follow(self._transport.lines("POST", "/pool/compact"), progress))

    def heal(
        self,
        sources: Sequence[str | Path],
        *,
        images: Sequence[str] = (),
        credentials: Mapping[str, Credentials] | None = None,
        insecure: bool = False,
        progress: Progress | None = None,
    ) -> Healed:
        """Heals damaged chunks from other pools, raw images, devices, and images in registries, while they are in use. Raises PoolBusy, RegistryError."""
        known = {image: credentials_of(image, (credentials or {}).get(image)) for image in images}
        body = {"sources": [os.path.abspath(one) for one in sources], "images": list(images), "credentials": known, "insecure": insecure}
        return decode_healed(follow(self._transport.lines("POST", "/pool/heal", body), progress))

    def compute_digests(self, progress: Progress | None = None) -> None:
        """Gives sealed layers the content digests that they lack, and lets equal ones share all."""
        follow(self._transport.lines("POST", "/pool/digests"), progress)

    def backups(self) -> list[Backup]:
        """The metadata backups, the newest first."""
        return [Backup(**data) for data in self._transport.json("GET", "/backups")]

    def make_backup(self, *, hold: bool = False) -> Backup:
        """Copies the metadata. ``hold``: what it names now is kept until it is dropped. Raises OutOfSpace."""
        return Backup(**self._transport.json("POST", "/backups", {"hold": hold}))

    def drop_backup(self, name: str) -> None:
        """Removes a metadata backup; of a held one, what nothing else needs is freed. Raises BackupNotFound, LayerBusy."""
        self._transport.json("DELETE", f"/backups/{quote(name, safe='')}")

    def serve_nbd(self, address: str, *, certificates: str | Path | None = None, keys: str | Path | None = None, verify_peer: bool = False) -> str:
        """Lets the server serve all layers over NBD until it stops, and with that it stays. Raises BadAddress."""
        local = address.startswith("unix:") or "/" in address
        where = f"unix:{os.path.abspath(address.removeprefix('unix:'))}" if local else address
        paths = {name: None if path is None else os.path.abspath(path) for name, path in (("certificates", certificates), ("keys", keys))}
        return str(self._transport.json("POST", "/pool/nbd", {"address": where, "verify_peer": verify_peer, **paths}))

    def nbd_addresses(self) -> list[str]:
        """Where NBD clients are served."""
        return list(self._transport.json("GET", "/pool/nbd"))

    def serve_http(self, address: str, *, certificates: str | Path | None = None, verify_peer: bool = False) -> str:
        """Lets the server answer over TCP too, to those who have the pool's token, and with that it stays. Raises BadAddress."""
        where = None if certificates is None else os.path.abspath(certificates)
        return str(self._transport.json("POST", "/pool/http", {"address": address, "certificates": where, "verify_peer": verify_peer}))

    def http_addresses(self) -> list[str]:
        """Where it does."""
        return list(self._transport.json("GET", "/pool/http"))

    def close(self) -> None:
        """Lets the server go; it stays as long as somebody needs it. Later calls raise PoolClosed."""
        self._transport.close()

    def _layer(self, record: dict[str, Any]) -> RemoteLayer:
        return RemoteLayer(self._transport, record["id"])


class RemoteLayer:
    """A layer of a pool that a server has open."""

    def __init__(self, transport: Transport, layer_id: int) -> None:
        self._transport = transport
        self._id = layer_id
        self._route = f"/layers/{layer_id}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RemoteLayer):
            return NotImplemented
        return self._id == other._id and self._transport is other._transport

    def __hash__(self) -> int:
        return hash((self._id, id(self._transport)))

    def __repr__(self) -> str:
        return f"<RemoteLayer {self._id}>"

    @property
    def id(self) -> int:
        """The number that no other layer of the pool ever has."""
        return self._id

    @property
    def name(self) -> str:
        """The name now."""
        return self._record().name

    @property
    def size(self) -> int:
        """Bytes."""
        return self._record().size

    @property
    def sealed(self) -> bool:
        """Whether it never changes again."""
        return self._record().sealed

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels now, as a copy."""
        return self._record().labels

    @property
    def digests(self) -> Mapping[str, str]:
        """What names it by its content, by kind."""
        return self._record().digests

    @property
    def created(self) -> float:
        """When it was made, in seconds since 1970."""
        return self._record().created

    @property
    def limits(self) -> Limits:
        """What it may do."""
        return self._record().limits

    @property
    def parent(self) -> RemoteLayer | None:
        """What it branched from."""
        parent_id = self._record().parent_id
        return None if parent_id is None else RemoteLayer(self._transport, parent_id)

    @property
    def children(self) -> list[LayerAPI]:
        """What branched from it."""
        return [RemoteLayer(self._transport, layer_id) for layer_id in self._ask("GET", "children")]

    def pread(self, length: int, offset: int) -> bytes:
        """Exactly ``length`` bytes from ``offset`` on. Raises OutOfRange."""
        if length <= IO_BYTES:
            return self._transport.data("GET", f"{self._route}/data", offset=offset, length=length)
        buffer = bytearray(length)
        self.pread_into(buffer, offset)
        return bytes(buffer)

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fills ``buffer`` from ``offset`` on. Raises OutOfRange."""
        view = memoryview(buffer).cast("B")
        for start, end in _pieces(len(view)):
            view[start:end] = self._transport.data("GET", f"{self._route}/data", offset=offset + start, length=end - start)
        return len(view)

    def pwrite(self, data: Buffer, offset: int) -> int:
        """Writes all of ``data`` at ``offset``. Raises OutOfRange, LayerSealed, OutOfSpace."""
        view = memoryview(data).cast("B")
        # From the last piece to the first: one past the end is refused before anything is written.
        for start, end in reversed(_pieces(len(view))):
            self._transport.data("PUT", f"{self._route}/data", bytes(view[start:end]), offset=offset + start)
        return len(view)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Makes a range read as zeros. Raises OutOfRange, LayerSealed."""
        self._ask("POST", "write_zeroes", {"offset": offset, "length": length})

    def discard(self, offset: int, length: int) -> None:
        """Makes a range read as zeros and gives its whole blocks back. Raises OutOfRange, LayerSealed."""
        self._ask("POST", "discard", {"offset": offset, "length": length})

    def sparsify(self, progress: Progress | None = None) -> Sparsified:
        """What reads as zeros becomes holes, while others use the layer. Raises LayerSealed."""
        return Sparsified(**follow(self._transport.lines("POST", f"{self._route}/sparsify"), progress))

    def flush(self) -> None:
        """Returns when all that was written before is durable."""
        self._ask("POST", "flush")

    def snapshot(self, name: str, *, labels: Mapping[str, str] | None = None) -> RemoteLayer:
        """A sealed layer of the present content. Raises LayerExists, BadName."""
        return self._layer(self._ask("POST", "snapshot", {"name": name, "labels": _plain(labels)}))

    def clone(self, name: str, size: Size | None = None, *, labels: Mapping[str, str] | None = None) -> RemoteLayer:
        """A writable layer of the present content. Raises LayerExists, BadName, BadSize."""
        return self._layer(self._ask("POST", "clone", {"name": name, "size": size, "labels": _plain(labels)}))

    def seal(self) -> None:
        """Makes it never change again."""
        self._ask("POST", "seal")

    def resize(self, size: Size, *, allow_shrink: bool = False) -> None:
        """Grows it, or with ``allow_shrink`` cuts it. Raises BadSize, LayerSealed."""
        self._ask("POST", "resize", {"size": size, "allow_shrink": allow_shrink})

    def rename(self, name: str, *, labels: Mapping[str, str] | None = None) -> None:
        """Gives it another name, and, where given, other labels in the same step. Raises LayerExists, BadName."""
        self._ask("POST", "rename", {"name": name, "labels": _plain(labels)})

    def set_labels(self, labels: Mapping[str, str]) -> None:
        """Replaces its labels."""
        self._ask("POST", "labels", {"labels": _plain(labels)})

    def set_limits(self, limits: Limits) -> None:
        """Replaces its limits, from now on, for all who read and write it. Raises BadSize."""
        self._ask("POST", "limits", asdict(limits))

    def reset(self, to: str | None = None) -> None:
        """Takes the content of the layer ``to``, or its parent's. Raises LayerSealed, LayerBusy, LayerState."""
        self._ask("POST", "reset", {"to": to})

    def delete(self) -> None:
        """Deletes it; its children stay whole. Raises LayerBusy."""
        self._transport.json("DELETE", self._route)

    def extents(self) -> Iterator[Extent]:
        """Data and holes from its start to its end, without gaps."""
        return _extents(self._transport.lines("GET", f"{self._route}/extents"))

    def usage(self) -> Usage:
        """What it takes, in bytes."""
        return Usage(**self._ask("GET", "usage"))

    def open(self, mode: str = "rb") -> io.RawIOBase:
        """A seekable binary file over the layer (``rb`` or ``r+b``)."""
        from ..layerfile import LayerFile

        return LayerFile(self, mode)

    def export_raw(self, path: str | Path, *, progress: Progress | None = None) -> None:
        """Writes it as a sparse raw image. The server's user must be able to write there."""
        follow(self._transport.lines("POST", f"{self._route}/export/raw", {"path": os.path.abspath(path)}), progress)

    def attach(self, *, sector_size: int = 512, owner: int = 0, via: Via = "loop") -> Attachment:
        """Makes it a block device. Raises NeedsRoot, LayerBusy, ToolFailed."""
        return Attachment(**self._ask("POST", "attach", {"sector_size": sector_size, "owner": owner, "via": via}))

    def mount(self, directory: str | Path, *, read_only: bool | None = None, owner: int = 0, via: Via = "loop") -> Attachment:
        """Mounts its file system. Raises NeedsRoot, LayerBusy, ToolFailed."""
        body = {"directory": os.path.abspath(directory), "read_only": read_only, "owner": owner, "via": via}
        return Attachment(**self._ask("POST", "mount", body))

    def detach(self) -> None:
        """Takes its block device away."""
        self._ask("POST", "detach")

    def unmount(self) -> None:
        """Unmounts its file system."""
        self._ask("POST", "unmount")

    def _ask(self, method: str, what: str, body: Any = None) -> Any:
        return self._transport.json(method, f"{self._route}/{what}", body)

    def _record(self) -> LayerRecord:
        return LayerRecord.from_json(self._transport.json("GET", self._route))

    def _layer(self, record: dict[str, Any]) -> RemoteLayer:
        return RemoteLayer(self._transport, record["id"])


def _plain(labels: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if labels is None else dict(labels)


def _name_or_id(layer: str | LayerAPI) -> str | int:
    return layer if isinstance(layer, str) else layer.id


def _pieces(length: int) -> list[tuple[int, int]]:
    """Ranges of at most IO_BYTES; one empty range for length 0, so that its offset is checked all the same."""
    return [(start, min(start + IO_BYTES, length)) for start in range(0, length or 1, IO_BYTES)]


def _extents(lines: Iterator[dict[str, Any]]) -> Iterator[Extent]:
    for line in lines:
        yield from decode_extents(line.get("items", []))
