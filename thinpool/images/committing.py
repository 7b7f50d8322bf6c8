"""An image from a container: what it changed becomes an OCI layer tar, and the rest is an import like any other.

The container's layer is compared with its image's: the block diff says which inodes and blocks may differ, and only these files are
looked at. The new layer is applied from its tar, so that it is the same, bit for bit, in every pool that gets the image.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ..api import Buffer
from ..errors import ContainerNotFound, ImportFailed, LayerState, ThinpoolError
from ..exports.freezing import frozen_snapshot
from ..filesystems.changes import changes
from ..filesystems.ext4 import Ext4
from ..filesystems.layertar import write_layer
from .blobs import Blob, open_kept
from .compressing import portable_compressor
from .oci import LAYER_TAR, Descriptor, derived_config
from .store import CONTAINER_KEY, ImageRecord, ImageStore

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool


class CommittedSource:
    """A container's image with one layer more, as an :class:`~thinpool.images.transfer.ImageSource`."""

    manifest: bytes | None = None
    manifest_type = ""
    references: tuple[str, ...] = ()
    config: bytes | None

    def __init__(self, pool: Pool, container: str, *, author: str, message: str, command: Sequence[str] | None) -> None:
        self._pool, self._store = pool, ImageStore(pool)
        content = pool.document(CONTAINER_KEY + container)
        if content is None:
            raise ContainerNotFound(f"no container named {container!r}")
        record: dict[str, Any] = json.loads(content)
        image = None if record["image_id"] is None else self._store.image(record["image_id"])
        if image is None:
            raise LayerState(f"container {container} was not made from an image that is still here: snapshot its layer instead")
        layer = pool.layer(container)
        self.size = layer.size
        self._blob, diff_id = self._write_changes(layer, image)
        try:
            self._new = self._blob.finish()
            now = datetime.fromtimestamp(time.time(), UTC).isoformat()
            self.config = derived_config(
                image.config.encode(), diff_id, created=now, created_by=f"thinpool commit {container}", author=author, comment=message, command=command
            )
        except BaseException:
            self._blob.discard()
            raise
        below = [Descriptor(LAYER_TAR, diff, 0) for diff in image.parsed.diff_ids]
        self.layers = (*below, self._new)

    def _write_changes(self, layer: Layer, image: ImageRecord) -> tuple[Blob, str]:
        base = self._pool.layers_with_digest("chain", image.chain_ids[-1])[0]
        media_type, compressor = portable_compressor()
        blob = Blob(self._pool, media_type, layer.size + (1 << 30))
        try:
            with frozen_snapshot(self._pool, layer) as snapshot, Ext4(base) as below, Ext4(snapshot) as above:
                changed = changes(below, above, self._pool.diff(base, snapshot))
                tar = _Compressing(blob, compressor)
                write_layer(cast(BinaryIO, tar), changed, above)
                blob.write(compressor.flush())
        except BaseException:
            blob.discard()
            raise
        return blob, f"sha256:{tar.hash.hexdigest()}"

    def open_blob(self, layer: Descriptor, offset: int = 0) -> BinaryIO:
        """The archive of the new layer; those below are in the pool."""
        if layer != self._new:
            raise ImportFailed(f"layer {layer.digest} of the container's image was removed meanwhile")
        return open_kept(self._blob.layer, offset)

    def config_for(self, diff_id: str) -> bytes:
        raise AssertionError("it has one")

    def close(self) -> None:
        """Takes the archive away: the import has made its own of it."""
        with suppress(ThinpoolError):
            self._blob.discard()


class _Compressing(io.RawIOBase):
    """Takes a tar: hashes and compresses it into a blob."""

    def __init__(self, blob: Blob, compressor: Any) -> None:
        super().__init__()
        self._blob, self._compressor = blob, compressor
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:  # type: ignore[override]
        self.hash.update(data)
        self._blob.write(self._compressor.compress(data))
        return len(data)
