"""Images and containers through a pool's server are what they are in a pool opened here; and nothing is left of work whose client went away."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import random
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from commandline import wait_until
from conftest import needs_tool
from imageworld import umoci_image

import thinpool
from thinpool.api import Change, PoolAPI
from thinpool.server.client import RemotePool
from thinpool.server.connect import connect

MIB = 1 << 20
KINDS = ("local", "remote")


def open_pool(directory: Path, kind: str) -> PoolAPI:
    thinpool.Pool.create(directory).close()
    return connect(directory, server=True) if kind == "remote" else thinpool.Pool.open(directory)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return umoci_image(tmp_path_factory.mktemp("images"), 2)


def work_with_images(pool: PoolAPI, layout: Path, directory: Path) -> dict[str, Any]:
    """Each verb once; what they gave."""
    seen: list[tuple[int, int]] = []
    images, containers = pool.images, pool.containers
    given: dict[str, Any] = {"load": images.load(layout, "app:1", size="1G", progress=lambda done, total: seen.append((done, total)))}
    assert seen and seen[-1][0] == seen[-1][1] > 0
    given["get"], given["list"] = images.get("app:1"), list(images.list())
    images.tag("app:1", "app:2")
    given["history"], given["inspect"] = list(images.history("app:2")), images.inspect("app:2")
    made = containers.create("app:1", name="box", command=["echo", "hi"], labels={"why": "test"})
    given["create"] = replace(made, created=0)
    (directory / "file").write_text("mine")
    containers.copy_in("file", "box", "/etc")
    given["diff"] = list(containers.diff("box"))
    containers.copy_out("box", "/etc/file", "copied")
    given["copied"] = (directory / "copied").read_text()
    given["commit"] = images.commit("box", "app:3", author="me", message="why", command=["sh"]).references
    images.save(["app:1"], "saved.tar", progress=lambda done, total: None)
    given["saved"] = (directory / "saved.tar").stat().st_size
    containers.reset("box")
    given["reset"] = list(containers.diff("box"))
    given["containers"] = [replace(one, created=0) for one in containers.list()] == [replace(containers.get("box"), created=0)]
    given["configuration"] = {**containers.configuration("box"), "created": 0, "layer_id": 0}  # of that moment, of that pool
    containers.remove("box")
    images.untag("app:2")
    given["remove"], given["removed"] = images.remove("app:1"), images.remove("app:3", force=True).references
    given["gc"], given["end"] = images.gc(), (list(images.list()), list(containers.list()))
    return given


@needs_tool("umoci", "busybox")
def test_every_verb_gives_the_same(tmp_path: Path, layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        monkeypatch.chdir(tmp_path / kind)  # relative paths are those of who asks
        pool = open_pool(tmp_path / kind / "pool", kind)
        assert isinstance(pool, RemotePool) == (kind == "remote")
        given[kind] = work_with_images(pool, layout, tmp_path / kind)
        pool.close()
    assert given["remote"] == given["local"]
    assert given["local"]["diff"] == [Change("C", "/etc"), Change("A", "/etc/file")]
    assert given["local"]["copied"] == "mine" and given["local"]["reset"] == [] and given["local"]["end"] == ([], [])


MISTAKES: dict[str, Callable[[PoolAPI], object]] = {
    "load of no file": lambda pool: pool.images.load("/nonexistent/image"),
    "load of no image": lambda pool: pool.images.load(__file__),
    "load by an impossible name": lambda pool: pool.images.load(__file__, "UPPER"),
    "pull by an impossible name": lambda pool: pool.images.pull("a/UPPER"),
    "pull from nobody": lambda pool: pool.images.pull("127.0.0.1:1/app"),
    "push of an unknown image": lambda pool: pool.images.push("127.0.0.1:1/nope"),
    "push to nobody": lambda pool: pool.images.push("127.0.0.1:1/app"),
    "save of an unknown image": lambda pool: pool.images.save(["nope"], "/nonexistent/out"),
    "save in an unknown form": lambda pool: pool.images.save(["app:1"], "/nonexistent/out", form="zip"),  # type: ignore[arg-type]
    "save into no directory": lambda pool: pool.images.save(["app:1"], "/nonexistent/out"),
    "commit of an unknown container": lambda pool: pool.images.commit("nope"),
    "commit by an impossible name": lambda pool: pool.images.commit("box", "UPPER"),
    "get of an unknown image": lambda pool: pool.images.get("nope"),
    "inspect of an unknown image": lambda pool: pool.images.inspect("nope"),
    "history of an unknown image": lambda pool: pool.images.history("nope"),
    "tag of an unknown image": lambda pool: pool.images.tag("nope", "app:2"),
    "tag with a digest": lambda pool: pool.images.tag("app:1", f"app@sha256:{'0' * 64}"),
    "untag of an unknown name": lambda pool: pool.images.untag("app:9"),
    "removal of an unknown image": lambda pool: pool.images.remove("nope"),
    "removal of an image in use": lambda pool: pool.images.remove("app:1"),
    "container of an unknown image": lambda pool: pool.containers.create("nope"),
    "container of a taken name": lambda pool: pool.containers.create("app:1", name="box"),
    "container of an impossible size": lambda pool: pool.containers.create("app:1", size="1 apple"),
    "container smaller than its image": lambda pool: pool.containers.create("app:1", size="1M"),
    "get of an unknown container": lambda pool: pool.containers.get("nope"),
    "removal of an unknown container": lambda pool: pool.containers.remove("nope"),
    "reset of an unknown container": lambda pool: pool.containers.reset("nope"),
    "resize to less": lambda pool: pool.containers.resize("box", "1M"),
    "diff of an unknown container": lambda pool: pool.containers.diff("nope"),
    "copy of no such path": lambda pool: pool.containers.copy_out("box", "/nope", "/nonexistent/out"),
    "copy of no such file": lambda pool: pool.containers.copy_in("/nonexistent/file", "box", "/etc"),
    "configuration of an unknown container": lambda pool: pool.containers.configuration("nope"),
}


@needs_tool("umoci", "busybox")
def test_the_same_errors_and_nothing_has_changed(tmp_path: Path, layout: Path) -> None:
    outcomes: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        pool = open_pool(tmp_path / kind, kind)
        pool.images.load(layout, "app:1")
        pool.containers.create("app:1", name="box")
        before = sorted(layer.name for layer in pool.layers())
        for mistake, make in MISTAKES.items():
            try:
                outcomes[kind][mistake] = (None, repr(make(pool)))
            except Exception as error:
                outcomes[kind][mistake] = (type(error), re.sub(r"partial-\w+|frozen/\w+", "", str(error)))
        assert sorted(layer.name for layer in pool.layers()) == before
        assert [image.references for image in pool.images.list()] == [("docker.io/library/app:1",)]
        pool.close()
    assert outcomes["remote"] == outcomes["local"]
    assert [mistake for mistake, (kind, _) in outcomes["local"].items() if kind is None or not issubclass(kind, (thinpool.ThinpoolError, OSError))] == []


class SlowRegistry:
    """An image of one layer with 64 MiB of noise, of which the second half waits for ``go_on``."""

    def __init__(self) -> None:
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as members:
            info = tarfile.TarInfo("noise")
            info.size = 64 * MIB
            members.addfile(info, io.BytesIO(random.Random(1).randbytes(MIB) * 64))
        self.layer = tar.getvalue()
        config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [_digest(self.layer)]}}).encode()
        described = [{"mediaType": f"application/vnd.oci.image.{kind}", "digest": _digest(blob), "size": len(blob)} for kind, blob in (
            ("config.v1+json", config), ("layer.v1.tar", self.layer)
        )]  # fmt: skip
        self.type = "application/vnd.oci.image.manifest.v1+json"
        self.manifest = json.dumps({"schemaVersion": 2, "mediaType": self.type, "config": described[0], "layers": described[1:]}).encode()
        self.blobs = {_digest(config): config}
        self.half_sent, self.go_on, self.broken = threading.Event(), threading.Event(), threading.Event()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        last = request.path.rpartition("/")[2]
        body = self.manifest if "/manifests/" in request.path else self.blobs.get(last, self.layer if "/blobs/" in request.path else b"{}")
        request.send_response(200)
        request.send_header("Content-Type", self.type if "/manifests/" in request.path else "application/octet-stream")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if body is not self.layer:
            request.wfile.write(body)
            return
        try:
            request.wfile.write(body[: 32 * MIB])
            self.half_sent.set()
            assert self.go_on.wait(60)
            request.wfile.write(body[32 * MIB :])
        except OSError:
            self.broken.set()


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.fixture
def slow() -> Iterator[tuple[SlowRegistry, str]]:
    registry = SlowRegistry()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            registry.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield registry, f"127.0.0.1:{server.server_port}"
    registry.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_client_that_goes_away_stops_a_pull(tmp_path: Path, slow: tuple[SlowRegistry, str]) -> None:
    registry, address = slow
    pool = open_pool(tmp_path / "pool", "remote")
    assert isinstance(pool, RemotePool)
    asked = {"reference": f"{address}/app:1"}
    answer = pool.images._transport.lines("POST", "/images/pull", asked)  # what pull() follows, and closes when it is interrupted
    assert "progress" in next(answer)
    assert registry.half_sent.wait(60)
    answer.close()  # type: ignore[attr-defined]
    registry.go_on.set()
    assert registry.broken.wait(60)
    assert pool.images.list() == []
    wait_until(lambda: {layer.name for layer in pool.layers() if "thinpool.blank" not in layer.labels} == set())
    pool.close()


def test_a_verb_or_argument_that_is_none_is_refused(tmp_path: Path) -> None:
    pool = open_pool(tmp_path / "pool", "remote")
    assert isinstance(pool, RemotePool)
    transport = pool.images._transport
    for route, arguments, kind in (
        ("/images/_sweep", {}, thinpool.ServerError),
        ("/images/get", {}, TypeError),
        ("/images/get", {"reference": "a", "more": 1}, TypeError),
        ("/images/get", [], TypeError),
        ("/containers/pool", {}, thinpool.ServerError),
    ):
        with pytest.raises(kind):
            transport.json("POST", route, arguments)
    with pytest.raises((TypeError, http.client.HTTPException, thinpool.ServerError)):
        list(transport.lines("POST", "/images/load", {"path": "/x", "progress": 1}))
    pool.close()
