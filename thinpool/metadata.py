"""The seam to the metadata store: one LMDB environment, the only module that imports lmdb.

Every record is a value with a CRC-32C over its kind, key and content (docs/FORMAT.md). The engine's records (map
nodes, counts, space) arrive framed and checksummed; layers, fingerprints and the pool's own record are framed here.
A commit is one LMDB write transaction. The map size grows by itself: a transaction that does not fit is run again in
a larger one. The store's file is allocated some way past its used end, so that the commit that frees space still fits
on a full disk (DESIGN.md, "Reserve").
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import lmdb

from . import engine as data_plane
from .engine import NO_READER, crc32c
from .errors import NO_SPACE_ERRNOS, DamagedError, DiskError, FormatError, OutOfSpace, PoolBusy, PoolFailed, ThinpoolError
from .poolfiles import sync_directory
from .records import Record

FORMAT_VERSION = 1
# Features that this version knows, by what a version that does not know one must do.
KNOWN_INCOMPATIBLE: frozenset[str] = frozenset()  # refuse the pool
KNOWN_READ_COMPATIBLE = frozenset({"checksums", "documents", "holds", "sums"})  # open it read-only
_FEATURES_FROM_THE_START = frozenset({"sums"})  # of new pools only
_FEATURES_ON_REQUEST = frozenset({"holds"})  # of pools that use them only
_DATABASES = {
    data_plane.NODE: b"nodes",
    data_plane.CHUNK_PAGE: b"chunk-counts",
    data_plane.NODE_PAGE: b"node-counts",
    data_plane.SUMMARY: b"summaries",
    data_plane.MAP: b"maps",
    data_plane.STATE: b"state",
}
LAYER, FINGERPRINT, POOL, DOCUMENT = 7, 8, 9, 10
"""Kinds of the records that are framed here, for their CRC."""
_OWN_DATABASES = {LAYER: b"layers", FINGERPRINT: b"fingerprints", POOL: b"pool"}
_LATER_DATABASES = {DOCUMENT: b"documents", data_plane.CHECKSUM: b"checksums"}  # pools made by earlier versions have none until they are opened for writing
DATABASE_NAMES = {**_DATABASES, **_OWN_DATABASES, **_LATER_DATABASES}
"""All databases by the kind of their records."""
_POOL_KEY, SUMS_KEY = b"pool", b"sums"
_SUM_MAX, _CHECKSUM = 2**64 - 1, struct.Struct("<I").unpack_from
_INITIAL_MAP_BYTES = 256 << 20
_RESERVE_BYTES = 8 << 20


def frame(kind: int, key: bytes, body: bytes) -> bytes:
    """The stored form of a record: CRC-32C of kind, key and body, little-endian, then the body."""
    return crc32c(body, crc32c(bytes([kind]) + key)).to_bytes(4, "little") + body


def unframe(kind: int, key: bytes, value: bytes) -> bytes:
    """The body of a stored record. Raises :class:`~thinpool.errors.DamagedError`."""
    body = value[4:]
    if len(value) < 4 or frame(kind, key, body) != value:
        raise DamagedError(f"damaged metadata: record {key!r} of kind {kind} does not match its checksum")
    return body


class Sums:
    """How many records there are, all but those of kind POOL, and the sum of their checksums."""

    __slots__ = ("checksums", "count")

    def __init__(self, count: int = 0, checksums: int = 0) -> None:
        self.count, self.checksums = count, checksums

    @classmethod
    def of(cls, stored: Any) -> Self:
        """As stored. Raises DamagedError."""
        count, checksums = struct.unpack("<QQ", unframe(POOL, SUMS_KEY, bytes(stored)))
        return cls(count, checksums)

    def record(self) -> bytes:
        """The stored form."""
        return frame(POOL, SUMS_KEY, struct.pack("<QQ", self.count, self.checksums))

    def add(self, *values: Any) -> None:
        """Stored values, of which the first four bytes are the checksum."""
        self.count += len(values)
        self.checksums = self.checksums + _sum(values) & _SUM_MAX

    def remove(self, *values: Any) -> None:
        self.count -= len(values)
        self.checksums = self.checksums - _sum(values) & _SUM_MAX


def _sum(values: Iterable[Any]) -> int:
    try:
        return sum(_CHECKSUM(value)[0] for value in values)
    except struct.error:
        raise DamagedError("damaged metadata: a record is shorter than its checksum") from None


class PinLost(Exception):
    """A state that was pinned was let go of, and may have been overwritten while it was read: read another one."""


class Metadata:
    """The open metadata store of one pool."""

    def __init__(self, path: Path, *, create: bool = False, read_only: bool = False) -> None:
        """Opens ``path`` (a directory). Raises DamagedError, FormatError, PoolBusy, or DiskError."""
        self.path = path
        self.read_only = read_only
        # In the order they are taken. The environment changes under all of them, the size of the map while nobody reads or writes.
        self._writes, self._copies, self._reads = threading.Lock(), threading.Lock(), threading.Lock()
        self._map_changes = 0  # how often all transactions were ended for it
        self._reserved_to = 0  # bytes of the store's file that are known to be allocated
        self._open(create=create, read_only=read_only)
        self._snapshot = self._env.begin(buffers=True) if read_only else None

    def _open(self, *, create: bool, read_only: bool) -> None:
        with _lmdb_errors(self.path):
            self._env: Any = lmdb.open(
                str(self.path), map_size=_INITIAL_MAP_BYTES, max_dbs=16, subdir=True, readonly=read_only, create=create, mode=0o600, max_readers=1024
            )
            self._env.set_mapsize(max(_INITIAL_MAP_BYTES, self._file_bytes() * 2)) if not read_only else None
            names = {**_DATABASES, **_OWN_DATABASES}
            self._dbs = {kind: self._env.open_db(name, create=create) for kind, name in names.items()}
            for kind, name in _LATER_DATABASES.items():
                with suppress(lmdb.ReadonlyError, lmdb.NotFoundError):
                    self._dbs[kind] = self._env.open_db(name, create=not read_only)
            self._writable = not read_only

    def _file_bytes(self) -> int:
        try:
            return (self.path / "data.mdb").stat().st_size
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        if self._snapshot is not None:
            self._snapshot.abort()
        self._env.close()

    # --- reading ---

    def fetch(self, kind: int, key: int) -> bytes | None:
        """The committed value of one of the engine's records."""
        return self._get(kind, key.to_bytes(8, "big"))

    def _get(self, kind: int, key: bytes) -> bytes | None:
        if kind not in self._dbs:
            return None
        with _lmdb_errors(self.path):
            if self._snapshot is not None:
                with self._reads:
                    found = self._snapshot.get(key, db=self._dbs[kind])
                    return None if found is None else bytes(found)
            with self._reads, self._env.begin() as txn:
                value: bytes | None = txn.get(key, db=self._dbs[kind])
                return value

    def records(self, kind: int) -> list[tuple[bytes, bytes]]:
        """All committed records of a kind as (key, stored value), in the order of keys."""
        if kind not in self._dbs:
            return []
        with _lmdb_errors(self.path), self._reads:
            if self._snapshot is not None:
                return [(bytes(k), bytes(v)) for k, v in self._snapshot.cursor(self._dbs[kind])]
            with self._env.begin() as txn:
                return list(txn.cursor(self._dbs[kind]))

    def layers(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every layer's id and record."""
        for key, value in self.records(LAYER):
            body = unframe(LAYER, key, value)
            try:
                yield int.from_bytes(key, "big"), json.loads(body)
            except (ValueError, RecursionError) as error:
                raise DamagedError(f"damaged metadata: the record of layer number {int.from_bytes(key, 'big')} is no JSON") from error

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """Every document's key and content."""
        for key, value in self.records(DOCUMENT):
            yield key.decode(), unframe(DOCUMENT, key, value)

    def fingerprint(self, digest: bytes) -> int | None:
        """The chunk that once had this fingerprint: a hint, to be compared."""
        value = self._get(FINGERPRINT, digest)
        return None if value is None else int.from_bytes(unframe(FINGERPRINT, digest, value), "little")

    def pool_record(self) -> dict[str, Any]:
        """What :meth:`create_pool` stored. Raises FormatError for a newer version or an unknown feature that forbids opening."""
        value = self._get(POOL, _POOL_KEY)
        if value is None:
            raise DamagedError(f"{self.path} has no pool record: it was never finished, or is damaged")
        try:
            record: dict[str, Any] = json.loads(unframe(POOL, _POOL_KEY, value))
            unknown = set(record["features"]["incompatible"]) - KNOWN_INCOMPATIBLE
            read_compatible, newer = set(record["features"]["read_compatible"]), record["version"] > FORMAT_VERSION
            int(record["chunk_size"]), int(record["capacity"])
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise DamagedError(f"damaged metadata: the pool's record makes no sense ({error})") from error
        if newer or unknown:
            what = f"features {', '.join(sorted(unknown))}" if unknown else f"format version {record['version']}"
            raise FormatError(f"the pool was written by a newer thinpool ({what}); this one knows version {FORMAT_VERSION}: upgrade to open it")
        unknown = read_compatible - KNOWN_READ_COMPATIBLE
        if unknown and not self.read_only:
            raise FormatError(f"the pool has features this version must not write to ({', '.join(sorted(unknown))}): open it read-only, or upgrade")
        return record

    def usage(self) -> int:
        """Bytes of the store's pages in use."""
        with _lmdb_errors(self.path), self._reads:
            if self._snapshot is not None:
                stats = [self._snapshot.stat(db) for db in self._dbs.values()]
            else:
                with self._env.begin() as txn:
                    stats = [txn.stat(db) for db in self._dbs.values()]
        pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        return int(pages * self._env.stat()["psize"])

    def oldest_reader(self) -> int:
        """The oldest transaction that a live reader, of any process, looks at; :data:`NO_READER` if none does."""
        self._env.reader_check()
        oldest = NO_READER
        for line in self._env.readers().splitlines():
            fields = line.split()
            if len(fields) == 3 and fields[0].isdigit() and fields[2].isdigit():
                oldest = min(oldest, int(fields[2]))
        return oldest

    @contextmanager
    def pinned(self) -> Iterator[int]:
        """As :func:`pinned`, for who has the environment open. Raises PinLost at the end where it has grown meanwhile."""
        with _lmdb_errors(self.path), self._reads:
            txn, map_changes = self._env.begin(), self._map_changes
        try:
            yield int(txn.id())
        finally:
            with suppress(lmdb.Error):  # it went with the map
                txn.abort()
            if self._map_changes != map_changes:
                raise PinLost

    def last_txn(self) -> int:
        """The number of the newest transaction."""
        return int(self._env.info()["last_txnid"])

    def copy_to(self, directory: Path) -> None:
        """A compact copy of the newest committed state in an empty directory, durable when it returns."""
        with _lmdb_errors(directory), self._copies:
            self._env.copy(str(directory), compact=True)
        sync_directory(directory)

    # --- writing ---

    def create_pool(self, chunk_size: int, capacity: int) -> None:
        """Stores the pool's record: sizes in bytes, capacity 0 for no limit."""
        features: dict[str, list[str]] = {"incompatible": [], "read_compatible": sorted(KNOWN_READ_COMPATIBLE - _FEATURES_ON_REQUEST), "compatible": []}
        record = {"version": FORMAT_VERSION, "uuid": str(uuid.uuid4()), "chunk_size": chunk_size, "capacity": capacity, "features": features}
        self.put_pool(record)

    def use_features(self, *requested: str) -> None:
        """Marks a pool of an earlier version as written by this one, which keeps records that the earlier one does not know; ``requested``: others
        that it is about to use."""
        record = self.pool_record()
        features = record["features"]
        used = KNOWN_READ_COMPATIBLE - _FEATURES_FROM_THE_START - _FEATURES_ON_REQUEST | set(requested)
        if missing := used - set(features["read_compatible"]):
            self.put_pool(record | {"features": features | {"read_compatible": sorted({*features["read_compatible"], *missing})}})

    def set_capacity(self, capacity: int) -> None:
        """Bytes that chunks may take; 0: no limit."""
        self.put_pool(self.pool_record() | {"capacity": capacity})

    def put_pool(self, record: Mapping[str, Any]) -> None:
        """Stores the pool's record as it is given."""
        value = frame(POOL, _POOL_KEY, json.dumps(record).encode())
        self._write(lambda txn: txn.put(_POOL_KEY, value, db=self._dbs[POOL]))

    def commit(
        self,
        records: Iterable[Record],
        layers: Mapping[int, Mapping[str, Any] | None],
        fingerprints: Mapping[bytes, int],
        documents: Mapping[str, bytes | None],
    ) -> int:
        """One durable transaction of everything; returns LMDB's number of it. A layer or document that is ``None`` is deleted."""
        puts: dict[int, list[tuple[bytes, bytes]]] = {kind: [] for kind in self._dbs}
        deletes: list[tuple[int, bytes]] = []
        for kind, key, value in records:
            if value is None:
                deletes.append((kind, key))
            else:
                puts[kind].append((key, value))
        for layer_id, layer in layers.items():
            key = layer_id.to_bytes(8, "big")
            if layer is None:
                deletes.append((LAYER, key))
            else:
                puts[LAYER].append((key, frame(LAYER, key, json.dumps(layer).encode())))
        for name, content in documents.items():
            key = name.encode()
            if content is None:
                deletes.append((DOCUMENT, key))
            else:
                puts[DOCUMENT].append((key, frame(DOCUMENT, key, content)))
        for digest, chunk in fingerprints.items():
            puts[FINGERPRINT].append((digest, frame(FINGERPRINT, digest, chunk.to_bytes(5, "little"))))
        for items in puts.values():
            items.sort()  # neighbours fill pages well

        return self._write(lambda txn: self._change(txn, puts, deletes))

    def put_window(self, record: Record) -> None:
        """Stores (or with value ``None`` removes) the engine's allocation window, and nothing else."""
        kind, key, value = record
        puts = {} if value is None else {kind: [(key, value)]}
        self._write(lambda txn: self._change(txn, puts, [] if value is not None else [(kind, key)]))

    def _change(self, txn: Any, puts: Mapping[int, list[tuple[bytes, bytes]]], deletes: Iterable[tuple[int, bytes]]) -> None:
        """Stores and removes records, and keeps the sums over all records in step, by which a check finds old ones in new places."""
        stored = txn.get(SUMS_KEY, db=self._dbs[POOL])
        sums = Sums() if stored is None else Sums.of(stored)
        for kind, key in deletes:
            old = txn.get(key, db=self._dbs[kind])
            if old is not None:
                sums.remove(old)
                txn.delete(key, db=self._dbs[kind])
        for kind, items in puts.items():
            if items:
                cursor = txn.cursor(self._dbs[kind])
                sums.remove(*(old for _, old in cursor.getmulti([key for key, _ in items])))
                sums.add(*(value for _, value in items))
                cursor.putmulti(items, overwrite=True)
        txn.put(SUMS_KEY, sums.record(), db=self._dbs[POOL])

    def _write(self, write: Callable[[Any], object]) -> int:
        """Runs a write transaction to its durable end: again in a larger map, if need be. Raises PoolFailed where no other can follow."""
        with self._writes:
            if not self._writable:
                raise PoolFailed(f"the metadata store {self.path} has failed: open the pool anew")
            while True:
                try:
                    with _lmdb_errors(self.path), self._env.begin(write=True, buffers=True) as txn:
                        self._reserve()
                        write(txn)
                        return int(txn.id())
                except lmdb.MapFullError:
                    with self._reads:
                        self._map_changes += 1
                        self._env.set_mapsize(self._env.info()["map_size"] * 2)
                except ThinpoolError as error:
                    if self._is_stuck():
                        raise PoolFailed(f"the metadata store has failed for good: {error}") from error
                    raise

    def _is_stuck(self) -> bool:
        """Whether LMDB could not write its first pages, and refuses all from then on; reads go on in the environment opened anew."""
        with self._copies, self._reads:
            try:
                self._env.begin().abort()
            except lmdb.PanicError:
                self._writable = False
                self._map_changes += 1
                self._env.close()
                with suppress(ThinpoolError):
                    self._open(create=False, read_only=True)
        return not self._writable

    def _reserve(self) -> None:
        """Takes disk space for the next transactions while there is some: LMDB writes past its used end, where only it may.

        In a write transaction, so that nobody writes to the file meanwhile.
        """
        used = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if used + _RESERVE_BYTES // 2 <= self._reserved_to:
            return
        with suppress(OSError), open(self.path / "data.mdb", "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, used + _RESERVE_BYTES)
            self._reserved_to = used + _RESERVE_BYTES


@contextmanager
def pinned(path: Path) -> Iterator[int]:
    """Keeps the newest committed state of an environment as it is, whoever writes to it; its transaction's number. Reads no page of it."""
    with _lmdb_errors(path):
        env = lmdb.open(str(path), map_size=_INITIAL_MAP_BYTES, readonly=True, create=False, max_readers=1024)
        try:
            txn = env.begin()
        except BaseException:
            env.close()
            raise
    try:
        yield int(txn.id())
    finally:
        txn.abort()
        env.close()


@contextmanager
def _lmdb_errors(path: Path) -> Iterator[None]:
    """LMDB's errors as thinpool's; MapFullError passes, for :meth:`Metadata._write`."""
    try:
        yield
    except lmdb.MapFullError:
        raise
    except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PanicError) as error:
        raise DamagedError(f"damaged metadata store {path}: {error}") from error
    except (lmdb.NotFoundError, lmdb.BadRslotError) as error:
        raise DamagedError(f"damaged metadata store {path}: a database is missing ({error})") from error
    except (lmdb.DiskError, lmdb.Error) as error:
        text = str(error)
        if any(os.strerror(code) in text for code in NO_SPACE_ERRNOS):
            raise OutOfSpace(f"the host's disk is full, or a quota on it: {path}: remove layers or other files") from error
        if "already open in this process" in text:
            raise PoolBusy(f"the pool {path.parent} is already open in this process", os.getpid()) from error
        if os.strerror(errno.EACCES) in text:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from error
        raise DiskError(f"the metadata store {path} failed: {error}") from error
