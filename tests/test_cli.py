"""The command line, as a process on a real pool: each verb, its JSON, each exit code."""

from __future__ import annotations

import os
import pty
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import Command, wait_until

import thinpool
from thinpool.cli.transfer import looks_like_tarball

MIB = 1 << 20


@pytest.fixture
def command(tmp_path: Path) -> Command:
    made = Command(tmp_path)
    made("init")
    return made


def test_init_makes_a_pool_as_asked(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command("init", "--chunk-size", "128K", "--capacity", "1G")
    with thinpool.Pool.open(command.pool) as pool:
        assert pool.chunk_size == 128 << 10
        assert pool.usage().capacity == 1 << 30


def test_the_pool_is_said_before_or_after_the_verb_or_in_the_environment(command: Command) -> None:
    command.environment["THINPOOL_POOL"] = "/nonexistent"
    command("--pool", command.pool, "create", "a", "1M")
    assert "a " in command("ls", "--pool", command.pool)
    code, line = command.fails("ls")
    assert code == 3 and "/nonexistent" in line
    del command.environment["THINPOOL_POOL"]
    code, line = command.fails("ls")
    assert code == 2 and "THINPOOL_POOL" in line


def test_layers_are_made_and_changed(command: Command) -> None:
    command("create", "base", "1M", "--label", "os=debian", "--label", "note=a=b")
    command("snapshot", "base", "base@1")
    command("clone", "base@1", "c1", "--size", "2M")
    command("seal", "base")
    command("reset", "c1")
    command("reset", "c1", "--to", "base")
    command("resize", "c1", "3M")
    command("resize", "c1", "1M", "--shrink")
    command("rename", "c1", "web")
    layers = {layer["name"]: layer for layer in command.json("ls")}
    assert list(layers) == ["base", "base@1", "web"]
    assert layers["base"]["labels"] == {"os": "debian", "note": "a=b"}
    assert [layers[name]["sealed"] for name in layers] == [True, True, False]
    assert [layers[name]["parent"] for name in layers] == [None, "base", "base@1"]
    assert [layers[name]["size"] for name in layers] == [MIB] * 3
    command("rm", "base", "base@1")
    assert [layer["name"] for layer in command.json("ls")] == ["web"]


@pytest.mark.parametrize("with_server", [False, True])
@pytest.mark.parametrize("words", ["rm disk --keep 0", "resize disk 1M --shrink", "reset disk --to empty"])
def test_the_host_has_the_space_back_when_a_verb_returns(command: Command, words: str, with_server: bool) -> None:
    (command.directory / "disk.img").write_bytes(random.Random(5).randbytes(24 * MIB))
    command("import", "disk.img")
    command("create", "empty", "24M")
    keeper = thinpool.connect(command.pool, server=True) if with_server else None
    assert command.json("df")["host"] >= 24 * MIB
    command(*words.split())
    assert command.json("df")["host"] <= 2 * MIB
    if keeper is not None:
        keeper.close()


def test_ls_says_what_each_layer_takes(command: Command) -> None:
    with thinpool.Pool.open(command.pool) as pool:
        base = pool.create_layer("base", "10M")
        base.pwrite(b"x" * MIB, 0)
        base.clone("c1").pwrite(b"y" * (64 << 10), 0)
        pool.create_layer("blank", "1M", labels={"thinpool.blank": "ext4"})
    by_name = {layer["name"]: layer for layer in command.json("ls")}
    assert set(by_name["c1"]) == {
        "id", "name", "size", "sealed", "created", "labels", "digests", "parent", "limits", "virtual", "mapped", "exclusive", "shared", "used_by"
    }  # fmt: skip
    c1 = by_name["c1"]
    assert (c1["virtual"], c1["mapped"], c1["exclusive"], c1["shared"]) == (10 * MIB, MIB, 64 << 10, MIB - (64 << 10))
    assert [line.split() for line in command("ls").splitlines()] == [
        ["LAYER", "KIND", "VIRTUAL", "MAPPED", "EXCLUSIVE", "SHARED", "USED", "BY"],
        ["base", "writable", "10M", "1M", "64K", "960K"],
        ["└─", "c1", "writable", "10M", "1M", "64K", "960K"],
    ]
    assert "blank" in command("ls", "--all")


def test_ls_draws_the_tree(command: Command) -> None:
    with thinpool.Pool.open(command.pool) as pool:
        base = pool.create_layer("base", "1M")
        a = base.clone("a")
        a.clone("a1")
        a.clone("a2").clone("a21")
        base.clone("b")
        pool.create_layer("other", "1M")
    tree = [line[: line.index("writable")].rstrip() for line in command("ls").splitlines()[1:]]
    assert tree == ["base", "├─ a", "│  ├─ a1", "│  └─ a2", "│     └─ a21", "└─ b", "other"]


def test_ls_of_a_long_chain(command: Command) -> None:
    with thinpool.Pool.open(command.pool) as pool:
        layer = pool.create_layer("layer-0", "1M")
        for number in range(1, 1200):
            layer = layer.clone(f"layer-{number}")
    assert len(command("ls").splitlines()) == 1201


def test_df(command: Command) -> None:
    command("create", "a", "1M")
    usage = command.json("df")
    assert set(usage) == {"capacity", "allocated", "host", "metadata", "layers", "reclaimable", "held", "mode", "cause", "way_out"}
    assert (usage["mode"], usage["cause"], usage["way_out"]) == ("normal", "", "")
    assert (usage["capacity"], usage["allocated"], usage["layers"]) == (0, 0, 1)
    assert command("df").splitlines()[0].split() == ["CAPACITY", "ALLOCATED", "RECLAIMABLE", "ON", "HOST", "METADATA", "LAYERS"]


def test_map_and_diff(command: Command) -> None:
    with thinpool.Pool.open(command.pool) as pool:
        base = pool.create_layer("base", "1M")
        base.pwrite(b"x" * (64 << 10), 64 << 10)
        base.clone("c1").pwrite(b"y" * (64 << 10), 512 << 10)
    assert command.json("map", "base") == [
        {"offset": 0, "length": 65536, "kind": "hole"},
        {"offset": 65536, "length": 65536, "kind": "data"},
        {"offset": 131072, "length": 917504, "kind": "hole"},
    ]
    assert command.json("diff", "base", "c1") == [{"offset": 524288, "length": 65536, "kind": "data"}]
    assert command.json("diff", "base", "base") == []
    assert command("diff", "base", "c1").splitlines()[-1] == "data 64K, holes 0"
    assert command.json("delta", "c1", "base") == [{"offset": 524288, "length": 65536, "kind": "left_only"}]
    assert command("delta", "base", "c1").splitlines()[-1] == "left only 0, right only 64K, different 0"
    assert command("delta", "base", "c1", "--same").splitlines()[-1] == "left only 0, right only 64K, different 0, same 64K"


def test_ps_of_an_idle_pool(command: Command) -> None:
    assert command.json("ps") == []
    assert command("ps").split() == ["LAYER", "PURPOSE", "DEVICE", "MOUNTED", "ON", "OWNER", "CONTAINER"]


def test_a_raw_image_goes_in_and_out(command: Command) -> None:
    image = command.directory / "disk.img"
    image.write_bytes(random.Random(1).randbytes(3 * MIB))
    command("import", "disk.img")
    command("import", image, "--name", "other", "--raw", "--label", "k=v")
    command("export", "disk", "out.img")
    assert (command.directory / "out.img").read_bytes() == image.read_bytes()
    layers = command.json("ls")
    assert [(layer["name"], layer["sealed"], layer["labels"]) for layer in layers] == [("disk", False, {}), ("other", False, {"k": "v"})]
    assert layers[1]["exclusive"] == 0  # equal chunks are stored once


@pytest.mark.parametrize(("mode", "is_tarball"), [("w", True), ("w:gz", True), ("w:xz", True), ("w:bz2", True), (None, False)])
def test_tarballs_are_known_by_their_content(tmp_path: Path, mode: Any, is_tarball: bool) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4096))
    if mode is not None:
        packed = tmp_path / "packed"
        with tarfile.open(packed, mode) as archive:
            archive.add(file, "file")
        file = packed
    assert looks_like_tarball(file) == is_tarball


def test_a_progress_bar_is_for_terminals(command: Command) -> None:
    (command.directory / "disk.img").write_bytes(random.Random(1).randbytes(MIB))
    ours, theirs = pty.openpty()
    done = command.start("import", "disk.img", stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    assert done.returncode == 0 and done.stdout == ""
    assert b"importing disk" in os.read(ours, 1 << 16)
    os.close(ours)


def test_exit_codes(command: Command) -> None:
    command("create", "a", "1M")
    (command.directory / "directory").mkdir()
    (command.directory / "small.img").write_bytes(b"x" * 4096)
    cases: list[tuple[int, tuple[str, ...], str]] = [
        (2, ("frobnicate",), "frobnicate"),
        (2, ("ls", "--frobnicate"), "--frobnicate"),
        (2, ("create", "b"), "SIZE"),
        (2, ("create", "b", "1 apple"), "apple"),
        (2, ("create", "b", "1M", "--label", "nothing"), "KEY=VALUE"),
        (2, ("create", "--", "-b", "1M"), "-b"),
        (2, ("init", "--chunk-size", "65000", "--pool", "new"), "65000"),
        (2, ("import", "small.img", "--raw", "--rootfs"), "--raw"),
        (2, ("resize", "a", "4K"), "a"),
        (3, ("rm", "nope"), "nope"),
        (3, ("ls", "--pool", "directory"), "directory"),
        (3, ("import", "missing.img"), "missing.img"),
        (3, ("umount", "/mnt/nothing"), "/mnt/nothing"),
        (4, ("init",), "pool"),
        (4, ("create", "a", "1M"), "a"),
        (4, ("import", "small.img", "--name", "a"), "a"),
        (4, ("reset", "a"), "a"),
        (4, ("umount", "a"), "a"),
        (4, ("detach", "a"), "a"),
        (1, ("import", "directory"), "directory"),
        (1, ("import", "small.img", "--rootfs", "--size", "64M"), "small.img"),
    ]
    assert [(code, arguments) for code, arguments, _ in cases] == [(command.fails(*arguments)[0], arguments) for _, arguments, _ in cases]
    for _, arguments, named in cases:
        assert named in command.fails(*arguments)[1]
    assert [layer["name"] for layer in command.json("ls")] == ["a"]


def test_no_space_has_its_code(command: Command) -> None:
    (command.directory / "big.img").write_bytes(random.Random(2).randbytes(8 * MIB))
    command.environment["THINPOOL_POOL"] = str(command.directory / "small")
    command("init", "--capacity", "1M")
    code, line = command.fails("import", "big.img")
    assert code == 5 and "capacity" in line
    assert command.json("ls") == []


def test_paths_that_are_not_utf8(command: Command) -> None:
    """The metadata store and the server's interface know no others; the host does."""
    odd = os.fsdecode(b"\xff")
    code, line = command.fails("init", "--pool", odd)
    assert (code, line.partition(":")[2][:12]) == (2, " cannot be p") and not (command.directory / odd).exists()
    command("create", "a", "1M")
    command("export", "a", odd)
    assert (command.directory / odd).stat().st_size == MIB
    command("serve", "--nbd", "./sock")
    assert command.fails("export", "a", odd + "2")[0] == 2
    assert command.json("ls")[0]["name"] == "a"
    os.kill(int((command.pool / "lock").read_text()), signal.SIGTERM)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_files_of_the_pool(command: Command, closed: str) -> None:
    for words in (["create", "a", "1M"], ["ls"], ["rm", "nope"], ["check"]):
        done = subprocess.run(
            ["sh", "-c", f'"$@" {closed}', "sh", *command.words(*words)], env=command.environment, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == (3 if words[0] == "rm" else 0)
        assert b"internal error" not in done.stderr
    assert (command.pool / "data").read_bytes() == b""
    assert [layer["name"] for layer in command.json("ls")] == ["a"]


def test_damage_has_its_code(command: Command) -> None:
    with thinpool.Pool.open(command.pool) as pool:
        pool.create_layer("a", "1M").pwrite(random.Random(3).randbytes(MIB), 0)
    os.truncate(command.pool / "data", 4096)
    code, line = command.fails("export", "a", "out.img")
    assert code == 6 and "data" in line


def test_a_holder_is_named(command: Command) -> None:
    with thinpool.Pool.open(command.pool):
        code, line = command.fails("ls")
    assert code == 4 and str(os.getpid()) in line


def test_a_bug_is_one_line_and_a_traceback_on_request(command: Command) -> None:
    code = (
        "import sys, thinpool.cli.layers as layers\n"
        "def broken(*_): raise RuntimeError('a bug')\n"
        "layers.pool_path = broken\n"
        "sys.argv = ['thinpool', 'init']\n"
        "from thinpool.cli import main; main()\n"
    )
    plain = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=command.environment)
    assert plain.returncode == 1
    assert plain.stderr.splitlines() == ["thinpool: internal error: RuntimeError: a bug (set THINPOOL_DEBUG=1 for the traceback)"]
    environment = {**command.environment, "THINPOOL_DEBUG": "1"}
    loud = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert "Traceback" in loud.stderr


def test_a_reader_that_has_had_enough(command: Command) -> None:
    with thinpool.Pool.open(command.pool) as pool:
        layer = pool.create_layer("a", "1G")
        for chunk in range(0, 16384, 2):
            layer.pwrite(b"x", chunk << 16)
    script = f"{sys.executable} -m thinpool.cli map a | head -1"
    done = subprocess.run(["sh", "-c", script], check=False, capture_output=True, text=True, env=command.environment)
    assert done.stderr == ""
    assert done.stdout.split() == ["OFFSET", "LENGTH", "KIND"]


@pytest.mark.parametrize("with_server", [False, True])
def test_ctrl_c_is_quiet_and_leaves_no_layer(command: Command, with_server: bool) -> None:
    keeper = thinpool.connect(command.pool, server=True) if with_server else None
    with (command.directory / "big.img").open("wb") as file:
        source = random.Random(4)
        for _ in range(256):
            file.write(source.randbytes(MIB))
    words = [sys.executable, "-m", "thinpool.cli", "import", "big.img"]
    running = subprocess.Popen(words, env=command.environment, cwd=command.directory, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while running.poll() is None and (command.pool / "data").stat().st_blocks < 2048:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert errors.strip() == ""
    assert running.returncode == 130
    wait_until(lambda: command.json("ls") == [])
    if keeper is not None:
        keeper.close()


def test_a_command_loads_only_what_it_needs() -> None:
    """Help and listings start at once: what serves, and what talks to registries, is not loaded for them."""
    program = "import sys, thinpool.cli.app; print([name for name in sys.argv[1:] if name in sys.modules])"
    heavy = [
        "fastapi",
        "pydantic",
        "uvicorn",
        "grpc",
        "google.protobuf",
        "prometheus_client",
        "urllib3",
        "thinpool._ext4",
        "thinpool.exports",
        "thinpool.recovery.repair",
    ]
    assert subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_version(command: Command) -> None:
    assert command("--version").startswith("thinpool ")


def test_serve_starts_a_server_that_answers(command: Command) -> None:
    command("serve")
    command("create", "a", "1M")
    assert [layer["name"] for layer in command.json("ls")] == ["a"]


@pytest.fixture
def foreground(command: Command) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "thinpool.cli", "serve", "--foreground"]
    running = subprocess.Popen(words, env=command.environment, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    while "serving" not in running.stderr.readline():
        assert running.poll() is None
    yield running
    running.kill()
    running.communicate()


def test_serve_in_the_foreground_stays_until_a_signal(command: Command, foreground: subprocess.Popen[str]) -> None:
    command("create", "a", "1M")
    assert [layer["name"] for layer in command.json("ls")] == ["a"]
    foreground.send_signal(signal.SIGINT)
    assert foreground.wait(30) == 0
    assert [layer["name"] for layer in command.json("ls")] == ["a"]
