"""A server in the foreground, as a supervisor or a service manager has it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commandline import wait_until
from conftest import needs_root, needs_tool

import thinpool
from thinpool.server.client import RemotePool


def serve_in_foreground(path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "thinpool.cli", "--pool", str(path), "serve", "--foreground", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@needs_root()
@needs_tool("mkfs.ext4")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGUSR1])
def test_the_next_start_goes_on(pool_path: Path, tmp_path: Path, how: signal.Signals) -> None:
    place = tmp_path / "place"
    place.mkdir()
    nbd = f"unix:{pool_path.parent}/nbd"
    thinpool.Pool.create(pool_path).close()
    first = serve_in_foreground(pool_path, "--nbd", nbd)
    assert first.stdout is not None and first.stdout.readline() == f"{nbd}\n"
    wait_until((pool_path / "server.sock").exists)
    with thinpool.connect(pool_path) as pool:
        layer = pool.create_layer("disk", "64M")
        subprocess.run(["mkfs.ext4", "-q", layer.attach().device], check=True)
        layer.detach()
        layer.mount(place)
        first.send_signal(how)
        assert first.wait(30) == (-9 if how == signal.SIGKILL else 0)
        second = serve_in_foreground(pool_path, "--nbd", nbd)
        assert second.stdout is not None and second.stdout.readline() == f"{nbd}\n"
        (place / "file").write_text("x")
        assert [one.mountpoint for one in pool.attachments()] == [str(place)]
        pool.layer("disk").unmount()
    second.terminate()
    assert second.wait(30) == 0
    for process in (first, second):
        assert process.stdout is not None
        process.stdout.close()


def test_a_service_manager_gives_the_socket_and_is_told_when_it_serves(pool_path: Path, tmp_path: Path) -> None:
    """As a socket unit does it: a client that comes before the server waits for it."""
    thinpool.Pool.create(pool_path).close()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, ThreadPoolExecutor() as thread:
        listener.bind(str(pool_path / "server.sock"))
        listener.listen()
        manager.bind(str(tmp_path / "notify"))
        client = thread.submit(thinpool.connect, pool_path)
        script = f"[ $0 = 3 ] || exec 3<&$0; export LISTEN_PID=$$ LISTEN_FDS=1; exec {sys.executable} -m thinpool.cli --pool {pool_path} serve --foreground"
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        server = subprocess.Popen(["bash", "-c", script, str(listener.fileno())], pass_fds=[listener.fileno()], env=environment)
        try:
            manager.settimeout(30)
            assert manager.recv(100).decode().split() == ["READY=1", f"MAINPID={server.pid}"]
            with client.result(30) as pool:
                assert isinstance(pool, RemotePool) and pool.server_pid == server.pid
        finally:
            server.terminate()
            assert server.wait(30) == 0
        assert (pool_path / "server.sock").exists()  # it is the manager's
