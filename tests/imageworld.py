"""Real images for tests, made by umoci and buildah from a busybox root file system, and a real registry on loopback."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUSYBOX = "/bin/busybox"


def run(*command: str | Path) -> str:
    """A program that must succeed; what it prints."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def umoci_image(directory: Path, layers: int, seed: int = 0) -> Path:
    """An OCI layout with an image ``test`` of that many layers: files, links, whiteouts, replaced types, on a busybox."""
    layout, bundle = directory / f"layout-{layers}-{seed}", directory / f"bundle-{layers}-{seed}"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:test")
    for number in range(layers):
        run("umoci", "unpack", "--image", f"{layout}:test", bundle)
        _change(bundle / "rootfs", number, random.Random(seed * 1000 + number))
        run("umoci", "repack", "--image", f"{layout}:test", bundle)
        shutil.rmtree(bundle)
    run("umoci", "config", "--image", f"{layout}:test", "--config.cmd", "sh", "--config.env", "GREETING=hello", "--config.workingdir", "/work")
    return layout


def deep_umoci_image(directory: Path, layers: int) -> Path:
    """An OCI layout with an image ``test``: each layer adds a file, or hides that of some layers before."""
    layout, file, data = directory / f"deep-{layers}", directory / "file", directory / "data"
    data.mkdir()
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:test")
    for number in range(layers):
        file.write_text(str(number))
        change = ["--whiteout", f"/data/f{number - 8}"] if number % 10 == 9 else [file, f"/data/f{number}"]
        run("umoci", "insert", "--image", f"{layout}:test", *(change if number else [data, "/data"]))
    return layout


def buildah_image(directory: Path, layers: int) -> Path:
    """An OCI layout with an image ``test`` that buildah has made: a layer for each instruction that changes files."""
    context, layout = directory / f"context-{layers}", directory / f"buildah-{layers}"
    (context / "bin").mkdir(parents=True)
    shutil.copy(BUSYBOX, context / "bin/busybox")
    for applet in ("sh", "rm", "ln", "mkdir", "chmod", "chown"):
        (context / "bin" / applet).symlink_to("busybox")
    changes = (
        "RUN mkdir -p /data/deep/er && echo one > /data/one && ln /data/one /data/again && ln -s ../one /data/deep/link",
        "RUN rm -r /data/deep && mkdir /data/deep && echo new > /data/deep/new",
        "RUN rm /data/one && mkdir /data/one && chmod 1777 /data/one && chown 33:44 /data/again",
        "RUN rm -r /data/one && echo file > /data/one",
    )
    recipe = ["FROM scratch", "COPY bin /bin", *changes[: layers - 1], "ENV GREETING=hello", 'CMD ["sh"]']
    (context / "Containerfile").write_text("\n".join(recipe) + "\n")
    storage = ["--root", directory / "buildah", "--runroot", directory / "buildah-run", "--storage-driver", "vfs"]
    limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]  # or newer versions raise them, which not every root may
    run("buildah", *storage, "bud", "--isolation", "chroot", *limits, "--layers", "--format", "oci", "-t", "test", context)
    run("buildah", *storage, "push", "test", f"oci:{layout}:test")
    return layout


def _change(root: Path, number: int, rng: random.Random) -> None:
    if number == 0:
        for name in ("bin", "etc", "data/deep", "tmp"):
            (root / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, root / "bin/busybox")
        for applet in ("sh", "cat", "echo", "id", "pwd"):
            (root / "bin" / applet).symlink_to("busybox")
        (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n")
        (root / "etc/group").write_text("root:x:0:\napp:x:1001:\nextra:x:1002:app\n")
    for kind in range(6):
        (root / "data" / f"f{number}-{kind}").write_bytes(rng.randbytes(rng.choice([0, 10, 5000, 70_000, 300_000])))
    (root / "data" / f"link-{number}").hardlink_to(root / "data" / f"f{number}-0")
    (root / "data" / f"soft-{number}").symlink_to("x" * rng.choice([5, 100]))
    for path in sorted((root / "data").iterdir()):
        chance = rng.random()
        if path.name.startswith(f"f{number}") or path.name.endswith(f"-{number}") or path.name == "deep":
            continue
        if chance < 0.1:
            path.unlink() if not path.is_dir() else shutil.rmtree(path)
        elif chance < 0.2 and path.is_file() and not path.is_symlink():
            path.unlink()
            path.mkdir()
            (path / "inside").write_text("in place of a file")


@contextmanager
def registry(directory: Path) -> Iterator[str]:
    """A docker-registry on loopback; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configuration = directory / "registry.yml"
    configuration.write_text(
        f"version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {directory}/registry}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with (directory / "registry.log").open("wb") as log, subprocess.Popen(["docker-registry", "serve", configuration], stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, (directory / "registry.log").read_text()
                    time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
