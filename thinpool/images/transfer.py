"""Where images come from and where they go: what registries, archives and directories have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import BinaryIO, Protocol

from .oci import Descriptor


class ImageSource(Protocol):
    """An image elsewhere. ``manifest``: verbatim, with its media type; ``None`` where the form has none, and its layers are plain tars whose
    digests are DiffIDs. ``config``: verbatim; ``None`` for a tarball, whose DiffID is known only once it is read (:meth:`config_for`).
    ``references``: the full names that it came with; ``layers``: its archives, base first."""

    @property
    def manifest(self) -> bytes | None: ...
    @property
    def manifest_type(self) -> str: ...
    @property
    def config(self) -> bytes | None: ...
    @property
    def references(self) -> tuple[str, ...]: ...
    @property
    def layers(self) -> tuple[Descriptor, ...]: ...

    def open_blob(self, layer: Descriptor, offset: int = 0) -> BinaryIO:
        """An archive's bytes from an offset on, as they are there. Several threads may read at once."""

    def config_for(self, diff_id: str) -> bytes:
        """The configuration, where there is none: of a tarball with that DiffID."""

    def close(self) -> None: ...


class ImageTarget(Protocol):
    """A place that takes images. Nothing is there before :meth:`finish`; :meth:`close` without it leaves no trace.

    ``accepts_uncompressed``: layers must be plain tars (docker archives); others take archives as they are.
    """

    @property
    def accepts_uncompressed(self) -> bool: ...
    def has_blob(self, blob: Descriptor, *, hints: Sequence[str] = ()) -> bool:
        """Whether it is there. ``hints``: repositories ("docker.io/library/debian") that have it, for a registry to mount it from."""

    def put_blob(self, blob: Descriptor, open_blob: Callable[[], BinaryIO]) -> None:
        """Sends an archive."""

    def put_image(self, manifest: bytes, manifest_type: str, config: bytes, layers: Sequence[Descriptor], references: Sequence[str]) -> None:
        """Sends the rest of an image whose layers are there."""

    def finish(self) -> None: ...
    def close(self) -> None: ...
