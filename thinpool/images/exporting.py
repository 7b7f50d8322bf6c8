"""Gives an image away: to a registry, a docker archive or an OCI layout.

Layers that have not changed go out as the archives that they came in, so that their digests stay; an image goes out under a manifest
that it came with, if all of that is kept here or the receiver has it. What was made here (commits, plain tars that were loaded)
goes out as gzip.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, cast

from ..api import Progress
from ..errors import ImportFailed, LayerNotFound
from ..filesystems.compression import decompressed
from .blobs import Blob, copy, open_kept
from .compressing import portable_compressor
from .oci import LAYER_TAR, LAYER_ZSTD, MANIFEST, Descriptor, Manifest, digest_of, manifest_for
from .store import ImageRecord, ImageStore, KnownManifest, LayerArchives, blob_name
from .transfer import ImageTarget

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool

Opener = Callable[[], BinaryIO]


class Exporter:
    """Gives images to one target."""

    def __init__(self, pool: Pool, target: ImageTarget, progress: Progress | None) -> None:
        self._pool, self._target, self._progress = pool, target, progress
        self._store = ImageStore(pool)
        self._done = self._total = 0

    def send(self, record: ImageRecord, references: Sequence[str]) -> KnownManifest:
        """Sends an image under these names; the manifest that it has there. :meth:`ImageTarget.finish` is the caller's."""
        if self._target.accepts_uncompressed:
            manifest, media_type, layers = self._as_tars(record)
        else:
            manifest, media_type, layers = self._as_it_came(record) or self._as_archives(record)
        self._total += sum(layer.size for layer, _ in layers)
        for layer, open_archive in layers:
            if open_archive is not None:
                self._target.put_blob(layer, partial(self._counted, open_archive))
            else:
                self._advance(layer.size)
        self._target.put_image(manifest, media_type, record.config.encode(), [layer for layer, _ in layers], references)
        return KnownManifest(manifest.decode(), media_type, digest_of(manifest))

    def _counted(self, open_archive: Opener) -> BinaryIO:
        return cast(BinaryIO, _Counted(open_archive(), self._advance))

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    # --- in which form ---

    def _as_it_came(self, record: ImageRecord) -> tuple[bytes, str, list[tuple[Descriptor, Opener | None]]] | None:
        """A manifest that it came with, if everything in it can be had; ``None`` for the opener of what the target has."""
        for known in record.manifests:
            layers: list[tuple[Descriptor, Opener | None]] = []
            for archive in Manifest.parse(known.text.encode(), known.media_type).layers:
                if self._target.has_blob(archive, hints=record.sources):
                    layers.append((archive, None))
                elif (kept := self._kept(archive)) is not None:
                    layers.append((archive, partial(open_kept, kept)))
                else:
                    break
            else:
                return known.text.encode(), known.media_type, layers
        return None

    def _as_archives(self, record: ImageRecord) -> tuple[bytes, str, list[tuple[Descriptor, Opener | None]]]:
        """A new manifest over what is kept."""
        layers: list[tuple[Descriptor, Opener | None]] = []
        for chain_id in record.chain_ids:
            archive, kept = self._portable(chain_id)
            layers.append((archive, None if self._target.has_blob(archive, hints=record.sources) else partial(open_kept, kept)))
        return manifest_for(record.config.encode(), [archive for archive, _ in layers]), MANIFEST, layers

    def _as_tars(self, record: ImageRecord) -> tuple[bytes, str, list[tuple[Descriptor, Opener | None]]]:
        """Plain tars, for docker archives."""
        layers: list[tuple[Descriptor, Opener | None]] = []
        for chain_id in record.chain_ids:
            archives, (_, kept) = self._archives(chain_id), self._any_kept(chain_id)
            tar = Descriptor(LAYER_TAR, archives.diff_id, archives.size)
            layers.append((tar, None if self._target.has_blob(tar) else partial(_open_tar, kept)))
        return manifest_for(record.config.encode(), [tar for tar, _ in layers]), MANIFEST, layers

    # --- what is kept ---

    def _archives(self, chain_id: str) -> LayerArchives:
        archives = self._store.archives(chain_id)
        if archives is None:
            raise ImportFailed(f"nothing is known of the archive of layer {chain_id}")
        return archives

    def _kept(self, archive: Descriptor) -> Layer | None:
        try:
            return self._pool.layer(blob_name(archive.digest))
        except LayerNotFound:
            return None

    def _any_kept(self, chain_id: str) -> tuple[Descriptor, Layer]:
        for archive in self._archives(chain_id).all():
            if (kept := self._kept(archive)) is not None:
                return archive, kept
        raise ImportFailed(f"the archive of layer {chain_id} is not kept in this pool: pull or load its image again")

    def _portable(self, chain_id: str) -> tuple[Descriptor, Layer]:
        """An archive that every tool reads; made here from what was only kept, once."""
        archives = self._archives(chain_id)
        archive, kept = self._any_kept(chain_id)
        if archive != archives.made or archive.media_type != LAYER_ZSTD:
            return archive, kept
        media_type, compressor = portable_compressor()
        blob = Blob(self._pool, media_type, archives.size + (archives.size >> 4) + (1 << 20))
        try:
            with closing(_open_tar(kept)) as tar:
                copy(tar, lambda data: blob.write(compressor.compress(data)), threading.Event())
            blob.write(compressor.flush())
            made = blob.finish()
        except BaseException:
            blob.discard()
            raise
        with self._pool.atomically():
            blob.keep(made)
            self._store.put_archives(chain_id, replace(archives, made=made))
            if archive.digest not in self._store.archives_in_use():
                kept.delete()
        return made, self._pool.layer(blob_name(made.digest))


def _open_tar(kept: Layer) -> BinaryIO:
    return decompressed(open_kept(kept))


class _Counted:
    """A stream that tells how much of it is read."""

    def __init__(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        self._stream, self._advance = stream, advance
        self.close = stream.close

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._advance(len(data))
        return data
