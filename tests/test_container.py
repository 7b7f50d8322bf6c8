"""Containers on clones of a small root file system: apart from the host and each other, and gone when they end."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import needs_root, needs_tool

import thinpool
from thinpool.containers.run import run_container
from thinpool.errors import LayerBusy

pytestmark = [needs_root(), needs_tool("busybox", "mkfs.ext4", "mkfs.xfs", "resize2fs", "xfs_growfs")]

pytestmark.append(pytest.mark.usefixtures("runtime"))

RUN = """
import os, sys, thinpool
from thinpool.containers.run import run_container
with thinpool.Pool.open(sys.argv[1]) as pool:
    sys.exit(run_container(pool, "base", ["sh", "-c", sys.argv[3]], name=sys.argv[2], remove=True, runtime=os.environ["THINPOOL_RUNTIME"]))
"""


def import_busybox(pool: thinpool.Pool, tmp_path: Path, kind: str = "ext4") -> thinpool.Layer:
    path = tmp_path / "busybox.tar"
    with tarfile.open(path, "w") as tar:
        tar.add("/bin/busybox", "bin/busybox")
        for applet in ("sh", "ps", "hostname", "cat", "df", "sleep", "echo", "id"):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        text = tarfile.TarInfo("etc/text")
        tar.addfile(text)
    return pool.import_rootfs(path, "base", size="320M", filesystem=kind)


def shell(pool: thinpool.Pool, script: str, **options: object) -> int:
    return run_container(pool, "base", ["sh", "-c", script], **options)  # type: ignore[arg-type]


def start(pool_path: Path, name: str, script: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", RUN, pool_path, name, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def mounted_in(directory: Path) -> list[str]:
    """Others mount things elsewhere meanwhile."""
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(directory) in line]


def test_exit_status_isolation_and_what_stays(pool: thinpool.Pool, tmp_path: Path) -> None:
    import_busybox(pool, tmp_path)
    pool.uses.files()  # type: ignore[attr-defined]  # the tree of files that devices stand on stays up as long as the pool
    mounts, names = mounted_in(tmp_path), [layer.name for layer in pool.layers()]
    host = os.uname().nodename
    for script, status in {
        "exit 0": 0,
        "exit 7": 7,
        "sh -c 'kill -TERM $$'; exit $?": 143,
        "test $(hostname) = box && test $(ps | grep -c .) -lt 8": 0,
    }.items():
        assert shell(pool, script, name="box", remove=True) == status, script
    assert run_container(pool, "base", ["nothing"], remove=True) == 127
    assert run_container(pool, "base", ["/etc/text"], remove=True) == 126
    assert [layer.name for layer in pool.layers()] == names
    assert shell(pool, "echo kept > /etc/kept", name="a/kept") == 0
    assert run_container(pool, "a/kept", ["sh", "-c", "test $(cat /etc/kept) = kept"], remove=True) == 0
    assert mounted_in(tmp_path) == mounts
    assert os.uname().nodename == host


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_grown(pool: thinpool.Pool, tmp_path: Path, kind: str) -> None:
    import_busybox(pool, tmp_path, kind)
    assert shell(pool, "set -- $(busybox df -k / | busybox tail -n1); test $2 -gt 450000", size="512M", remove=True) == 0


def test_signals_input_and_busy(pool_path: Path, tmp_path: Path) -> None:
    with thinpool.Pool.create(pool_path) as pool:
        import_busybox(pool, tmp_path)
    process = start(pool_path, "box", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 9
    process = start(pool_path, "box", "echo ready; cat")
    assert process.communicate(b"through", timeout=20) == (b"through", None)


def test_a_terminal_is_passed_on(pool_path: Path, tmp_path: Path, runtime: str) -> None:
    with thinpool.Pool.create(pool_path) as pool:
        import_busybox(pool, tmp_path)
    ours, its = pty.openpty()
    command = [sys.executable, "-c", RUN, pool_path, "box", "test -t 0 && busybox tty; read word; echo got $word"]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, start_new_session=True) as process:
        os.close(its)
        os.write(ours, b"through\n")
        output = b""
        with suppress(OSError):  # EIO: the other end is closed
            while data := os.read(ours, 4096):
                output += data
    os.close(ours)
    assert process.returncode == 0
    assert b"got through" in output
    assert (b"not a tty" if runtime == "builtin" else b"/dev/") in output  # ours is of another file system than its /dev/pts


def test_killed_runner_leaves_nothing(pool_path: Path, tmp_path: Path) -> None:
    with thinpool.Pool.create(pool_path) as pool:
        import_busybox(pool, tmp_path)
    process = start(pool_path, "box", "echo ready; exec sleep 987")
    names = [path.read_text().split()[1] for path in pool_path.glob("run/bundles/*/runtime")]
    process.kill()
    process.wait(timeout=20)
    deadline = time.monotonic() + 10
    while any(b"sleep\x00987" in command_line(pid) for pid in os.listdir("/proc") if pid.isdigit()):
        assert time.monotonic() < deadline, "the container's process lives on"
        time.sleep(0.05)
    with thinpool.Pool.open(pool_path) as pool:
        assert shell(pool, "exit 0", name="next", remove=True) == 0  # sweeps
        assert "box" not in [layer.name for layer in pool.layers()]
        assert not list(pool_path.glob("run/bundles/*"))
    assert not [name for name in names if list(Path("/sys/fs/cgroup").glob(f"**/{name}"))]
    assert mounted_in(pool_path) == []


def command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_running_ones_are_busy_and_three_at_once(pool: thinpool.Pool, tmp_path: Path) -> None:
    base = import_busybox(pool, tmp_path)
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(shell(pool, f"echo {n} > /n; sleep 2; test $(cat /n) = {n}", name=f"box{n}"))) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 15
    while len(pool.attachments()) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(LayerBusy, match="box1"):
        pool.layer("box1").delete()
    for thread in threads:
        thread.join(timeout=30)
    assert results == [0, 0, 0]
    base.delete()
    assert not list(pool.path.glob("run/bundles/*"))
