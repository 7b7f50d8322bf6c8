"""What layers are used for: block devices and mounts (:class:`Uses`), and raw image files (:mod:`.raw`).

How the pieces hang together, from the bottom::

    layer -> file in the FUSE tree (fuse) -> loop device (loop) -> mount (mounts)
      |                                                             ^
      +----> NBD (csrc/nbd.c) ------------> nbd device (nbd_device)-+

and who takes them down (keeping/takedown): :class:`Uses`, when asked, when an owner ends (owners), when the pool is closed; the
keeper process (keeping), when this process dies; the next process, when the keeper died too. The keeper of a pool's server does not
take them down, but keeps what it needs to go on, and the next server finds the rest in the register: :meth:`Uses.survive`.

The life of a use::

    STARTING --> UP --> ENDING --> gone
        |         ^       |
        +-> gone  +-------+ (busy: it stays)
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..api import Attachment, Via
from ..errors import BadAddress, BadSize, LayerBusy, LayerState, NeedsRoot, PoolClosed, PoolFailed, PoolReadOnly, ToolFailed
from .freezing import thaw
from .fuse import NEEDS_ROOT, LayerTree, file_name
from .keeping.link import KeeperLink, kernel_can_resend
from .keeping.takedown import backing_file, device_number, device_path, devices, is_nbd, remove_mountpoint, take_down_device, take_down_orphan
from .loop import LoopDevice
from .mounts import filesystem_of, mount_filesystem, unmount_filesystem
from .nbd.server import NbdServer, resolved
from .nbd.tls import tls_context
from .nbd_device import NbdDevice
from .owners import Owners, process_identity
from .register import Register, SavedNbd, SavedUse

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool

_LOG = logging.getLogger("thinpool")
_SECTOR_SIZES = (512, 4096)


@dataclass(slots=True)
class _Use:
    layer: Layer
    purpose: str
    owner: int
    mountpoint: str | None
    state: str = "starting"
    owner_ended: bool = False
    owner_identity: str = ""
    block: LoopDevice | NbdDevice | None = None

    @property
    def device(self) -> str:
        return self.block.path if self.block else ""

    @property
    def container(self) -> str | None:
        return os.path.basename(self.mountpoint) if self.mountpoint and self.purpose == "run" else None

    def __str__(self) -> str:
        if self.container:
            return f"container {self.container}"
        return f"mount on {self.mountpoint}" if self.mountpoint else f"block device {self.device}".rstrip()


class Uses:
    """The attachments of one pool: made, found, taken down. All methods may be called from any thread."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._run = os.path.realpath(pool.path / "run")
        self._lock = threading.Lock()  # of the table and the states; never held while the kernel works
        self._settled = threading.Condition(self._lock)  # a use is no longer starting or ending
        self._uses: dict[int, _Use] = {}  # by layer id
        self._closing = False
        self._tree_lock = threading.Lock()
        self._tree: LayerTree | None = None
        self._keeper: KeeperLink | None = None
        self._surviving = False
        self._owners: Owners[_Use] = Owners(self._owner_ended)
        self._clients: Counter[int] = Counter()  # of NBD, by layer id
        self._nbd = NbdServer(pool, self._served)
        self._nbd_settings: list[SavedNbd] = []

    # --- what there is ---

    def attachments(self) -> list[Attachment]:
        """What is attached or mounted now."""
        with self._lock:
            uses = [use for use in self._uses.values() if use.state != "starting"]
        return [_attachment(use) for use in uses]

    def users(self, layer: Layer) -> tuple[str, ...]:
        """What a layer is used for, in words; nothing: it is free."""
        with self._lock:
            use, clients = self._uses.get(layer.id), self._clients[layer.id]
        return (() if use is None else (str(use),)) + ((f"{clients} NBD client{'s' if clients > 1 else ''}",) if clients else ())

    def files(self) -> Path:
        """The directory with one live file per layer; mounted from the first call or attachment until :meth:`close`.

        Raises NeedsRoot, PoolReadOnly or ToolFailed.
        """
        self._require_possible()
        return Path(self._running_tree().path)

    # --- NBD ---

    def serve_nbd(self, address: str, *, certificates: str | Path | None = None, keys: str | Path | None = None, verify_peer: bool = False) -> str:
        """Serves all layers over NBD until :meth:`close`; where, as it is then (port 0: one that was free). See :mod:`.nbd.server`, :mod:`.nbd.tls`.

        Where it does already, new clients get TLS as it is told now, with the files as they are now. Raises BadAddress.
        """
        files = [None if path is None else os.path.abspath(path) for path in (certificates, keys)]
        name = resolved(address, has_tls=any(files))[2]
        settings = SavedNbd(name, files[0], files[1], verify_peer)
        context = _tls(settings)
        for served in [one for one in self._nbd_settings if one.address == name]:
            self._nbd.use(name, context)
            self._nbd_settings[self._nbd_settings.index(served)] = settings
            self._write_register()
            return name
        bound = self._nbd.listen(address, context)
        self._nbd_settings.append(replace(settings, address=bound))
        if self._keeper is not None and self._surviving:
            self._keeper.keep(f"nbd:{bound}", [self._nbd.descriptor(bound)])
            self._write_register()
        return bound

    def nbd_addresses(self) -> list[str]:
        """Where NBD clients are served."""
        return self._nbd.addresses()

    def nbd_clients(self) -> int:
        """How many connections NBD clients have."""
        with self._lock:
            return self._clients.total()

    @contextmanager
    def _served(self, layer: Layer) -> Iterator[None]:
        with self._lock:
            use = self._uses.get(layer.id)
            if use is not None and not layer.sealed:
                raise LayerBusy(f"layer {layer.name!r} is in use already: {use}", (str(use),))
            self._clients[layer.id] += 1
        try:
            if self._surviving:
                with suppress(PoolFailed):  # in error mode reads go on
                    self._pool.commit()  # as in _starting
            yield
        finally:
            with self._lock:
                self._clients[layer.id] -= 1

    # --- making and ending uses ---

    def attach(self, layer: Layer, sector_size: int = 512, owner: int = 0, via: Via = "loop") -> Attachment:
        """Put a block device on a layer. Raises NeedsRoot, LayerBusy, LayerState, BadSize or ToolFailed."""
        if sector_size not in _SECTOR_SIZES:
            raise BadSize(f"a block device has sectors of 512 or 4096 bytes, not {sector_size}")
        if layer.size % sector_size:
            raise LayerState(f"layer {layer.name!r} has {layer.size} bytes, which is not a whole number of {sector_size}-byte sectors")
        with self._starting(_Use(layer, "attach", owner, None)) as use:
            self._put_device(use, sector_size, via)
        return _attachment(use)

    def mount(self, layer: Layer, directory: Path, read_only: bool | None = None, owner: int = 0, via: Via = "loop") -> Attachment:
        """Mount a layer's file system; ``read_only`` ``None``: if the layer is sealed.

        A directory in ``run/containers`` of the pool is a container's: it is made, and removed by :meth:`unmount`. Raises what
        :meth:`attach` raises, and LayerState for a layer without a file system or a sealed one to be written.
        """
        if layer.sealed and read_only is False:
            raise LayerState(f"layer {layer.name!r} is sealed and can only be mounted read-only; mount a clone of it to write")
        filesystem_of(layer)
        mountpoint = os.path.realpath(directory)
        in_container = os.path.dirname(mountpoint) == os.path.join(self._run, "containers")
        with self._starting(_Use(layer, "run" if in_container else "mount", owner, mountpoint)) as use:
            if in_container:
                os.makedirs(mountpoint, mode=0o700, exist_ok=True)
            if not os.path.isdir(mountpoint):
                raise ToolFailed(f"cannot mount on {directory}: it is not a directory; make it first")
            self._put_device(use, 512, via)  # which any file system takes, whatever it was made on
            mount_filesystem(layer, use.device, mountpoint, layer.sealed or bool(read_only))
        return _attachment(use)

    def detach(self, layer: Layer) -> None:
        """Take a layer's block device away. Raises LayerState where there is none, LayerBusy while it is in use."""
        self._end(layer, mounted=False)

    def unmount(self, layer: Layer) -> None:
        """Unmount a layer and take its device away. Raises LayerState where it is not mounted, LayerBusy while it is in use."""
        self._end(layer, mounted=True)

    def layer_resized(self, layer: Layer) -> None:
        """Let the kernel see a layer's new size, and the content that a reset gave it."""
        tree = self._tree
        if tree is not None:
            tree.resized(layer.id)
        with self._lock:
            use = self._uses.get(layer.id)
            block = use.block if use is not None and use.state == "up" else None
        if block is not None:
            block.resized()

    def close(self) -> None:
        """Take everything down, by force where it must be."""
        with self._lock:
            self._closing = True
            self._settled.wait_for(lambda: all(use.state == "up" for use in self._uses.values()))
            uses = list(self._uses.values())
        self._nbd.close()
        self._owners.close()
        for use in reversed(uses):
            self._force(use)
        if any(backing_file(number, self._run) is not None for number in devices()):
            os.sync()  # mounted where only others see it, as in a container that ends after this: what it has written so far is kept
        with self._tree_lock:
            if self._tree is not None:
                self._tree.close()
                self._tree = None
            if self._surviving:
                Register.remove(self._run)
            if self._keeper is not None:
                self._keeper.close()
                self._keeper = None

    # --- over the end of the process ---

    def survive(self, keeper: KeeperLink) -> None:
        """Lets what is attached and served outlive this process, and goes on with what the one before it had; what belongs to nobody is taken down.

        Before anything else is done with this object. Raises what the engine raises.
        """
        saved = Register.read(self._run)
        self._keeper, self._surviving = keeper, True
        if descriptors := keeper.kept("fuse"):
            self._tree = LayerTree(self._pool, descriptors)
        self._adopt(saved.uses)
        for settings in saved.nbd:
            if listener := keeper.kept(name := f"nbd:{settings.address}"):
                try:
                    context = _tls(settings)
                except BadAddress as error:  # files that are gone or in disorder cost nobody a file system
                    _LOG.error("NBD is not served at %s any more: %s", settings.address, error)
                    keeper.drop(name)
                    os.close(listener[0])
                    continue
                self._nbd.adopt(settings.address, listener[0], context)
                self._nbd_settings.append(settings)
        self._write_register()

    def _adopt(self, saved: Sequence[SavedUse]) -> None:
        strays = {device_path(number): file for number in devices() if (file := backing_file(number, self._run)) is not None}
        for one in saved:
            if one.device not in strays or (self._tree is None and not is_nbd(one.device)):
                continue
            layer = self._pool.layer_by_id(one.layer_id)
            owner = int(one.owner.partition(":")[0] or 0)
            use = _Use(layer, one.purpose, owner, one.mountpoint, state="up", owner_identity=one.owner)
            file = strays.pop(one.device)
            if is_nbd(one.device):
                use.block = NbdDevice(layer, file, orphan=one.device)
            else:
                assert self._tree is not None
                use.block = LoopDevice(self._tree.file(layer.name), orphan=one.device)
            if one.mountpoint is not None:
                thaw(self._pool, layer, one.mountpoint)
            if owner and process_identity(owner) != one.owner:
                self._force(use)
                continue
            self._uses[layer.id] = use
            if owner:
                self._owners.watch(owner, use)
        for device in strays:
            take_down_orphan(device_number(device), self._run)

    def _write_register(self) -> None:
        if not self._surviving:
            return
        uses = [SavedUse(use.layer.id, use.purpose, use.owner_identity, use.mountpoint, use.device) for use in self._uses.values() if use.state == "up"]
        try:
            Register(uses, self._nbd_settings).write(self._run)
        except OSError as error:  # a full disk must not keep anybody from detaching; what is not in it goes with the server
            _LOG.warning("%s is not up to date: %s", Register.path(self._run), error)

    # --- how ---

    def _require_possible(self) -> None:
        if self._pool.read_only:
            raise PoolReadOnly(f"the pool {self._pool.path} is open read-only: its layers cannot be attached or mounted")
        if os.geteuid() != 0:
            raise NeedsRoot(NEEDS_ROOT)

    @contextmanager
    def _starting(self, use: _Use) -> Iterator[_Use]:
        """Keep the layer for this use while it is being made, and take down what was made if that fails."""
        self._require_possible()
        with self._lock:
            if self._closing:
                raise PoolClosed(f"the pool {self._pool.path} is closed")
            there = self._uses.get(use.layer.id)
            if there is not None:
                raise LayerBusy(f"layer {use.layer.name!r} is in use already: {there}", (str(there),))
            if (clients := self._clients[use.layer.id]) and not use.layer.sealed:
                raise LayerBusy(f"layer {use.layer.name!r} is in use already: {clients} NBD clients", ("NBD",))
            self._uses[use.layer.id] = use
        try:
            if use.owner:
                self._owners.watch(use.owner, use)
                use.owner_identity = process_identity(use.owner) or ""
            yield use
            if self._surviving:
                # What goes on after a kill must find its layer, as made by then: layers that are not committed are gone.
                self._pool.commit()
        except BaseException:
            self._force(use)
            raise
        if self._settle(use):
            raise LayerState(f"process {use.owner}, which was to own it, has ended")

    def _settle(self, use: _Use) -> bool:
        """The use is up (again), or, when its owner ended meanwhile, taken down; true if so."""
        with self._lock:
            if not use.owner_ended:
                use.state = "up"
                self._write_register()
                self._settled.notify_all()
                return False
        self._force(use)
        return True

    def _put_device(self, use: _Use, sector_size: int, via: Via) -> None:
        if via == "loop":
            use.block = LoopDevice(self._running_tree().file(use.layer.name), sector_size, use.layer.sealed)
        elif via == "nbd":
            with self._kept():
                path = os.path.join(self._run, "layers", file_name(use.layer.name))
            use.block = NbdDevice(use.layer, path, sector_size)
        else:
            raise LayerState(f"a layer becomes a block device via loop or nbd, not via {via!r}")

    def _running_tree(self) -> LayerTree:
        with self._kept() as keeper:
            if self._tree is None:
                keeps = self._surviving and kernel_can_resend()
                self._tree = LayerTree(self._pool, on_mounted=(lambda descriptors: keeper.keep("fuse", descriptors)) if keeps else None)
            return self._tree

    @contextmanager
    def _kept(self) -> Iterator[KeeperLink]:
        """There is a keeper, and nobody else changes the tree."""
        with self._tree_lock:
            if self._closing:
                raise PoolClosed(f"the pool {self._pool.path} is closed")
            if self._keeper is None:
                self._keeper = KeeperLink(self._run)
            yield self._keeper

    def _end(self, layer: Layer, *, mounted: bool) -> None:
        with self._lock:
            use = self._uses.get(layer.id)
            if use is not None and use.state != "up":
                raise LayerBusy(f"layer {layer.name!r} is just being attached or taken down: {use}", (str(use),))
            if use is None or (use.mountpoint is not None) != mounted:
                what = "mounted" if mounted else "attached"
                raise LayerState(f"layer {layer.name!r} is not {what}" + (f", it is in use otherwise: {use}" if use else ""))
            use.state = "ending"
        try:
            if use.block is not None and backing_file(device_number(use.device), self._run) is not None:  # else somebody has taken it down by hand
                if use.mountpoint is not None:
                    unmount_filesystem(use.mountpoint, use.device)
                use.block.detach()
        except BaseException:
            if not self._settle(use):
                raise
        else:
            self._forget(use)

    def _forget(self, use: _Use) -> None:
        if use.block is not None:
            use.block.close()
        if use.mountpoint is not None:
            remove_mountpoint(self._run, use.mountpoint)
        if use.owner:
            self._owners.forget(use)
        with self._lock:
            self._uses.pop(use.layer.id, None)
            self._write_register()
            self._settled.notify_all()

    def _force(self, use: _Use) -> None:
        """Take a use down whoever is still in it: that goes when they go."""
        if use.device:
            take_down_device(device_number(use.device), self._run)
        self._forget(use)

    def _owner_ended(self, use: _Use) -> None:
        with self._lock:
            use.owner_ended = True
            if use.state != "up":
                return  # whoever is at work on it finds out when he is done
            use.state = "ending"
        self._force(use)


def _tls(settings: SavedNbd) -> ssl.SSLContext | None:
    paths = [None if path is None else Path(path) for path in (settings.certificates, settings.keys)]
    return tls_context(*paths, verify_peer=settings.verify_peer)


def _attachment(use: _Use) -> Attachment:
    return Attachment(use.layer.name, use.device, use.mountpoint, use.purpose, use.owner, use.container)
