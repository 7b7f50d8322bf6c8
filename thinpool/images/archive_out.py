"""Images to files: docker archives, and OCI layouts as directories or tars.

Formats as in :mod:`.archives`. What is written stands beside its place until it is complete, and carries no times: equal images make equal
files.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from ..errors import ImportFailed, PoolExists
from .oci import INDEX, Descriptor, Manifest, digest_of
from .reference import Reference

_PIECE_BYTES = 1 << 20


class _Partial:
    """A file or directory that takes its place when it is complete."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise PoolExists(f"{path} exists already")
        self.path, self.partial = path, path.with_name(f"{path.name}.partial-{os.getpid()}")

    def complete(self) -> None:
        os.rename(self.partial, self.path)

    def remove(self) -> None:
        if self.partial.is_dir():
            shutil.rmtree(self.partial)
        else:
            self.partial.unlink(missing_ok=True)


class _TarFiles:
    """Files put into a tar."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def put(self, name: str, size: int, content: BinaryIO) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        self._tar.addfile(info, content)

    def close(self) -> None:
        self._tar.close()


class _DirectoryFiles:
    """Files put into a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir()

    def put(self, name: str, size: int, content: BinaryIO) -> None:
        (self._path / name).parent.mkdir(parents=True, exist_ok=True)
        with (self._path / name).open("xb") as file:
            shutil.copyfileobj(content, file, _PIECE_BYTES)
            if file.tell() != size:
                raise ImportFailed(f"{name} has {file.tell()} bytes here, not {size}")

    def close(self) -> None:
        pass


class _FileTarget:
    """What both kinds have in common: blobs that are put once."""

    def __init__(self, path: Path, *, directory: bool) -> None:
        self._place = _Partial(path)
        self._files: _TarFiles | _DirectoryFiles = _DirectoryFiles(self._place.partial) if directory else _TarFiles(self._place.partial)
        self._there: set[str] = set()
        self._finished = False

    def _put_once(self, name: str, content: bytes) -> None:
        if name not in self._there:
            self._files.put(name, len(content), io.BytesIO(content))
            self._there.add(name)

    def _put_stream(self, name: str, blob: Descriptor, open_blob: Callable[[], BinaryIO]) -> None:
        if name not in self._there:
            with closing(open_blob()) as stream:
                self._files.put(name, blob.size, stream)
            self._there.add(name)

    def _write_index(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        self._write_index()
        self._files.close()
        self._place.complete()
        self._finished = True

    def close(self) -> None:
        if not self._finished:
            self._files.close()
            self._place.remove()


class OciLayoutTarget(_FileTarget):
    """An OCI layout."""

    accepts_uncompressed = False

    def __init__(self, path: Path, form: str) -> None:
        super().__init__(path, directory=form == "oci")
        self._manifests: list[Descriptor] = []

    def has_blob(self, blob: Descriptor, *, hints: Sequence[str] = ()) -> bool:
        return _blob(blob.digest) in self._there

    def put_blob(self, blob: Descriptor, open_blob: Callable[[], BinaryIO]) -> None:
        self._put_stream(_blob(blob.digest), blob, open_blob)

    def put_image(self, manifest: bytes, manifest_type: str, config: bytes, layers: Sequence[Descriptor], references: Sequence[str]) -> None:
        self._put_once(_blob(Manifest.parse(manifest, manifest_type).config.digest), config)
        self._put_once(_blob(digest_of(manifest)), manifest)
        for name in references or [""]:
            annotations = {}
            if name:
                reference = Reference.parse(name)
                annotations = {"io.containerd.image.name": str(reference), "org.opencontainers.image.ref.name": reference.familiar}
            self._manifests.append(Descriptor(manifest_type, digest_of(manifest), len(manifest), annotations))

    def _write_index(self) -> None:
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [one.to_json() for one in self._manifests]}
        self._put_once("index.json", json.dumps(index).encode())
        self._put_once("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')


class DockerArchiveTarget(_FileTarget):
    """What ``docker load`` reads."""

    accepts_uncompressed = True

    def __init__(self, path: Path) -> None:
        super().__init__(path, directory=False)
        self._images: list[dict[str, object]] = []

    def has_blob(self, blob: Descriptor, *, hints: Sequence[str] = ()) -> bool:
        return _layer(blob.digest) in self._there

    def put_blob(self, blob: Descriptor, open_blob: Callable[[], BinaryIO]) -> None:
        self._put_stream(_layer(blob.digest), blob, open_blob)

    def put_image(self, manifest: bytes, manifest_type: str, config: bytes, layers: Sequence[Descriptor], references: Sequence[str]) -> None:
        name = f"{digest_of(config).removeprefix('sha256:')}.json"
        self._put_once(name, config)
        tags = [Reference.parse(reference).familiar for reference in references]
        self._images.append({"Config": name, "RepoTags": tags, "Layers": [_layer(layer.digest) for layer in layers]})

    def _write_index(self) -> None:
        self._put_once("manifest.json", json.dumps(self._images).encode())


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _layer(diff_id: str) -> str:
    return f"{diff_id.removeprefix('sha256:')}/layer.tar"
