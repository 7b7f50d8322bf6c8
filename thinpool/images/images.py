"""The images of a pool: :class:`Images`, what :attr:`thinpool.Pool.images` is.

Taking in is done by ``importer``, giving away by ``exporting``; here is what is left: names, listings, removal.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..api import Credentials, HistoryEntry, Image, Progress, Removed, Size, Usage
from ..catalog import PARTIAL_LABEL
from ..errors import BadReference, ImageBusy, ImageNotFound, LayerBusy, LayerNotFound
from .archives import open_archive
from .committing import CommittedSource
from .credentials import credentials_for
from .exporting import Exporter
from .importer import ChainLocks, Importer
from .reference import Reference
from .registry import RegistrySource, RegistryTarget
from .store import BLOB_LABEL, ImageRecord, ImageStore, blob_name
from .transfer import ImageSource, ImageTarget

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool

Form = Literal["docker-archive", "oci-archive", "oci"]


class Images:
    """The container images of one pool; see :class:`thinpool.api.ImagesAPI`. All methods may be called from any thread."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._store = ImageStore(pool)
        self._locks = ChainLocks()

    # --- in ---

    def load(
        self, path: str | Path, reference: str | None = None, *, platform: str | None = None, size: Size = "10G", progress: Progress | None = None
    ) -> Image:
        """Takes in a ``docker save`` archive, an OCI layout (a directory or a tar), or a root file system tarball as an image of one layer.

        ``reference``: the name it gets; where the archive holds several images, the one to take. Without it the image keeps the names
        that it came with. ``platform``: which one of several, like ``linux/arm64``; ``size``: of the file system of a new base layer.
        Raises ImportFailed for what cannot be taken in, OutOfSpace, …; then nothing has changed.
        """
        name = None if reference is None else Reference.parse(reference)
        with closing(open_archive(Path(path), reference=reference, platform=platform, spool=self._pool.path)) as source:
            names = (str(name),) if name is not None else source.references
            return self._take(source, names, [], size, progress)

    def pull(
        self,
        reference: str,
        *,
        platform: str | None = None,
        credentials: Credentials | None = None,
        insecure: bool = False,
        size: Size = "10G",
        progress: Progress | None = None,
    ) -> Image:
        """Takes an image from a registry; only layers that the pool lacks are fetched.

        ``credentials``: by default those of ``~/.docker/config.json``. ``insecure``: plain HTTP also for a registry elsewhere than on
        this machine. Raises RegistryError, BadReference, ImportFailed, …; then nothing has changed.
        """
        name = Reference.parse(reference)
        known = credentials or credentials_for(name.domain)
        with closing(RegistrySource(name, platform=platform, credentials=known, insecure=insecure)) as source:
            return self._take(source, [str(name)], [name.name], size, progress)

    def _take(self, source: ImageSource, names: Sequence[str], sources: Sequence[str], size: Size, progress: Progress | None) -> Image:
        importer = Importer(self._pool, source, self._locks, size=size, progress=progress)
        return self.get(importer.run(names, sources))

    def commit(
        self,
        container: str,
        reference: str | None = None,
        *,
        author: str = "",
        message: str = "",
        command: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Image:
        """An image of a container: the container's image, and a layer with what the container has changed.

        A running container is frozen for a moment; it goes on. ``reference``: its name; ``command``: what it runs by default, if not what
        the container's image does. Raises ContainerNotFound, LayerState for a container that was not made from an image, …
        """
        name = None if reference is None else Reference.parse(reference)
        with closing(CommittedSource(self._pool, container, author=author, message=message, command=command)) as source:
            return self._take(source, [] if name is None else [str(name)], [], source.size, progress)

    # --- out ---

    def push(self, reference: str, *, credentials: Credentials | None = None, insecure: bool = False, progress: Progress | None = None) -> str:
        """Gives an image to the registry that its name says; the digest of its manifest there. What the registry has is not sent again.

        Raises ImageNotFound, RegistryError, …
        """
        name = Reference.parse(reference)
        record = self._store.find(reference)
        known = credentials or credentials_for(name.domain)
        with closing(RegistryTarget(name, credentials=known, insecure=insecure)) as target:
            sent = Exporter(self._pool, target, progress).send(record, [str(name)])
            target.finish()
        with self._pool.atomically():
            record = self._store.find(reference)
            manifests = record.manifests if sent in record.manifests else (*record.manifests, sent)
            self._store.put_image(replace(record, manifests=manifests, sources=tuple(sorted({*record.sources, name.name}))))
        self._pool.commit()
        return sent.digest

    def save(self, references: Sequence[str], path: str | Path, *, form: Form = "docker-archive", progress: Progress | None = None) -> None:
        """Writes images to a file (or directory, for ``oci``) that does not exist yet. Raises ImageNotFound, PoolExists, BadReference."""
        records = [(self._store.find(reference), self._names_for(reference)) for reference in references]
        with closing(self._file_target(Path(path), form)) as target:
            exporter = Exporter(self._pool, target, progress)
            for record, names in records:
                exporter.send(record, names)
            target.finish()

    @staticmethod
    def _file_target(path: Path, form: Form) -> ImageTarget:
        from .archive_out import DockerArchiveTarget, OciLayoutTarget

        if form == "docker-archive":
            return DockerArchiveTarget(path)
        if form in ("oci", "oci-archive"):
            return OciLayoutTarget(path, form)
        raise BadReference(f"no form {form!r} of image files: there are docker-archive, oci-archive and oci")

    def _names_for(self, reference: str) -> Sequence[str]:
        """The names that a saved image carries: the one it was asked for by, or none where it was by its id."""
        try:
            name = str(Reference.parse(reference))
        except BadReference:
            return []
        return [name] if name in self._store.tags() else []

    # --- what there is ---

    def get(self, reference: str) -> Image:
        """The image of a name, an id or the beginning of one. Raises ImageNotFound."""
        return self._image(self._store.find(reference))

    def list(self) -> Sequence[Image]:
        """All images, the newest first."""
        return sorted((self._image(record) for record in self._store.images()), key=lambda image: image.created, reverse=True)

    def _image(self, record: ImageRecord) -> Image:
        config = record.parsed
        layers = self._layers(record)
        top = layers[-1].usage() if layers else Usage(0, 0, 0, 0)
        exclusive = self._exclusive(self._only_in(record))
        return Image(
            id=record.id,
            references=tuple(self._store.tags_of(record.id)),
            digest=record.manifests[0].digest if record.manifests else None,
            platform=str(config.platform),
            created=config.created or 0.0,
            layers=tuple(layer.name for layer in layers),
            usage=Usage(virtual=top.virtual, mapped=top.mapped, exclusive=exclusive, shared=max(0, top.mapped - exclusive)),
            blobs=sum(blob.size for blob in self._blobs(record.chain_ids)),
        )

    def _layers(self, record: ImageRecord) -> Sequence[Layer]:
        return [self._layer(chain_id) for chain_id in record.chain_ids]

    def _layer(self, chain_id: str) -> Layer:
        found = self._pool.layers_with_digest("chain", chain_id)
        if not found:
            raise LayerNotFound(f"layer {chain_id} of an image is gone: load or pull the image again")
        return found[0]

    def _only_in(self, record: ImageRecord) -> Sequence[Layer]:
        """Layers that no other image has."""
        others = {chain_id for other in self._store.images() if other.id != record.id for chain_id in other.chain_ids}
        return [self._layer(chain_id) for chain_id in record.chain_ids if chain_id not in others]

    def _blobs(self, chain_ids: Sequence[str]) -> Sequence[Layer]:
        """The archives of these layers that are kept, each once."""
        digests = {archive.digest for chain_id in chain_ids if (archives := self._store.archives(chain_id)) for archive in archives.all()}
        found = []
        for digest in sorted(digests):
            try:
                found.append(self._pool.layer(blob_name(digest)))
            except LayerNotFound:
                continue
        return found

    def inspect(self, reference: str) -> dict[str, Any]:
        """All there is to say about an image, as JSON takes it; ``Config`` is the OCI configuration's ``config``."""
        record = self._store.find(reference)
        image, config = self._image(record), json.loads(record.config)
        return {
            "Id": image.id,
            "RepoTags": [Reference.parse(name).familiar for name in image.references],
            "RepoDigests": [f"{source}@{known.digest}" for known in record.manifests for source in record.sources],
            "Created": config.get("created"),
            "Author": config.get("author", ""),
            "Architecture": config.get("architecture", ""),
            "Variant": config.get("variant", ""),
            "Os": config.get("os", ""),
            "Config": config.get("config") or {},
            "RootFS": {"Type": "layers", "Layers": list(record.parsed.diff_ids), "ChainIDs": list(record.chain_ids)},
            "History": config.get("history", []),
            "Manifests": [{"digest": known.digest, "mediaType": known.media_type} for known in record.manifests],
            "Usage": {
                "virtual": image.usage.virtual,
                "mapped": image.usage.mapped,
                "shared": image.usage.shared,
                "exclusive": image.usage.exclusive,
                "blobs": image.blobs,
            },
            "Layers": [{"name": layer.name, "digests": layer.digests} for layer in self._layers(record)],
        }

    def history(self, reference: str) -> Sequence[HistoryEntry]:
        """How an image was made, oldest step first; steps that changed no file have size 0."""
        record = self._store.find(reference)
        sizes = self._sizes(record)
        layers = iter(zip(record.chain_ids, record.parsed.diff_ids, sizes, strict=True))
        entries = []
        for step in record.parsed.history:
            chain_id, diff_id, (size, exclusive) = (None, None, (0, 0)) if step.empty_layer else next(layers, (None, None, (0, 0)))
            entries.append(HistoryEntry(step.created, step.created_by, step.comment, chain_id, diff_id, size, max(0, size - exclusive), exclusive))
        for chain_id, diff_id, (size, exclusive) in layers:  # layers that the history says nothing of
            entries.append(HistoryEntry(None, "", "", chain_id, diff_id, size, max(0, size - exclusive), exclusive))
        return entries

    def _sizes(self, record: ImageRecord) -> Sequence[tuple[int, int]]:
        """Per layer: bytes that it changed, and of these what only this image has.

        Taking layers away from the top down, each frees what neither lower ones nor anybody else has; so the parts add up.
        """
        layers, mine = self._layers(record), {layer.id for layer in self._only_in(record)}
        sizes: builtins.list[tuple[int, int]] = []
        above: builtins.list[Layer] = []
        freed = 0
        for layer in layers[::-1]:
            exclusive = 0
            if layer.id in mine:
                above.append(layer)
                exclusive = self._exclusive(above) - freed
                freed += exclusive
            size = self._changed(layer)
            sizes.append((size, min(exclusive, size)))
        return sizes[::-1]

    def _exclusive(self, layers: Sequence[Layer]) -> int:
        """Bytes that deleting all these would give back."""
        return self._pool.engine.exclusive_chunks([layer.handle for layer in layers]) * self._pool.chunk_size

    def _changed(self, layer: Layer) -> int:
        """Bytes of the blocks by which a layer differs from its parent."""
        parent = layer.parent
        extents = layer.extents() if parent is None else self._pool.diff(parent, layer)
        return sum(extent.length for extent in extents if extent.kind == "data")

    # --- names ---

    def tag(self, source: str, target: str) -> None:
        """One more name for an image; a name that another has moves. Raises ImageNotFound, BadReference."""
        name = Reference.parse(target)
        if name.digest is not None:
            raise BadReference(f"{target!r} has a digest: a name for an image is REPOSITORY[:TAG]")
        with self._pool.atomically():
            self._store.put_tag(str(name), self._store.find(source).id)

    def untag(self, reference: str) -> None:
        """Takes a name away; the image stays, for its id. Raises ImageNotFound."""
        full = str(Reference.parse(reference))
        with self._pool.atomically():
            if full not in self._store.tags():
                raise ImageNotFound(f"no image has the name {reference!r}")
            self._store.put_tag(full, None)

    # --- removal ---

    def remove(self, reference: str, *, force: bool = False) -> Removed:
        """Takes a name away, and with its last name the image and the layers that nothing else needs.

        By id, an image goes with its one name. Raises ImageBusy where containers were made from it, or, by id, where it has several names;
        ``force`` removes it all the same (containers stay whole, but can no longer be reset).
        """
        with self._pool.atomically():
            record = self._store.find(reference)
            names = self._store.tags_of(record.id)
            asked = self._names_for(reference)
            going = asked or names
            if not asked and len(names) > 1 and not force:
                raise ImageBusy(f"the image {reference} has {len(names)} names: remove them, or force", tuple(names))
            if set(going) != set(names):
                for full in going:
                    self._store.put_tag(full, None)
                return Removed(references=tuple(going))
            containers = self._store.containers_of(record.id)
            if containers and not force:
                raise ImageBusy(f"the image {reference} is used by the containers {', '.join(containers)}: remove them first", tuple(containers))
            for full in names:
                self._store.put_tag(full, None)
            self._store.remove_image(record.id)
            removed, freed = self._sweep()
        self._pool.commit()
        return Removed(tuple(going), (record.id,), removed, freed)

    def gc(self) -> Removed:
        """Removes images that have neither name nor container, layers that no image needs, and archives of such layers."""
        with self._pool.atomically():
            named = set(self._store.tags().values())
            dangling = [record.id for record in self._store.images() if record.id not in named and not self._store.containers_of(record.id)]
            for image_id in dangling:
                self._store.remove_image(image_id)
            removed, freed = self._sweep()
        self._pool.commit()
        return Removed(images=tuple(dangling), layers=removed, bytes=freed)

    def _sweep(self) -> tuple[tuple[str, ...], int]:
        """Deletes image layers, and archives, that no image needs and nobody uses; their names, and the bytes that gives back."""
        needed = {chain_id for record in self._store.images() for chain_id in record.chain_ids}
        for chain_id in self._store.layers():
            if chain_id not in needed:
                self._store.put_archives(chain_id, None)
        archives = {blob_name(digest) for digest in self._store.archives_in_use()}
        gone = []
        for layer in self._pool.layers():
            labels, chain = layer.labels, layer.digests.get("chain")
            unneeded = (chain is not None and chain not in needed) or (BLOB_LABEL in labels and layer.name not in archives)
            if unneeded and PARTIAL_LABEL not in labels and not self._in_use(layer):
                gone.append(layer)
        names, freed = tuple(layer.name for layer in gone), self._exclusive(gone)
        for layer in gone[::-1]:
            layer.delete()
        return names, freed

    def _in_use(self, layer: Layer) -> bool:
        try:
            self._pool.require_unused(layer, "delete")
        except LayerBusy:
            return True
        return False
