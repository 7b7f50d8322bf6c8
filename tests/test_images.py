"""Images in a pool: stored once, out again as they came, gone without a trace; with real tools at both ends."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import needs_root, needs_tool
from filetrees import described
from imageworld import buildah_image, deep_umoci_image, registry, run, umoci_image

import thinpool
from thinpool.images.importer import Importer

pytestmark = [needs_tool("umoci", "skopeo", "buildah", "busybox"), needs_root()]


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of five layers."""
    return umoci_image(tmp_path_factory.mktemp("images"), 5)


def layer_names(pool: thinpool.Pool) -> set[str]:
    return {layer.name for layer in pool.layers()}


def fsck(layer: thinpool.Layer, directory: Path) -> None:
    image = directory / "fsck.img"
    layer.export_raw(image)
    done = subprocess.run(["/sbin/e2fsck", "-fn", str(image)], capture_output=True, text=True, check=False)
    image.unlink()
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("make", "layers"), [(umoci_image, 1), (umoci_image, 5), (deep_umoci_image, 127), (buildah_image, 1), (buildah_image, 5)])
def test_the_mounted_tree_is_what_umoci_unpacks(pool: thinpool.Pool, tmp_path: Path, make: Callable[[Path, int], Path], layers: int) -> None:
    layout = make(tmp_path, layers)
    image = pool.images.load(layout)
    assert len(image.layers) == layers
    run("umoci", "unpack", "--image", f"{layout}:test", tmp_path / "unpacked")
    mountpoint = tmp_path / "mounted"
    mountpoint.mkdir()
    top = pool.layer(image.layers[-1])
    top.mount(mountpoint)
    try:
        mounted, unpacked = (described(root, without=["lost+found"]) for root in (mountpoint, tmp_path / "unpacked" / "rootfs"))
        del mounted[""], unpacked[""]  # the root directory is in no layer: its time is when umoci made it
        assert mounted == unpacked
    finally:
        top.unmount()
    fsck(top, tmp_path)


def test_an_image_that_is_there_brings_nothing(pool: thinpool.Pool, layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pool.images.load(layout)
    layers = [pool.layer(name) for name in first.layers]
    assert all(layer.sealed and layer.digests["chain"] == layer.name for layer in layers)
    assert [layer.parent for layer in layers[1:]] == layers[:-1]
    run("skopeo", "copy", f"oci:{layout}:test", f"docker-archive:{tmp_path}/image.tar:other/name:1")
    before, allocated = layer_names(pool), pool.usage().allocated
    monkeypatch.setattr(Importer, "_apply", lambda *_: pytest.fail("applied a layer that is there"))
    again = pool.images.load(tmp_path / "image.tar")
    assert (again.id, layer_names(pool), pool.usage().allocated) == (first.id, before, allocated)
    assert again.references == ("docker.io/library/test:latest", "docker.io/other/name:1")


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci"])
def test_saved_images_are_what_they_were(pool: thinpool.Pool, layout: Path, tmp_path: Path, form: str) -> None:
    pool.images.load(layout)
    pool.images.save(["test"], tmp_path / "saved", form=form)  # type: ignore[arg-type]
    run("skopeo", "copy", f"{form}:{tmp_path}/saved", f"oci:{tmp_path}/copy:test")
    ours, theirs = (json.loads(run("skopeo", "inspect", "--config", f"oci:{where}:test")) for where in (tmp_path / "copy", layout))
    assert ours == theirs
    if form != "docker-archive":
        raws = [run("skopeo", "inspect", "--raw", image) for image in (f"{form}:{tmp_path}/saved", f"oci:{layout}:test")]
        assert raws[0] == raws[1]
    with thinpool.Pool.create(tmp_path / "second") as second:
        assert second.images.load(tmp_path / "saved").id == pool.images.get("test").id


def test_through_a_registry_and_back(pool: thinpool.Pool, layout: Path, tmp_path: Path) -> None:
    with registry(tmp_path) as address:
        run("skopeo", "copy", "--dest-tls-verify=false", f"oci:{layout}:test", f"docker://{address}/a/image:1")
        image = pool.images.pull(f"{address}/a/image:1")
        pool.images.tag(image.id, f"{address}/b/other:2")
        digest = pool.images.push(f"{address}/b/other:2")
        assert digest == image.digest == "sha256:" + hashlib.sha256(run("skopeo", "inspect", "--raw", f"oci:{layout}:test").encode()).hexdigest()
        assert json.loads(run("skopeo", "inspect", "--tls-verify=false", f"docker://{address}/b/other:2"))["Digest"] == digest
        log = (tmp_path / "registry.log").read_text()
        assert "mount=sha256" in log and "PATCH /v2/b/other" not in log  # what the registry had was not sent again
        pool.containers.create(image.id, name="c")
        (tmp_path / "new").write_text("new\n")
        pool.containers.copy_in(tmp_path / "new", "c", "/data/new")
        pool.images.commit("c", f"{address}/c/mine:3", message="more")
        assert pool.images.get(f"{address}/c/mine:3").digest is None
        digest = pool.images.push(f"{address}/c/mine:3")
        assert pool.images.get(f"{address}/c/mine@{digest}").digest == pool.images.push(f"{address}/c/mine:3") == digest
        assert pool.images.inspect(f"{address}/c/mine:3")["RepoDigests"] == [f"{address}/c/mine@{digest}"]
        run("skopeo", "copy", "--src-tls-verify=false", f"docker://{address}/c/mine:3", f"oci:{tmp_path}/back:x")
        with pytest.raises(thinpool.RegistryError, match="MANIFEST_UNKNOWN"):
            pool.images.pull(f"{address}/no/such:1")
    run("umoci", "unpack", "--image", f"{tmp_path}/back:x", tmp_path / "unpacked")
    assert (tmp_path / "unpacked/rootfs/data/new").read_text() == "new\n"
    with pytest.raises(thinpool.RegistryError, match="cannot be reached"):
        pool.images.pull(f"{address}/a/image:1")


def test_what_is_removed_leaves_nothing(pool: thinpool.Pool, layout: Path, tmp_path: Path) -> None:
    other = umoci_image(tmp_path, 2, seed=9)
    pool.images.load(other, "other:1")
    pool.reclaim()
    before = layer_names(pool), pool.usage().allocated
    image = pool.images.load(layout)
    pool.images.tag("test", "test:2")
    assert pool.images.remove("test:2").images == ()
    pool.containers.create("test", name="c")
    with pytest.raises(thinpool.ImageBusy, match="c"):
        pool.images.remove("test")
    with pytest.raises(thinpool.ImageNotFound):
        pool.images.get("nope")
    pool.containers.remove("c")
    assert pool.images.get("test").id == image.id  # a container's end leaves its image whole
    removed = pool.images.remove("test")
    pool.reclaim()
    assert removed.images == (image.id,) and (layer_names(pool), pool.usage().allocated) == before
    pool.images.untag("other:1")
    assert len(pool.images.gc().images) == 1 and pool.images.list() == []


def test_figures_add_up(pool: thinpool.Pool, layout: Path, tmp_path: Path) -> None:
    image = pool.images.load(layout)
    history = pool.images.history("test")
    assert sum(entry.exclusive for entry in history) <= image.usage.exclusive
    assert [entry.layer for entry in history if entry.layer] == list(image.layers)
    assert all(entry.size == 0 for entry in history if entry.layer is None)
    assert all(entry.size > 0 for entry in history if entry.layer is not None)
    pool.images.load(layout, "again:1")
    assert pool.images.get("again:1").usage == image.usage
    assert pool.images.inspect("test")["Config"]["WorkingDir"] == "/work"


def test_the_same_layer_at_once_from_several(pool: thinpool.Pool, layout: Path) -> None:
    done: list[str] = []
    threads = [threading.Thread(target=lambda n=n: done.append(pool.images.load(layout, f"name{n}:1").id)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4 and len(set(done)) == 1
    assert sum("chain" in layer.digests for layer in pool.layers()) == 5
    assert len(pool.images.get(done[0]).references) == 4


def test_a_rootfs_tarball_is_an_image_of_one_layer(pool: thinpool.Pool, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hello").write_text("hello")
    with tarfile.open(tmp_path / "root.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "etc", "etc")
    image = pool.images.load(tmp_path / "root.tar.xz", "scratch:1")
    assert len(image.layers) == 1
    assert pool.images.load(tmp_path / "root.tar.xz", "scratch:2").id == image.id
    pool.containers.copy_out("scratch:1", "/etc/hello", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "hello"


def damaged(layout: Path, copy: Path) -> Iterator[str]:
    """Ways in which a layout can be damaged."""
    import shutil

    manifest = json.loads(run("skopeo", "inspect", "--raw", f"oci:{layout}:test"))
    blob = copy / "blobs/sha256" / manifest["layers"][2]["digest"].removeprefix("sha256:")
    for what in ("missing", "short", "flipped", "long"):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(layout, copy)
        content = bytearray(blob.read_bytes())
        if what == "flipped":
            content[len(content) // 2] ^= 1
        blob.unlink()
        if what != "missing":
            blob.write_bytes({"short": content[:-20], "flipped": content, "long": content + b"more"}[what])
        yield what


def test_a_damaged_image_leaves_no_trace(pool: thinpool.Pool, layout: Path, tmp_path: Path) -> None:
    pool.images.load(umoci_image(tmp_path, 1, seed=3), "first:1")
    pool.reclaim()
    before, allocated = layer_names(pool), pool.usage().allocated
    for what in damaged(layout, tmp_path / "copy"):
        with pytest.raises(thinpool.ImportFailed):
            pool.images.load(tmp_path / "copy")
        pool.reclaim()
        assert (layer_names(pool), pool.usage().allocated) == (before, allocated), what
    with pytest.raises(thinpool.ImportFailed, match="no OCI layout"):
        pool.images.load(tmp_path)
    with pytest.raises(thinpool.ImportFailed, match="cannot read"):
        pool.images.load(tmp_path / "nope")


VICTIM = """
import sys, thinpool
with thinpool.Pool.open(sys.argv[1]) as pool:
    print("ready", flush=True)
    pool.images.load(sys.argv[2])
    print("done", flush=True)
    sys.stdin.read()
"""


def test_a_killed_import_leaves_no_trace(tmp_path: Path, layout: Path) -> None:
    rng = random.Random(seed := random.randrange(1 << 32))
    print(f"seed {seed}")
    path = tmp_path / "pool"
    with thinpool.Pool.create(path) as pool:
        pool.images.load(umoci_image(tmp_path, 1, seed=3), "first:1")
        pool.reclaim()
        before, allocated = layer_names(pool), pool.usage().allocated
    for _ in range(8):
        command = [sys.executable, "-c", VICTIM, str(path), str(layout)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(rng.random() * 0.4)
            os.kill(process.pid, signal.SIGKILL)
        with thinpool.Pool.open(path) as pool:
            names = layer_names(pool)
            if len(pool.images.list()) == 1:
                pool.reclaim()
                assert (names, pool.usage().allocated) == (before, allocated)
            else:  # it was complete, and then it is whole
                assert len(pool.images.get("test").layers) == 5
                pool.images.remove("test")


def test_without_root(tmp_path: Path, layout: Path) -> None:
    """Load, inspect, history, create, cp, diff, commit and save as somebody who may do nothing."""
    script = """
import sys, thinpool
from pathlib import Path
home = Path(sys.argv[1])
with thinpool.Pool.create(home / "pool") as pool:
    pool.images.load(sys.argv[2])
    pool.containers.create("test", name="c")
    (home / "file").write_text("mine")
    pool.containers.copy_in(home / "file", "c", "/etc/file")
    assert [change.path for change in pool.containers.diff("c")] == ["/etc", "/etc/file"]
    pool.images.commit("c", "mine:1")
    pool.images.save(["mine:1"], home / "saved.tar")
    pool.containers.copy_out("mine:1", "/etc/file", home / "out")
    assert (home / "out").read_text() == "mine" and len(pool.images.history("mine:1")) >= 6
"""
    home = tmp_path / "home"
    run("cp", "-r", layout, tmp_path / "layout")
    run("chmod", "-R", "a+rX", tmp_path / "layout")
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o711)
    home.mkdir()
    os.chown(home, 65534, 65534)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", script, str(home), str(tmp_path / "layout")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HOME": str(home)})
    assert done.returncode == 0, done.stderr
