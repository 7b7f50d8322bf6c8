"""Heals chunks that are not what their checksums say, from elsewhere: another pool that has the layer, its bytes in a file, or its image in a registry.

Where bytes come from need not be trusted, nor be of the same version: a chunk's checksum decides which are taken, and they are written where
the chunk is, so that no map changes. The pool may be in use. What a chunk is found to be may be over when it is to be written: it was freed, has moved or has
been given another checksum, or its layer another name. So the core compares once more, and writes, under the lock of a layer that names the chunk
(``tp_layer_heal``); what does not fit is looked at again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Protocol

from .api import Credentials, Healed, Progress, Range
from .digests import has_its_content, lineage
from .engine import BLOCK_SIZE, _core, _ffi
from .errors import DamagedError, DiskError, LayerDeleted, LayerNotFound, OutOfSpace, PoolBusy
from .images.credentials import credentials_for
from .images.importer import ChainLocks, Importer
from .images.oci import ImageConfig, chain_ids
from .images.reference import Reference
from .images.registry import RegistrySource
from .layer import Layer
from .metadata import PinLost
from .pool import Pool
from .recovery.checksums import checksum_of
from .recovery.report import Report, joined
from .recovery.scrub import Place, Places, look_again, scrub_chunks

_LOOKS = 5
_NOT_FOUND = "no source has what its checksum says"
_GIVEN_UP = "written to beside the damage before it was healed: nothing says any more what it should be"


class _Source(Protocol):
    """Where bytes of layers may be."""

    def versions(self, layer: Layer, offset: int, length: int) -> Iterator[bytes]:
        """What it has for a range of a layer, the likeliest first."""


class _File:
    """A raw image of a layer, or a device: of which layer need not be known."""

    def __init__(self, path: Path, undo: ExitStack) -> None:
        self._file = undo.enter_context(path.open("rb", buffering=0))

    def versions(self, _: Layer, offset: int, length: int) -> Iterator[bytes]:
        with suppress(OSError):
            if found := os.pread(self._file.fileno(), length, offset):
                yield found.ljust(length, b"\0")


class _OtherPool:
    """A pool's layers of the same content, or of the same name."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._by_name = {layer.name: layer for layer in pool.layers()}

    def versions(self, layer: Layer, offset: int, length: int) -> Iterator[bytes]:
        alike = [one for digest in layer.digests.items() for one in self._pool.layers_with_digest(*digest)]
        if layer.name in self._by_name:
            alike.append(self._by_name[layer.name])
        for other in alike:
            with suppress(DamagedError, DiskError):
                there = min(length, other.size - offset)
                if there > 0:
                    yield other.pread(there, offset).ljust(length, b"\0")


def heal(
    pool: Pool,
    sources: Sequence[str | Path],
    *,
    images: Sequence[str] = (),
    credentials: Mapping[str, Credentials] | None = None,
    insecure: bool = False,
    progress: Progress | None = None,
) -> Healed:
    """The method ``heal`` of :class:`~thinpool.pool.Pool`: chunks get back what their checksums are of, while all of it is in use.

    ``sources``: other pools' directories, raw images, devices; ``images``: what is fetched from registries, one at a time, where these have not all; of an
    image that no layer here is of, nothing is fetched. ``credentials``: by image; by default those of ``~/.docker/config.json``. ``insecure``: as ``pull``
    has it. ``progress``: bytes of the data file that are read, then of what is fetched, of what is to be healed, and of the layers that were.

    All that has a checksum is read first. Raises PoolReadOnly, PoolBusy for a source that is this pool, DiskError, what opening a source raises, and what
    pulling an image does; OutOfSpace where that does not fit beside the pool. What was healed by then is.
    """
    pool._require_writable()
    references = {name: Reference.parse(name) for name in images}
    with ExitStack() as undo:
        undo.enter_context(pool._committer.healing)
        opened = [_source(Path(one), pool.path, undo) for one in sources]
        healing = _Healing(pool, progress or (lambda _done, _total: None))
        for source in opened:
            healing.take_from(source)
        for name, reference in references.items():
            if healing.wrong:
                known = (credentials or {}).get(name) or credentials_for(reference.domain)
                with closing(RegistrySource(reference, credentials=known, insecure=insecure)) as image:
                    healing.take_from_image(image, reference)
        return healing.result()


def _source(path: Path, own: Path, undo: ExitStack) -> _Source:
    if not path.is_dir():
        return _File(path, undo)
    if path.samefile(own):
        raise PoolBusy(f"{path} is the pool that is to be healed: say where else its layers are")
    return _OtherPool(undo.enter_context(Pool.open(path, read_only=True)))


class _Changed(Exception):
    """A chunk is not what it was found to be."""


class _Healing:
    """One that is under way. ``wrong``: the chunks that are to be healed yet."""

    def __init__(self, pool: Pool, progress: Progress) -> None:
        self._pool, self._progress = pool, progress
        pool.commit()  # what a state that can be looked at has
        self.wrong = self._steadily(lambda: scrub_chunks(pool.path, Report("scrub"), progress, pool._store.pinned))
        self._chunks = len(self.wrong)
        self._healed, self._left = list[Range](), list[Range]()

    @staticmethod
    def _steadily(look: Callable[[], Places]) -> Places:
        """What is seen in states that stay; the metadata file doubles now and then, and lets go of them."""
        while True:
            with suppress(PinLost):
                return look()

    def take_from(self, source: _Source) -> None:
        """Heals what the source has the bytes for."""
        waiting = list(self.wrong)
        for _ in range(_LOOKS):
            changed = []
            for number, chunk in enumerate(waiting):
                self._progress(number * self._pool.chunk_size, len(waiting) * self._pool.chunk_size)
                try:
                    self._try(source, chunk)
                except _Changed:
                    changed.append(chunk)
            waiting = self._look_again(changed) if changed else []

    def _try(self, source: _Source, chunk: int) -> None:
        checksum, places = self.wrong[chunk]
        if _heal_chunk(self._pool, source, chunk, checksum, places):
            self._healed += (Range(*place, "healed") for place in places)
            del self.wrong[chunk]

    def _look_again(self, chunks: Collection[int]) -> list[int]:
        """Those that are wrong still."""
        self._pool.commit()
        now = self._steadily(lambda: look_again(self._pool.path, chunks, self._pool.chunk_size, self._pool._store.pinned))
        for chunk in chunks:
            before = {(name, offset) for name, offset, _ in self.wrong.pop(chunk)[1]}
            checksum, places = now.get(chunk, (0, []))
            if checksum:
                self.wrong[chunk] = (checksum, places)
            else:  # freed; or given up, which the layer that it is of has still
                self._left += (Range(*place, _GIVEN_UP) for place in places if place[:2] in before)
        return [chunk for chunk in chunks if chunk in self.wrong]

    def take_from_image(self, image: RegistrySource, reference: Reference) -> None:
        """Makes the image's layers of those bytes that they have here, in a pool of its own, and heals from them."""
        assert image.config is not None
        chain = chain_ids(ImageConfig.parse(image.config).diff_ids)
        size = next((layer.size for one in chain for layer in self._pool.layers_with_digest("chain", one)), None)
        if size is None:
            return
        files = self._pool._files
        with ExitStack() as undo:
            undo.callback(files.remove_healing)
            # Half of what is free, so that whoever writes meanwhile has room.
            Pool.create(files.healing, capacity=max(files.free() // 2, 1 << 20)).close()
            other = undo.enter_context(Pool.open(files.healing, background=False))
            try:
                Importer(other, image, ChainLocks(), size=size, progress=self._progress).run([str(reference)], [reference.name])
            except OutOfSpace as error:
                raise OutOfSpace(f"no room beside the pool for {reference}, which may take half of what is free: pull it into a pool elsewhere") from error
            self.take_from(_OtherPool(other))

    def result(self) -> Healed:
        """Makes it durable, and compares the healed layers with their digests."""
        left = [*self._left, *(Range(*place, _NOT_FOUND) for _, places in self.wrong.values() for place in places)]
        self._pool.commit()
        damaged = {one.layer for one in left}
        differ = [name for name in sorted({one.layer for one in self._healed}) if self._differs(name, damaged)]
        return Healed(self._chunks, _in_order(self._healed), _in_order(left), tuple(differ))

    def _differs(self, name: str, damaged: set[str]) -> bool:
        try:
            layer = self._pool.layer(name)
            if not layer.sealed or any(one.name in damaged for one in lineage(layer)):
                return False
            return has_its_content(layer, lambda done: self._progress(done, layer.size)) is False
        except (LayerNotFound, LayerDeleted):
            return False
        except (DamagedError, DiskError):
            return True


def _in_order(ranges: Sequence[Range]) -> tuple[Range, ...]:
    return tuple(joined(iter(sorted(ranges, key=lambda one: (one.layer, one.offset)))))


def _heal_chunk(pool: Pool, source: _Source, chunk: int, checksum: int, places: Sequence[Place]) -> bool:
    """Tries what the source has for what layers have in the chunk. Blocks that no layer names are as they are, or, if it is these that are damaged, were
    never written. Raises _Changed."""
    size, entries = pool.chunk_size, dict[tuple[str, int], list[Place]]()
    for place in places:
        entries.setdefault((place[0], place[1] // size), []).append(place)
    with (pool.path / "data").open("rb", buffering=0) as data:
        own = _read(data.fileno(), chunk * size, size)
    together, changed = bytearray(own), False
    for (name, index), parts in entries.items():
        try:
            layer = pool.layer(name)
            for content in _overlaid(source, layer, parts, own, together):
                if checksum_of(content) == checksum:
                    if _put(layer, index, chunk, content):
                        return True
                    changed = True
        except (LayerNotFound, LayerDeleted):
            changed = True
    if changed:
        raise _Changed
    return False


def _put(layer: Layer, index: int, chunk: int, content: bytearray) -> bool:
    """Puts the content of a whole chunk into the pool's chunk, which chunk ``index`` of the layer names; false: it does not, or its checksum says another
    by now."""
    rc = _core.tp_layer_heal(layer.handle.pointer, index, chunk, _ffi.from_buffer(content))
    return bool(layer.handle.engine.check(rc, layer.id))


def _read(data_fd: int, offset: int, length: int) -> bytes:
    """What is there; zeros for blocks that the disk has lost."""
    try:
        return os.pread(data_fd, length, offset).ljust(length, b"\0")
    except OSError:
        if length == BLOCK_SIZE:
            return bytes(length)
        return b"".join(_read(data_fd, at, BLOCK_SIZE) for at in range(offset, offset + length, BLOCK_SIZE))


def _overlaid(source: _Source, layer: Layer, parts: Sequence[Place], own: bytes, together: bytearray) -> Iterator[bytearray]:
    """The chunk with what the source has for parts of a layer in it: laid over the chunk as it is, over zeros, and over what came from other layers."""
    size = len(own)
    versions = [source.versions(layer, offset, length) for _, offset, length in parts]
    while True:
        content, alone, some = bytearray(own), bytearray(size), False
        for (_, offset, length), found in zip(parts, versions, strict=True):
            if (piece := next(found, None)) is None:
                continue
            some, at = True, offset % size
            content[at : at + length] = alone[at : at + length] = together[at : at + length] = piece
        if not some:
            return
        yield from (content, alone, together)
