"""A layer of a pool in this process: :class:`Layer`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .api import Attachment, Buffer, Extent, Limits, Progress, Size, Sparsified, Usage, Via
from .catalog import LayerRecord
from .engine import EngineLayer
from .errors import BadSize, LayerDeleted, LayerState
from .layerfile import LayerFile
from .units import parse_size

if TYPE_CHECKING:
    from .pool import Pool

_SPARSIFY_STEP_BYTES = 8 << 20


class Layer:
    """A name, a size, a block map and a parent; see :class:`thinpool.api.LayerAPI` for the contract.

    All methods may be called from any thread. Every one raises :class:`~thinpool.errors.LayerDeleted` once the layer is
    deleted, and :class:`~thinpool.errors.PoolClosed` once the pool is closed.
    """

    def __init__(self, pool: Pool, handle: EngineLayer) -> None:
        self._pool = pool
        self._handle = handle

    # --- what it is ---

    def _record(self) -> LayerRecord:
        record = self._pool.record(self.id)
        if record is None:
            raise LayerDeleted("the layer was deleted")
        return record

    @property
    def id(self) -> int:
        """A number that no other layer of the open pool has."""
        return self._handle.id

    @property
    def pool(self) -> Pool:
        return self._pool

    @property
    def name(self) -> str:
        return self._record().name

    @property
    def size(self) -> int:
        """Bytes that the layer seems to have."""
        self._record()
        return self._handle.size

    @property
    def sealed(self) -> bool:
        return self._handle.info()[2]

    @property
    def labels(self) -> dict[str, str]:
        return dict(self._record().labels)

    @property
    def digests(self) -> dict[str, str]:
        """What names it by its content: ``diff`` and ``chain`` (OCI DiffID and ChainID) for an image's, ``content`` once computed."""
        return dict(self._record().digests)

    @property
    def created(self) -> float:
        """Seconds since the epoch."""
        return self._record().created

    @property
    def limits(self) -> Limits:
        """What it may do; see :meth:`set_limits`."""
        return Limits(**self._record().limits)

    @property
    def origin(self) -> str | None:
        """The name its parent had when it was made; it stays when the parent is deleted."""
        return self._record().origin

    @property
    def parent(self) -> Layer | None:
        """The layer it was made from; ``None``: none, or deleted since."""
        self._record()
        return next(iter(self._pool.related(lambda catalog: catalog.parents(self.id))), None)

    @property
    def children(self) -> list[Layer]:
        """The layers made from it, oldest first."""
        self._record()
        return self._pool.related(lambda catalog: catalog.children(self.id))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layer) and other._pool is self._pool and other.id == self.id

    def __hash__(self) -> int:
        return hash((id(self._pool), self.id))

    def __repr__(self) -> str:
        record = self._pool.record(self.id)
        return f"<Layer {record.name if record else '(deleted)'}>"

    # --- I/O ---

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes at ``offset``. Raises :class:`~thinpool.errors.OutOfRange` past the end."""
        return self._handle.read(length, offset)

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fills the buffer from ``offset`` on; the number of bytes. A page-aligned buffer is fastest."""
        return self._handle.read_into(buffer, offset)

    def pwrite(self, data: Buffer, offset: int) -> int:
        """Writes all of ``data`` at ``offset``; the number of bytes. Durable after the next :meth:`flush`.

        Raises LayerSealed, OutOfRange (nothing is written), OutOfSpace, DiskError, PoolFailed or PoolReadOnly.
        """
        return self._handle.write(data, offset)

    def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards; whole blocks of 4 KiB give their space back."""
        self._handle.discard(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """The same as :meth:`write_zeroes`: what is discarded reads as zeros, to the byte."""
        self._handle.discard(offset, length)

    def sparsify(self, progress: Progress | None = None) -> Sparsified:
        """Chunks that read as zeros become holes, and so do blocks of 4 KiB in chunks that the layer has in part. Others may use it meanwhile.

        ``progress`` is called after each 8 MiB or so; what it raises ends the work there, and nothing is lost. Raises
        LayerSealed: of a sealed layer neither content nor map changes, so this is for before it is sealed.
        """
        done = Sparsified(0, 0)
        for position, *sizes in self._handle.sparsify(max(1, _SPARSIFY_STEP_BYTES // self._pool.chunk_size)):
            done = Sparsified(*sizes)
            if progress is not None:
                progress(position, self._handle.size)
        return done

    def flush(self) -> None:
        """All writes that returned before the call are durable when it returns."""
        self._record()
        self._pool.commit()

    def open(self, mode: str = "rb") -> LayerFile:
        """A seekable binary file object; ``mode`` is ``"rb"`` or ``"r+b"``."""
        return LayerFile(self, mode)

    # --- branches and states ---

    def snapshot(self, name: str, *, labels: Mapping[str, str] | None = None) -> Layer:
        """A sealed layer with this one's content of now; O(1), and works while this one is being written."""
        return self._pool.branch(self, name, None, sealed=True, labels=labels)

    def clone(self, name: str, size: Size | None = None, *, labels: Mapping[str, str] | None = None) -> Layer:
        """A writable layer with this one's content of now; O(1). ``size`` may be larger than this one's."""
        return self._pool.branch(self, name, size, sealed=False, labels=labels)

    def seal(self) -> None:
        """From now on the layer never changes. Raises LayerBusy while it is attached or mounted: it would still be written."""
        self._pool.require_unused(self, "seal")
        self._handle.seal()

    def resize(self, size: Size, *, allow_shrink: bool = False) -> None:
        """Changes the size; what is cut off by shrinking is lost. Raises BadSize for shrinking without ``allow_shrink``."""
        new = parse_size(size)
        if new == 0:
            raise BadSize("a layer cannot have no bytes")
        if new < self.size and not allow_shrink:
            raise BadSize(f"layer {self.name} has {self.size} bytes: {new} would cut it short (allow_shrink=True to do so)")
        if new < self.size:
            self._pool.require_unused(self, "shrink")
        self._handle.resize(new)
        self._pool.resized(self)

    def rename(self, name: str, *, labels: Mapping[str, str] | None = None) -> None:
        """Gives it another name, and, where given, other labels in the same step. Raises BadName or LayerExists."""
        self._pool.rename(self, name, labels)

    def set_labels(self, labels: Mapping[str, str]) -> None:
        """Replaces all labels."""
        self._pool.set_labels(self, labels)

    def set_limits(self, limits: Limits) -> None:
        """Replaces its limits, from now on, for all who read and write it. Layers made from it have none. Raises BadSize."""
        self._pool.set_limits(self, limits)

    def reset(self, to: str | None = None) -> None:
        """Back to the parent's content, or to that of the layer named ``to`` (a snapshot of this one, say); O(1).

        Raises LayerState where the parent is gone, LayerSealed, LayerBusy while it is attached or mounted.
        """
        source = self._pool.layer(to) if to is not None else self.parent
        if source is None:
            gone = f"its parent {self.origin} was deleted" if self.origin else "it has no parent"
            raise LayerState(f"layer {self.name} cannot be reset: {gone}; name the layer to reset it to")
        if source == self:
            raise LayerState(f"layer {self.name} cannot be reset to itself")
        self._pool.require_unused(self, "reset")
        self._handle.reset(source._handle)
        self._pool.resized(self)

    def delete(self) -> None:
        """Removes the layer; returns at once, the space comes back in the background. Children stay whole.

        Raises LayerBusy while it is attached or mounted.
        """
        self._pool.delete(self)

    # --- what is where ---

    def extents(self) -> Iterator[Extent]:
        """Data and holes from 0 to the end, without gaps."""
        for offset, length, data in self._handle.extents():
            yield Extent(offset, length, "data" if data else "hole")

    def usage(self) -> Usage:
        """What the layer takes, exactly, as of now; costs what it does not share."""
        size, refs, _ = self._handle.info()
        chunk_size = self._pool.chunk_size
        exclusive = self._pool.engine.exclusive_chunks([self._handle]) * chunk_size
        return Usage(virtual=size, mapped=refs * chunk_size, exclusive=exclusive, shared=refs * chunk_size - exclusive)

    # --- uses: exports do these (Pool.register) ---

    def export_raw(self, path: str | Path, *, progress: Progress | None = None) -> None:
        """Writes the layer to a sparse raw image file; holes stay holes."""
        self._pool.export_raw(self, Path(path), progress)

    def attach(self, *, sector_size: int = 512, owner: int = 0, via: Via = "loop") -> Attachment:
        """Puts a block device on the layer: logical block size 512 or 4096 bytes. Needs root."""
        return self._pool.uses.attach(self, sector_size, owner, via)

    def detach(self) -> None:
        """Takes the block device away."""
        self._pool.uses.detach(self)

    def mount(self, directory: str | Path, *, read_only: bool | None = None, owner: int = 0, via: Via = "loop") -> Attachment:
        """Mounts the layer's file system; sealed layers read-only. Needs root."""
        return self._pool.uses.mount(self, Path(directory), read_only, owner, via)

    def unmount(self) -> None:
        """Takes the mount away, and the device with it."""
        self._pool.uses.unmount(self)

    @property
    def handle(self) -> EngineLayer:
        """The engine's handle, for exports that serve the layer from C."""
        return self._handle
