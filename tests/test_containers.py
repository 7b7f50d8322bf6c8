"""Containers: made in no time, each its own, gone without a trace; what they change, and what is copied in and out."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import needs_root, needs_tool
from imageworld import umoci_image

import thinpool
from thinpool.containers.run import run_container, start_container

pytestmark = [needs_tool("umoci", "busybox"), needs_root()]


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return umoci_image(tmp_path_factory.mktemp("images"), 2)


@pytest.fixture
def loaded(pool: thinpool.Pool, layout: Path) -> thinpool.Pool:
    pool.images.load(layout, "test:1")
    return pool


def test_two_hundred_at_once(loaded: thinpool.Pool, tmp_path: Path) -> None:
    loaded.reclaim()
    before = loaded.usage().allocated
    for number in range(200):
        container = loaded.containers.create("test:1", name=f"c{number}")
        assert container.usage.exclusive == 0
    file = tmp_path / "file"
    for number in range(200):
        file.write_text(str(number))
        loaded.containers.copy_in(file, f"c{number}", "/etc/mine")
    for number in range(200):
        loaded.containers.copy_out(f"c{number}", "/etc/mine", tmp_path / "out")
        assert (tmp_path / "out").read_text() == str(number)
        assert loaded.layer(f"c{number}").usage().exclusive < 1 << 20
    for container in loaded.containers.list():
        loaded.containers.remove(container.name)
    loaded.reclaim()
    assert loaded.usage().allocated == before and loaded.containers.list() == []
    assert len(loaded.images.get("test:1").layers) == 2


def resident(path: Path) -> int:
    """Bytes of a file in the page cache."""
    return int(subprocess.run(["fincore", "--bytes", "-nro", "RES", path], capture_output=True, text=True, check=True).stdout)


def test_twenty_that_read_the_same_keep_one_copy_of_it_in_the_page_cache(pool: thinpool.Pool, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(16):
        (tree / f"file{number}").write_bytes(random.Random(number).randbytes(1 << 20))
    subprocess.run(["tar", "-C", tree, "-cf", tmp_path / "tree.tar", "."], check=True)
    pool.images.load(tmp_path / "tree.tar", "base:1")
    pool.commit()
    data = pool.path / "data"
    with data.open("rb") as file:
        deadline = time.monotonic() + 10
        while resident(data) > 4 << 20 and time.monotonic() < deadline:  # pages that the kernel is at work on stay
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cached, allocated = [], []
    mountpoint = tmp_path / "mounted"
    mountpoint.mkdir()
    for number in range(20):
        pool.containers.create("base:1", name=f"c{number}")
        (mountpoint / str(number)).mkdir()
        pool.layer(f"c{number}").mount(mountpoint / str(number))
        for path in tree.iterdir():
            assert (mountpoint / str(number) / path.name).read_bytes() == path.read_bytes()
        cached.append(resident(data))
        allocated.append(pool.usage().allocated)
    for number in range(20):
        pool.layer(f"c{number}").unmount()
    written = allocated[-1] - allocated[0]  # by each mount for itself, the more the longer it is there
    assert written < 16 << 20
    assert cached[0] >= 16 << 20 and cached[-1] - cached[0] <= written + (1 << 20)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize(
    ("settings", "script", "expected"),
    [
        ({}, "echo $GREETING $HOME; pwd; id -u", "hello /root\n/work\n0\n"),
        ({"user": "app"}, "id; echo $HOME", "uid=1000(app) gid=1001(app) groups=1001(app),1002(extra)\n/home/app\n"),
        ({"user": "77:88", "workdir": "/data"}, "id -u; id -g; pwd", "77\n88\n/data\n"),
        ({"environment": {"GREETING": "bye"}, "hostname": "box"}, "echo $GREETING; hostname", "bye\nbox\n"),
    ],
)  # fmt: skip
def test_a_run_honours_the_image_and_what_is_said_instead(
    loaded: thinpool.Pool, settings: dict[str, object], script: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["/bin/busybox", "sh", "-c", f"PATH=/bin\nalias hostname='busybox hostname'\n{script}"]
    assert run_container(loaded, "test:1", command, remove=True, **settings) == 0  # type: ignore[arg-type]
    assert capfd.readouterr().out == expected


@pytest.mark.usefixtures("runtime")
def test_entrypoint_and_default_command(loaded: thinpool.Pool, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_container(loaded, "test:1", ["made", "so"], entrypoint="/bin/echo", remove=True) == 0
    assert capfd.readouterr().out == "made so\n"
    assert loaded.containers.create("test:1", name="c").command == ("sh",)
    assert loaded.containers.create("test:1", name="d", command=["/bin/echo", "mine"]).command == ("/bin/echo", "mine")
    assert start_container(loaded, "d") == 0 and capfd.readouterr().out == "mine\n"
    assert run_container(loaded, "test:1", ["/bin/echo"], user="nobody-here", remove=True) == 126


def test_words_that_are_not_utf8(loaded: thinpool.Pool, runtime: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    odd = os.fsdecode(b"\xff")
    with nullcontext() if runtime == "builtin" else pytest.raises(UnicodeEncodeError):
        run_container(loaded, "test:1", ["/bin/echo", odd], remove=True)
    with nullcontext() if runtime == "builtin" else pytest.raises(UnicodeEncodeError):
        run_container(loaded, "test:1", ["/bin/busybox", "sh", "-c", "echo $A"], environment={"A": odd}, remove=True)
    assert capfdbinary.readouterr().out == (b"\xff\n\xff\n" if runtime == "builtin" else b"")
    assert loaded.containers.list() == []


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("server", [False, True])
def test_a_relative_path_leads_to_the_pool_from_elsewhere_too(
    loaded: thinpool.Pool, server: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded.close()
    monkeypatch.chdir(loaded.path.parent)
    with thinpool.connect(loaded.path.name, server=server) as pool:
        assert run_container(pool, "test:1", ["/bin/echo", "here"], remove=True) == 0
        monkeypatch.chdir("/")
        assert run_container(pool, "test:1", ["/bin/echo", "elsewhere"], remove=True) == 0
        pool.make_backup()
    assert capfd.readouterr().out == "here\nelsewhere\n"


def test_copies_run_at_once(loaded: thinpool.Pool, runtime: str) -> None:
    before = [layer.name for layer in loaded.layers()]
    script = f"""
import sys, thinpool
from thinpool.containers.run import run_container
with thinpool.connect({str(loaded.path)!r}) as pool:
    command = ["sh", "-c", "echo $THINPOOL_COPY > /etc/mine; cat /etc/mine; test $THINPOOL_COPY != 3"]
    sys.exit(run_container(pool, "test:1", command, name="t", remove=True, copies=4, runtime={runtime!r}))
"""
    loaded.close()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"t-{number} | {number}" for number in range(1, 5)]
    with thinpool.Pool.open(loaded.path) as pool:
        assert [layer.name for layer in pool.layers()] == before


def test_diff_commit_and_reset_while_it_is_mounted(loaded: thinpool.Pool, tmp_path: Path) -> None:
    loaded.containers.create("test:1", name="c")
    mountpoint = tmp_path / "mounted"
    mountpoint.mkdir()
    layer = loaded.layer("c")
    layer.mount(mountpoint)
    try:
        (mountpoint / "new").write_text("new")
        (mountpoint / "etc/passwd").unlink()
        (mountpoint / "etc/group").chmod(0o600)
        assert [(one.kind, one.path) for one in loaded.containers.diff("c")] == [
            ("C", "/etc"), ("C", "/etc/group"), ("D", "/etc/passwd"), ("A", "/new")
        ]  # fmt: skip
        image = loaded.images.commit("c", "changed:1", message="why", author="who")
        with pytest.raises(thinpool.LayerBusy):
            loaded.containers.reset("c")
        with pytest.raises(thinpool.LayerBusy):
            loaded.containers.remove("c")
    finally:
        layer.unmount()
    assert image.layers[:2] == loaded.images.get("test:1").layers and len(image.layers) == 3
    assert loaded.images.history("changed:1")[-1].comment == "why"
    loaded.containers.copy_out("changed:1", "/etc", tmp_path / "etc")
    assert {path.name for path in (tmp_path / "etc").iterdir()} == {"group"}
    started = time.monotonic()
    loaded.containers.reset("c")
    assert loaded.containers.diff("c") == [] and time.monotonic() > started


def test_copying_leads_nowhere_else(loaded: thinpool.Pool, tmp_path: Path) -> None:
    loaded.containers.create("test:1", name="c")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_bytes(b"x" * 100_000)
    (tree / "out").symlink_to("/etc/passwd")
    (tree / "up").symlink_to("../../../../../etc/hostname")
    loaded.containers.copy_in(tree, "c", "/data")
    loaded.containers.copy_out("c", "/data/tree", tmp_path / "back")
    assert (tmp_path / "back/sub/file").read_bytes() == b"x" * 100_000
    assert os.readlink(tmp_path / "back/out") == "/etc/passwd"
    loaded.containers.copy_out("c", "/data/tree/out", tmp_path / "passwd")  # the container's
    assert "app:x:1000" in (tmp_path / "passwd").read_text()
    with pytest.raises(thinpool.ImportFailed, match="link"):
        loaded.containers.copy_in(tree / "sub/file", "c", "/data/tree/out/below")
    for path in ("/data/../../x", "/no/such/place"):
        with pytest.raises(thinpool.ImportFailed):
            loaded.containers.copy_in(tree / "sub/file", "c", path)
    with pytest.raises(thinpool.ImportFailed, match="there is no"):
        loaded.containers.copy_out("c", "/data/tree/up", tmp_path / "nope")
    with pytest.raises(thinpool.ContainerNotFound):
        loaded.containers.get("nope")


def test_removing_by_force_kills(loaded: thinpool.Pool, runtime: str) -> None:
    path = loaded.path
    loaded.close()
    script = f"""
import sys, thinpool
from thinpool.containers.run import run_container
with thinpool.connect({str(path)!r}, server=True) as pool:
    run_container(pool, "test:1", ["sh", "-c", "echo up; sleep 1000; busybox sleep 1000"], name="c", runtime={runtime!r})
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        names = [file.read_text().split()[1] for file in path.glob("run/bundles/*/runtime")]
        with thinpool.connect(path) as pool:
            with pytest.raises(thinpool.LayerBusy):
                pool.containers.remove("c")
            pool.containers.remove("c", force=True)
            assert pool.containers.list() == []
    assert process.returncode == -9
    assert not list(path.glob("run/bundles/*"))
    assert not [name for name in names if list(Path("/sys/fs/cgroup").glob(f"**/{name}"))]


@pytest.mark.usefixtures("runtime")
def test_an_image_has_no_say_outside_of_its_container(loaded: thinpool.Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What it sets in the environment, for the dynamic linker or for Python, is for its command alone."""
    trap = tmp_path / "trap.so"
    subprocess.run(["gcc", "-shared", "-o", trap, "-xc", "-"], input=b"__attribute__((constructor)) void run(void) { __builtin_trap(); }", check=True)
    environment = {"LD_PRELOAD": str(trap), "PYTHONSTARTUP": "/x", "PYTHONPATH": "/x", "PYTHONHOME": "/x"}
    assert run_container(loaded, "test:1", ["/bin/busybox", "env"], environment=environment, remove=True) == 0
    assert f"LD_PRELOAD={trap}" in capfd.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["crun", "runc"])
def test_an_oci_container_is_confined(loaded: thinpool.Pool, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    script = "cat /proc/kcore | head -c 1; busybox mount -t tmpfs none /mnt; echo x > /proc/sys/kernel/hostname; grep CapEff /proc/self/status"
    command = ["/bin/busybox", "sh", "-c", f"busybox mkdir -p /mnt; alias cat='busybox cat' head='busybox head' grep='busybox grep'; {script}"]
    assert run_container(loaded, "test:1", command, runtime=name, remove=True) == 0
    found = capfd.readouterr()
    assert found.out.split()[:1] == ["CapEff:"] and int(found.out.split()[1], 16) & ~0xA80425FB == 0
    assert "mount" in found.err and "hostname" in found.err
    with pytest.raises(thinpool.ToolFailed, match="no OCI runtime 'nope'"):
        run_container(loaded, "test:1", command, runtime="nope", remove=True)
    assert not list(loaded.path.glob("run/bundles/*"))


def test_grown(loaded: thinpool.Pool, tmp_path: Path) -> None:
    assert loaded.containers.create("test:1", name="c", size="12G").usage.virtual == 12 << 30
    mountpoint = tmp_path / "mounted"
    mountpoint.mkdir()
    loaded.layer("c").mount(mountpoint)
    free = os.statvfs(mountpoint)
    loaded.layer("c").unmount()
    assert free.f_blocks * free.f_frsize > 11 << 30
    loaded.containers.reset("c")
    assert loaded.containers.get("c").usage.virtual == 12 << 30
    with pytest.raises(thinpool.BadSize):
        loaded.containers.resize("c", "1G")
    loaded.containers.resize("c", "13G")
    assert loaded.layer("c").size == 13 << 30
