"""A world whose power can be cut: a disk that forgets, keeps, tears or garbles what was not synced, and records that roll back.

The disk stands below the engine (``tp_disk``), the records beside it (in place of :class:`thinpool.metadata.Metadata`). Each
operation of either is a step; at the step that a test chooses the power goes, before or after its effect, and every later
one fails. :meth:`World.reboot` settles what the disk held unsynced, and the pool is opened anew over what is left.
"""

from __future__ import annotations

import json
import mmap
import pickle
import random
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

from thinpool.engine import NO_READER, Record, _ffi, is_zero
from thinpool.errors import DiskError
from thinpool.metadata import DOCUMENT, LAYER, frame
from thinpool.pool import Pool
from thinpool.poolfiles import PoolFiles

SECTOR = 512
DISK_BYTES = 1 << 30  # of addresses; only what was written takes memory
GARBAGE = 0xEE
EIO = 5


class PowerCut(DiskError):
    """The power is gone."""

    def __init__(self) -> None:
        super().__init__("the power is gone")


class Disk:
    """A sparse file in memory: what is durable, what is seen, and the unsynced writes between the two."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._durable, self._seen = (memoryview(mmap.mmap(-1, DISK_BYTES)) for _ in range(2))
        self._unsynced: list[tuple[int, bytes | int]] = []  # offset and data, or the length of a punch
        self._touched: list[slice] = []  # where the two may differ, or did since the power was last gone
        self._length = self._durable_length = self._written_to = 0
        signatures = {
            "pread": "int64_t(void *, void *, uint64_t, uint64_t)",
            "pwrite": "int64_t(void *, const void *, uint64_t, uint64_t)",
            "punch": "int(void *, uint64_t, uint64_t)",
            "sync": "int(void *)",
            "resize": "int(void *, uint64_t)",
            "size": "int64_t(void *)",
            "cut": "int(void *, uint64_t)",
        }
        self.operations = _ffi.new("tp_disk *")
        self._keep = {name: _ffi.callback(signature, getattr(self, f"_{name}"), error=-EIO) for name, signature in signatures.items()}
        for name, callback in self._keep.items():
            setattr(self.operations, name, callback)

    # --- what the engine calls ---

    def _pread(self, _: Any, buffer: Any, length: int, offset: int) -> int:
        if self._world.dark:
            return -EIO
        _ffi.memmove(buffer, self._seen[offset : offset + length], length)
        return length

    def _pwrite(self, _: Any, buffer: Any, length: int, offset: int) -> int:
        return self._change(offset, bytes(_ffi.buffer(buffer, length)), length)

    def read(self, offset: int, length: int) -> bytes:
        """What is seen, for :func:`invariants.check`."""
        return bytes(self._seen[offset : offset + length])

    def _punch(self, _: Any, offset: int, length: int) -> int:
        return self._change(offset, length, 0)

    def _change(self, offset: int, what: bytes | int, result: int) -> int:
        def effect() -> None:
            self._touched.append(self._apply(self._seen, offset, what))
            self._unsynced.append((offset, what))
            self._written_to = max(self._written_to, offset + result)

        return result if self._world.step(effect) else -EIO

    def _sync(self, _: Any) -> int:
        def effect() -> None:
            for offset, what in self._unsynced:
                self._apply(self._durable, offset, what)
            self._unsynced.clear()
            self._durable_length = self._length

        return 0 if self._world.step(effect) else -EIO

    def _resize(self, _: Any, length: int) -> int:
        def effect() -> None:
            self._length = max(self._length, length)

        return 0 if self._world.step(effect) else -EIO

    def _cut(self, _: Any, length: int) -> int:
        """What is cut off must be zeros already, durable ones: the power may go before the cut is."""

        def effect() -> None:
            end = max(self._written_to, length)
            self._world.lost_by_cuts |= not all(is_zero(content[length:end]) for content in (self._durable, self._seen))
            self._length = min(self._length, length)

        return 0 if self._world.step(effect) else -EIO

    def _size(self, _: Any) -> int:
        return -EIO if self._world.dark else self._length

    # --- bytes ---

    @staticmethod
    def _apply(content: memoryview, offset: int, what: bytes | int) -> slice:
        data = what if isinstance(what, bytes) else bytes(what)
        where = slice(offset, offset + len(data))
        content[where] = data
        return where

    def settle(self, rng: random.Random) -> None:
        """What becomes of unsynced changes when the power goes: each is kept, forgotten, torn by sectors, or garbled."""
        for offset, what in self._unsynced:
            data = what if isinstance(what, bytes) else bytes(what)
            fate = rng.choice(("keep", "forget", "tear", "garble"))
            if fate == "keep":
                self._apply(self._durable, offset, data)
            elif fate != "forget":
                for start in range(0, len(data), SECTOR):
                    if rng.random() < 0.5:
                        continue
                    piece = data[start : start + SECTOR]
                    garbled = fate == "garble" and isinstance(what, bytes) and rng.random() < 0.5
                    self._apply(self._durable, offset + start, bytes([GARBAGE]) * len(piece) if garbled else piece)
        self._unsynced.clear()
        for where in self._touched:
            self._seen[where] = self._durable[where]
        self._touched.clear()
        self._length = rng.choice((self._length, self._durable_length))


class Records:
    """The metadata store: atomic and durable by itself, as LMDB is."""

    def __init__(self, world: World, chunk_size: int) -> None:
        self._world = world
        self._chunk_size = chunk_size
        self.path = world.directory / "meta"  # on the host, whose disk is not full
        self.path.mkdir(exist_ok=True)
        self.capacity = 0
        self.kinds: dict[int, dict[bytes, bytes]] = {}
        self.committed = 0

    def fetch(self, kind: int, key: int) -> bytes | None:
        if self._world.dark:
            raise PowerCut
        return self.kinds.get(kind, {}).get(key.to_bytes(8, "big"))

    def commit(
        self,
        records: Iterable[Record],
        layers: Mapping[int, Mapping[str, Any] | None],
        fingerprints: Mapping[bytes, int],
        documents: Mapping[str, bytes | None],
    ) -> int:
        changes = list(records)
        for layer_id, layer in layers.items():
            key = layer_id.to_bytes(8, "big")
            changes.append((LAYER, key, None if layer is None else frame(LAYER, key, json.dumps(layer).encode())))
        for name, content in documents.items():
            changes.append((DOCUMENT, name.encode(), None if content is None else frame(DOCUMENT, name.encode(), content)))
        self._store(changes, commit=True)
        return self.committed

    def put_window(self, record: Record) -> None:
        self._store([record], commit=False)

    def _store(self, changes: list[Record], *, commit: bool) -> None:
        def effect() -> None:
            for kind, key, value in changes:
                if value is None:
                    self.kinds.setdefault(kind, {}).pop(key, None)
                else:
                    self.kinds.setdefault(kind, {})[key] = value
            if commit:
                self.committed += 1
                self._world.on_commit()

        if not self._world.step(effect):
            raise PowerCut

    def layers(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, value in self.kinds.get(LAYER, {}).items():
            yield int.from_bytes(key, "big"), json.loads(value[4:])

    def documents(self) -> Iterator[tuple[str, bytes]]:
        for key, value in self.kinds.get(DOCUMENT, {}).items():
            yield key.decode(), value[4:]

    def use_features(self, *requested: str) -> None:
        pass

    def copy_to(self, directory: Path) -> None:
        (directory / "data.mdb").write_bytes(pickle.dumps(self.kinds))

    def of_kind(self, kind: int) -> list[tuple[bytes, bytes]]:
        """For :func:`invariants.check`."""
        return sorted(self.kinds.get(kind, {}).items())

    def pool_record(self) -> dict[str, Any]:
        return {"chunk_size": self._chunk_size, "capacity": self.capacity}

    def set_capacity(self, capacity: int) -> None:
        def effect() -> None:
            self.capacity = capacity

        if not self._world.step(effect):
            raise PowerCut

    def fingerprint(self, digest: bytes) -> None:
        return None

    def oldest_reader(self) -> int:
        return NO_READER

    def close(self) -> None:
        pass


class World:
    """One disk, one store, one power switch."""

    def __init__(self, directory: Path, chunk_size: int, rng: random.Random) -> None:
        self.directory, self._rng = directory, rng
        self.dark = False
        self.verify_reads = False
        self.steps = 0
        self.lost_by_cuts = False  # the file was made shorter than what it held
        self._cut_at: int | None = None
        self.disk = Disk(self)
        self.records = Records(self, chunk_size)
        self.on_commit: Any = lambda: None

    def cut_after(self, steps: int) -> None:
        """The power goes that many steps from now."""
        self._cut_at = self.steps + steps

    def step(self, effect: Any) -> bool:
        """Runs an operation's effect, unless the power is gone, or goes with it; false: the operation failed."""
        if self.dark:
            return False
        self.steps += 1
        if self.steps == self._cut_at:
            if self._rng.random() < 0.5:
                effect()
            self.dark = True
            return False
        effect()
        return True

    def open(self) -> Pool:
        """Opens the pool over what the disk and the store have."""
        return self._open(self.records, read_only=False)

    def open_backup(self, backup: Path) -> Pool:
        """Opens the pool, to read, over what the disk has and a copy of the store says."""
        records = copy(self.records)
        records.kinds = pickle.loads((backup / "data.mdb").read_bytes())
        return self._open(records, read_only=True)

    def _open(self, records: Records, *, read_only: bool) -> Pool:
        files = PoolFiles(self.directory)
        options: dict[str, Any] = {"disk": self.disk.operations, "cache_bytes": 1 << 16, "window_bytes": 1, "verify_reads": self.verify_reads}
        return Pool(files, records, read_only=read_only, background=False, **options)  # type: ignore[arg-type]

    def reboot(self) -> None:
        """The power comes back."""
        self.disk.settle(self._rng)
        self.dark, self._cut_at = False, None
