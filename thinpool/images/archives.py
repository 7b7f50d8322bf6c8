"""Images in files: ``docker save`` archives, OCI layouts as directories or tars, and plain root file system tarballs.

What a file is, is told by what is in it. Names inside archives reach no file system: members are read where they lie in the archive.
Formats: image-spec 1.1, "Image Layout"; Docker's image specification 1.2, "Combined Image JSON + Filesystem Changeset Format"
(``manifest.json``); newer Docker archives are both, and are then read as OCI layouts, which have the manifests.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from ..errors import BadReference, ImportFailed
from ..filesystems.compression import decompressed, form_of
from .oci import (
    INDEXES,
    LAYER_GZIP,
    LAYER_TAR,
    LAYER_ZSTD,
    Descriptor,
    ImageConfig,
    Manifest,
    digest_of,
    parse_index,
    parse_json,
    rootfs_config,
    select_platform,
)
from .reference import Reference
from .transfer import ImageSource

_JSON_BYTES_MAX = 4 << 20
_PIECE_BYTES = 1 << 20
_REF_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"
_LINKS_MAX = 8


class _Files(Protocol):
    """The files of an archive or a layout, by name."""

    def has(self, name: str) -> bool: ...
    def size(self, name: str) -> int: ...
    def open(self, name: str, offset: int = 0) -> BinaryIO: ...
    def close(self) -> None: ...


class _Directory:
    """An OCI layout's directory; only names that the layout's specification makes are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def has(self, name: str) -> bool:
        return (self._path / name).is_file()

    def size(self, name: str) -> int:
        return (self._path / name).stat().st_size

    def open(self, name: str, offset: int = 0) -> BinaryIO:
        try:
            file = open(self._path / name, "rb")  # noqa: SIM115
        except OSError as error:
            raise ImportFailed(f"cannot read {self._path / name}: {error.strerror}") from error
        file.seek(offset)
        return file

    def close(self) -> None:
        pass


class _Section(io.RawIOBase):
    """A part of a file, read by position, so that several threads may read at once."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        super().__init__()
        self._fd, self._position, self._end = fd, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._fd, [memoryview(buffer)[: self._end - self._position]], self._position) if self._position < self._end else 0
        self._position += count
        return count


class _Tar:
    """The members of a tar, and where they lie in it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._file = file
        self._members: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    name = _normal(member.name)
                    if member.isreg():
                        if member.offset_data + member.size > size:
                            raise ImportFailed(f"{path} is cut short in {member.name!r}")
                        self._members[name] = member.offset_data, member.size
                    elif member.issym():  # skopeo writes equal layers so
                        self._links[name] = _normal(os.path.join(os.path.dirname(member.name), member.linkname))
                    elif member.islnk():
                        self._links[name] = _normal(member.linkname)
        except tarfile.TarError as error:
            raise ImportFailed(f"{path} is damaged: {error}") from error

    def _where(self, name: str) -> tuple[int, int] | None:
        for _ in range(_LINKS_MAX):
            if name in self._members:
                return self._members[name]
            name = self._links.get(name, "")
        return None

    def has(self, name: str) -> bool:
        return self._where(name) is not None

    def size(self, name: str) -> int:
        found = self._where(name)
        if found is None:
            raise ImportFailed(f"the archive has no {name!r}")
        return found[1]

    def open(self, name: str, offset: int = 0) -> BinaryIO:
        found = self._where(name)
        if found is None:
            raise ImportFailed(f"the archive has no {name!r}")
        return cast(BinaryIO, io.BufferedReader(_Section(self._file.fileno(), found[0] + offset, max(0, found[1] - offset)), _PIECE_BYTES))

    def close(self) -> None:
        self._file.close()


def _normal(name: str) -> str:
    return os.path.normpath(name).lstrip("/")


def _read_json_bytes(files: _Files, name: str) -> bytes:
    if files.size(name) > _JSON_BYTES_MAX:
        raise ImportFailed(f"{name!r} has {files.size(name)} bytes: too many for what it should be")
    with closing(files.open(name)) as file:
        return file.read()


def _read_blob(files: _Files, descriptor: Descriptor) -> bytes:
    name = _blob_path(descriptor.digest)
    if not files.has(name):
        raise ImportFailed(f"the layout has no {name!r}, which it names")
    content = _read_json_bytes(files, name)
    if digest_of(content) != descriptor.digest:
        raise ImportFailed(f"{name!r} is damaged: it has the digest {digest_of(content)}")
    return content


def _blob_path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def open_archive(path: Path, *, reference: str | None = None, platform: str | None = None, spool: Path | None = None) -> ImageSource:
    """What is in the file or directory. ``reference``, ``platform``: which of several images; ``spool``: where an archive that is compressed
    as a whole is decompressed to, for as long as it is open. Raises ImportFailed."""
    if path.is_dir():
        if not (path / "oci-layout").is_file():
            raise ImportFailed(f"{path} is a directory, but no OCI layout: it has no oci-layout file")
        return _OciSource(_Directory(path), reference, platform)
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise ImportFailed(f"cannot read {path}: {error.strerror}") from error
    try:
        return _open_file(path, file, reference, platform, spool)
    except BaseException:
        file.close()
        raise


def _open_file(path: Path, file: BinaryIO, reference: str | None, platform: str | None, spool: Path | None) -> ImageSource:
    form = form_of(file.read(512))
    file.seek(0)
    if form is not None:
        if not _names_images(file):
            file.seek(0)
            return _RootfsSource(path, file, form)
        file.seek(0)
        spooled = tempfile.TemporaryFile(dir=spool, prefix=".spool-")  # noqa: SIM115
        try:
            shutil.copyfileobj(decompressed(file), spooled, _PIECE_BYTES)
            spooled.flush()
        except BaseException:
            spooled.close()
            raise
        file.close()
        file = cast(BinaryIO, spooled)
        file.seek(0)
    tar = _Tar(path, file)
    if tar.has("oci-layout") and tar.has("index.json"):
        return _OciSource(tar, reference, platform)
    if tar.has("manifest.json"):
        return _DockerSource(tar, reference)
    file.seek(0)
    return _RootfsSource(path, file, None)


def _names_images(file: BinaryIO) -> bool:
    """Whether a compressed tar is an archive of images: its first members tell."""
    names = []
    try:
        with tarfile.open(fileobj=decompressed(file), mode="r|") as tar:
            for member in tar:
                names.append(_normal(member.name))
                if len(names) >= 8 or names[-1] in ("oci-layout", "index.json", "manifest.json"):
                    break
    except (tarfile.TarError, ImportFailed):
        return False
    return any(name in ("oci-layout", "index.json", "manifest.json") or name.startswith("blobs/sha256") or name.endswith("/layer.tar") for name in names)


def _chosen(images: Sequence[tuple[tuple[str, ...], Any]], reference: str | None, what: str) -> tuple[tuple[str, ...], Any]:
    """The image of that name, or the only one."""
    if not images:
        raise ImportFailed(f"the {what} holds no image")
    wanted = None if reference is None else str(Reference.parse(reference))
    for names, image in images:
        if wanted in names:
            return names, image
    if len(images) > 1:
        there = ", ".join(sorted(name for names, _ in images for name in names)) or "none of them with a name"
        raise ImportFailed(f"the {what} holds {len(images)} images ({there}): say which one by its name")
    return images[0]


def _full_names(names: Sequence[Any]) -> tuple[str, ...]:
    found = []
    for name in names:
        try:
            found.append(str(Reference.parse(name)))
        except BadReference:
            continue
    return tuple(found)


class _OciSource:
    """An image of an OCI layout."""

    def __init__(self, files: _Files, reference: str | None, platform: str | None) -> None:
        self._files = files
        entries = [(_names_of(one), one) for one in parse_index(_read_json_bytes(files, "index.json"))]
        self.references, descriptor = _chosen(_joined(entries), reference, "OCI layout")
        if len(descriptor) > 1:
            descriptor = [select_platform(descriptor, platform)]
        found = descriptor[0]
        for _ in range(_LINKS_MAX):
            if found.media_type not in INDEXES:
                break
            found = select_platform(parse_index(_read_blob(files, found)), platform)
        self.manifest: bytes | None = _read_blob(files, found)
        self.manifest_type = found.media_type
        parsed = Manifest.parse(self.manifest, found.media_type)
        self.config: bytes | None = _read_blob(files, parsed.config)
        self.layers = parsed.layers

    def open_blob(self, layer: Descriptor, offset: int = 0) -> BinaryIO:
        name = _blob_path(layer.digest)
        if not self._files.has(name):
            raise ImportFailed(f"the layout has no {name!r}, the archive of a layer")
        return self._files.open(name, offset)

    def config_for(self, diff_id: str) -> bytes:
        raise AssertionError("it has one")

    def close(self) -> None:
        self._files.close()


def _names_of(descriptor: Descriptor) -> tuple[str, ...]:
    """An entry's name: containerd writes a full one, others a short one, or a tag alone, which then is taken for a name."""
    name = descriptor.annotations.get(_FULL_NAME) or descriptor.annotations.get(_REF_NAME)
    return _full_names([name]) if name else ()


def _joined(entries: Sequence[tuple[tuple[str, ...], Descriptor]]) -> list[tuple[tuple[str, ...], list[Descriptor]]]:
    """Entries of the same name are one image for several platforms."""
    joined: dict[tuple[str, ...], list[Descriptor]] = {}
    for names, descriptor in entries:
        joined.setdefault(names, []).append(descriptor)
    return list(joined.items())


class _DockerSource:
    """An image of a ``docker save`` archive: plain tars, no manifest of the registry's kind."""

    manifest: bytes | None = None
    manifest_type = ""

    def __init__(self, files: _Files, reference: str | None) -> None:
        self._files = files
        try:
            listed = json.loads(_read_json_bytes(files, "manifest.json"))
            images = [(_full_names(one.get("RepoTags") or ()), (str(one["Config"]), [str(name) for name in one["Layers"]])) for one in listed]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ImportFailed(f"manifest.json is not what docker save writes: {error!r}") from None
        self.references, (config_name, names) = _chosen(images, reference, "archive")
        self.config: bytes | None = _read_json_bytes(files, _normal(config_name))
        parse_json(self.config, config_name)
        diff_ids = ImageConfig.parse(self.config).diff_ids
        if len(diff_ids) != len(names):
            raise ImportFailed(f"the archive has {len(names)} layers, the image's configuration {len(diff_ids)}")
        self._names = dict(zip(diff_ids, map(_normal, names), strict=True))
        self.layers = tuple(Descriptor(LAYER_TAR, diff_id, files.size(self._names[diff_id])) for diff_id in diff_ids)

    def open_blob(self, layer: Descriptor, offset: int = 0) -> BinaryIO:
        return self._files.open(self._names[layer.digest], offset)

    def config_for(self, diff_id: str) -> bytes:
        raise AssertionError("it has one")

    def close(self) -> None:
        self._files.close()


class _RootfsSource:
    """A root file system's tarball, as an image of one layer. Its configuration follows from its DiffID."""

    manifest: bytes | None = None
    manifest_type = ""
    config: bytes | None = None
    references: tuple[str, ...] = ()

    def __init__(self, path: Path, file: BinaryIO, form: str | None) -> None:
        self._path, self._file = path, file
        size = os.fstat(file.fileno()).st_size
        hashed = hashlib.sha256()
        while data := file.read(_PIECE_BYTES):
            hashed.update(data)
        media_type = {None: LAYER_TAR, "gzip": LAYER_GZIP, "zstd": LAYER_ZSTD}.get(form, f"application/x-{form}")
        self.layers = (Descriptor(media_type, f"sha256:{hashed.hexdigest()}", size),)

    def open_blob(self, layer: Descriptor, offset: int = 0) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Section(self._file.fileno(), offset, max(0, layer.size - offset)), _PIECE_BYTES))

    def config_for(self, diff_id: str) -> bytes:
        return rootfs_config(diff_id, self._path.name)

    def close(self) -> None:
        self._file.close()
