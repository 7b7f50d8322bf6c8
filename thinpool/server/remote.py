"""A pool's images and containers through its server: what :mod:`thinpool.api` says of them, as requests.

Each method is one request that names itself and carries its arguments (``verb_routes`` answers it). What depends on who asks is
settled here: relative paths, and the credentials in the asking user's home.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..api import Change, Container, Credentials, HistoryEntry, Image, Progress, Removed, Size
from ..errors import ServerError
from .transport import Transport
from .wire import Json, decode_record

Record = TypeVar("Record")


class _Verbs:
    """Requests to one of the two."""

    _route = ""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _ask(self, verb: str, **arguments: Any) -> Any:
        return self._transport.json("POST", f"{self._route}/{verb}", arguments)

    def _one(self, kind: type[Record], verb: str, **arguments: Any) -> Record:
        return decode_record(kind, self._ask(verb, **arguments))

    def _all(self, kind: type[Record], verb: str, **arguments: Any) -> list[Record]:
        return [decode_record(kind, data) for data in self._ask(verb, **arguments)]

    def _work(self, progress: Progress | None, verb: str, **arguments: Any) -> Any:
        return follow(self._transport.lines("POST", f"{self._route}/{verb}", arguments), progress)


class RemoteImages(_Verbs):
    """The images of a pool that a server has open; see :class:`thinpool.api.ImagesAPI`."""

    _route = "/images"

    def load(
        self, path: str | Path, reference: str | None = None, *, platform: str | None = None, size: Size = "10G", progress: Progress | None = None
    ) -> Image:
        """Takes in an archive of an image, or a root file system tarball as one. Raises ImportFailed, BadReference."""
        answer = self._work(progress, "load", path=os.path.abspath(path), reference=reference, platform=platform, size=size)
        return decode_record(Image, answer)

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
        """Takes an image from a registry; only layers that the pool lacks are fetched. Raises RegistryError, BadReference."""
        known = credentials_of(reference, credentials)
        answer = self._work(progress, "pull", reference=reference, platform=platform, credentials=known, insecure=insecure, size=size)
        return decode_record(Image, answer)

    def push(self, reference: str, *, credentials: Credentials | None = None, insecure: bool = False, progress: Progress | None = None) -> str:
        """Gives an image to a registry; the digest of its manifest there. Raises RegistryError, ImageNotFound."""
        return str(self._work(progress, "push", reference=reference, credentials=credentials_of(reference, credentials), insecure=insecure))

    def save(
        self,
        references: Sequence[str],
        path: str | Path,
        *,
        form: Literal["docker-archive", "oci-archive", "oci"] = "docker-archive",
        progress: Progress | None = None,
    ) -> None:
        """Writes images to a file, or to a directory. The server's user must be able to write there. Raises ImageNotFound."""
        self._work(progress, "save", references=list(references), path=os.path.abspath(path), form=form)

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
        """An image of a container. Raises ContainerNotFound, LayerState."""
        words = None if command is None else list(command)
        answer = self._work(progress, "commit", container=container, reference=reference, author=author, message=message, command=words)
        return decode_record(Image, answer)

    def get(self, reference: str) -> Image:
        """The image of a name or id. Raises ImageNotFound."""
        return self._one(Image, "get", reference=reference)

    def list(self) -> Sequence[Image]:
        """All images, the newest first."""
        return self._all(Image, "list")

    def inspect(self, reference: str) -> dict[str, Any]:
        """All there is to say about an image. Raises ImageNotFound."""
        return dict(self._ask("inspect", reference=reference))

    def history(self, reference: str) -> Sequence[HistoryEntry]:
        """How an image was made, oldest step first. Raises ImageNotFound."""
        return self._all(HistoryEntry, "history", reference=reference)

    def tag(self, source: str, target: str) -> None:
        """One more name for an image. Raises ImageNotFound, BadReference."""
        self._ask("tag", source=source, target=target)

    def untag(self, reference: str) -> None:
        """Takes a name away. Raises ImageNotFound."""
        self._ask("untag", reference=reference)

    def remove(self, reference: str, *, force: bool = False) -> Removed:
        """Takes a name away, and with the last one the image. Raises ImageNotFound, ImageBusy."""
        return self._one(Removed, "remove", reference=reference, force=force)

    def gc(self) -> Removed:
        """Removes what no image and no container needs."""
        return self._one(Removed, "gc")


class RemoteContainers(_Verbs):
    """The containers of a pool that a server has open; see :class:`thinpool.api.ContainersAPI`."""

    _route = "/containers"

    def create(
        self,
        image: str,
        *,
        name: str | None = None,
        size: Size | None = None,
        command: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> Container:
        """A container of an image, or of any layer. Raises ImageNotFound, LayerExists, BadSize."""
        marks = None if labels is None else dict(labels)
        return self._one(Container, "create", image=image, name=name, size=size, command=list(command), labels=marks)

    def get(self, name: str) -> Container:
        """The container of a name. Raises ContainerNotFound."""
        return self._one(Container, "get", name=name)

    def list(self) -> Sequence[Container]:
        """All containers."""
        return self._all(Container, "list")

    def remove(self, name: str, *, force: bool = False) -> None:
        """Deletes a container and its layer. Raises ContainerNotFound, LayerBusy."""
        self._ask("remove", name=name, force=force)

    def reset(self, name: str) -> None:
        """Puts a container back to its image. Raises ContainerNotFound, LayerBusy."""
        self._ask("reset", name=name)

    def resize(self, name: str, size: Size) -> None:
        """Grows a container's layer and file system, also while it is mounted. Raises ContainerNotFound, BadSize."""
        self._ask("resize", name=name, size=size)

    def diff(self, name: str) -> Sequence[Change]:
        """What a container has added, changed and deleted. Raises ContainerNotFound."""
        return self._all(Change, "diff", name=name)

    def copy_out(self, name: str, path: str, destination: str | Path) -> None:
        """Copies a file or a tree out of a container. The server's user must be able to write there. Raises ContainerNotFound."""
        self._ask("copy_out", name=name, path=path, destination=os.path.abspath(destination))

    def copy_in(self, source: str | Path, name: str, path: str) -> None:
        """Copies a file or a tree into a container. Raises ContainerNotFound."""
        self._ask("copy_in", source=os.path.abspath(source), name=name, path=path)

    def configuration(self, name: str) -> dict[str, Any]:
        """How commands run in it. Raises ContainerNotFound."""
        return dict(self._ask("configuration", name=name))


def follow(lines: Iterator[Json], progress: Progress | None) -> Any:
    """Follows long work to its end, and gives its result."""
    for line in lines:
        if "result" in line:
            return line["result"]
        if progress is not None:
            progress(*line["progress"])
    raise ServerError("the pool's server ended its answer without a result")


def credentials_of(reference: str, given: Credentials | None) -> Json:
    """The asking user's credentials, also where there are none: the server must not look for its own."""
    from ..images.credentials import credentials_for
    from ..images.reference import Reference

    return asdict(given or credentials_for(Reference.parse(reference).domain) or Credentials())
