"""The gRPC server: requests in, :class:`~.snapshotter.Snapshotter` asked, answers and gRPC codes out.

Every key is one of containerd's own: its metadata store has made it unique over its namespaces before it calls (``namespace/number/key``), and calls
without a namespace when it collects garbage. So the header ``containerd-namespace`` chooses nothing here.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import grpc

from .. import errors
from ..api import PoolAPI
from .filters import BadFilter
from .messages import ACTIVE, COMMITTED, SERVICE, VIEW, classes
from .records import Snapshot
from .snapshotter import Mount, Snapshotter

_LOG = logging.getLogger("thinpool.containerd")
_THREADS = 32
_GRACE_SECONDS = 5
_LIST_BATCH = 100
_PATH_BYTES_MAX = 107  # of a Unix socket
_LEFTOVERS_SECONDS = 1.0  # until what is in use is looked at again
_KINDS = {"view": VIEW, "active": ACTIVE, "committed": COMMITTED}
_Code = grpc.StatusCode

# The first that fits counts.
_CODES: list[tuple[type[BaseException], grpc.StatusCode]] = [
    (errors.LayerNotFound, _Code.NOT_FOUND),
    (errors.LayerDeleted, _Code.NOT_FOUND),
    (errors.LayerExists, _Code.ALREADY_EXISTS),
    (errors.LayerState, _Code.FAILED_PRECONDITION),
    (errors.LayerBusy, _Code.FAILED_PRECONDITION),
    (errors.BadSize, _Code.INVALID_ARGUMENT),
    (errors.BadName, _Code.INVALID_ARGUMENT),
    (BadFilter, _Code.INVALID_ARGUMENT),
    (errors.NeedsRoot, _Code.PERMISSION_DENIED),
    (errors.OutOfSpace, _Code.RESOURCE_EXHAUSTED),
    (errors.ServerError, _Code.UNAVAILABLE),
    (errors.PoolBusy, _Code.UNAVAILABLE),
    (errors.PoolClosed, _Code.UNAVAILABLE),
]

Connect = Callable[[], AbstractContextManager[PoolAPI]]
"""Gives the pool, which is closed when it is done with."""
Result = TypeVar("Result")


class Connection:
    """The pool, connected to anew when its server has gone."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._pool: PoolAPI | None = None

    def run(self, work: Callable[[PoolAPI], Result]) -> Result:
        """Does the work; from the beginning once more if the server goes on the way."""
        pool = self._connected(None)
        try:
            return work(pool)
        except (errors.ServerError, errors.PoolClosed) as error:
            _LOG.warning("%s", error)
            return work(self._connected(pool))

    def _connected(self, gone: PoolAPI | None) -> PoolAPI:
        with self._lock:
            if self._pool is None or self._pool is gone:
                self._pool = None
                self._open.close()
                self._pool = self._open.enter_context(self._connect())
            return self._pool

    def close(self) -> None:
        """Lets the pool go."""
        self._open.close()


class Service:
    """A snapshotter for containerd, listening from the beginning to :meth:`close`."""

    def __init__(self, connect: Connect, address: str, *, filesystem: str = "ext4", size: int = 10 << 30) -> None:
        """``address``: the path of a Unix socket, its owner's alone; ``filesystem`` (``ext4`` or ``xfs``), ``size`` in bytes: of what has no parent.

        Raises BadAddress, and what connecting and making the first file system raises.
        """
        self._connection = Connection(connect)
        self._leftovers = threading.Event()
        self._closing = threading.Event()
        self._snapshotter = Snapshotter(filesystem=filesystem, size=size, on_leftover=self._leftovers.set)
        self._server = grpc.server(ThreadPoolExecutor(_THREADS, thread_name_prefix="thinpool-snapshots"))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers()),))
        try:
            self._connection.run(self._snapshotter.recover)
            _listen(self._server, address)
        except BaseException:
            self._connection.close()
            raise
        self._reaper = threading.Thread(target=self._reap, name="thinpool-reaper", daemon=True)
        self._reaper.start()
        self._server.start()

    def close(self) -> None:
        """Answers what is being asked, and ends. Devices stay up."""
        self._server.stop(_GRACE_SECONDS).wait()
        self._closing.set()
        self._leftovers.set()
        self._reaper.join()
        self._connection.close()

    def _reap(self) -> None:
        while True:
            self._leftovers.wait()
            self._leftovers.clear()
            if self._closing.is_set():
                return
            try:
                done = self._connection.run(self._snapshotter.reap)
            except Exception:
                _LOG.exception("what was removed could not be deleted; trying again")
                done = False
            if not done:
                self._closing.wait(_LEFTOVERS_SECONDS)
                self._leftovers.set()

    # --- calls ---

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        calls: dict[str, tuple[Callable[[Any, int], Any], str]] = {
            "Prepare": (self._prepare, "PrepareSnapshotRequest"),
            "View": (self._view, "ViewSnapshotRequest"),
            "Mounts": (self._mounts, "MountsRequest"),
            "Commit": (self._commit, "CommitSnapshotRequest"),
            "Remove": (self._remove, "RemoveSnapshotRequest"),
            "Stat": (self._stat, "StatSnapshotRequest"),
            "Update": (self._update, "UpdateSnapshotRequest"),
            "Usage": (self._usage, "UsageRequest"),
            "Cleanup": (self._cleanup, "CleanupRequest"),
        }
        handlers = {name: _unary(call, request) for name, (call, request) in calls.items()}
        return {**handlers, "List": _stream(self._list, "ListSnapshotsRequest")}

    def _prepare(self, request: Any, now: int) -> Any:
        mount = self._connection.run(lambda pool: self._snapshotter.prepare(pool, request.key, request.parent, request.labels, now))
        return classes["PrepareSnapshotResponse"](mounts=[_mount(mount)])

    def _view(self, request: Any, now: int) -> Any:
        mount = self._connection.run(lambda pool: self._snapshotter.view(pool, request.key, request.parent, request.labels, now))
        return classes["ViewSnapshotResponse"](mounts=[_mount(mount)])

    def _mounts(self, request: Any, _now: int) -> Any:
        mount = self._connection.run(lambda pool: self._snapshotter.mounts(pool, request.key))
        return classes["MountsResponse"](mounts=[_mount(mount)])

    def _commit(self, request: Any, now: int) -> Any:
        self._connection.run(lambda pool: self._snapshotter.commit(pool, request.key, request.name, request.labels, now))
        return classes["Empty"]()

    def _remove(self, request: Any, _now: int) -> Any:
        tried = False

        def remove(pool: PoolAPI) -> None:
            nonlocal tried
            again, tried = tried, True
            try:
                self._snapshotter.remove(pool, request.key)
            except errors.LayerNotFound:
                if not again:  # else the first try has removed it
                    raise

        self._connection.run(remove)
        return classes["Empty"]()

    def _stat(self, request: Any, _now: int) -> Any:
        snapshot = self._connection.run(lambda pool: self._snapshotter.stat(pool, request.key))
        return classes["StatSnapshotResponse"](info=_info(snapshot))

    def _update(self, request: Any, now: int) -> Any:
        given, paths = request.info, list(request.update_mask.paths)
        snapshot = self._connection.run(lambda pool: self._snapshotter.update(pool, given.name, given.labels, paths, now))
        return classes["UpdateSnapshotResponse"](info=_info(snapshot))

    def _usage(self, request: Any, _now: int) -> Any:
        size, inodes = self._connection.run(lambda pool: self._snapshotter.usage(pool, request.key))
        return classes["UsageResponse"](size=size, inodes=inodes)

    def _cleanup(self, _request: Any, _now: int) -> Any:
        self._connection.run(self._snapshotter.reap)
        return classes["Empty"]()

    def _list(self, request: Any) -> Iterator[Any]:
        found = self._connection.run(lambda pool: self._snapshotter.list(pool, request.filters))
        for start in range(0, len(found), _LIST_BATCH):
            yield classes["ListSnapshotsResponse"](info=[_info(snapshot) for snapshot in found[start : start + _LIST_BATCH]])


def _listen(server: grpc.Server, address: str) -> None:
    path = os.path.abspath(address)
    if not os.path.isdir(os.path.dirname(path)) or len(os.fsencode(path)) > _PATH_BYTES_MAX:  # gRPC would say so on standard error
        raise errors.BadAddress(f"cannot listen on {address}: its directory must be there, and its path have {_PATH_BYTES_MAX} bytes at most")
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError:
        raise errors.BadAddress(f"cannot listen on {address}: something else is there, or it may not be made") from None
    finally:
        os.umask(mask)


def _unary(call: Callable[[Any, int], Any], request: str) -> grpc.RpcMethodHandler:
    def answer(message: Any, context: grpc.ServicerContext) -> Any:
        try:
            return call(message, time.time_ns())
        except Exception as error:
            context.abort(*_failure(error))

    return grpc.unary_unary_rpc_method_handler(answer, classes[request].FromString, _serialized)


def _stream(call: Callable[[Any], Iterator[Any]], request: str) -> grpc.RpcMethodHandler:
    def answer(message: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from call(message)
        except Exception as error:
            context.abort(*_failure(error))

    return grpc.unary_stream_rpc_method_handler(answer, classes[request].FromString, _serialized)


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _failure(error: Exception) -> tuple[grpc.StatusCode, str]:
    code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    if code is None:
        _LOG.error("failed", exc_info=error)
    return code or _Code.UNKNOWN, str(error)


def _mount(mount: Mount) -> Any:
    return classes["Mount"](type=mount.type, source=mount.source, options=mount.options)


def _info(snapshot: Snapshot) -> Any:
    info = classes["Info"](name=snapshot.key, parent=snapshot.parent, kind=_KINDS[snapshot.kind], labels=snapshot.labels)
    info.created_at.FromNanoseconds(snapshot.created)
    info.updated_at.FromNanoseconds(snapshot.updated)
    return info
