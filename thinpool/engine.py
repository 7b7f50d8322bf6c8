"""The seam to the data plane: the only module that imports the C core.

:class:`Engine` is one open pool, :class:`EngineLayer` a handle on one of its layers. Both only pass calls on and turn
error codes into exceptions, through one table. cffi lets go of the GIL for the length of every call; C takes it
again only to fetch a record that is not in memory, and to run a commit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, cast

from . import errors
from ._core import ffi, lib
from .api import Buffer, Limits
from .faults import FAULTS
from .records import EngineInfo, Record, Store, parse_records

_core, _ffi = lib, ffi

# Looked up once: these are called for each read and write.
_read, _write, _from_buffer = _core.tp_read, _core.tp_write, _ffi.from_buffer

NODE, CHUNK_PAGE, NODE_PAGE, SUMMARY, MAP, STATE, CHECKSUM = *range(1, 7), 11
"""Record kinds (``enum tp_kind``)."""
_ERRORS = {getattr(_core, code): fault for code, fault in FAULTS.items()}

WORK_WINDOW, WORK_RECLAIM, WORK_PUNCH, WORK_COMMIT, WORK_OVERDUE = 1, 2, 4, 8, 16
"""Bits of :meth:`Engine.wait_work`."""
CORRUPT: int = _core.TP_ECORRUPT
"""In :attr:`EngineInfo.failed`: the pool is in error mode as its counts cannot be right."""
BLOCK_SIZE = 4096
_WINDOW_KEY, _EXTENTS_PER_CALL = 2, 1024
NO_READER = 2**64 - 1


def crc32c(data: Buffer, crc: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of the data, continuing from ``crc``."""
    view = _ffi.from_buffer(data)
    return int(_core.tp_crc32c(crc, view, len(view)))


def is_zero(data: Buffer) -> bool:
    """True if every byte is zero."""
    view = _ffi.from_buffer(data)
    return bool(_core.tp_is_zero(view, len(view)))


# --- callbacks from C ---


@_ffi.def_extern(error=_core.TP_ECALLBACK)  # type: ignore[untyped-decorator]
def tp_py_fetch(ctx: Any, kind: int, key: int, buf: Any, capacity: int, length: Any) -> int:
    return cast(Engine, _ffi.from_handle(ctx))._fetch(kind, key, buf, capacity, length)


@_ffi.def_extern(error=_core.TP_ECALLBACK)  # type: ignore[untyped-decorator]
def tp_py_commit(ctx: Any) -> int:
    engine = cast(Engine, _ffi.from_handle(ctx))
    return engine._guarded(engine.store.commit)


@_ffi.def_extern(error=_core.TP_ECALLBACK)  # type: ignore[untyped-decorator]
def tp_py_extend_window(ctx: Any) -> int:
    engine = cast(Engine, _ffi.from_handle(ctx))
    return engine._guarded(engine.store.extend_window)


def io_addresses() -> tuple[int, int, int]:
    """Where the core's functions to read, write and discard are, for C code that is given a layer's :attr:`EngineLayer.address`."""
    return tuple(int(_ffi.cast("uintptr_t", _ffi.addressof(_core, name))) for name in ("tp_read", "tp_write", "tp_discard"))  # type: ignore[return-value]


class Engine:
    """One open pool in the data plane."""

    def __init__(
        self,
        store: Store,
        *,
        data_fd: int,
        chunk_size: int,
        capacity: int = 0,
        cache_bytes: int = 0,
        window_bytes: int = 0,
        read_only: bool = False,
        verify_reads: bool = False,
        disk: Any = None,
    ) -> None:
        """Opens the pool whose records ``store`` keeps. ``disk``: a ``tp_disk *`` in place of ``data_fd``, for tests, and
        ``window_bytes`` another size of the allocation window.

        Raises :class:`~thinpool.errors.DamagedError` where the stored state makes no sense.
        """
        self.store = store
        self._raised = threading.local()
        self._handle = _ffi.new_handle(self)
        options = _ffi.new("tp_options *")
        options.chunk_size, options.capacity, options.cache_bytes, options.window_bytes = chunk_size, capacity, cache_bytes, window_bytes
        options.data_fd, options.read_only, options.verify_reads = data_fd, read_only, verify_reads
        options.disk, options.ctx = disk if disk is not None else _ffi.NULL, self._handle
        options.fetch, options.commit, options.extend_window = _core.tp_py_fetch, _core.tp_py_commit, _core.tp_py_extend_window
        out = _ffi.new("tp_pool **")
        self.check(_core.tp_pool_open(options, out))
        self.pointer = _ffi.gc(out[0], _core.tp_pool_put)

    def end_limits(self) -> None:
        """Nobody waits for a layer's limits any more, nor for room."""
        _core.tp_limits_end(self.pointer)

    def stop(self) -> None:
        """Drains I/O; no layer changes from now on. What is to be committed still is."""
        _core.tp_pool_stop(self.pointer)

    def close(self) -> None:
        """Drains I/O; every later call raises :class:`~thinpool.errors.PoolClosed`. Nothing is committed."""
        _core.tp_pool_close(self.pointer)

    def abandon(self, layers: set[EngineLayer]) -> None:
        """In a process that was forked: the core's threads are not there, its locks may be taken for ever, so that it must not be called again.

        Methods of this object and of its ``layers`` raise :class:`~thinpool.errors.PoolClosed` from now on.
        """
        _ffi.gc(self.pointer, None)
        for layer in layers:
            _ffi.gc(layer.pointer, None)
            layer.__class__ = _AbandonedLayer
        self.__class__ = _AbandonedEngine

    # --- errors ---

    def _where(self, info: Any) -> str:
        """The part of a message that names layer and range."""
        if not info.layer_id:
            return ""
        name = self.store.layer_name(info.layer_id)
        return f" (layer {name}, offset {info.offset}, {info.length} bytes)" if info.length else f" (layer {name})"

    def check(self, rc: int, layer_id: int = 0, offset: int = 0, length: int = 0) -> int:
        """Returns ``rc`` if it is no error; else raises the exception for it."""
        if rc >= 0:
            return rc
        pending: BaseException | None = getattr(self._raised, "exception", None)
        self._raised.exception = None
        if isinstance(pending, errors.OutOfSpace) and rc != _core.TP_ENOSPC:
            pending = None  # of an earlier call, which did without
        info = _ffi.new("tp_error_info *")
        _core.tp_last_error(info)
        if info.code != rc:
            info.code, info.kind, info.os_error, info.layer_id = rc, 0, 0, 0
        if not info.layer_id and layer_id:
            info.layer_id, info.offset, info.length = layer_id, offset, length
        if isinstance(pending, errors.ThinpoolError):
            raise pending
        raise _ERRORS[rc](info, self._where(info)) from pending

    def _guarded(self, work: Callable[[], object]) -> int:
        """Runs a callback; what it raises is raised again by the call that is under way in this thread."""
        self._raised.exception = None
        try:
            work()
        except errors.OutOfSpace as error:
            self._raised.exception = error
            return int(_core.TP_ENOSPC)
        except Exception as error:
            self._raised.exception = error
            return int(_core.TP_ECALLBACK)
        return 0

    def _fetch(self, kind: int, key: int, buf: Any, capacity: int, length: Any) -> int:
        found: list[bytes | memoryview | None] = []
        rc = self._guarded(lambda: found.append(self.store.fetch(kind, key)))
        if rc != 0:
            return rc
        value = found[0]
        if value is None:
            return int(_core.TP_ENOENT)
        length[0] = len(value)
        if len(value) > capacity:
            return int(_core.TP_ERANGE)
        _ffi.memmove(buf, value, len(value))
        return 0

    # --- pool ---

    def info(self) -> EngineInfo:
        """The engine's figures."""
        info = _ffi.new("tp_pool_info *")
        _core.tp_pool_get_info(self.pointer, info)
        return EngineInfo(*(int(getattr(info, name)) for name in EngineInfo.__slots__))

    def set_capacity(self, capacity: int) -> None:
        """Bytes that chunks may take; 0: no limit."""
        self.check(_core.tp_pool_set_capacity(self.pointer, capacity))

    def set_patience(self, seconds: int) -> None:
        """How long writers of devices wait for room; 0: not at all."""
        self.check(_core.tp_pool_set_patience(self.pointer, seconds * 1000))

    def create_layer(self, layer_id: int, size: int) -> EngineLayer:
        out = _ffi.new("tp_layer **")
        self.check(_core.tp_layer_create(self.pointer, layer_id, size, out), layer_id)
        return EngineLayer(self, layer_id, out[0])

    def layer(self, layer_id: int) -> EngineLayer:
        out = _ffi.new("tp_layer **")
        self.check(_core.tp_layer_get(self.pointer, layer_id, out), layer_id)
        return EngineLayer(self, layer_id, out[0])

    def exclusive_chunks(self, layers: Sequence[EngineLayer]) -> int:
        """How many chunks deleting all these layers would free."""
        out = _ffi.new("uint64_t *")
        self.check(_core.tp_exclusive([layer.pointer for layer in layers], len(layers), out))
        return int(out[0])

    def diff(self, from_layer: EngineLayer, to_layer: EngineLayer) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, data in ``to_layer``) of each range that may differ, neighbours joined."""
        return self._walk(lambda cursor, out: _core.tp_diff(from_layer.pointer, to_layer.pointer, cursor, out, _EXTENTS_PER_CALL), to_layer)

    def _walk(self, call: Callable[[Any, Any], int], layer: EngineLayer) -> Iterator[tuple[int, int, bool]]:
        cursor, out = _ffi.new("uint64_t *", 0), _ffi.new("tp_extent[]", _EXTENTS_PER_CALL)
        pending: tuple[int, int, bool] | None = None
        while True:
            before = cursor[0]
            count = self.check(call(cursor, out), layer.id)
            for i in range(count):
                offset, length, data = out[i].offset, out[i].length, bool(out[i].data)
                if pending and pending[0] + pending[1] == offset and pending[2] == data:
                    pending = (pending[0], pending[1] + length, data)
                    continue
                if pending:
                    yield pending
                pending = (offset, length, data)
            if count == 0 and cursor[0] == before:
                break
        if pending:
            yield pending

    # --- commits: one at a time, in this order ---

    def flush(self) -> None:
        """All that was written before the call is durable when it returns; concurrent flushes share a commit."""
        self.check(_core.tp_flush(self.pointer))

    def touch(self) -> None:
        """The open transaction has records of the caller's: the next flush must commit."""
        _core.tp_touch(self.pointer)

    def freeze(self) -> bool:
        """Closes the open transaction; true if it has records to store."""
        txn = _ffi.new("uint64_t *")
        return bool(self.check(_core.tp_freeze(self.pointer, txn)))

    def sync(self) -> None:
        self.check(_core.tp_sync(self.pointer))

    def encoded(self) -> Iterator[Record]:
        """The frozen records; runs of them are encoded as the iteration goes on."""
        records, length = _ffi.new("uint8_t **"), _ffi.new("uint64_t *")
        while True:
            self.check(_core.tp_encode(self.pointer, records, length))
            if length[0] == 0:
                return
            yield from parse_records(bytes(_ffi.buffer(records[0], length[0])))

    def release(self, store_txn: int, oldest_reader: int) -> None:
        self.check(_core.tp_release(self.pointer, store_txn, oldest_reader))

    def fail(self) -> None:
        """Error mode, for good: reads go on, writes and commits raise :class:`~thinpool.errors.PoolFailed`."""
        _core.tp_fail(self.pointer, _core.TP_EIO)

    def plan_window(self) -> Record:
        """The record to store so that more clean chunks may be handed out; then :meth:`activate_window`."""
        record, length = _ffi.new("uint8_t **"), _ffi.new("uint64_t *")
        self.check(_core.tp_window_plan(self.pointer, record, length))
        return next(parse_records(bytes(_ffi.buffer(record[0], length[0]))))

    def activate_window(self) -> None:
        self.check(_core.tp_window_activate(self.pointer))

    @staticmethod
    def no_window() -> Record:
        """What a clean close stores: no chunk is handed out that a commit does not know."""
        return STATE, _WINDOW_KEY.to_bytes(8, "big"), None

    def redo(self, descriptor: int) -> int:
        """Does again what a killed process noted in this memory file and had not committed, commits, and notes there from now on. How many notes."""
        try:
            count = self.check(_core.tp_redo_open(self.pointer, descriptor))
            self.flush()
        except BaseException:
            self.close()  # half of it must not be committed
            raise
        _core.tp_redo_begin(self.pointer)
        return count

    # --- background work ---

    def wait_work(self, timeout_seconds: float) -> int:
        """Waits for work, or until the time is up; a set of ``WORK_*`` bits. Raises PoolClosed."""
        return self.check(_core.tp_wait_work(self.pointer, int(timeout_seconds * 1000)))

    def wake(self) -> None:
        _core.tp_wake(self.pointer)

    def reclaim(self, entries: int) -> bool:
        """Walks up to that many entries of deleted maps; true if there is more."""
        return bool(self.check(_core.tp_reclaim(self.pointer, entries)))

    def punch(self, budget_bytes: int) -> bool:
        """Gives up to that many bytes of free chunks back to the host; true if there may be more."""
        return bool(self.check(_core.tp_punch(self.pointer, budget_bytes)))

    def revoke(self) -> None:
        """Before chunks are compared that entries were made to share: nobody overwrites them in place from now on."""
        self.check(_core.tp_revoke(self.pointer))


class EngineLayer:
    """A handle on a layer. Methods raise what :data:`_ERRORS` says; a handle outlives its layer."""

    __slots__ = ("engine", "id", "pointer")

    def __init__(self, engine: Engine, layer_id: int, pointer: Any) -> None:
        self.engine = engine
        self.id = layer_id
        self.pointer = _ffi.gc(pointer, _core.tp_layer_put)

    @property
    def address(self) -> int:
        """Of the core's handle, for C code; good for as long as this object lives."""
        return int(_ffi.cast("uintptr_t", self.pointer))

    def raise_error(self, rc: int, offset: int = 0, length: int = 0) -> None:
        """Raises the exception for a code that one of the core's functions has returned in this thread."""
        self.engine.check(rc, self.id, offset, length)

    def read(self, length: int, offset: int) -> bytes:
        if length < 2:
            small = bytearray(max(length, 0))
            if length < 0:
                raise errors.OutOfRange(f"a negative length: {length}")
            self.read_into(small, offset)
            return bytes(small)
        if length > self.size:  # before memory is asked for that is not there
            raise errors.OutOfRange(f"past the end of the layer (layer {self.engine.store.layer_name(self.id)}, offset {offset}, {length} bytes)")
        # A new bytes object that nobody else has seen is filled in place: a copy of a large one would cost half the speed.
        data = bytes(length)
        self.read_into_unchecked(data, length, offset)
        return data

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        view = _ffi.from_buffer(buffer, require_writable=True)
        self.read_into_unchecked(view, len(view), offset)
        return len(view)

    def read_into_unchecked(self, target: Any, length: int, offset: int) -> None:
        try:
            rc = _read(self.pointer, _from_buffer(target) if type(target) is bytes else target, length, offset)
        except OverflowError:
            raise errors.OutOfRange(f"an offset that no layer has: {offset}") from None
        if rc:
            self.raise_error(rc, offset, length)

    def write(self, data: Buffer, offset: int) -> int:
        source = data if type(data) is bytes else _from_buffer(data)
        length = len(source)
        try:
            rc = _write(self.pointer, source, length, offset)
        except OverflowError:
            raise errors.OutOfRange(f"an offset that no layer has: {offset}") from None
        if rc:
            self.raise_error(rc, offset, length)
        return length

    def discard(self, offset: int, length: int) -> None:
        try:
            rc = _core.tp_discard(self.pointer, offset, length)
        except OverflowError:
            raise errors.OutOfRange(f"a range that no layer has: {length} bytes at {offset}") from None
        if rc:
            self.raise_error(rc, offset, length)

    def sparsify(self, chunks: int) -> Iterator[tuple[int, int, int]]:
        """Zeros become holes, up to so many chunks at a time: where it has come to, bytes that became holes, bytes of these that nobody needs any more."""
        done, more = _ffi.new("tp_sparsified *"), 1
        while more:
            more = self.engine.check(_core.tp_sparsify(self.pointer, done, chunks), self.id)
            yield int(done.cursor), int(done.zeros), int(done.freed)

    def equal(self, data: Buffer, offset: int) -> bool:
        """True if the layer holds these bytes there."""
        view = _ffi.from_buffer(data)
        return bool(self.engine.check(_core.tp_equal(self.pointer, view, len(view), offset), self.id))

    def branch(self, layer_id: int, size: int, *, sealed: bool) -> EngineLayer:
        out = _ffi.new("tp_layer **")
        self.engine.check(_core.tp_layer_branch(self.pointer, layer_id, size, sealed, out), self.id)
        return EngineLayer(self.engine, layer_id, out[0])

    def set_limits(self, limits: Limits) -> None:
        """From now on, and as long as this handle lives; who waits goes on at once."""
        _core.tp_layer_set_limits(self.pointer, _ffi.new("tp_limits *", asdict(limits)))

    def seal(self) -> None:
        self.engine.check(_core.tp_layer_seal(self.pointer), self.id)

    def resize(self, size: int) -> None:
        self.engine.check(_core.tp_layer_resize(self.pointer, size), self.id)

    def reset(self, source: EngineLayer) -> None:
        self.engine.check(_core.tp_layer_reset(self.pointer, source.pointer), self.id)

    def delete(self) -> None:
        self.engine.check(_core.tp_layer_delete(self.pointer), self.id)

    @property
    def size(self) -> int:
        return int(_core.tp_layer_size(self.pointer))

    def info(self) -> tuple[int, int, bool]:
        """(size in bytes, chunk references of the map, sealed)."""
        info = _ffi.new("tp_layer_info *")
        self.engine.check(_core.tp_layer_get_info(self.pointer, info), self.id)
        return int(info.size), int(info.mapped_refs), bool(info.sealed)

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, data) from the start to the end of the layer, without gaps."""
        return self.engine._walk(lambda cursor, out: _core.tp_extents(self.pointer, cursor, out, _EXTENTS_PER_CALL), self)

    def rebase(self, source: EngineLayer, target: EngineLayer) -> None:
        """Names what ``target`` names wherever it names what ``source`` names: for a descendant of ``source``, and then ``source`` itself.

        The two are sealed and equal, byte for byte.
        """
        cursor = _ffi.new("uint64_t *", 0)
        while self.engine.check(_core.tp_layer_rebase(self.pointer, source.pointer, target.pointer, cursor), self.id):
            continue

    def checksum(self, offset: int, length: int) -> None:
        """Makes the checksums that chunks lack, of those that a sealed layer names in the range."""
        self.engine.check(_core.tp_layer_checksum(self.pointer, offset, length), self.id)

    def map_shared(self, index: int, chunk: int) -> bool:
        """Lets chunk ``index`` of the layer be that chunk of the pool; false if that is not allocated."""
        return bool(self.engine.check(_core.tp_map_shared(self.pointer, index, chunk), self.id))

    def chunk_at(self, index: int) -> int | None:
        """The pool's chunk behind chunk ``index`` of the layer, if it is a whole one."""
        chunk = int(_core.tp_chunk_at(self.pointer, index))
        return chunk if chunk >= 0 else None

    def serve_nbd(self, descriptor: int, *, read_only: bool, structured: bool, contexts: Sequence[tuple[int, EngineLayer | None]]) -> None:
        """Serves the transmission phase of an NBD connection until it ends. ``contexts``: their ids, and the layer since which changes are told."""
        listed = _ffi.new("tp_nbd_context[]", [(number, since.pointer if since else _ffi.NULL) for number, since in contexts])
        options = _ffi.new("tp_nbd_options *", (read_only, structured, listed, len(contexts)))
        self.engine.check(_core.tp_nbd_serve(self.engine.pointer, self.pointer, descriptor, options), self.id)

    def map_unwritten(self, index: int, count: int) -> None:
        """For tests and benchmarks: maps chunks without writing any data."""
        self.engine.check(_core.tp_map_unwritten(self.pointer, index, count), self.id)


def _refuse(self: object, name: str) -> Any:
    raise errors.PoolClosed("the pool was opened by the process that this one was forked from: open it anew")


class _AbandonedEngine(Engine):
    __getattribute__ = _refuse


class _AbandonedLayer(EngineLayer):
    __slots__ = ()
    __getattribute__ = _refuse
