"""What an image is made of, as JSON: descriptors, manifests, indexes, configurations, and the ids that follow from them.

From the OCI image specification 1.1 ("Image Manifest", "Image Index", "Image Configuration", "Descriptors") and Docker's image manifest
version 2, schema 2, whose JSON is the same but for its media types. What comes from outside is checked here, once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from ..errors import ImportFailed

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = LAYER_TAR + "+gzip"
LAYER_ZSTD = LAYER_TAR + "+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
ARCHIVES = (LAYER_GZIP, LAYER_ZSTD, DOCKER_LAYER_GZIP)
MANIFESTS = (MANIFEST, DOCKER_MANIFEST)
INDEXES = (INDEX, DOCKER_INDEX)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LAYERS_MAX = 1024
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "armv6l": "arm/v6", "i686": "386", "ppc64le": "ppc64le", "s390x": "s390x"}
_VARIANTS = {"arm64": "v8", "arm": "v7"}  # what no variant means


def digest_of(content: bytes) -> str:
    """``sha256:`` and the hash of the content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def check_digest(digest: Any, what: str) -> str:
    """The digest, if it is one. Raises ImportFailed."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ImportFailed(f"{what} is not a SHA-256 digest: {digest!r}")
    return digest


def parse_json(content: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises ImportFailed."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ImportFailed(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ImportFailed(f"{what} is not a JSON object")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ImportFailed(f"{what} is not a list")
    return value


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and architecture, like ``linux/arm64/v8``."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """From ``OS/ARCHITECTURE[/VARIANT]``. Raises ImportFailed."""
        parts = text.split("/")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise ImportFailed(f"not a platform: {text!r} (OS/ARCHITECTURE[/VARIANT], like linux/arm64)")
        return cls(*parts)

    @classmethod
    def of_this_machine(cls) -> Platform:
        """What runs here."""
        machine = os.uname().machine
        return cls.parse(f"linux/{_MACHINES.get(machine, machine)}")

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def accepts(self, other: Platform) -> int:
        """How well the other one runs where this one is wanted: 0 not at all, the more the better. An ARM runs what older ones run."""
        if (self.os, self.architecture) != (other.os, other.architecture):
            return 0
        default = _VARIANTS.get(self.architecture, "")
        mine, theirs = self.variant or default, other.variant or default
        if mine == theirs:
            return 100
        if self.architecture == "arm" and mine[1:].isdigit() and theirs[1:].isdigit() and int(theirs[1:]) < int(mine[1:]):
            return int(theirs[1:])
        return 0


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What names content: its media type, digest and size in bytes. A digest of "" is not known yet."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None

    def to_json(self) -> dict[str, Any]:
        """As manifests hold it."""
        data: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return {**data, "annotations": dict(self.annotations)} if self.annotations else data

    @classmethod
    def from_json(cls, data: Any, what: str = "a descriptor") -> Descriptor:
        """Checks it. Raises ImportFailed."""
        if not isinstance(data, dict):
            raise ImportFailed(f"{what} is not a JSON object")
        media_type, size, annotations = data.get("mediaType", ""), data.get("size"), data.get("annotations") or {}
        if not isinstance(media_type, str) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ImportFailed(f"{what} has no media type, or no size")
        if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
            raise ImportFailed(f"{what} has annotations that are not text")
        platform = data.get("platform")
        found = None
        if isinstance(platform, dict):
            found = Platform(*(str(platform.get(name) or "") for name in ("os", "architecture", "variant")))
        return cls(media_type, check_digest(data.get("digest"), f"the digest of {what}"), size, annotations, found)


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image: its configuration, and the archives of its layers, base first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]

    @classmethod
    def parse(cls, content: bytes, media_type: str = "") -> Self:
        """Raises ImportFailed for what is not an image's manifest."""
        data = parse_json(content, "the manifest")
        if data.get("schemaVersion") != 2:
            raise ImportFailed("the manifest is of Docker's old schema 1, which is not read: push the image again with a tool of today")
        if "layers" not in data:
            raise ImportFailed(f"the manifest ({data.get('mediaType', media_type) or 'of no media type'}) is not one of an image: it has no layers")
        layers = tuple(
            Descriptor.from_json(one, f"layer {number} of the manifest") for number, one in enumerate(_list(data["layers"], "the manifest's layers"))
        )
        if len(layers) > _LAYERS_MAX:
            raise ImportFailed(f"the manifest has {len(layers)} layers: more than {_LAYERS_MAX}")
        return cls(Descriptor.from_json(data.get("config"), "the manifest's configuration"), layers)


def manifest_for(config: bytes, layers: Sequence[Descriptor]) -> bytes:
    """A manifest over a configuration and archives; the same ones make the same bytes."""
    data = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": Descriptor(CONFIG, digest_of(config), len(config)).to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    return json.dumps(data, separators=(",", ":")).encode()


def parse_index(content: bytes) -> list[Descriptor]:
    """The manifests that an index (or Docker's manifest list) names. Raises ImportFailed."""
    manifests = _list(parse_json(content, "the index").get("manifests"), "the index's manifests")
    return [Descriptor.from_json(one, f"manifest {number} of the index") for number, one in enumerate(manifests)]


def select_platform(manifests: Sequence[Descriptor], wanted: str | None) -> Descriptor:
    """The manifest for a platform, by default for this machine's. Raises ImportFailed, listing what there is."""
    images = [one for one in manifests if one.media_type in (*MANIFESTS, *INDEXES, "")]
    platform = Platform.parse(wanted) if wanted is not None else Platform.of_this_machine()
    if len(images) == 1 and (images[0].platform is None or wanted is None):
        return images[0]
    best = max(images, key=lambda one: platform.accepts(one.platform) if one.platform else 0, default=None)
    if best is None or best.platform is None or not platform.accepts(best.platform):
        there = sorted({str(one.platform) for one in images if one.platform and one.platform.os != "unknown"})
        raise ImportFailed(f"there is no image for {platform}, only for {', '.join(there) or 'none that is named'}")
    return best


@dataclass(frozen=True, slots=True)
class HistoryStep:
    """An entry of a configuration's history. ``created``: seconds since 1970, if it says."""

    created: float | None
    created_by: str
    comment: str
    empty_layer: bool


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """An image's configuration. ``run``: what containers of it run with, as the specification's ``config``."""

    platform: Platform
    created: float | None
    diff_ids: tuple[str, ...]
    history: tuple[HistoryStep, ...]
    run: Mapping[str, Any]

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Raises ImportFailed for what is not the configuration of an image."""
        data = parse_json(content, "the image's configuration")
        rootfs = data.get("rootfs")
        if not isinstance(rootfs, dict) or rootfs.get("type") != "layers":
            raise ImportFailed("the image's configuration has no rootfs of layers: it is not a container image")
        diff_ids = tuple(check_digest(one, "a DiffID of the image's configuration") for one in _list(rootfs.get("diff_ids"), "rootfs.diff_ids"))
        if len(diff_ids) > _LAYERS_MAX:
            raise ImportFailed(f"the image has {len(diff_ids)} layers: more than {_LAYERS_MAX}")
        run = data.get("config") or {}
        if not isinstance(run, dict):
            raise ImportFailed("the image's configuration has a config that is not a JSON object")
        platform = Platform(*(str(data.get(name) or "") for name in ("os", "architecture", "variant")))
        history = tuple(_history_step(one) for one in _list(data.get("history"), "the history") if isinstance(one, dict))
        return cls(platform, _seconds(data.get("created")), diff_ids, history, run)


def _history_step(data: Mapping[str, Any]) -> HistoryStep:
    return HistoryStep(_seconds(data.get("created")), str(data.get("created_by") or ""), str(data.get("comment") or ""), bool(data.get("empty_layer")))


def _seconds(text: Any) -> float | None:
    """RFC 3339, also with nanoseconds, as seconds since 1970."""
    if not isinstance(text, str):
        return None
    try:
        return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)).timestamp()
    except (ValueError, OverflowError):
        return None


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """What names each layer together with those below it (image-spec, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(diff_id if not chain else digest_of(f"{chain[-1]} {diff_id}".encode()))
    return chain


def rootfs_config(diff_id: str, made_from: str) -> bytes:
    """The configuration of an image that is a root file system and no more; the same one makes the same bytes."""
    platform = Platform.of_this_machine()
    data: dict[str, Any] = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": f"load {made_from}"}],
        "created": "1970-01-01T00:00:00Z",
    }
    if platform.variant:
        data["variant"] = platform.variant
    return json.dumps(data, separators=(",", ":")).encode()


def derived_config(
    config: bytes, diff_id: str, *, created: str, created_by: str, author: str = "", comment: str = "", command: Sequence[str] | None = None
) -> bytes:
    """A configuration with one layer more. ``created``: RFC 3339; ``command``: in place of the image's Cmd, and without its Entrypoint."""
    data = parse_json(config, "the image's configuration")
    step = {"created": created, "created_by": created_by, **({"author": author} if author else {}), **({"comment": comment} if comment else {})}
    data["created"] = created
    if author:
        data["author"] = author
    data["history"] = [*_list(data.get("history"), "the history"), step]
    data["rootfs"] = {"type": "layers", "diff_ids": [*data["rootfs"]["diff_ids"], diff_id]}
    if command is not None:
        data["config"] = {**(data.get("config") or {}), "Cmd": list(command)}
        data["config"].pop("Entrypoint", None)
    return json.dumps(data, separators=(",", ":")).encode()
