"""Takes an image into a pool: fetches what is missing, and applies it layer by layer.

::

    source --fetch (threads)--> blob --follow--> decompress --hash--> apply --> layer --share--> seal
                                  digest                      DiffID

Archives are fetched several at a time while earlier layers are applied, each into a blob of the pool that the applying
thread reads as it grows. Layers that the pool has by ChainID are neither fetched nor applied. Until the end everything
that was made carries the partial label; one commit then takes the labels off and stores the image's documents. Whatever ends it
before that, a failure or a power cut, leaves nothing.

Who applies a layer holds its ChainID; another import that needs the same one waits for it. ChainIDs are taken base first, and who
wants one wants those below it too, so nobody waits in a circle.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO

from ..api import Progress, Size
from ..catalog import PARTIAL_LABEL
from ..errors import ImportFailed, LayerNotFound, RegistryError, ThinpoolError
from ..filesystems.apply import apply_layer
from ..filesystems.blank import FILESYSTEM_LABEL, blank_layer
from ..filesystems.compression import Readable, decompressed
from ..filesystems.filling import filling
from ..sharing import share_equal_chunks
from ..units import parse_size
from .blobs import PIECE_BYTES, Blob, copy, open_kept
from .compressing import Compressor, quick_compressor
from .oci import ARCHIVES, Descriptor, ImageConfig, chain_ids, digest_of
from .store import BLOB_LABEL, ImageRecord, ImageStore, KnownManifest, LayerArchives, blob_name
from .transfer import ImageSource

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool

_FETCHES_AT_ONCE = 3
_TRIES = 5
_FILESYSTEM = "ext4"
_PLAIN_BYTES_MAX = 1 << 50  # of archives made here: a limit for a layer that takes no space until it is written


class ChainLocks:
    """Who applies which layer: one lock per ChainID, for as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def holding(self, chain_id: str) -> Iterator[None]:
        """Alone with a ChainID."""
        with self._guard:
            lock, users = self._locks.get(chain_id, (threading.Lock(), 0))
            self._locks[chain_id] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks.pop(chain_id)
                if users > 1:
                    self._locks[chain_id] = lock, users - 1


@dataclass(slots=True)
class _Step:
    """A layer that is missing."""

    archive: Descriptor
    chain_id: str  # "", as the next: not known before it is applied
    diff_id: str
    kept: Layer | None = None  # its archive is in the pool already
    blob: Blob | None = None  # its archive as it is being fetched, or made
    fetch: Future[Descriptor] | None = None
    kept_as: Descriptor | None = None
    layer: Layer | None = None
    tar_size: int = 0


class Importer:
    """One import."""

    def __init__(self, pool: Pool, source: ImageSource, locks: ChainLocks, *, size: Size, progress: Progress | None) -> None:
        self._pool, self._source, self._locks = pool, source, locks
        self._store = ImageStore(pool)
        self._size = parse_size(size)
        self._progress = progress
        self._done = self._total = 0
        self._stopped = threading.Event()
        self._diff_ids = self._known_diff_ids()
        self._chain_ids = chain_ids(self._diff_ids)
        if self._diff_ids and len(self._diff_ids) != len(source.layers):
            raise ImportFailed(f"the image's configuration lists {len(self._diff_ids)} layers, its manifest {len(source.layers)}")

    def _known_diff_ids(self) -> tuple[str, ...]:
        """Those of the configuration; of a tarball, if the pool has had it before; else none."""
        if self._source.config is not None:
            return ImageConfig.parse(self._source.config).diff_ids
        digest = self._source.layers[0].digest
        return tuple({one.diff_id for one in self._store.layers().values() if digest in (archive.digest for archive in one.all())})[:1]

    def run(self, references: Sequence[str], sources: Sequence[str]) -> str:
        """Imports, gives the image these full names, and returns its id. ``sources``: repositories that have its layers."""
        steps: list[_Step] = []
        with ExitStack() as held:
            missing = self._take_missing(held)
            fetchers = ThreadPoolExecutor(_FETCHES_AT_ONCE, thread_name_prefix="thinpool-fetch")
            try:
                self._total = sum(self._source.layers[index].size for index in missing)
                for index in missing:
                    steps.append(self._plan(index))
                    self._start(steps[-1], fetchers)
                below = self._layer_of(self._chain_ids[missing[0] - 1]) if missing and missing[0] else None
                for step in steps:
                    below = self._apply(step, below)
                for step in steps:
                    if step.fetch is not None:
                        step.kept_as = step.fetch.result()
                image_id = self._finish(steps, references, sources)
            except BaseException:
                self._stopped.set()
                fetchers.shutdown(wait=True, cancel_futures=True)
                self._discard(steps)
                raise
            finally:
                fetchers.shutdown(wait=True)
        self._pool.commit()
        return image_id

    # --- what is missing ---

    def _take_missing(self, held: ExitStack) -> list[int]:
        """Numbers of the layers that the pool lacks, each held from here on."""
        if not self._diff_ids and self._source.layers:  # a tarball that is new here
            held.enter_context(self._locks.holding(self._source.layers[0].digest))
            return [0]
        missing = []
        for index, chain_id in enumerate(self._chain_ids):
            if self._find(chain_id):
                continue
            held.enter_context(self._locks.holding(chain_id))
            if not self._find(chain_id):  # nobody has brought it while we waited
                missing.append(index)
        if missing and missing != list(range(missing[0], len(self._chain_ids))):
            raise ImportFailed("the pool has an upper layer of the image but lacks one below it: thinpool gc removes what is left over")
        return missing

    def _find(self, chain_id: str) -> Layer | None:
        found = self._pool.layers_with_digest("chain", chain_id)
        return found[0] if found else None

    def _layer_of(self, chain_id: str) -> Layer:
        layer = self._find(chain_id)
        if layer is None:
            raise ImportFailed(f"layer {chain_id} was removed meanwhile")
        return layer

    def _plan(self, index: int) -> _Step:
        archive = self._source.layers[index]
        step = _Step(archive, *((self._chain_ids[index], self._diff_ids[index]) if self._diff_ids else ("", "")))
        with suppress(LayerNotFound):
            step.kept = self._pool.layer(blob_name(archive.digest))
        return step

    # --- fetching, in threads ---

    def _start(self, step: _Step, fetchers: ThreadPoolExecutor) -> None:
        if step.kept is not None:
            return
        if self._source.manifest is not None or step.archive.media_type in ARCHIVES:
            step.blob = Blob.expecting(self._pool, step.archive)
            step.fetch = fetchers.submit(self._fetch, step.blob, step.archive)
        else:  # a plain tar, or a form that no registry knows: kept compressed
            media_type, compressor = quick_compressor()
            step.blob = Blob(self._pool, media_type, _PLAIN_BYTES_MAX)
            step.fetch = fetchers.submit(self._compress, step.blob, step.archive, compressor)

    def _fetch(self, blob: Blob, archive: Descriptor) -> Descriptor:
        """Fetches an archive; goes on where a transfer broke off, a few times."""
        try:
            failures = 0
            while True:
                before = blob.filled
                try:
                    with closing(self._source.open_blob(archive, before)) as stream:
                        copy(stream, blob.write, self._stopped)
                    return blob.finish()
                except (RegistryError, ConnectionError, TimeoutError) as error:
                    failures = 1 if blob.filled > before else failures + 1
                    lasting = isinstance(error, RegistryError) and 400 <= error.status < 500 and error.status not in (408, 429)
                    if failures >= _TRIES or lasting or self._stopped.wait(0.1 * 2**failures):
                        raise error if isinstance(error, RegistryError) else RegistryError(f"cannot get {archive.digest}: {error}") from error
        except BaseException as error:
            blob.fail(error)
            raise

    def _compress(self, blob: Blob, archive: Descriptor, compressor: Compressor) -> Descriptor:
        with closing(self._source.open_blob(archive)) as stream:
            copy(decompressed(stream), lambda data: blob.write(compressor.compress(data)), self._stopped)
            blob.write(compressor.flush())
        return blob.finish()

    # --- applying, in this thread ---

    def _open(self, step: _Step) -> BinaryIO:
        if step.kept is not None:
            return open_kept(step.kept)
        if self._source.manifest is None:
            return self._source.open_blob(step.archive)
        assert step.blob is not None
        return step.blob.open()

    def _apply(self, step: _Step, below: Layer | None) -> Layer:
        parent = below if below is not None else blank_layer(self._pool, _FILESYSTEM, self._size)
        layer = parent.clone(f"thinpool/import/{uuid.uuid4().hex}", labels={PARTIAL_LABEL: "1", FILESYSTEM_LABEL: _FILESYSTEM})
        step.layer = layer
        with closing(self._open(step)) as archive:
            tar = _Hashed(decompressed(_Counted(archive, self._advance)))
            with filling(self._pool, layer, _FILESYSTEM) as tree:
                try:
                    apply_layer(tar, tree, whiteouts=True)
                except ImportFailed as error:
                    raise ImportFailed(f"layer {step.archive.digest}: {error}") from error
            tar.drain()
        if step.diff_id and tar.digest != step.diff_id:
            raise ImportFailed(f"layer {step.archive.digest} holds a tar with the digest {tar.digest}, not {step.diff_id} as its image says")
        step.diff_id, step.chain_id, step.tar_size = tar.digest, step.chain_id or tar.digest, tar.size
        share_equal_chunks(self._pool, layer, parent)
        layer.seal()
        return layer

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)

    # --- the end ---

    def _finish(self, steps: list[_Step], references: Sequence[str], sources: Sequence[str]) -> str:
        diff_ids = self._diff_ids or tuple(step.diff_id for step in steps)
        config = self._source.config if self._source.config is not None else self._source.config_for(diff_ids[0])
        image_id, chain = digest_of(config), tuple(chain_ids(diff_ids))
        with self._pool.atomically():
            for step in steps:
                self._keep(step)
            record = self._store.image(image_id) or ImageRecord(image_id, config.decode(), chain)
            manifests = record.manifests
            if self._source.manifest is not None:
                digest = digest_of(self._source.manifest)
                if digest not in {manifest.digest for manifest in manifests}:
                    manifests = (*manifests, KnownManifest(self._source.manifest.decode(), self._source.manifest_type, digest))
            if self._source.manifest is not None or self._source.config is None:
                for chain_id, archive in zip(chain, self._source.layers, strict=True):
                    self._note_original(chain_id, archive)
            self._store.put_image(replace(record, manifests=manifests, sources=tuple(sorted({*record.sources, *sources}))))
            for name in references:
                self._store.put_tag(name, image_id)
        return image_id

    def _keep(self, step: _Step) -> None:
        assert step.layer is not None
        made = None
        if self._find(step.chain_id) is not None:  # the tarball was a layer that is here
            step.layer.delete()
            if step.blob is not None:
                step.blob.discard()
            return
        if step.blob is not None and step.kept_as is not None:
            step.blob.keep(step.kept_as)
            made = step.kept_as if self._source.manifest is None else None
        elif step.kept is not None:
            step.kept.set_labels({BLOB_LABEL: step.archive.media_type})
            made = step.archive if self._source.manifest is None else None
        self._pool.set_digests(step.layer, {"diff": step.diff_id, "chain": step.chain_id})
        step.layer.rename(step.chain_id, labels={FILESYSTEM_LABEL: _FILESYSTEM})
        self._store.put_archives(step.chain_id, LayerArchives(step.diff_id, step.tar_size, made=made))

    def _note_original(self, chain_id: str, archive: Descriptor) -> None:
        archives = self._store.archives(chain_id)
        if archives is not None and all(archive.digest != known.digest for known in archives.all()):
            self._store.put_archives(chain_id, replace(archives, originals=(*archives.originals, archive)))

    def _discard(self, steps: list[_Step]) -> None:
        for step in reversed(steps):
            for made in (step.layer, step.blob.layer if step.blob is not None else None):
                if made is not None:
                    with suppress(ThinpoolError):  # the failure that brought us here is the one to tell
                        made.delete()


class _Counted:
    """A stream that tells how much of it is read."""

    def __init__(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        self._stream, self._advance = stream, advance

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._advance(len(data))
        return data


class _Hashed:
    """A stream whose digest and size are known once it is read."""

    def __init__(self, stream: Readable) -> None:
        self._stream, self._hash = stream, hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        self.size += len(data)
        return data

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def drain(self) -> None:
        """Reads what nobody wanted, to the end."""
        while self.read(PIECE_BYTES):
            continue
