"""``thinpool top``: what a pool's server does, for people and for programs."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import Command

import thinpool
from thinpool.cli.top import between
from thinpool.server.connect import connect


@pytest.fixture
def command(tmp_path: Path) -> Command:
    with thinpool.Pool.create(tmp_path / "pool", capacity="1G") as pool:
        for name in ("busy", "idle"):
            pool.create_layer(name, "1M")
    return Command(tmp_path)


@pytest.fixture
def traffic(command: Command) -> Iterator[None]:
    """Somebody writes to a layer through the server, without end."""
    stop = threading.Event()
    with_server = connect(command.pool, server=True)
    layer = with_server.layer("busy")

    def write() -> None:
        while not stop.is_set():
            layer.pwrite(bytes(4096), 0)

    thread = threading.Thread(target=write)
    thread.start()
    yield
    stop.set()
    thread.join()
    with_server.close()


@pytest.mark.usefixtures("traffic")
def test_one_interval_for_programs(command: Command) -> None:
    found = json.loads(command("top", "--once", "--interval", "0.3", "--json"))
    (layer,) = found["layers"]
    write = layer["operations"]["write"]
    assert layer["layer"] == "busy" and layer["operations"]["read"]["per_second"] == 0
    assert write["bytes_per_second"] == pytest.approx(write["per_second"] * 4096) and write["per_second"] > 0
    assert 0 < write["p50"] <= write["p99"]
    assert found["operations"]["write"]["per_second"] >= write["per_second"]
    assert (found["mode"], found["capacity"], found["seconds"] >= 0.3) == ("writable", 1 << 30, True)


@pytest.mark.usefixtures("traffic")
def test_a_line_for_each_interval(command: Command) -> None:
    with subprocess.Popen(command.words("top", "--interval", "0.1", "--json"), env=command.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert json.loads(process.stdout.readline())["layers"][0]["layer"] == "busy"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=30) == 0


@pytest.mark.usefixtures("traffic")
def test_one_interval_for_people(command: Command) -> None:
    screen = command("top", "--once", "--interval", "0.3")
    assert f"{command.pool}  writable" in screen
    assert "of 1G taken" in screen and "commits/s" in screen
    heading, everything, busy = screen.splitlines()[-3:]
    assert heading.split()[:2] == ["LAYER", "READS/S"]
    assert everything.split()[0] == "all" and busy.split()[0] == "busy"


@pytest.mark.usefixtures("traffic")
def test_a_terminal_is_kept_up_to_date_until_it_is_interrupted(command: Command) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(command.words("top", "--interval", "0.1"), env={**command.environment, "TERM": "xterm"}, stdin=theirs, stdout=theirs) as process:
        os.close(theirs)
        seen = b""
        while seen.count(b"busy") < 3:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    os.close(ours)


def test_without_a_server_there_is_nothing_to_watch(command: Command) -> None:
    code, line = command.fails("top", "--once")
    assert code == 1 and "no server has" in line and "thinpool serve" in line


def test_the_busiest_layer_comes_first_and_deleted_ones_go(pool: thinpool.Pool) -> None:
    one, two, gone = (pool.create_layer(name, "1M") for name in ("one", "two", "gone"))
    for layer in (one, gone):
        layer.pwrite(b"x", 0)
    before = pool.metrics()
    gone.delete()
    one.pread(1, 0)
    for _ in range(5):
        two.pwrite(b"x", 0)
    found = between(before, pool.metrics(), 2.0)
    assert [(layer["layer"], layer["operations"]["write"]["per_second"]) for layer in found["layers"]] == [("two", 2.5), ("one", 0.0)]
    assert found["operations"]["write"]["bytes_per_second"] == 2.5
    assert found["operations"]["discard"]["p50"] is None
