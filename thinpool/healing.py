"""Heals chunks that are not what their checksums say, from elsewhere: another pool that has the layer, or its bytes in a file.

Where bytes come from need not be trusted, nor be of the same version: a chunk's checksum decides which are taken, and they are written where
the chunk is, so that no map changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .api import Progress, Range
from .digests import has_its_content
from .engine import _core, _ffi
from .errors import DamagedError, DiskError, PoolBusy
from .layer import Layer
from .pool import Pool
from .poolfiles import PoolFiles
from .recovery.checksums import checksum_of
from .recovery.report import Report, joined
from .recovery.scrub import Place, scrub_chunks


@dataclass
class Healed:
    """What was healed, and what is left, by layer and range. ``chunks``: how many were not what their checksums say; ``differ``: sealed layers
    with healed chunks that are not what their content digest says all the same."""

    chunks: int = 0
    healed: list[Range] = field(default_factory=list)
    left: list[Range] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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

    def __init__(self, path: Path, undo: ExitStack) -> None:
        self._pool = undo.enter_context(Pool.open(path, read_only=True))
        self._by_name = {layer.name: layer for layer in self._pool.layers()}

    def versions(self, layer: Layer, offset: int, length: int) -> Iterator[bytes]:
        alike = [one for digest in layer.digests.items() for one in self._pool.layers_with_digest(*digest)]
        if layer.name in self._by_name:
            alike.append(self._by_name[layer.name])
        for other in alike:
            with suppress(DamagedError, DiskError):
                there = min(length, other.size - offset)
                if there > 0:
                    yield other.pread(there, offset).ljust(length, b"\0")


def heal(path: Path, sources: Sequence[Path], progress: Progress | None = None) -> Healed:
    """Heals the pool in ``path``, which nobody else has open, from other pools' directories, raw images and devices.

    All that has a checksum is read first; ``progress`` as :func:`~thinpool.recovery.scrub.scrub_chunks` has it. Raises PoolNotFound, PoolBusy, DiskError, or
    what opening a source raises.
    """
    files, done = PoolFiles(path), Healed()
    files.require_pool()
    with ExitStack() as undo:
        undo.callback(files.close)
        files.lock()
        opened = [_source(one, path, undo) for one in sources]
        wrong = scrub_chunks(path, Report("scrub"), progress)
        if wrong:
            _heal(undo.enter_context(Pool.open(path, background=False, lock=files.lock_fd)), opened, wrong, done)
    return done


def _heal(pool: Pool, sources: Sequence[_Source], wrong: Mapping[int, tuple[int, list[Place]]], done: Healed) -> None:
    healed, left = list[Range](), list[Range]()
    for chunk, (checksum, places) in wrong.items():
        done.chunks += 1
        if _heal_chunk(pool, sources, chunk, checksum, places):
            healed += (Range(*place, "healed") for place in places)
        else:
            left += (Range(*place, "no source has what its checksum says") for place in places)
    pool.commit()
    done.healed, done.left = (list(joined(iter(sorted(ranges, key=lambda one: (one.layer, one.offset))))) for ranges in (healed, left))
    whole = {one.layer for one in healed} - {one.layer for one in left}
    done.differ = [name for name in sorted(whole) if (layer := pool.layer(name)).sealed and has_its_content(layer) is False]


def _source(path: Path, own: Path, undo: ExitStack) -> _Source:
    if not path.is_dir():
        return _File(path, undo)
    if path.samefile(own):
        raise PoolBusy(f"{path} is the pool that is to be healed: say where else its layers are")
    return _OtherPool(path, undo)


def _heal_chunk(pool: Pool, sources: Sequence[_Source], chunk: int, checksum: int, places: Sequence[Place]) -> bool:
    """Tries what each source has for what layers have in the chunk. Blocks that no layer names are as they are, or, if it is these that are damaged, were
    never written."""
    size, entries = pool.chunk_size, dict[tuple[str, int], list[Place]]()
    for place in places:
        entries.setdefault((place[0], place[1] // size), []).append(place)
    with (pool.path / "data").open("rb", buffering=0) as data:
        own = _read(data.fileno(), size, chunk)
    for source in sources:
        together = bytearray(own)
        for (name, index), parts in entries.items():
            layer = pool.layer(name)
            for content in _overlaid(source, layer, parts, own, together):
                if checksum_of(content) == checksum and _put(layer, index, chunk, content):
                    return True
    return False


def _put(layer: Layer, index: int, chunk: int, content: bytearray) -> bool:
    """Puts the content of a whole chunk into the pool's chunk, which chunk ``index`` of the layer names; false: its checksum says another by now."""
    rc = _core.tp_layer_heal(layer.handle.pointer, index, chunk, _ffi.from_buffer(content))
    return bool(layer.handle.engine.check(rc, layer.id))


def _read(data_fd: int, size: int, chunk: int) -> bytes:
    try:
        return os.pread(data_fd, size, chunk * size).ljust(size, b"\0")
    except OSError:  # the disk has lost it
        return bytes(size)


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
