"""Chunks that are equal are shared: fingerprints find them, bytes decide (DESIGN.md, "Equal chunks").

For layers that an import is filling, which nobody else reads or writes yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mmh3

from .engine import is_zero

if TYPE_CHECKING:
    from .layer import Layer
    from .pool import Pool

_BATCH_BYTES = 32 << 20
_PIECE_BYTES = 4 << 20


class Sharer:
    """Lets entries of one layer name chunks that the pool has already. What is offered last is compared by :meth:`compare`."""

    def __init__(self, pool: Pool, layer: Layer) -> None:
        self._pool, self._layer = pool, layer
        self._chunk = pool.chunk_size
        self._shared: list[tuple[int, bytes, bytes]] = []  # entries made to share, with fingerprint and bytes, not compared yet
        self.shared_bytes = 0

    def offer(self, index: int, content: bytes, *, written: bool) -> None:
        """A chunk of the layer that has, or is to have, these bytes: shared if there are equal ones, else ``written`` or written now."""
        digest = mmh3.mmh3_x64_128_digest(content)
        chunk = self._pool.fingerprints.find(digest)
        own = self._layer.handle.chunk_at(index) if written else None
        if chunk is not None and chunk != own and self._layer.handle.map_shared(index, chunk):
            self._shared.append((index, digest, content))
            if len(self._shared) * self._chunk >= _BATCH_BYTES:
                self.compare()
            return
        if not written:
            self._layer.pwrite(content, index * self._chunk)
        self._note(digest, index)

    def _note(self, digest: bytes, index: int) -> None:
        chunk = self._layer.handle.chunk_at(index)
        if chunk is not None:
            self._pool.fingerprints.note(digest, chunk)

    def compare(self) -> None:
        """Nobody overwrites the shared chunks from here on: those that are equal stay shared, the others are written."""
        if not self._shared:
            return
        self._pool.engine.revoke()
        for index, digest, content in self._shared:
            offset = index * self._chunk
            if self._layer.handle.equal(content, offset):
                self.shared_bytes += self._chunk
                self._pool.fingerprints.count_shared(self._chunk)
            else:
                self._layer.pwrite(content, offset)
                self._note(digest, index)
        self._shared.clear()


def share_equal_chunks(pool: Pool, layer: Layer, parent: Layer) -> int:
    """Shares what a layer has that its parent has not; the bytes that this saves. Zero chunks are given back."""
    size, sharer = pool.chunk_size, Sharer(pool, layer)
    for extent in list(pool.diff(parent, layer)):
        first, end = -(-extent.offset // size) * size, (extent.offset + extent.length) // size * size
        if extent.kind != "data":
            continue
        for start in range(first, end, _PIECE_BYTES):
            piece = memoryview(layer.pread(min(_PIECE_BYTES, end - start), start))
            for at in range(0, len(piece), size):
                content = piece[at : at + size]
                if is_zero(content):
                    layer.discard(start + at, size)
                elif layer.handle.chunk_at((start + at) // size) is not None:  # of split ones the parent has a part
                    sharer.offer((start + at) // size, bytes(content), written=True)
    sharer.compare()
    return sharer.shared_bytes
