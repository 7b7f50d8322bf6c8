"""Images from and to a registry (OCI distribution specification 1.1): :class:`RegistrySource`, :class:`RegistryTarget`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urlencode

from ..api import Credentials
from ..errors import ImportFailed, RegistryError
from .oci import INDEXES, MANIFESTS, Descriptor, Manifest, digest_of, parse_index, select_platform
from .reference import Reference
from .registry_http import Connection

_PIECE_BYTES = 8 << 20
_MANIFEST_BYTES_MAX = 4 << 20
_INDEXES_MAX = 4


class RegistrySource:
    """An image in a registry."""

    def __init__(self, reference: Reference, *, platform: str | None = None, credentials: Credentials | None = None, insecure: bool = False) -> None:
        self._reference = reference
        self._scope = f"repository:{reference.path}:pull"
        self._connection = Connection(reference.domain, credentials=credentials, insecure=insecure)
        self.references = (str(reference),)
        try:
            self.manifest, self.manifest_type = self._find_manifest(platform)
            parsed = Manifest.parse(self.manifest, self.manifest_type)
            self.layers = parsed.layers
            self.config: bytes | None = self._small_blob(parsed.config)
        except BaseException:
            self.close()
            raise

    def _find_manifest(self, platform: str | None) -> tuple[bytes, str]:
        wanted: str = self._reference.digest or self._reference.tag or "latest"
        for _ in range(_INDEXES_MAX):
            content, media_type = self._get_manifest(wanted)
            if media_type not in INDEXES:
                return content, media_type
            wanted = select_platform(parse_index(content), platform).digest
        raise ImportFailed(f"{self._reference} is an index of indexes, more than {_INDEXES_MAX} deep")

    def _get_manifest(self, wanted: str) -> tuple[bytes, str]:
        answer = self._connection.request(
            "GET",
            f"/v2/{self._reference.path}/manifests/{quote(wanted, safe=':')}",
            scope=self._scope,
            what=f"cannot get {self._reference.familiar}",
            headers={"Accept": ", ".join((*MANIFESTS, *INDEXES))},
            stream=True,
        )
        content = answer.read(_MANIFEST_BYTES_MAX + 1)
        answer.release_conn()
        if len(content) > _MANIFEST_BYTES_MAX:
            raise ImportFailed(f"the manifest of {self._reference.familiar} has more than {_MANIFEST_BYTES_MAX} bytes")
        if wanted.startswith("sha256:") and digest_of(content) != wanted:
            raise ImportFailed(f"{self._reference.domain} gave a manifest with the digest {digest_of(content)} for {wanted}")
        return content, answer.headers.get("Content-Type", "").partition(";")[0].strip()

    def _small_blob(self, descriptor: Descriptor) -> bytes:
        if descriptor.size > _MANIFEST_BYTES_MAX:
            raise ImportFailed(f"the configuration of {self._reference.familiar} has {descriptor.size} bytes: too many")
        with closing(self.open_blob(descriptor)) as stream:
            content = stream.read(descriptor.size + 1)
        if digest_of(content) != descriptor.digest:
            raise ImportFailed(f"the configuration of {self._reference.familiar} is damaged: it has the digest {digest_of(content)}")
        return content

    def open_blob(self, layer: Descriptor, offset: int = 0) -> BinaryIO:
        answer = self._connection.request(
            "GET",
            f"/v2/{self._reference.path}/blobs/{layer.digest}",
            scope=self._scope,
            what=f"cannot get {layer.digest} of {self._reference.familiar}",
            accepted=(200, 206),
            headers={"Range": f"bytes={offset}-"} if offset else {},
            stream=True,
        )
        skipped = 0 if answer.status == 206 or not offset else offset
        stream = _Body(answer)
        while skipped:  # of a registry that cannot begin in the middle
            data = stream.read(min(skipped, _PIECE_BYTES))
            if not data:
                raise RegistryError(f"the transfer of {layer.digest} ended early")
            skipped -= len(data)
        return cast(BinaryIO, stream)

    def config_for(self, diff_id: str) -> bytes:
        raise AssertionError("it has one")

    def close(self) -> None:
        self._connection.close()


class _Body:
    """The body of an answer as a stream; what breaks off is a ConnectionError, to be gone on with."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def read(self, size: int = -1) -> bytes:
        from urllib3.exceptions import HTTPError

        try:
            return bytes(self._answer.read(None if size < 0 else size, decode_content=False))
        except (HTTPError, OSError) as error:
            raise ConnectionError(f"the transfer broke off: {error}") from error

    def close(self) -> None:
        self._answer.close()
        self._answer.release_conn()


class RegistryTarget:
    """A repository of a registry, to be given an image."""

    accepts_uncompressed = False

    def __init__(self, reference: Reference, *, credentials: Credentials | None = None, insecure: bool = False) -> None:
        self._reference = reference
        self._scope = f"repository:{reference.path}:pull,push"
        self._connection = Connection(reference.domain, credentials=credentials, insecure=insecure)
        self._blobs = f"/v2/{reference.path}/blobs"

    def _ask(self, method: str, path: str, what: str, accepted: tuple[int, ...], **more: Any) -> Any:
        return self._connection.request(method, path, scope=self._scope, what=f"cannot {what} {self._reference.familiar}", accepted=accepted, **more)

    def has_blob(self, blob: Descriptor, *, hints: Sequence[str] = ()) -> bool:
        if self._ask("HEAD", f"{self._blobs}/{blob.digest}", "look into", (200, 404)).status == 200:
            return True
        own = f"{self._reference.domain}/"
        return any(self._mount(blob, hint.removeprefix(own)) for hint in hints if hint.startswith(own) and hint != self._reference.name)

    def _mount(self, blob: Descriptor, repository: str) -> bool:
        """From another repository; a registry that cannot begins an upload instead, which is given up."""
        query = urlencode({"mount": blob.digest, "from": repository})
        answer = self._ask("POST", f"{self._blobs}/uploads/?{query}", "push to", (201, 202))
        if answer.status == 202 and "Location" in answer.headers:
            self._ask("DELETE", answer.headers["Location"], "push to", (200, 202, 204, 404, 405), retry=False)
        return bool(answer.status == 201)

    def put_blob(self, blob: Descriptor, open_blob: Callable[[], BinaryIO]) -> None:
        location = self._location(self._ask("POST", f"{self._blobs}/uploads/", "push to", (202,)))
        with closing(open_blob()) as stream:
            sent = 0
            while data := stream.read(_PIECE_BYTES):
                headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{sent}-{sent + len(data) - 1}"}
                answer = self._ask("PATCH", location, "push to", (202,), headers=headers, body=data, retry=False)
                location = self._location(answer)
                sent += len(data)
        if sent != blob.size:
            raise ImportFailed(f"{blob.digest} has {sent} bytes here, not {blob.size}")
        self._finish_upload(location, blob.digest)

    def _finish_upload(self, location: str, digest: str, body: bytes | None = None) -> None:
        joined = f"{location}{'&' if '?' in location else '?'}{urlencode({'digest': digest})}"
        headers = {"Content-Type": "application/octet-stream"} if body is not None else {}
        self._ask("PUT", joined, "push to", (201,), headers=headers, body=body, retry=False)

    def _location(self, answer: Any) -> str:
        location = answer.headers.get("Location")
        if not location:
            raise RegistryError(f"{self._reference.domain} does not say where to upload to")
        return str(self._connection.url(location))

    def put_image(self, manifest: bytes, manifest_type: str, config: bytes, layers: Sequence[Descriptor], references: Sequence[str]) -> None:
        described = Manifest.parse(manifest, manifest_type).config
        if not self.has_blob(described):
            self._finish_upload(self._location(self._ask("POST", f"{self._blobs}/uploads/", "push to", (202,))), described.digest, config)
        for name in references or [str(self._reference)]:
            reference = Reference.parse(name)
            wanted = reference.tag or digest_of(manifest)
            answer = self._ask("PUT", f"/v2/{reference.path}/manifests/{wanted}", "push", (200, 201), headers={"Content-Type": manifest_type}, body=manifest)
            there = answer.headers.get("Docker-Content-Digest", digest_of(manifest))
            if there != digest_of(manifest):
                raise RegistryError(f"{reference.domain} took the manifest of {reference.familiar} for another: {there}")

    def finish(self) -> None:
        """The manifest, which came last, has made it visible."""

    def close(self) -> None:
        self._connection.close()
