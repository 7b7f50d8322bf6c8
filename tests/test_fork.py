"""A process that was forked from one that has a pool open has none, and cannot hurt it; through a server, each has its own connections."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import needs_root

import thinpool
import thinpool.closing
from thinpool.api import Limits
from thinpool.errors import PoolClosed
from thinpool.server.connect import connect

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later, where there are threads
CHUNK = 64 << 10
SECONDS = 60


def in_child(work: Callable[[], object]) -> int:
    """Does it in a forked process, which then ends as programs do; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    # What the interpreter does in the end, but for pytest's part in it: atexit functions, and the end of all objects.
    thinpool.closing._close_open_pools()
    os._exit(status)


def ended(pid: int) -> int:
    """The exit status of a child; one that hangs is killed."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def refused(pool: thinpool.Pool, layer: thinpool.Layer) -> None:
    """That a child can do nothing with them, and that nothing it does waits."""
    for attempt in (
        lambda: layer.pread(1, 0),
        lambda: layer.pwrite(b"child", 0),
        lambda: layer.discard(0, CHUNK),
        layer.flush,
        lambda: layer.snapshot("s"),
        layer.delete,
        lambda: pool.create_layer("child", "1M"),
        pool.layers,
        pool.commit,
        pool.usage,
        pool.make_backup,
        lambda: pool.engine.info(),
    ):
        with pytest.raises(PoolClosed):
            attempt()
    with pool:
        pool.close()


def test_a_child_has_no_part_in_the_pool(pool: thinpool.Pool, tmp_path: Path) -> None:
    layer = pool.create_layer("a", "1M")
    layer.set_limits(Limits(quota=1 << 20))
    layer.pwrite(b"parent", 0)

    def work() -> None:
        refused(pool, layer)
        with pytest.raises(thinpool.PoolBusy):
            thinpool.Pool.open(pool.path)
        with thinpool.Pool.create(tmp_path / "own") as own:
            own.create_layer("b", "1M").pwrite(b"own", 0)

    assert ended(in_child(work)) == 0
    assert layer.pread(6, 0) == b"parent"
    layer.pwrite(b"on", 0)
    pool.commit()
    with thinpool.Pool.open(tmp_path / "own") as own:
        assert own.layer("b").pread(3, 0) == b"own"


def test_a_child_that_lives_on_keeps_nobody_from_the_pool(pool: thinpool.Pool) -> None:
    ready, go = os.pipe()
    pid = in_child(lambda: os.read(ready, 1))
    pool.close()
    thinpool.Pool.open(pool.path).close()
    os.write(go, b".")
    assert ended(pid) == 0


def test_children_of_a_busy_process(pool: thinpool.Pool) -> None:
    """Forked while its threads hold whatever they hold."""
    layers = [pool.create_layer(f"l{number}", "64M") for number in range(4)]
    stop = threading.Event()

    def write(layer: thinpool.Layer) -> None:
        number = 0
        while not stop.is_set():
            layer.pwrite(b"x" * 4096, number * 4096 % (64 << 20))
            number += 1
            if number % 50 == 0:
                layer.snapshot(f"{layer.name}-{number}").delete()
                pool.commit()

    threads = [threading.Thread(target=write, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            assert ended(in_child(lambda: refused(pool, layers[0]))) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {layer.pread(4096, 0) for layer in layers} == {b"x" * 4096}


@needs_root()
def test_what_is_attached_stays(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("a", "1M")
    device = layer.attach().device
    assert ended(in_child(lambda: None)) == 0
    with open(device, "r+b", buffering=0) as file:
        assert file.write(b"y" * 4096) == 4096
        os.fsync(file.fileno())
    assert layer.pread(4096, 0) == b"y" * 4096


def test_each_asks_the_server_by_connections_of_its_own(pool_path: Path) -> None:
    thinpool.Pool.create(pool_path).close()
    with connect(pool_path, server=True) as pool:
        layers = [pool.create_layer(f"l{number}", CHUNK) for number in range(4)]
        for number, layer in enumerate(layers):
            layer.pwrite(bytes([number]) * CHUNK, 0)

        def read(number: int) -> None:
            for _ in range(100):
                assert layers[number].pread(1, 0) == bytes([number])

        children = [in_child(lambda number=number: read(number)) for number in (1, 2, 3)]  # type: ignore[misc]
        read(0)
        assert [ended(pid) for pid in children] == [0, 0, 0]


def test_it_ends_in_order_as_a_program(pool_path: Path) -> None:
    program = """
import os, sys, thinpool
with thinpool.Pool.create(sys.argv[1]) as pool:
    layer = pool.create_layer("a", "1M")
    pid = os.fork()
    if pid == 0:
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    layer.pwrite(b"parent", 0)
"""
    subprocess.run([sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", program, pool_path], check=True, timeout=SECONDS)
    with thinpool.Pool.open(pool_path) as pool:
        assert pool.layer("a").pread(6, 0) == b"parent"
