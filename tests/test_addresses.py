"""Where a server in the foreground is told to listen: the next one has the addresses again, and one that cannot be had costs nobody a device."""

from __future__ import annotations

import http.client
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import wait_until
from conftest import needs_root, needs_tool
from nbdworld import run

import thinpool
from thinpool.server.client import RemotePool

pytestmark = [needs_root(), needs_tool("nbdinfo")]


class Server:
    """One that serves, in a process of its own. ``told``: the addresses that it printed."""

    def __init__(self, path: Path, number: int, *options: str | Path) -> None:
        self.log, self._output = path.parent / f"log{number}", path.parent / f"output{number}"
        command = [sys.executable, "-m", "thinpool.cli", "--pool", str(path), "serve", "--foreground", *map(str, options)]
        with self.log.open("w") as log, self._output.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=log, cwd=path.parent)

    def started(self) -> Server:
        """Once it serves."""
        wait_until(lambda: self.process.poll() is not None or f"[{self.process.pid}] serving" in self.log.read_text())
        assert self.process.poll() is None, self.log.read_text()
        self.told = self._output.read_text().split()
        return self

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Sends it a signal, if it is still there; its exit status."""
        self.process.send_signal(how)
        return self.process.wait(30)


class World:
    """A pool with a layer that is attached, and one that NBD's clients can have; and its servers."""

    def __init__(self, path: Path) -> None:
        self.path, self.servers = path, list[Server]()
        thinpool.Pool.create(path).close()

    def serve(self, *options: str | Path) -> Server:
        """Another server, told that; it need not come to serve."""
        self.servers.append(Server(self.path, len(self.servers), *options))
        return self.servers[-1]

    def attach(self) -> RemotePool:
        """The pool, from its server."""
        pool = thinpool.connect(self.path)
        assert isinstance(pool, RemotePool)
        pool.create_layer("free", "1M")
        pool.create_layer("disk", "1M").attach()
        pool.commit()
        return pool


@pytest.fixture
def world(pool_path: Path) -> Iterator[World]:
    made = World(pool_path)
    yield made
    for server in made.servers:
        server.end()
        print(server.log.read_text())
    wait_until(lambda: not (pool_path / "run/keeper.sock").exists())


def answers(http_address: str, *nbd: str) -> bool:
    """Whether the page is there, without TLS, and the layer that nobody else has."""
    connection = http.client.HTTPConnection(http_address, timeout=30)
    connection.request("GET", "/")
    sizes = [run("nbdinfo", "--size", f"nbd+unix:///free?socket={one[5:]}" if one.startswith("unix:") else f"nbd://{one}/free") for one in nbd]
    status = connection.getresponse().status
    connection.close()
    return (status, set(sizes)) == (200, {"1048576\n"})


def test_the_next_one_has_them_again(world: World) -> None:
    first = world.serve("--http", "127.0.0.1:0", "--nbd", "127.0.0.1:0", "--nbd", "./nbd.sock").started()
    nbd, unix, web = first.told
    assert unix == f"unix:{world.path.parent}/nbd.sock"
    with world.attach() as pool:
        first.end(signal.SIGKILL)
        second = world.serve("--http", web, "--nbd", nbd, "--nbd", "./nbd.sock").started()
        assert second.told == first.told
        assert answers(web, nbd, unix)
        assert [one.layer for one in pool.attachments()] == ["disk"]
        assert second.end(signal.SIGUSR1) == 0  # it leaves for the next one
        world.serve().started()  # told nothing, it goes on as well
        assert answers(web, nbd, unix)
        assert [one.layer for one in pool.attachments()] == ["disk"]


def test_what_it_is_told_of_tls_counts(world: World, certificates: Path) -> None:
    first = world.serve("--http", "127.0.0.1:0", "--nbd", "127.0.0.1:0", "--tls-certificates", certificates).started()
    nbd, web = first.told
    with world.attach() as pool:
        with pytest.raises((AssertionError, OSError, http.client.HTTPException)):
            answers(web, nbd)
        first.end(signal.SIGKILL)
        second = world.serve("--http", web, "--nbd", nbd).started()
        assert answers(web, nbd)
        second.end(signal.SIGKILL)
        third = world.serve().started()
        assert answers(web, nbd)
        assert (pool.http_addresses(), pool.nbd_addresses()) == ([web], [nbd])
        assert "not served" not in second.log.read_text() + third.log.read_text()


def certificate_at(http_address: str) -> str:
    host, _, port = http_address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=30)


def test_what_is_said_again_to_one_that_runs_counts_for_new_clients(world: World, certificates: Path, tmp_path: Path) -> None:
    first = world.serve().started()
    files = tmp_path / "tls"
    files.mkdir()
    with world.attach() as pool:
        web, nbd = pool.serve_http("127.0.0.1:0"), pool.serve_nbd("127.0.0.1:0")
        older = http.client.HTTPConnection(web, timeout=30)
        for _ in range(2):
            assert (pool.serve_http(web), pool.serve_nbd(nbd)) == (web, nbd)
            assert answers(web, nbd)
            older.request("GET", "/")
            assert older.getresponse().read().startswith(b"<!doctype html>")
        for name in ("server", "client"):  # with TLS; with renewed files
            for part in ("cert", "key"):
                shutil.copy(certificates / f"{name}-{part}.pem", files / f"server-{part}.pem")
            assert (pool.serve_http(web, certificates=files), pool.serve_nbd(nbd, certificates=files)) == (web, nbd)
            with pytest.raises(thinpool.BadAddress):
                pool.serve_http(web, certificates=tmp_path / "nothing")
            assert certificate_at(web) == (certificates / f"{name}-cert.pem").read_text()
            assert run("nbdinfo", "--size", f"nbds://{nbd}/free?tls-certificates={certificates}") == "1048576\n"
            with pytest.raises(AssertionError):
                run("nbdinfo", "--size", f"nbd://{nbd}/free")
        older.request("GET", "/")
        assert older.getresponse().read().startswith(b"<!doctype html>")
        older.close()
        first.end(signal.SIGKILL)
        world.serve().started()
        assert certificate_at(web) == (certificates / "client-cert.pem").read_text()
        assert (pool.http_addresses(), pool.nbd_addresses()) == ([web], [nbd])


@pytest.mark.parametrize("option", ["--http", "--nbd"])
def test_one_that_others_have_is_an_error_or_costs_nobody_a_device(world: World, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        refused = world.serve(option, address)
        assert refused.process.wait(30) == 2
        assert refused.log.read_text().endswith(f"thinpool: cannot listen at {address}: Address already in use\n")
        first = world.serve().started()
        with world.attach() as pool:
            first.end(signal.SIGKILL)
            second = world.serve(option, address).started()
            assert [one.layer for one in pool.attachments()] == ["disk"]
            assert f"is not served at {address} as told: cannot listen" in second.log.read_text()


@pytest.mark.parametrize(
    "options", [("--nbd", "0.0.0.0:0"), ("--http", "nowhere"), ("--nbd", "127.0.0.1:0", "--tls-certificates", "nothing"), ("--http", "unix:/x")]
)
def test_one_that_cannot_be_takes_over_from_nobody(world: World, options: tuple[str, ...]) -> None:
    first = world.serve().started()
    with world.attach() as pool:
        refused = world.serve("--takeover", *options)
        assert refused.process.wait(30) == 2
        assert refused.log.read_text().startswith("thinpool: ")
        assert pool.server_pid == first.process.pid
        assert [one.layer for one in pool.attachments()] == ["disk"]
        second = world.serve("--takeover").started()
        assert first.process.wait(30) == 0
        assert second.process.poll() is None
        assert [one.layer for one in pool.attachments()] == ["disk"]


def test_one_that_fails_as_it_starts_leaves_devices_to_the_next(world: World) -> None:
    first = world.serve().started()
    with world.attach() as pool:
        first.end(signal.SIGKILL)
        failed = world.serve("--containerd", "nowhere/sock")
        assert failed.process.wait(30) == 1
        assert "cannot listen on" in failed.log.read_text() and "leaves what is attached to the next one" in failed.log.read_text()
        world.serve().started()
        assert [one.layer for one in pool.attachments()] == ["disk"]
