"""What a pool keeps about its images, as documents in the commits of its layers (docs/FORMAT.md, "Documents").

=================  ====================================================================================================
document           what
=================  ====================================================================================================
``image/ID``       an image: its configuration, the manifests that it came with, where from, its layers' ChainIDs
``tag/NAME``       the image that a name stands for
``layer/CHAINID``  an image layer: its DiffID, the size of its tar, and the archives of it that are kept or known
``container/NAME`` a container (thinpool.containers)
=================  ====================================================================================================

An image layer is a sealed layer whose name is its ChainID. An archive that is kept is a sealed layer ``blob/DIGEST``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BadReference, ImageNotFound
from .oci import Descriptor, ImageConfig
from .reference import Reference

if TYPE_CHECKING:
    from ..pool import Pool

IMAGE_KEY, TAG_KEY, LAYER_KEY, CONTAINER_KEY = "image/", "tag/", "layer/", "container/"
BLOB_LABEL = "thinpool.blob"
_ID_DIGITS_MIN = 4


def blob_name(digest: str) -> str:
    """The layer that keeps the archive of that digest."""
    return f"blob/{digest}"


@dataclass(frozen=True, slots=True)
class KnownManifest:
    """A manifest of an image, verbatim, with its media type and digest."""

    text: str
    media_type: str
    digest: str


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image as it is stored. ``config``: verbatim; ``sources``: repositories it is known to be in, for mounts across them."""

    id: str
    config: str
    chain_ids: tuple[str, ...]
    manifests: tuple[KnownManifest, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def parsed(self) -> ImageConfig:
        """The configuration."""
        return ImageConfig.parse(self.config.encode())

    def encode(self) -> bytes:
        """The stored form."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, content: bytes) -> ImageRecord:
        """What :meth:`encode` wrote."""
        stored = json.loads(content)
        manifests = tuple(KnownManifest(**manifest) for manifest in stored["manifests"])
        return cls(stored["id"], stored["config"], tuple(stored["chain_ids"]), manifests, tuple(stored["sources"]))


@dataclass(frozen=True, slots=True)
class LayerArchives:
    """How the tar of an image layer is to be had. ``size``: bytes of the plain tar. ``originals``: archives with the digests they
    came with; ``kept``: the one that is in the pool, if any: one of them, or one made here (``made``)."""

    diff_id: str
    size: int
    originals: tuple[Descriptor, ...] = ()
    made: Descriptor | None = None

    def encode(self) -> bytes:
        """The stored form."""
        return json.dumps(
            {
                "diff_id": self.diff_id,
                "size": self.size,
                "originals": [descriptor.to_json() for descriptor in self.originals],
                "made": None if self.made is None else self.made.to_json(),
            }
        ).encode()

    @classmethod
    def decode(cls, content: bytes) -> LayerArchives:
        """What :meth:`encode` wrote."""
        stored = json.loads(content)
        made = stored["made"]
        originals = tuple(Descriptor.from_json(one) for one in stored["originals"])
        return cls(stored["diff_id"], stored["size"], originals, None if made is None else Descriptor.from_json(made))

    def all(self) -> tuple[Descriptor, ...]:
        """Every archive that is known."""
        return self.originals if self.made is None else (*self.originals, self.made)


@dataclass(slots=True)
class ImageStore:
    """The images of one pool: reads and writes their documents. Changes of several are made under :meth:`Pool.atomically`."""

    pool: Pool

    # --- images ---

    def image(self, image_id: str) -> ImageRecord | None:
        """The image of that id."""
        content = self.pool.document(IMAGE_KEY + image_id)
        return None if content is None else ImageRecord.decode(content)

    def images(self) -> Iterator[ImageRecord]:
        """Every image."""
        for _, content in self.pool.documents(IMAGE_KEY):
            yield ImageRecord.decode(content)

    def put_image(self, record: ImageRecord) -> None:
        """Stores an image."""
        self.pool.put_document(IMAGE_KEY + record.id, record.encode())

    def remove_image(self, image_id: str) -> None:
        """Forgets an image; its layers stay."""
        self.pool.put_document(IMAGE_KEY + image_id, None)

    # --- names ---

    def tags(self) -> dict[str, str]:
        """Every full name, and the id of the image it stands for."""
        return {key.removeprefix(TAG_KEY): content.decode() for key, content in self.pool.documents(TAG_KEY)}

    def put_tag(self, name: str, image_id: str | None) -> None:
        """Makes a full name stand for an image; ``None``: for none."""
        self.pool.put_document(TAG_KEY + name, None if image_id is None else image_id.encode())

    def tags_of(self, image_id: str) -> list[str]:
        """The full names of an image, sorted."""
        return [name for name, named in self.tags().items() if named == image_id]

    def find(self, reference: str) -> ImageRecord:
        """The image of a name, an id, the beginning of an id (four digits or more), or a name with a manifest's digest.

        Raises :class:`~thinpool.errors.ImageNotFound`, also where several ids begin so.
        """
        record = self._by_name(reference) or self._by_id(reference)
        if record is None:
            raise ImageNotFound(f"no image {reference!r} in this pool: load or pull it first")
        return record

    def _by_name(self, reference: str) -> ImageRecord | None:
        try:
            name = Reference.parse(reference)
        except BadReference:
            return None
        content = self.pool.document(TAG_KEY + str(name))
        if content is not None:
            return self.image(content.decode())
        if name.digest is None:
            return None
        return next((record for record in self.images() if any(known.digest == name.digest for known in record.manifests)), None)

    def _by_id(self, reference: str) -> ImageRecord | None:
        digits = reference.removeprefix("sha256:")
        if len(digits) < _ID_DIGITS_MIN or not set(digits) <= set("0123456789abcdef"):
            return None
        found = self.pool.documents(f"{IMAGE_KEY}sha256:{digits}")
        if len(found) > 1:
            raise ImageNotFound(f"{len(found)} images have an id that begins with {digits}: give more of it")
        return ImageRecord.decode(found[0][1]) if found else None

    # --- layers ---

    def archives(self, chain_id: str) -> LayerArchives | None:
        """What is known of the archives of an image layer."""
        content = self.pool.document(LAYER_KEY + chain_id)
        return None if content is None else LayerArchives.decode(content)

    def layers(self) -> dict[str, LayerArchives]:
        """The same of every image layer, by ChainID."""
        return {key.removeprefix(LAYER_KEY): LayerArchives.decode(content) for key, content in self.pool.documents(LAYER_KEY)}

    def put_archives(self, chain_id: str, archives: LayerArchives | None) -> None:
        """Stores it; ``None`` forgets it."""
        self.pool.put_document(LAYER_KEY + chain_id, None if archives is None else archives.encode())

    # --- who needs what ---

    def archives_in_use(self) -> set[str]:
        """Digests of the archives that image layers know."""
        return {archive.digest for archives in self.layers().values() for archive in archives.all()}

    def containers_of(self, image_id: str) -> list[str]:
        """Names of the containers that were made from an image."""
        records: list[tuple[str, Mapping[str, Any]]] = [
            (key.removeprefix(CONTAINER_KEY), json.loads(content)) for key, content in self.pool.documents(CONTAINER_KEY)
        ]
        return [name for name, record in records if record.get("image_id") == image_id]
