"""The library's interface: what a pool and a layer can do, whoever does it.

Two implementations: :class:`thinpool.pool.Pool` in this process, and :class:`thinpool.server.client.RemotePool`
through the pool's server. Programs that take a :class:`PoolAPI` need not know which they have.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from .metrics import PoolMetrics

Size = int | str
Progress = Callable[[int, int], None]
"""Called now and then with (bytes done, bytes in all; 0 when not known)."""
Buffer = bytes | bytearray | memoryview
Via = Literal["loop", "nbd"]
"""What a block device on a layer is to the kernel: a loop device over a live file, or a client of NBD."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a layer: ``offset`` and ``length`` in bytes, and whether it holds data or is a hole."""

    offset: int
    length: int
    kind: Literal["data", "hole"]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a layer takes, in bytes. ``mapped`` counts every chunk the map names; ``exclusive`` is what deleting the
    layer would free; ``shared`` is the rest of ``mapped``."""

    virtual: int
    mapped: int
    exclusive: int
    shared: int


@dataclass(frozen=True, slots=True)
class Sparsified:
    """What came of sparsifying a layer, in bytes. ``zeros``: what was zeros and is holes now; ``freed``: the part of it that nobody else needs, so
    that the host gets it back: whole chunks, and blocks of chunks of which the rest stays."""

    zeros: int
    freed: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What a layer may do; 0: as much as it wants. ``rbps``, ``wbps``: bytes read and written a second; ``riops``, ``wiops``: reads and writes
    a second; ``quota``: bytes that it may map (:attr:`Usage.mapped`)."""

    rbps: int = 0
    wbps: int = 0
    riops: int = 0
    wiops: int = 0
    quota: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """What happens as a pool fills up. ``low_water``: percent in use from which on the pool is said to be low (0: never); ``extend_at``: percent in use
    from which on the capacity is raised (0: never), by ``extend_by`` percent of what it is, up to ``extend_max`` bytes (0: as far as the host's disk
    goes); ``wait``: seconds that what writes to a block device (loop, NBD) waits where there is no room, before it gets ENOSPC (0: at once);
    ``hook``: a command (no shell) that is run for each event, with it as JSON on its standard input."""

    low_water: int = 80
    extend_at: int = 0
    extend_by: int = 20
    extend_max: int = 0
    wait: int = 0
    hook: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something about a pool's space. ``kind``: ``normal``, ``low-water`` or ``full``, how it is from now on; ``extended`` or ``not-extended``, what came of
    raising the capacity. ``time``: seconds since 1970; ``used`` and ``free``: bytes, as far as capacity and host go."""

    kind: Literal["normal", "low-water", "full", "extended", "not-extended"]
    time: float
    capacity: int
    used: int
    free: int


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """What a pool takes, in bytes (``layers`` is a count). ``capacity`` 0 means no limit; ``host`` is what the data
    file really takes on the host's disk; ``metadata`` is the used part of the metadata store; ``reclaimable`` is what the trash takes, ``held`` what nothing
    but held metadata backups does.
    ``mode``: ``error`` after a failed sync or commit, with its ``cause`` and the ``way_out``, which else are empty."""

    capacity: int
    allocated: int
    host: int
    metadata: int
    layers: int
    reclaimable: int = 0
    held: int = 0
    mode: Literal["normal", "error"] = "normal"
    cause: str = ""
    way_out: str = ""


@dataclass(frozen=True, slots=True)
class Backup:
    """A copy of a pool's metadata. ``time``: when it was made, in seconds since 1970; ``bytes``: what the copy takes; ``held``: what it names stays as it
    was, until it is dropped."""

    name: str
    time: float
    bytes: int
    held: bool


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did, in bytes (``merged``: split entries of maps that became one chunk's). ``moved``: data copied to another place; ``file_before``,
    ``file_after``: the length of the data file; ``host_before``, ``host_after``: what that takes on the host's disk."""

    moved: int
    merged: int
    file_before: int
    file_after: int
    host_before: int
    host_after: int


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a layer, and what there is to say about them."""

    layer: str
    offset: int
    length: int
    why: str


@dataclass(frozen=True, slots=True)
class Healed:
    """What healing came to. ``chunks``: how many were not what their checksums say; ``healed``, ``left``: what layers have in them, in bytes; ``differ``:
    sealed layers with healed chunks that are not what their content digest says all the same."""

    chunks: int
    healed: tuple[Range, ...]
    left: tuple[Range, ...]
    differ: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attachment:
    """A layer in use: its block device, and where it is mounted (``None``: not). ``owner`` is the pid whose end takes it
    down (0: it stays until detached), ``purpose`` one of ``attach``, ``mount``, ``run``; ``container`` a running container's name."""

    layer: str
    device: str
    mountpoint: str | None = None
    purpose: str = "attach"
    owner: int = 0
    container: str | None = None


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who one is to a registry. ``identity_token``: an OAuth2 refresh token, in place of the two others."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Image:
    """An image as it is now. ``id``: the digest of its configuration, as Docker's image ID; ``references``: its names, sorted (none: it
    is dangling); ``digest``: of its manifest; ``platform``: like ``linux/amd64``; ``created``: seconds since 1970; ``layers``: the names of
    the layers it is made of, base first (none: nothing is applied); ``usage``: ``virtual`` is the size of its file system, ``mapped``
    what is in it, ``exclusive`` what removing it would free; ``blobs``: bytes of the archives of its layers that are kept for ``push``."""

    id: str
    references: tuple[str, ...]
    digest: str | None
    platform: str
    created: float
    layers: tuple[str, ...]
    usage: Usage
    blobs: int


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A step by which an image was made, oldest first. ``created``: seconds since 1970, ``None`` where not told; ``layer`` and
    ``diff_id``: ``None`` for a step that changed no file. ``size``: bytes of the blocks it changed; ``exclusive``: of these, what only this
    image has; ``shared``: the rest."""

    created: float | None
    created_by: str
    comment: str
    layer: str | None
    diff_id: str | None
    size: int
    shared: int
    exclusive: int


@dataclass(frozen=True, slots=True)
class Removed:
    """What a removal took away: names of images, ids of images, names of layers, and bytes that are given back."""

    references: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Container:
    """A container: a writable layer of the same name on top of an image. ``image``: what it was made from, as named then; ``image_id``:
    ``None`` for one made from a plain layer; ``command``: what runs in it by default; ``running``: whether it is mounted to run."""

    name: str
    image: str
    image_id: str | None
    layer: str
    created: float
    command: tuple[str, ...]
    running: bool
    usage: Usage


@dataclass(frozen=True, slots=True)
class Change:
    """A path that a container has added (``A``), changed (``C``) or deleted (``D``), from ``/`` on."""

    kind: Literal["A", "C", "D"]
    path: str


class LayerAPI(Protocol):
    """A layer: a name, a size, a block map and a parent."""

    @property
    def name(self) -> str: ...
    @property
    def id(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def sealed(self) -> bool: ...
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def digests(self) -> Mapping[str, str]: ...
    @property
    def created(self) -> float: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def parent(self) -> LayerAPI | None: ...
    @property
    def children(self) -> Sequence[LayerAPI]: ...
    def pread(self, length: int, offset: int) -> bytes: ...
    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int: ...
    def pwrite(self, data: Buffer, offset: int) -> int: ...
    def write_zeroes(self, offset: int, length: int) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...
    def snapshot(self, name: str, *, labels: Mapping[str, str] | None = None) -> LayerAPI: ...
    def clone(self, name: str, size: Size | None = None, *, labels: Mapping[str, str] | None = None) -> LayerAPI: ...
    def seal(self) -> None: ...
    def resize(self, size: Size, *, allow_shrink: bool = False) -> None: ...
    def rename(self, name: str, *, labels: Mapping[str, str] | None = None) -> None: ...
    def set_labels(self, labels: Mapping[str, str]) -> None: ...
    def set_limits(self, limits: Limits) -> None: ...
    def reset(self, to: str | None = None) -> None: ...
    def delete(self) -> None: ...
    def sparsify(self, progress: Progress | None = None) -> Sparsified: ...
    def extents(self) -> Iterator[Extent]: ...
    def usage(self) -> Usage: ...
    def open(self, mode: str = "rb") -> io.RawIOBase: ...
    def export_raw(self, path: str | Path, *, progress: Progress | None = None) -> None: ...
    def attach(self, *, sector_size: int = 512, owner: int = 0, via: Via = "loop") -> Attachment: ...
    def mount(self, directory: str | Path, *, read_only: bool | None = None, owner: int = 0, via: Via = "loop") -> Attachment: ...
    def detach(self) -> None: ...
    def unmount(self) -> None: ...


class ImagesAPI(Protocol):
    """Container images. A ``reference`` names one as Docker does (``debian:12``), by id, or by the beginning of its id."""

    def load(
        self, path: str | Path, reference: str | None = None, *, platform: str | None = None, size: Size = "10G", progress: Progress | None = None
    ) -> Image: ...
    def pull(
        self,
        reference: str,
        *,
        platform: str | None = None,
        credentials: Credentials | None = None,
        insecure: bool = False,
        size: Size = "10G",
        progress: Progress | None = None,
    ) -> Image: ...
    def push(self, reference: str, *, credentials: Credentials | None = None, insecure: bool = False, progress: Progress | None = None) -> str: ...
    def save(
        self,
        references: Sequence[str],
        path: str | Path,
        *,
        form: Literal["docker-archive", "oci-archive", "oci"] = "docker-archive",
        progress: Progress | None = None,
    ) -> None: ...
    def commit(
        self,
        container: str,
        reference: str | None = None,
        *,
        author: str = "",
        message: str = "",
        command: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Image: ...
    def get(self, reference: str) -> Image: ...
    def list(self) -> Sequence[Image]: ...
    def inspect(self, reference: str) -> dict[str, Any]: ...
    def history(self, reference: str) -> Sequence[HistoryEntry]: ...
    def tag(self, source: str, target: str) -> None: ...
    def untag(self, reference: str) -> None: ...
    def remove(self, reference: str, *, force: bool = False) -> Removed: ...
    def gc(self) -> Removed: ...


class ContainersAPI(Protocol):
    """Containers: thin writable layers, each on top of an image (or of any layer)."""

    def create(
        self,
        image: str,
        *,
        name: str | None = None,
        size: Size | None = None,
        command: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> Container: ...
    def get(self, name: str) -> Container: ...
    def list(self) -> Sequence[Container]: ...
    def remove(self, name: str, *, force: bool = False) -> None: ...
    def reset(self, name: str) -> None: ...
    def resize(self, name: str, size: Size) -> None: ...
    def diff(self, name: str) -> Sequence[Change]: ...
    def copy_out(self, name: str, path: str, destination: str | Path) -> None: ...
    def copy_in(self, source: str | Path, name: str, path: str) -> None: ...
    def configuration(self, name: str) -> dict[str, Any]: ...


class PoolAPI(Protocol):
    """A pool: layers over one data file and one metadata store."""

    @property
    def images(self) -> ImagesAPI: ...
    @property
    def containers(self) -> ContainersAPI: ...

    @property
    def path(self) -> Path: ...
    @property
    def chunk_size(self) -> int: ...
    def create_layer(self, name: str, size: Size, *, labels: Mapping[str, str] | None = None) -> LayerAPI: ...
    def layer(self, name: str) -> LayerAPI: ...
    def layers(self, label: str | None = None) -> Sequence[LayerAPI]: ...
    def diff(self, from_layer: str | LayerAPI, to_layer: str | LayerAPI) -> Iterator[Extent]: ...
    def usage(self) -> PoolUsage: ...
    def metrics(self) -> PoolMetrics: ...
    def set_capacity(self, capacity: Size) -> None: ...
    def policy(self) -> Policy: ...
    def set_policy(self, policy: Policy) -> None: ...
    def events(self) -> Iterator[Event]: ...
    def import_raw(self, path: str | Path, name: str, *, labels: Mapping[str, str] | None = None, progress: Progress | None = None) -> LayerAPI: ...
    def import_rootfs(
        self,
        path: str | Path,
        name: str,
        *,
        size: Size = "10G",
        filesystem: str = "ext4",
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> LayerAPI: ...
    def attachments(self) -> Sequence[Attachment]: ...
    def serve_nbd(self, address: str, *, certificates: str | Path | None = None, keys: str | Path | None = None, verify_peer: bool = False) -> str: ...
    def nbd_addresses(self) -> Sequence[str]: ...
    def commit(self) -> None: ...
    def reclaim(self) -> None: ...
    def compact(self, progress: Progress | None = None) -> Compacted: ...
    def compute_digests(self, progress: Progress | None = None) -> None: ...
    def heal(
        self,
        sources: Sequence[str | Path],
        *,
        images: Sequence[str] = (),
        credentials: Mapping[str, Credentials] | None = None,
        insecure: bool = False,
        progress: Progress | None = None,
    ) -> Healed: ...
    def backups(self) -> Sequence[Backup]: ...
    def make_backup(self, *, hold: bool = False) -> Backup: ...
    def drop_backup(self, name: str) -> None: ...
    def close(self) -> None: ...


class UsesAPI(Protocol):
    """Who uses the layers of a pool as devices and mounts: :class:`thinpool.exports.Uses`. For :class:`thinpool.pool.Pool` alone."""

    def attach(self, layer: Any, sector_size: int, owner: int, via: Via) -> Attachment: ...
    def detach(self, layer: Any) -> None: ...
    def mount(self, layer: Any, directory: Path, read_only: bool | None, owner: int, via: Via) -> Attachment: ...
    def unmount(self, layer: Any) -> None: ...
    def attachments(self) -> list[Attachment]: ...
    def users(self, layer: Any) -> tuple[str, ...]: ...
    def layer_resized(self, layer: Any) -> None: ...
    def serve_nbd(self, address: str, *, certificates: str | Path | None = None, keys: str | Path | None = None, verify_peer: bool = False) -> str: ...
    def nbd_addresses(self) -> Sequence[str]: ...
    def nbd_clients(self) -> int: ...
    def survive(self, keeper: Any) -> None: ...
    def close(self) -> None: ...
