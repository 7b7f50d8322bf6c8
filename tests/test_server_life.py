"""The server's start and end: no race, no orphan, and a clean pool after whatever ends it."""

from __future__ import annotations

import itertools
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from commandline import Command, wait_until

import thinpool
from thinpool.errors import PoolBusy, PoolNotFound, ServerError
from thinpool.server import connect as connecting
from thinpool.server.client import RemotePool
from thinpool.server.connect import connect
from thinpool.server.daemon import IDLE_SECONDS


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def started_server(path: Path) -> tuple[RemotePool, int]:
    pool = connect(path, server=True)
    assert isinstance(pool, RemotePool)
    return pool, pool.server_pid


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "pool"
    thinpool.Pool.create(directory).close()
    yield directory
    log = directory / "server.log"
    print(log.read_text() if log.exists() else "no server log")


def test_connect_opens_the_pool_here_when_no_server_runs(path: Path) -> None:
    with thinpool.connect(path) as pool:
        assert isinstance(pool, thinpool.Pool)


def test_connect_finds_the_server(path: Path) -> None:
    first, pid = started_server(path)
    first.create_layer("a", "1M")
    with thinpool.connect(path) as second:
        assert isinstance(second, RemotePool) and second.server_pid == pid != os.getpid()
        assert second.layer("a").size == 1 << 20
    first.close()


def test_files_are_for_their_owner_only(path: Path) -> None:
    pool, _ = started_server(path)
    assert (path / "server.sock").stat().st_mode & 0o777 == 0o600
    assert (path / "server.log").stat().st_mode & 0o777 == 0o600
    pool.close()


def test_the_server_stops_by_itself(path: Path) -> None:
    pool, pid = started_server(path)
    pool.create_layer("a", "1M")
    pool.close()
    wait_until(lambda: not is_running(pid))
    assert not (path / "server.sock").exists()
    with thinpool.Pool.open(path) as local:
        assert [layer.name for layer in local.layers()] == ["a"]


def test_an_open_pool_keeps_the_server(path: Path) -> None:
    pool, pid = started_server(path)
    # Longer than it would wait: what it does not do cannot be waited for otherwise.
    time.sleep(4)
    assert is_running(pid)
    pool.create_layer("a", "1M")
    pool.close()
    wait_until(lambda: not is_running(pid))


def test_the_server_is_no_child_of_its_starter(path: Path) -> None:
    pool, pid = started_server(path)
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"PPid:\t{os.getpid()}\n" not in status
    assert os.getsid(pid) != os.getsid(0)
    pool.close()


def test_sigterm_closes_the_pool(path: Path) -> None:
    pool, pid = started_server(path)
    pool.create_layer("a", "1M").pwrite(b"kept", 0)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_running(pid))
    with pytest.raises(ServerError):
        pool.layers()
    with thinpool.Pool.open(path) as local:
        assert local.layer("a").pread(4, 0) == b"kept"


def test_a_server_killed_with_its_keeper_leaves_a_pool_that_opens(path: Path) -> None:
    pool, pid = started_server(path)
    layer = pool.create_layer("a", "1M")
    layer.pwrite(b"kept", 0)
    layer.flush()
    os.kill(pid, signal.SIGSTOP)  # or it would replace its keeper
    for victim in (*children(pid), pid):
        os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not is_running(pid))
    assert (path / "server.sock").exists()  # stale
    with thinpool.connect(path) as local:
        assert isinstance(local, thinpool.Pool)
        assert local.layer("a").pread(4, 0) == b"kept"
    again, second_pid = started_server(path)
    assert second_pid != pid
    assert again.layer("a").pread(4, 0) == b"kept"
    again.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
def test_a_server_keeps_memory_for_few_threads(path: Path) -> None:
    """Not the most that each of its threads ever needed: glibc gives them arenas of 64 MiB of addresses (more where that is not enough)."""
    pool, pid = started_server(path)
    layer = pool.create_layer("a", "1M")
    with ThreadPoolExecutor(24) as threads:
        list(threads.map(lambda at: layer.pread(64 << 10, 0)[at], range(480)))
    ranges = re.findall(r"^(\w+)-(\w+) rw-p 0+ 00:00 0 *\n(\w+)-(\w+) ---p", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
    pool.close()
    arenas = [start for start, end, behind, last in ranges if end == behind and int(last, 16) - int(start, 16) == 64 << 20]
    assert len(arenas) <= 1, "besides the one that is no mapping of its own"


def test_the_server_goes_with_its_pool(path: Path) -> None:
    pool, pid = started_server(path)
    shutil.rmtree(path)
    wait_until(lambda: not is_running(pid))
    pool.close()


def test_the_server_goes_when_nobody_can_reach_it(path: Path) -> None:
    pool, pid = started_server(path)
    (path / "server.sock").unlink()
    wait_until(lambda: not is_running(pid))
    pool.close()
    thinpool.Pool.open(path).close()


def test_a_long_path_is_no_obstacle(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.parent.mkdir()
    thinpool.Pool.create(directory).close()
    pool, _ = started_server(directory)
    assert pool.layers() == []
    pool.close()


def test_not_a_pool_is_said_and_left_alone(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(PoolNotFound):
            connect(directory)
        with pytest.raises(PoolNotFound):
            connect(directory, server=True)
    assert list(tmp_path.iterdir()) == []


def test_a_busy_pool_names_its_holder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "BUSY_SECONDS", 0.3)
    with thinpool.Pool.open(path):
        for server in (False, True):
            with pytest.raises(PoolBusy) as caught:
                connect(path, server=server)
            assert caught.value.pid == os.getpid()


def test_a_busy_pool_is_waited_for(path: Path) -> None:
    pool = thinpool.Pool.open(path)
    threading.Timer(0.5, pool.close).start()
    connect(path, server=True).close()


def test_a_socket_that_does_not_answer_is_no_server(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path / "server.sock"))
    with connect(path) as pool:
        assert isinstance(pool, thinpool.Pool)


def test_servers_started_at_once_are_one(path: Path) -> None:
    pools: list[RemotePool] = []
    threads = [threading.Thread(target=lambda: pools.append(started_server(path)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pools) == 8
    assert len({pool.server_pid for pool in pools}) == 1
    for pool in pools:
        pool.close()


@pytest.mark.parametrize("with_server", [False, True])
def test_twenty_verbs_at_once(path: Path, with_server: bool) -> None:
    keeper = connect(path, server=True) if with_server else None
    command = Command(path.parent)
    verbs = [
        subprocess.Popen(command.words("create", f"layer-{number}", "1M"), env=command.environment, stderr=subprocess.PIPE, text=True) for number in range(20)
    ]
    errors = [verb.communicate(timeout=120)[1] for verb in verbs]
    assert errors == [""] * 20
    assert [verb.returncode for verb in verbs] == [0] * 20
    if keeper is not None:
        keeper.close()
    with connect(path) as pool:
        assert {layer.name for layer in pool.layers()} == {f"layer-{number}" for number in range(20)}


def test_connecting_while_the_server_stops(path: Path) -> None:
    """All let go at once, and come back about when the server gives up waiting: everybody gets a pool that works."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    together = threading.Barrier(6)
    failures: list[Exception] = []

    def come_and_go(number: int) -> None:
        rng = random.Random(seed + number)
        try:
            for turn in range(4):
                with connect(path, server=turn == 0 or rng.random() < 0.7) as pool:
                    pool.create_layer(f"{number}-{turn}", "1M")
                together.wait(60)
                time.sleep(rng.uniform(IDLE_SECONDS - 0.2, IDLE_SECONDS + 0.8))
        except Exception as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with connect(path) as pool:
        assert len(pool.layers()) == 24


def test_requests_end_before_the_server_does(path: Path) -> None:
    """SIGTERM in the midst of requests: each is answered or fails cleanly, and what was answered is kept."""
    pool, pid = started_server(path)
    made: list[str] = []

    def create(number: int) -> None:
        for turn in itertools.count():
            name = f"{number}-{turn}"
            try:
                pool.create_layer(name, "1M")
            except ServerError:
                return
            made.append(name)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(made) > 50)
    os.kill(pid, signal.SIGTERM)
    for thread in threads:
        thread.join()
    wait_until(lambda: not is_running(pid))
    with thinpool.Pool.open(path) as local:
        assert set(made) <= {layer.name for layer in local.layers()}


def test_a_client_that_goes_ends_its_import(path: Path, tmp_path: Path) -> None:
    image = tmp_path / "big.img"
    with image.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    pool, _ = started_server(path)

    class Gone(Exception):
        pass

    def leave(done: int, total: int) -> None:
        raise Gone

    with pytest.raises(Gone):
        pool.import_raw(image, "big", progress=leave)
    wait_until(lambda: [record.name for record in pool.records()] in ([], ["big"]))  # given up, or too quick to be
    pool.close()


def test_a_client_that_goes_while_it_sends_is_no_failure(path: Path) -> None:
    pool, _ = started_server(path)
    layer = pool.create_layer("a", "1M")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path / "server.sock"))
        client.sendall(b"PUT /v1/layers/%d/data?offset=0 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\npart of it" % layer.id)
    pool.commit()
    pool.close()
    wait_until(lambda: not (path / "server.sock").exists())
    assert "Traceback" not in (path / "server.log").read_text()


# The pool's settings, the last answer on its connection: no request can go by that a moment before the other end closes it.
POOL_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 33\r\nConnection: close\r\n\r\n" + b'{"chunk_size": 4096, "pid": 4242}'


@contextmanager
def answering(directory: Path, *answers: bytes) -> Iterator[None]:
    """A server that gives these answers, one on each connection, and closes that."""

    def serve() -> None:
        for answer in answers:
            connection, _address = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "server.sock"))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(30)
        assert not thread.is_alive()


def test_an_answer_may_be_the_last_on_its_connection(tmp_path: Path) -> None:
    """As one is that a server gives while it leaves: the next request goes by another connection."""
    with answering(tmp_path, POOL_ANSWER, POOL_ANSWER), RemotePool(tmp_path) as pool:
        pool.commit()


def test_an_answer_in_lines_may_be_cut_off(tmp_path: Path) -> None:
    """Where its server was killed; with the last line it is whole."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/jsonl\r\nTransfer-Encoding: chunked\r\n\r\n"
    first, last = b'{"progress": [1, 2]}\n', b'{"result": null}\n'
    chunked = [b"%x\r\n%s\r\n" % (len(line), line) for line in (first, last)]
    whole = head + b"".join(chunked)
    cuts = range(len(head), len(whole))
    with answering(tmp_path, POOL_ANSWER, *(whole[:cut] for cut in cuts)), RemotePool(tmp_path) as remote:
        for cut in cuts:
            seen: list[tuple[int, int]] = []
            complete = cut >= len(whole) - len("\r\n")
            with nullcontext() if complete else pytest.raises(ServerError, match="went away"):
                remote.compute_digests(lambda done, total, seen=seen: seen.append((done, total)))  # type: ignore[misc]
            assert seen == [(1, 2)] * (cut >= len(head + chunked[0]) - len("\r\n"))
