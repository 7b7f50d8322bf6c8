"""What containerd asks of a snapshotter, done with layers through the library's interface.

::

    Prepare -> active ----Commit----> committed --Remove--> gone
    View ----> view ------Remove----> gone           (also active ones)

An active snapshot or a view is a clone of its parent's layer, a committed one a sealed layer. Its block device is there from ``Prepare`` on, or from
the next ``Mounts`` after the devices went down, until ``Commit`` or ``Remove``. All that is known is in the pool: nothing here needs to outlive this process.

A committed snapshot that has children stays. So that none is made from one that is just being removed, both are done under one lock:
one process at a time serves the snapshots of a pool.

Calls may be made again after a failure on the way; ``now``, nanoseconds since 1970, tells one call from another.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ..api import LayerAPI, PoolAPI
from ..errors import BadName, LayerBusy, LayerDeleted, LayerExists, LayerNotFound, LayerState
from ..exports.freezing import frozen, thaw
from ..exports.keeping.takedown import device_number, mount_table
from ..filesystems.blank import FILESYSTEM_LABEL
from ..server.client import RemotePool
from ..server.wire import LayerRecord, record_of, records_of
from ..units import parse_size
from .bases import base_layer, fit_filesystem
from .filters import parse
from .records import REF_LABEL, SNAPSHOT_LABEL, Snapshot, is_removed, layer_name, parent_label, ref_label, removed_name
from .shared import end_share, end_unused_shares, others_mountpoint, share

SIZE_LABEL = "containerd.io/snapshot/max-size"
"""containerd's label for the size of a container's file system, as in ``20G``."""

# A clone has its origin's UUID, which XFS would refuse to mount twice. Reading writes no atime, and deleting gives space back: thin layers stay thin.
_OPTIONS = {"ext4": ("noatime", "discard"), "xfs": ("nouuid", "noatime", "discard")}
_VIEW_OPTIONS = {"ext4": ("ro",), "xfs": ("nouuid", "ro")}


@dataclass(frozen=True, slots=True)
class Mount:
    """What is to be mounted, as mount(2) has it."""

    type: str
    source: str
    options: tuple[str, ...]


class Snapshotter:
    """The snapshots of a pool. Methods may be called from any thread; each takes the pool that it is to work on."""

    def __init__(self, *, filesystem: str, size: int, on_leftover: Callable[[], None]) -> None:
        """``filesystem``, ``size`` in bytes: of snapshots without a parent. ``on_leftover`` is called when :meth:`reap` has something to do later."""
        self._filesystem, self._size = filesystem, size
        self._on_leftover = on_leftover
        self._relating = threading.Lock()  # makes children, or removes what has none
        self._attaching = threading.Lock()

    # --- making and changing ---

    def prepare(self, pool: PoolAPI, key: str, parent: str, labels: Mapping[str, str], now: int) -> Mount:
        """A snapshot to be written. Raises LayerExists: the key is taken, or there is a committed snapshot with the content that ``labels`` ask for."""
        return self._create(pool, Snapshot(key, "active", parent, now, now, dict(labels), self._filesystem))

    def view(self, pool: PoolAPI, key: str, parent: str, labels: Mapping[str, str], now: int) -> Mount:
        """A snapshot to be read."""
        return self._create(pool, Snapshot(key, "view", parent, now, now, dict(labels), self._filesystem))

    def _create(self, pool: PoolAPI, wanted: Snapshot) -> Mount:
        name = layer_name(_required(wanted.key))
        size = _size(wanted.labels) if wanted.kind == "active" else None
        if not wanted.parent:
            source = base_layer(pool, wanted.filesystem, size or self._size)
        with self._relating:
            if wanted.parent:
                source, parent = self._find(pool, wanted.parent)
                if parent.kind != "committed":
                    raise BadName(f"parent {wanted.parent!r} is no committed snapshot")
                wanted = replace(wanted, filesystem=parent.filesystem)
            if wanted.kind == "active" and REF_LABEL in wanted.labels:
                self._refuse_what_is_there(pool, wanted)
            is_new = True
            try:
                layer = source.clone(name, labels=wanted.as_labels())
            except LayerExists:
                is_new = False
                layer, there = self._find(pool, wanted.key)
                if there != wanted:
                    raise LayerExists(f"snapshot {wanted.key!r} exists already") from None
            except LayerDeleted:
                raise LayerNotFound(f"snapshot {wanted.parent!r} was removed") from None
        try:
            if size is not None:
                fit_filesystem(layer, wanted.filesystem, size)
            mount = self._mount(pool, layer, wanted, is_new=is_new)
        except BaseException:
            self._discard(pool, layer)
            raise
        pool.commit()
        return mount

    def _refuse_what_is_there(self, pool: PoolAPI, wanted: Snapshot) -> None:
        """Raises LayerExists where a committed snapshot has the content asked for: one that was there, or one made of an image layer of the pool."""
        chain_id = wanted.labels[REF_LABEL]
        for layer in pool.layers(ref_label(chain_id)):
            there = Snapshot.from_labels(layer.labels)
            if there is not None and there.parent == wanted.parent and not is_removed(layer.name):
                raise LayerExists(f"snapshot {there.key!r} holds {chain_id} already")
        try:
            image_layer = pool.layer(chain_id)
        except (LayerNotFound, BadName):
            return
        filesystem = image_layer.labels.get(FILESYSTEM_LABEL)
        if not image_layer.sealed or filesystem is None:  # none, or still being imported
            return
        committed = replace(wanted, key=chain_id, kind="committed", filesystem=filesystem)
        try:
            image_layer.snapshot(layer_name(chain_id), labels=committed.as_labels())
        except LayerExists:  # a snapshot of that name has another parent
            return
        pool.commit()
        raise LayerExists(f"the pool has {chain_id} already")

    def commit(self, pool: PoolAPI, key: str, name: str, labels: Mapping[str, str], now: int) -> None:
        """Makes an active snapshot a committed one of another name. Raises LayerExists, LayerNotFound, LayerState."""
        try:
            layer, there = self._find(pool, _required(name))
        except LayerNotFound:
            self._commit(pool, key, name, labels, now)
        else:
            if (there.kind, there.created) != ("committed", now):
                raise LayerExists(f"snapshot {name!r} exists already")
            _seal(layer)
        pool.commit()

    def _commit(self, pool: PoolAPI, key: str, name: str, labels: Mapping[str, str], now: int) -> None:
        layer, active = self._find(pool, key)
        if active.kind != "active":
            raise LayerState(f"snapshot {key!r} is not active but {active.kind}")
        committed = replace(active, key=name, kind="committed", created=now, updated=now, labels=dict(labels))
        mountpoint = self._let_go(pool, layer)
        if mountpoint is not None:
            self._commit_in_use(pool, layer, mountpoint, committed)
            return
        _seal(layer)
        layer.rename(layer_name(name), labels=committed.as_labels())

    def _commit_in_use(self, pool: PoolAPI, layer: LayerAPI, mountpoint: str, committed: Snapshot) -> None:
        if not mountpoint:  # mounted where only others see it
            os.sync()
        with frozen(pool, layer, mountpoint or None):
            layer.snapshot(layer_name(committed.key), labels=committed.as_labels())
        layer.rename(removed_name())
        self._on_leftover()

    def remove(self, pool: PoolAPI, key: str) -> None:
        """Takes a snapshot away; its space comes back in the background. Raises LayerNotFound, LayerState where it has children."""
        with self._relating:
            layer, _ = self._find(pool, key)
            if any(_is_there(child) for child in pool.layers(parent_label(key))):
                raise LayerState(f"cannot remove snapshot {key!r}: it has children")
            layer.rename(removed_name())
        self._discard(pool, layer)

    def update(self, pool: PoolAPI, key: str, labels: Mapping[str, str], paths: Sequence[str], now: int) -> Snapshot:
        """Changes labels: those named by ``paths`` (``labels`` or ``labels.NAME``), or all. Raises LayerNotFound, BadName for another path."""
        layer, snapshot = self._find(pool, key)
        changed = dict(snapshot.labels)
        for path in paths or ("labels",):
            name = path.removeprefix("labels.")
            if path == "labels":
                changed = dict(labels)
            elif name == path:
                raise BadName(f"{path!r} of a snapshot cannot be changed: only labels can")
            elif name in labels:
                changed[name] = labels[name]
            else:
                changed.pop(name, None)
        snapshot = replace(snapshot, labels=changed, updated=now)
        layer.set_labels(snapshot.as_labels())
        pool.commit()
        return snapshot

    # --- asking ---

    def mounts(self, pool: PoolAPI, key: str) -> Mount:
        """How to mount an active snapshot or a view. Raises LayerNotFound, LayerState."""
        layer, snapshot = self._find(pool, key)
        if snapshot.kind == "committed":
            raise LayerState(f"snapshot {key!r} is committed: only active ones and views are mounted")
        return self._mount(pool, layer, snapshot)

    def stat(self, pool: PoolAPI, key: str) -> Snapshot:
        """What is known of a snapshot. Raises LayerNotFound."""
        return self._find(pool, key)[1]

    def list(self, pool: PoolAPI, filters: Iterable[str]) -> list[Snapshot]:
        """The snapshots that any of the filters matches. Raises BadFilter."""
        matches = parse(filters)
        found = [(record.name, Snapshot.from_labels(record.labels)) for record in _records(pool)]
        return [one for name, one in found if one is not None and name == layer_name(one.key) and matches(one.field)]

    def usage(self, pool: PoolAPI, key: str) -> tuple[int, int]:
        """Bytes and inodes by which a snapshot differs from its parent: what has reached the layer. Raises LayerNotFound."""
        layer, snapshot = self._find(pool, key)
        # Not the layer's own parent: that of one which was committed while it was mounted is the active one.
        parent = self._find(pool, snapshot.parent)[0] if snapshot.parent else base_layer(pool, snapshot.filesystem, layer.size)
        size = sum(extent.length for extent in pool.diff(parent, layer) if extent.kind == "data")
        inodes = _inodes(layer, snapshot.filesystem) - _inodes(parent, snapshot.filesystem)
        return size, max(inodes, 0)

    # --- what is left over ---

    def recover(self, pool: PoolAPI) -> None:
        """Ends what another process, which is no more, has begun; makes the file system to begin with. Raises BadSize, NeedsRoot, ToolFailed."""
        devices = {one.layer: device_number(one.device) for one in pool.attachments()}
        mountpoints = {entry.device_number: entry.mountpoint for entry in mount_table()}
        for record in _records(pool):
            mountpoint = mountpoints.get(devices.get(record.name, ""))
            if mountpoint is not None:
                thaw(pool, pool.layer(record.name), mountpoint)
        base_layer(pool, self._filesystem, self._size)
        self._on_leftover()

    def reap(self, pool: PoolAPI) -> bool:
        """Deletes what was removed while it was in use; false: some of it is in use still."""
        with self._attaching:
            end_unused_shares(pool)
        done = True
        for record in _records(pool):
            if is_removed(record.name):
                with suppress(LayerNotFound):
                    done &= self._discard(pool, pool.layer(record.name))
        return done

    def _discard(self, pool: PoolAPI, layer: LayerAPI) -> bool:
        try:
            if self._let_go(pool, layer) is None:
                with suppress(LayerBusy):  # others may read it over NBD
                    layer.delete()
                    return True
            if not is_removed(layer.name):
                layer.rename(removed_name())
        except LayerDeleted:  # the reaper was quicker
            return True
        self._on_leftover()
        return False

    # --- devices ---

    def _mount(self, pool: PoolAPI, layer: LayerAPI, snapshot: Snapshot, *, is_new: bool = False) -> Mount:
        options = (_VIEW_OPTIONS if snapshot.kind == "view" else _OPTIONS)[snapshot.filesystem]
        if is_new:  # nobody can have asked for its device yet
            return Mount(snapshot.filesystem, layer.attach().device, options)
        with self._attaching:
            device = _device_of(pool, layer_name(snapshot.key)) or layer.attach().device
            if snapshot.kind == "active" and others_mountpoint(pool, device) is not None:
                return Mount("bind", share(pool, layer, device, snapshot.filesystem), ("rbind", "rw"))
            end_share(pool, layer)
        return Mount(snapshot.filesystem, device, options)

    @staticmethod
    def _let_go(pool: PoolAPI, layer: LayerAPI) -> str | None:
        """Takes a layer's device away. ``None``: it has none any more; else somebody uses it: where it is mounted, empty if not seen from here."""
        device = _device_of(pool, layer.name)
        if device is None:
            return None
        end_share(pool, layer)
        mountpoint = others_mountpoint(pool, device)
        if mountpoint is not None:
            return mountpoint
        try:
            layer.detach()
        except LayerBusy:
            return ""
        except LayerState:  # somebody else did, or mounted it with thinpool
            return None if _device_of(pool, layer.name) is None else ""
        return None

    # --- finding ---

    @staticmethod
    def _find(pool: PoolAPI, key: str) -> tuple[LayerAPI, Snapshot]:
        """A snapshot and its layer. Raises LayerNotFound."""
        try:
            layer, record = _described(pool, layer_name(key))
            snapshot = Snapshot.from_labels(record.labels)
        except (LayerNotFound, LayerDeleted):
            snapshot = None
        if snapshot is None or snapshot.key != key:
            raise LayerNotFound(f"no snapshot {key!r}")
        return layer, snapshot


def _seal(layer: LayerAPI) -> None:
    """Unless that was done when the call was made before, by a server that was killed then."""
    if not layer.sealed:
        layer.seal()


def _required(key: str) -> str:
    if not key:
        raise BadName("a snapshot needs a key")
    return key


def _size(labels: Mapping[str, str]) -> int | None:
    """The size asked for in bytes, in whole blocks of a file system."""
    given = labels.get(SIZE_LABEL)
    return None if given is None else -(-parse_size(given) // 4096) * 4096


def _device_of(pool: PoolAPI, name: str) -> str | None:
    return next((one.device for one in pool.attachments() if one.layer == name), None)


def _described(pool: PoolAPI, name: str) -> tuple[LayerAPI, LayerRecord]:
    """A layer and its record, in one request where a server is asked. Raises LayerNotFound, LayerDeleted."""
    if isinstance(pool, RemotePool):
        return pool.described(name)
    layer = pool.layer(name)
    return layer, record_of(layer)


def _records(pool: PoolAPI) -> list[LayerRecord]:
    """The layers of snapshots, in one request where a server is asked."""
    return pool.records(SNAPSHOT_LABEL) if isinstance(pool, RemotePool) else records_of(pool, SNAPSHOT_LABEL)


def _is_there(layer: LayerAPI) -> bool:
    try:
        return not is_removed(layer.name)
    except LayerDeleted:
        return False


def _inodes(layer: LayerAPI, filesystem: str) -> int:
    """Inodes in use, as the superblock of a file system that was unmounted says (linux: struct ext4_super_block, struct xfs_dsb)."""
    if filesystem == "ext4":
        total, *_, free = struct.unpack("<5I", layer.pread(20, 1024))
    else:
        total, free = struct.unpack(">2Q", layer.pread(16, 128))
    return int(total) - int(free)
