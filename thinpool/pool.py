"""A pool in this process: :class:`Pool`, the entry to the library.

::

      create, open              commit or sync fails
    ----------------> OPEN -------------------------> FAILED (reads go on, writes raise PoolFailed)
                       |                                 |
                       +----------- close ---------------+--> CLOSED (everything raises PoolClosed)
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self
from weakref import WeakValueDictionary

from . import holds
from .api import Attachment, ContainersAPI, Extent, Healed, ImagesAPI, LayerAPI, Progress, Size, UsesAPI
from .catalog import HELD_LABEL, PARTIAL_LABEL, TRASH_LABEL, Catalog, LayerRecord
from .closing import open_pools
from .commits import Committer, Fingerprints, Housekeeper, drain
from .compacting import compact as compact_pool
from .digests import Digester
from .engine import Engine, EngineLayer
from .errors import BadSize, LayerBusy, LayerDeleted, LayerState, PoolClosed, PoolReadOnly, ThinpoolError
from .layer import Layer
from .limits import enforce_limits, set_limits
from .measuring import measure, usage_of
from .metadata import Metadata
from .policy import Watch, events_of, policy_of, set_capacity, set_policy
from .poolfiles import PoolFiles
from .units import format_size, parse_size

CHUNK_SIZE_MIN, CHUNK_SIZE_MAX = 4 << 10, 4 << 20
LAYER_SIZE_MAX = 1 << 60


class Pool:
    """Layers over one data file and one metadata store; see :class:`thinpool.api.PoolAPI` for the contract.

    A context manager. All methods may be called from any thread. One process at a time has a pool open for writing; any
    number may read it meanwhile: each sees the layers and maps that it found when it opened it, and of a writable layer the
    bytes that its chunks hold by now.
    """

    _make_images: ClassVar[Callable[[Pool], ImagesAPI]]
    _make_containers: ClassVar[Callable[[Pool], ContainersAPI]]
    _make_uses: ClassVar[Callable[[Pool], UsesAPI]]
    _import_raw: ClassVar[Callable[..., Layer]]
    _export_raw: ClassVar[Callable[..., None]]
    _import_rootfs: ClassVar[Callable[..., Layer]]
    _heal: ClassVar[Callable[..., Healed]]

    # --- opening and closing ---

    def __init__(self, files: PoolFiles, store: Metadata, *, read_only: bool = False, background: bool = True, redo: int = -1, **engine_options: Any) -> None:
        """Use :meth:`create` or :meth:`open`. What tests put in place of the disk below comes through ``engine_options``."""
        self._files, self._store = files, store
        self._read_only = read_only
        self._lock = threading.RLock()
        self._layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()
        self._uses: UsesAPI | None = None
        self._closed = False
        record = store.pool_record()
        self._chunk_size: int = record["chunk_size"]
        self._catalog = Catalog(store.layers(), store.documents())
        self._committer = Committer(store, self._catalog, self._lock)
        self._committer.engine = self._engine = Engine(
            self._committer, data_fd=files.data_fd, chunk_size=self._chunk_size, capacity=record["capacity"], read_only=read_only, **engine_options
        )
        self._housekeeper: Housekeeper | None = None
        self._digester, self.watch, self.limited = Digester(self), Watch(self, files.free), dict[int, EngineLayer]()
        if redo >= 0:
            self._engine.redo(redo)
        open_pools.add(self)
        if not read_only:
            store.use_features()
            self._committer.remove_leftovers()
            enforce_limits(self, self._catalog.limited())
            self._committer.look = self.watch.look
            if background:
                self._housekeeper = Housekeeper(self._engine, self._committer)
                self._housekeeper.start()
                self._digester.start()

    @classmethod
    def create(cls, path: str | Path, chunk_size: Size = "64K", capacity: Size = 0) -> Pool:
        """Makes a pool in a directory that is empty or does not exist, and opens it.

        ``chunk_size``: a power of two from 4K to 4M. ``capacity``: bytes that the layers' data may take; 0: no limit.
        Raises BadSize, PoolExists, OutOfSpace or PermissionError; the directory is then as it was.
        """
        chunk_bytes, capacity_bytes = parse_size(chunk_size), parse_size(capacity)
        if not CHUNK_SIZE_MIN <= chunk_bytes <= CHUNK_SIZE_MAX or chunk_bytes & (chunk_bytes - 1):
            raise BadSize(f"the chunk size must be a power of two from 4K to 4M, not {chunk_size}")
        if 0 < capacity_bytes < chunk_bytes:
            raise BadSize(f"a capacity of {capacity} holds not even one chunk of {format_size(chunk_bytes)}")
        files = PoolFiles(Path(path))
        existed = files.path.exists()
        files.create()
        try:
            store = Metadata(files.meta, create=True)
            try:
                store.create_pool(chunk_bytes, capacity_bytes)
            finally:
                store.close()
            files.sync()
        except BaseException:
            files.remove()
            if not existed:
                files.path.rmdir()
            raise
        return cls.open(path)

    @classmethod
    def open(
        cls,
        path: str | Path,
        read_only: bool = False,
        *,
        background: bool = True,
        verify_reads: bool = False,
        cache_size: Size = "64M",
        redo: int = -1,
        lock: int = -1,
    ) -> Pool:
        """Opens a pool; the same time whatever it holds, also after a crash.

        ``background=False`` leaves commits and reclaiming to explicit calls; ``cache_size`` bounds the maps in memory; ``redo`` is as :meth:`Engine.redo` has
        it; ``lock``: the :attr:`lock_fd` of a process before this one; ``verify_reads``: chunks that have a checksum are compared with it when they are read.
        Raises PoolNotFound, PoolBusy, FormatError, DamagedError or PermissionError.
        """
        files = PoolFiles(Path(path))
        files.require_pool()
        with ExitStack() as undo:
            undo.callback(files.close)
            if not read_only:
                files.lock(lock)
            files.open_data(read_only=read_only)
            store = Metadata(files.meta, read_only=read_only)
            undo.callback(store.close)
            cache_bytes = parse_size(cache_size)
            pool = cls(files, store, read_only=read_only, background=background, redo=redo, verify_reads=verify_reads, cache_bytes=cache_bytes)
            undo.pop_all()
            return pool

    def close(self) -> None:
        """Takes down what is attached, commits, and closes. Closing twice is fine."""
        if self._closed:
            return
        self._digester.stop()
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._engine.end_limits()
        try:
            if self._uses is not None:
                self._uses.close()
            self._engine.stop()
            if self._housekeeper is not None:
                self._housekeeper.join()
            self.watch.close()
            if not self._read_only and not self._engine.info().failed:
                self._engine.flush()
                # All that was handed out is committed: the next opening need not take this for a crash.
                self._store.put_window(self._engine.no_window())
        finally:
            self._committer.close()
            self._files.close()

    def abandon(self) -> None:
        """In a process that was forked: from now on the pool counts as closed here, and its files are the parent's alone."""
        self._closed, self._lock = True, threading.RLock()
        self._files.close()
        self._engine.abandon({*(layer.handle for layer in list(self._layers.values())), *self.limited.values()})

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and hasattr(self, "_engine"):
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
            with suppress(ThinpoolError):
                self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pool {self.path}{' (closed)' if self._closed else ''}>"

    def _require_open(self) -> None:
        if self._closed:
            raise PoolClosed(f"the pool {self.path} is closed")

    def _require_writable(self) -> None:
        self._require_open()
        if self._read_only:
            raise PoolReadOnly(f"the pool {self.path} is open read-only")

    # --- what it is ---

    @property
    def path(self) -> Path:
        return self._files.path

    @property
    def chunk_size(self) -> int:
        """Bytes."""
        return self._chunk_size

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def lock_fd(self) -> int:
        """The descriptor that makes this process the pool's writer."""
        return self._files.lock_fd

    @property
    def engine(self) -> Engine:
        """The data plane, for exports that serve layers from C."""
        return self._engine

    usage, metrics, compact = usage_of, measure, compact_pool
    backups, make_backup, drop_backup = holds.backups, holds.make_backup, holds.drop_backup
    set_capacity, policy, set_policy, events, set_limits = set_capacity, policy_of, set_policy, events_of, set_limits

    # --- layers ---

    def create_layer(self, name: str, size: Size, *, labels: Mapping[str, str] | None = None) -> Layer:
        """An empty writable layer; all of it reads as zeros. Raises BadName, LayerExists or BadSize."""
        self._require_writable()
        size_bytes = self._layer_size(size)
        with self._lock:
            self._catalog.require_free(name)
            layer_id = self._catalog.new_id()
            handle = self._engine.create_layer(layer_id, size_bytes)
            return self._add(handle, LayerRecord(name, None, None, time.time(), dict(labels or {})))

    def branch(self, source: Layer, name: str, size: Size | None, *, sealed: bool, labels: Mapping[str, str] | None) -> Layer:
        """A snapshot or clone of ``source``; see :class:`Layer`."""
        self._require_writable()
        size_bytes = source.size if size is None else self._layer_size(size)
        if size_bytes < source.size:
            raise BadSize(f"a clone of {source.name} cannot be smaller than its {source.size} bytes (resize it afterwards)")
        with self._lock:
            self._catalog.require_free(name)
            origin = self._catalog.get(source.id)
            if origin is None:
                raise LayerDeleted("the layer was deleted")
            handle = source.handle.branch(self._catalog.new_id(), size_bytes, sealed=sealed)
            return self._add(handle, LayerRecord(name, source.id, origin.name, time.time(), dict(labels or {})))

    @staticmethod
    def _layer_size(size: Size) -> int:
        size_bytes = parse_size(size)
        if not 0 < size_bytes <= LAYER_SIZE_MAX:
            raise BadSize(f"a layer has from 1 byte to 1 EiB, not {size}")
        return size_bytes

    def _add(self, handle: EngineLayer, record: LayerRecord) -> Layer:
        self._catalog.add(handle.id, record)
        layer = self._layers[handle.id] = Layer(self, handle)
        return layer

    def layer(self, name: str) -> Layer:
        """The layer of that name. Raises :class:`~thinpool.errors.LayerNotFound`."""
        self._require_open()
        with self._lock:
            return self.layer_by_id(self._catalog.find(name))

    def layer_by_id(self, layer_id: int) -> Layer:
        with self._lock:
            layer = self._layers.get(layer_id)
            if layer is None:
                layer = self._layers[layer_id] = Layer(self, self._engine.layer(layer_id))
            return layer

    def layers(self, label: str | None = None) -> list[Layer]:
        """All layers but holds, or those that have the label; oldest first."""
        self._require_open()
        with self._lock:
            return [self.layer_by_id(layer_id) for layer_id in self._catalog.ids(label)]

    def names(self) -> list[tuple[int, str]]:
        """Id and name of each layer but holds, oldest first; cheaper than :meth:`layers`."""
        self._require_open()
        with self._lock:
            return self._catalog.names()

    def record(self, layer_id: int) -> LayerRecord | None:
        """The catalog's record; ``None`` once the layer is deleted."""
        self._require_open()
        return self._catalog.get(layer_id)

    def related(self, find: Callable[[Catalog], Iterable[int]]) -> list[Layer]:
        with self._lock:  # else a layer that was found could be deleted before it is looked up
            return [self.layer_by_id(layer_id) for layer_id in find(self._catalog)]

    def require_free(self, name: str) -> None:
        """Raises BadName or LayerExists where no layer can be given that name."""
        with self._lock:
            self._catalog.require_free(name)

    @contextmanager
    def changing_record(self, layer: Layer) -> Iterator[Catalog]:
        self._require_writable()
        with self._lock:
            if (record := self._catalog.get(layer.id)) is None:
                raise LayerDeleted("the layer was deleted")
            if backup := record.labels.get(HELD_LABEL):
                raise LayerState(f"layer {record.name} is what the metadata backup {backup} holds: drop that")
            yield self._catalog
            self._engine.touch()

    def rename(self, layer: Layer, name: str, labels: Mapping[str, str] | None) -> None:
        with self.changing_record(layer):
            self._catalog.rename(layer.id, name)
            if labels is not None:
                self._catalog.set_labels(layer.id, labels)

    def set_labels(self, layer: Layer, labels: Mapping[str, str]) -> None:
        with self.changing_record(layer):
            self._catalog.set_labels(layer.id, labels)

    def set_digests(self, layer: Layer, digests: Mapping[str, str]) -> None:
        """Adds to what names the layer by its content; ``digests`` by kind (:data:`thinpool.catalog.DIGEST_KINDS`)."""
        with self.changing_record(layer):
            self._catalog.set_digests(layer.id, digests)

    def layers_with_digest(self, kind: str, digest: str) -> list[Layer]:
        """The layers with that digest, oldest first; ones that an import is still filling, or in the trash, are left out."""
        with self._lock:
            self._require_open()
            ids = self._catalog.with_digest(kind, digest)
            return [layer for layer in map(self.layer_by_id, ids) if not {PARTIAL_LABEL, TRASH_LABEL} & layer.labels.keys()]

    # --- documents: what the modules above keep about layers ---

    @contextmanager
    def atomically(self) -> Iterator[None]:
        """What is done to layers and documents within is in one commit, whole or not at all, unless it raises on the way.

        Everything else that changes layers waits meanwhile: no long work in here, and no :meth:`commit`.
        """
        self._require_writable()
        with self._lock:
            yield

    def document(self, key: str) -> bytes | None:
        """The document of that key; ``None``: there is none."""
        self._require_open()
        with self._lock:
            return self._catalog.document(key)

    def documents(self, prefix: str) -> list[tuple[str, bytes]]:
        """Keys and contents of the documents whose key begins so, in the order of keys."""
        self._require_open()
        with self._lock:
            return self._catalog.documents(prefix)

    def put_document(self, key: str, content: bytes | None) -> None:
        """Stores a document, durable with the next commit; ``None`` removes it."""
        self._require_writable()
        with self._lock:
            self._catalog.put_document(key, content)
            self._engine.touch()

    def delete(self, layer: Layer) -> None:
        self._require_writable()
        self.require_unused(layer, "delete")
        with self.changing_record(layer) as catalog:
            layer.handle.delete()
            catalog.remove(layer.id)
            self._layers.pop(layer.id, None)
            self.limited.pop(layer.id, None)

    def diff(self, from_layer: str | LayerAPI, to_layer: str | LayerAPI) -> Iterator[Extent]:
        """The ranges in which the two may differ; ``kind`` says what ``to_layer`` has there. Costs what differs."""
        source, target = (self.layer(x if isinstance(x, str) else x.name) for x in (from_layer, to_layer))
        for offset, length, data in self._engine.diff(source.handle, target.handle):
            yield Extent(offset, length, "data" if data else "hole")

    # --- durability ---

    def commit(self) -> None:
        """Everything done so far survives a power cut. Concurrent commits share one. Raises PoolFailed."""
        self._require_open()
        self._engine.flush()

    def reclaim(self) -> None:
        """Waits until the space of everything deleted is free and given back to the host."""
        self._require_writable()
        drain(self._engine)

    @property
    def fingerprints(self) -> Fingerprints:
        """Those of the pool's chunks, for imports."""
        return self._committer.fingerprints

    def compute_digests(self, progress: Progress | None = None) -> None:
        """Gives sealed layers the digests and checksums that they lack, and lets equal ones share all; as a pool that stays open does by itself."""
        self._require_writable()
        self._digester.catch_up(progress)

    # --- what is done with layers: filled in by the modules above this one (thinpool/__init__.py) ---

    @classmethod
    def register(cls, **makers: Callable[..., Any]) -> None:
        """Sets who does what: ``make_uses``, ``make_images``, ``make_containers``, ``import_raw``, ``export_raw``, ``import_rootfs``, ``heal``."""
        for name, maker in makers.items():
            setattr(cls, f"_{name}", staticmethod(maker))

    @cached_property
    def images(self) -> ImagesAPI:
        """The pool's container images."""
        return type(self)._make_images(self)

    @cached_property
    def containers(self) -> ContainersAPI:
        """The pool's containers."""
        return type(self)._make_containers(self)

    @property
    def uses(self) -> UsesAPI:
        with self._lock:
            self._require_open()
            if self._uses is None:
                self._uses = type(self)._make_uses(self)
                self._committer.users = self._uses.users
            return self._uses

    def require_unused(self, layer: Layer, verb: str) -> None:
        """Raises LayerBusy if the layer is attached, mounted or running."""
        users = self._uses.users(layer) if self._uses is not None else ()
        if users:
            raise LayerBusy(f"cannot {verb} layer {layer.name}: used by {', '.join(users)}", users)

    def resized(self, layer: Layer) -> None:
        if self._uses is not None:
            self._uses.layer_resized(layer)

    def attachments(self) -> list[Attachment]:
        """Layers that are attached or mounted."""
        self._require_open()
        return [] if self._uses is None else self._uses.attachments()

    def serve_nbd(self, address: str, **tls: Any) -> str:
        """Serves all layers over NBD until the pool is closed; see :meth:`thinpool.exports.Uses.serve_nbd`."""
        return self.uses.serve_nbd(address, **tls)

    def nbd_addresses(self) -> Sequence[str]:
        """Where NBD clients are served."""
        return [] if self._uses is None else self._uses.nbd_addresses()

    def import_raw(self, path: str | Path, name: str, *, labels: Mapping[str, str] | None = None, progress: Progress | None = None) -> Layer:
        """A writable layer with the content of a raw image or block device; holes are skipped, chunks that the pool has are shared. Raises ImportFailed, …"""
        self._require_writable()
        return type(self)._import_raw(self, Path(path), name, labels=labels, progress=progress)

    def export_raw(self, layer: Layer, path: Path, progress: Progress | None) -> None:
        type(self)._export_raw(layer, path, progress=progress)

    def import_rootfs(self, path: str | Path, name: str, **options: Any) -> Layer:
        """A sealed layer with a file system that holds the tarball's tree; ``options`` as in :class:`thinpool.api.PoolAPI`. Raises ImportFailed, NeedsRoot."""
        self._require_writable()
        return type(self)._import_rootfs(self, Path(path), name, **options)

    def heal(self, sources: Sequence[str | Path], **options: Any) -> Healed:
        """Heals damaged chunks, also while they are in use; :func:`thinpool.healing.heal` says how."""
        return type(self)._heal(self, sources, **options)
