"""A registry that misbehaves: what breaks off is gone on with, what is wrong is said, and nobody else learns a password."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import thinpool
from thinpool.api import Credentials

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


class Registry:
    """One image of one layer with 3 MiB of noise, and what to do wrong."""

    def __init__(self) -> None:
        import random

        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as members:
            info = tarfile.TarInfo("noise")
            info.size = 3 << 20
            members.addfile(info, io.BytesIO(random.Random(1).randbytes(info.size)))
        self.layer = gzip.compress(tar.getvalue(), 1, mtime=0)
        config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest_of(tar.getvalue())]}}
        self.config = json.dumps(config).encode()
        described = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(self.config), "size": len(self.config)}
        layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest_of(self.layer), "size": len(self.layer)}
        self.manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": [layer]}).encode()
        self.breaks = 0  # so many transfers of the layer break off
        self.ranges = True
        self.busy = 0  # so many requests are answered with 429
        self.token: str | None = None
        self.redirect: str | None = None
        self.seen: list[tuple[str, str, str | None]] = []
        self.sent = 0

    def answer(self, request: Any) -> None:
        path, authorization = request.path, request.headers.get("Authorization")
        self.seen.append((request.command, path, authorization))
        if path.startswith("/token"):
            return self.reply(request, 200, json.dumps({"token": "the-token"}).encode())
        if self.busy > 0:
            self.busy -= 1
            return self.reply(request, 429, b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}]}', {"Retry-After": "0"})
        if self.token and authorization != f"Bearer {self.token}":
            realm = f'Bearer realm="http://{request.headers["Host"]}/token",service="test"'
            return self.reply(request, 401, b"", {"WWW-Authenticate": realm})
        if "/manifests/" in path:
            return self.reply(request, 200, self.manifest, {"Content-Type": MANIFEST})
        if digest_of(self.config) in path:
            return self.reply(request, 200, self.config)
        if self.redirect:
            return self.reply(request, 307, b"", {"Location": f"{self.redirect}{path}"})
        return self.blob(request)

    def blob(self, request: Any) -> None:
        start = 0
        if self.ranges and (given := request.headers.get("Range")):
            start = int(given.removeprefix("bytes=").rstrip("-"))
        content = self.layer[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if self.breaks > 0:
            self.breaks -= 1
            content = content[: 1 << 20]
            request.close_connection = True
        self.sent += len(content)
        request.wfile.write(content)

    @staticmethod
    def reply(request: Any, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)


@pytest.fixture
def registries() -> Iterator[list[tuple[Registry, str]]]:
    """Two of them, with their addresses."""
    made, servers = [], []
    for _ in range(2):
        registry = Registry()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            here = registry

            def do_GET(self) -> None:
                self.here.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        made.append((registry, f"127.0.0.1:{server.server_port}"))
    yield made
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_is_gone_on_with(pool: thinpool.Pool, registries: list[tuple[Registry, str]], ranges: bool) -> None:
    registry, address = registries[0]
    registry.breaks, registry.ranges = 2, ranges
    assert len(pool.images.pull(f"{address}/a:1").layers) == 1
    assert registry.breaks == 0
    assert (registry.sent == len(registry.layer)) == ranges


def test_a_transfer_that_never_ends_well_leaves_nothing(pool: thinpool.Pool, registries: list[tuple[Registry, str]]) -> None:
    registry, address = registries[0]
    registry.layer = registry.layer[:-100] + bytes(100)
    with pytest.raises(thinpool.ImportFailed, match="damaged"):
        pool.images.pull(f"{address}/a:1")
    assert pool.images.list() == [] and not pool.layers("thinpool.blob") and not pool.layers("thinpool.partial")


def test_a_busy_registry_is_asked_again(pool: thinpool.Pool, registries: list[tuple[Registry, str]]) -> None:
    registry, address = registries[0]
    registry.busy = 2
    pool.images.pull(f"{address}/a:1")
    registry.busy = 100
    with pytest.raises(thinpool.RegistryError, match="429: TOOMANYREQUESTS slow down") as refused:
        pool.images.pull(f"{address}/a:2")
    assert refused.value.status == 429


def test_tokens_are_fetched_and_passwords_go_nowhere_else(pool: thinpool.Pool, registries: list[tuple[Registry, str]]) -> None:
    (registry, address), (elsewhere, other) = registries
    registry.token, registry.redirect = "the-token", f"http://{other}"
    pool.images.pull(f"{address}/a:1", credentials=Credentials("me", "secret"))
    asked = [seen for seen in registry.seen if seen[1].startswith("/token")]
    assert asked and all(seen[2] is not None and seen[2].startswith("Basic ") for seen in asked)
    assert "scope=repository%3Aa%3Apull" in asked[0][1]
    assert elsewhere.seen and all(authorization is None for _, _, authorization in elsewhere.seen)


def test_a_manifest_that_is_another_is_refused(pool: thinpool.Pool, registries: list[tuple[Registry, str]]) -> None:
    registry, address = registries[0]
    with pytest.raises(thinpool.ImportFailed, match="gave a manifest with the digest"):
        pool.images.pull(f"{address}/a@sha256:{'0' * 64}")
    registry.manifest = b"{"
    with pytest.raises(thinpool.ImportFailed, match="not JSON"):
        pool.images.pull(f"{address}/a:1")
    registry.manifest = json.dumps({"schemaVersion": 1}).encode()
    with pytest.raises(thinpool.ImportFailed, match="schema 1"):
        pool.images.pull(f"{address}/a:1")
