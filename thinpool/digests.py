"""Content digests of sealed layers, and checksums of their chunks, made in the background; and layers found equal that become one.

A digest is a Merkle digest of the blocks in which a layer differs from its base, the nearest sealed layer above it (docs/FORMAT.md,
"Content digests"): two layers that have the same one have the same content. Sealed layers do not change, so a digest that was
interrupted goes on where it was, also in another process. What is read for it gets checksums on the way (csrc/checksum.h).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .catalog import PARTIAL_LABEL
from .engine import BLOCK_SIZE
from .errors import LayerDeleted, PoolClosed, PoolFailed, ThinpoolError

if TYPE_CHECKING:
    from .api import Progress
    from .layer import Layer
    from .pool import Pool

_LOG = logging.getLogger("thinpool")
_FANOUT = 256
_DIGEST_BYTES = 32
_PIECE_BYTES = 1 << 20
_ZEROS = bytes(_PIECE_BYTES)
_SAVE_BYTES = 1 << 30
_QUIET_SECONDS = 5.0  # short-lived processes leave the work to longer-lived ones
_NICE = 10
_KEY = "digest/"


class MerkleTree:
    """The digest of a sparse array of blocks, given in order; keeps one open node a level."""

    def __init__(self, size: int, opened: list[tuple[int, str]] | None = None) -> None:
        """For a layer of ``size`` bytes; ``opened``: the state that another one had (:meth:`opened`)."""
        blocks, height = -(-size // BLOCK_SIZE), 1
        while _FANOUT**height < blocks:
            height += 1
        self._opened = [(number, bytearray.fromhex(content)) for number, content in opened or [(0, "")] * height]

    def opened(self) -> list[tuple[int, str]]:
        """What it knows so far, for JSON."""
        return [(number, content.hex()) for number, content in self._opened]

    def add(self, block: int, content: bytes | memoryview) -> None:
        """The block of that number, which comes behind all before it."""
        self._put(0, block, hashlib.sha256(b"\0" + content).digest())

    def _put(self, level: int, index: int, digest: bytes) -> None:
        number, place = divmod(index, _FANOUT)
        if number != self._opened[level][0]:
            self._close(level)
            self._opened[level] = (number, bytearray())
        self._opened[level][1].extend(bytes([place]) + digest)

    def _close(self, level: int) -> None:
        number, content = self._opened[level]
        if content:
            self._put(level + 1, number, hashlib.sha256(b"\1" + content).digest())

    def root(self) -> bytes:
        """The digest of all; zeros where there was no block."""
        for level in range(len(self._opened) - 1):
            self._close(level)
        content = self._opened[-1][1]
        return hashlib.sha256(b"\1" + content).digest() if content else bytes(_DIGEST_BYTES)


def base_of(layer: Layer) -> Layer | None:
    """The sealed layer that the digest is relative to."""
    base = layer.parent
    while base is not None and not base.sealed:
        base = base.parent
    return base


def lineage(layer: Layer | None) -> Iterator[Layer]:
    """The layer, and what it was made from."""
    while layer is not None:
        yield layer
        layer = layer.parent


def _pieces(layer: Layer, base: Layer | None, position: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges in which the layer may differ from its base, from ``position`` on."""
    extents = layer.extents() if base is None else layer.pool.diff(base, layer)
    for extent in extents:
        if base is None and extent.kind == "hole":
            continue
        end = min(extent.offset + extent.length, layer.size)
        for start in range(max(extent.offset, position), end, _PIECE_BYTES):
            yield start, min(start + _PIECE_BYTES, end)


class _Work:
    """One layer's digest, as far as it is; stored as a document now and then."""

    def __init__(self, pool: Pool, layer: Layer, base: Layer | None) -> None:
        self._pool, self._layer, self._base = pool, layer, base
        self._base_digest = self._base.digests["content"] if self._base else ""
        self._key = f"{_KEY}{layer.id}"
        stored = self._stored()
        self._position: int = stored["position"] if stored else 0
        self._tree = MerkleTree(layer.size, stored["opened"] if stored else None)

    def _stored(self) -> dict[str, Any] | None:
        content = self._pool.document(self._key)
        if content is None:
            return None
        stored: dict[str, Any] = json.loads(content)
        # Earlier versions used ids again, and made no checksums.
        fits = (stored["created"], stored["base"], stored.get("checksums")) == (self._layer.created, self._base_digest, True)
        return stored if fits else None

    def run(self, on_piece: Callable[[int], None]) -> None:
        """Goes on to the end, or until ``on_piece`` (called with bytes done) raises; then what is done so far is kept."""
        saved = self._position
        try:
            for start, end in _pieces(self._layer, self._base, self._position):
                self._add(start, end)
                self._layer.handle.checksum(start, end - start)
                self._position = end
                if end - saved >= _SAVE_BYTES:
                    saved = end
                    self._save()
                on_piece(end)
        except LayerDeleted:
            self._pool.put_document(self._key, None)
            raise
        except BaseException:
            self._save()
            raise
        self._finish()

    def _add(self, start: int, end: int) -> None:
        new = self._layer.pread(end - start, start)
        old = _ZEROS[: end - start]
        if self._base is not None and start < self._base.size:
            length = min(end, self._base.size) - start
            old = self._base.pread(length, start) + _ZEROS[: end - start - length]
        if new == old:
            return
        for at in range(0, end - start, BLOCK_SIZE):
            block = new[at : at + BLOCK_SIZE]
            if block != old[at : at + BLOCK_SIZE]:
                self._tree.add((start + at) // BLOCK_SIZE, block.ljust(BLOCK_SIZE, b"\0"))

    def _save(self) -> None:
        state = {"created": self._layer.created, "base": self._base_digest, "position": self._position, "opened": self._tree.opened()}
        self._pool.put_document(self._key, json.dumps(state | {"checksums": True}).encode())

    def again(self, on_piece: Callable[[int], None]) -> str:
        """The digest of a layer that has one, computed from its bytes as they are now."""
        for start, end in _pieces(self._layer, self._base):
            self._add(start, end)
            on_piece(end)
        return self._digest()

    def _digest(self) -> str:
        base = bytes.fromhex(self._base_digest.removeprefix("sha256:")) or bytes(_DIGEST_BYTES)
        whole = hashlib.sha256(b"thinpool content 1\n" + base + self._layer.size.to_bytes(8, "little") + self._tree.root())
        return f"sha256:{whole.hexdigest()}"

    def _finish(self) -> None:
        with self._pool.atomically():
            self._pool.set_digests(self._layer, {"content": self._digest()})
            self._pool.put_document(self._key, None)
            _note_checksums(self._layer)


def _note_checksums(layer: Layer) -> None:
    with layer.pool.changing_record(layer) as catalog:
        catalog.set_checksums(layer.id)


def _make_checksums(layer: Layer, on_piece: Callable[[int], None]) -> None:
    """Of a layer that has its digest from an earlier version. What was made by an earlier try is not read again."""
    for start, end in _pieces(layer, base_of(layer)):
        layer.handle.checksum(start, end - start)
        on_piece(end)
    _note_checksums(layer)


def has_its_content(layer: Layer, on_piece: Callable[[int], None] = lambda _: None) -> bool | None:
    """Whether a sealed layer's bytes still have its content digest; ``None``: it has none, or what that is relative to was deleted."""
    if "content" not in layer.digests:
        return None
    # Which ancestor was the nearest sealed one then is not known: others may have been sealed since.
    bases: list[Layer | None] = []
    above = layer.parent
    while above is not None:
        if above.sealed and "content" in above.digests:
            bases.append(above)
        top, above = above, above.parent
    orphan = (top if layer.parent is not None else layer).origin is not None
    for base in (*bases, None):
        if _Work(layer.pool, layer, base).again(on_piece) == layer.digests["content"]:
            return True
    return None if orphan else False


def _ranges_equal(pool: Pool, one: Layer, other: Layer, on_piece: Callable[[int], None]) -> bool:
    for extent in pool.diff(one, other):
        end = min(extent.offset + extent.length, one.size)
        for start in range(extent.offset, end, _PIECE_BYTES):
            length = min(_PIECE_BYTES, end - start)
            if one.pread(length, start) != other.pread(length, start):
                return False
            on_piece(start + length)
    return True


def _descendants(layer: Layer) -> list[Layer]:
    found = [layer]
    for one in found:  # which grows meanwhile
        found.extend(one.children)
    return found[1:]


def make_one(pool: Pool, kept: Layer, layer: Layer, on_piece: Callable[[int], None] = lambda _: None) -> bool:
    """Lets a sealed layer, and all that was made from it, name the chunks of another that is equal; false: it is not.

    Both keep their names. What only the one had is free once this is done. Digests have found them: here the bytes decide.
    """
    if kept.size != layer.size or not _ranges_equal(pool, kept, layer, on_piece):
        return False
    saved = sum(extent.length for extent in pool.diff(kept, layer) if extent.kind == "data")
    for heir in (*_descendants(layer), layer):
        if heir == kept:  # a snapshot of the other, which was sealed later
            continue
        try:
            heir.handle.rebase(layer.handle, kept.handle)
        except LayerDeleted:
            if heir == layer:
                raise
    pool.fingerprints.count_shared(saved)
    return True


class _Stopped(Exception):
    """The digester is to stop."""


class Digester(threading.Thread):
    """Gives sealed layers the digests and checksums that they lack, at half speed and low priority, while the pool is open."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(name="thinpool-digester", daemon=True)
        self._pool = weakref.ref(pool)  # a pool that nobody has any more is closed, not kept by its digester
        self._stop_asked = threading.Event()
        self._working = threading.Lock()

    def stop(self) -> None:
        """Ends the thread, if it runs; what was done of a layer is kept."""
        self._stop_asked.set()
        if self.ident not in (None, threading.get_ident()):
            self.join()

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        seen: int | None = -1
        while seen is not None and not self._stop_asked.wait(_QUIET_SECONDS):
            seen = self._look(seen)

    def _look(self, seen: int) -> int | None:
        """Works if there is anything new since that transaction; the one it saw, or ``None`` at the end."""
        pool = self._pool()
        if pool is None:
            return None
        try:
            txn = pool.engine.info().durable_txn
            if txn != seen:
                self.catch_up(self._pause())
        except (PoolClosed, PoolFailed, _Stopped):
            return None
        except Exception as error:
            _LOG.warning("content digests: %s", error, exc_info=not isinstance(error, ThinpoolError))
        return txn

    def _pause(self) -> Callable[[int, int], None]:
        began = time.monotonic()

        def pause(_done: int, _total: int) -> None:
            nonlocal began
            if self._stop_asked.wait(time.monotonic() - began):
                raise _Stopped
            began = time.monotonic()

        return pause

    def catch_up(self, progress: Progress | None = None) -> None:
        """Computes what is missing now, and makes layers one that are equal. ``progress`` may raise: then it goes on next time."""
        pool = self._pool()
        assert pool is not None  # whose method calls this
        with self._working:
            waiting = _waiting(pool)
            total, done = sum(size for _, size in waiting), 0
            for layer, size in waiting:

                def on_piece(position: int, done: int = done) -> None:
                    if progress is not None:
                        progress(done + position, total)

                try:
                    (_make_checksums if "content" in layer.digests else _digest)(layer, on_piece)
                    done += size
                except LayerDeleted:
                    continue


def _waiting(pool: Pool) -> list[tuple[Layer, int]]:
    """Sealed layers without a digest or checksums, and their sizes, the oldest first, so that bases are; what was kept of layers that are gone is dropped."""
    layers = {layer.id: layer for layer in pool.layers()}
    for key, _ in pool.documents(_KEY):
        if int(key.removeprefix(_KEY)) not in layers:
            pool.put_document(key, None)
    waiting = []
    for layer in layers.values():
        with suppress(LayerDeleted):
            if _lacks_some(layer):
                waiting.append((layer, layer.size))
    return waiting


def _lacks_some(layer: Layer) -> bool:
    record = layer.pool.record(layer.id)
    return record is not None and layer.sealed and PARTIAL_LABEL not in record.labels and not (record.checksums and "content" in record.digests)


def _digest(layer: Layer, on_piece: Callable[[int], None]) -> None:
    base, pool = base_of(layer), layer.pool
    if base is not None and "content" not in base.digests:
        return  # it is damaged, or still being filled
    _Work(pool, layer, base).run(on_piece)
    twins = [twin for twin in pool.layers_with_digest("content", layer.digests["content"]) if twin != layer]
    if twins and not make_one(pool, twins[0], layer, on_piece):
        _LOG.error("layers %s and %s have the same content digest but not the same bytes: one of them is damaged", twins[0].name, layer.name)
