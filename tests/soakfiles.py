"""Workers of the soak test (soak.py) that know nothing of layers: programs on mounted file systems, and fio behind QEMU."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from soakfronts import Library
from soakplace import GOLDEN, GOLDEN_BYTES, PATIENCE_SECONDS, Place, durably, stored, until_answered

_FILES_MAX = 24
_FILE_BYTES_MAX = 400_000


class FileSystem:
    """Works on a mounted file system: what was fsynced must read back, there, after mounting anew, and in snapshots."""

    def __init__(self, place: Place, front: Library, rng: random.Random, kind: str) -> None:
        self.place, self.front, self.rng, self.kind = place, front, rng, kind
        self.layer, self.directory = f"{place.name}-0", place.own / "mounted"
        self._file = place.own / "files"
        self._files: dict[str, str] = json.loads(self._file.read_text()) if self._file.exists() else {}  # the digest of what was fsynced, by name

    def run(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self._clear_up()
        steps: list[tuple[Callable[[], None], float]] = [
            (self._write, 40), (self._rename, 5), (self._remove, 8), (self._verify_one, 25), (self._look_at_snapshot, 2), (self._mount_anew, 1), (self._trim, 1)
        ]  # fmt: skip
        while not self.place.is_over():
            (step,) = self.rng.choices([step for step, _ in steps], [weight for _, weight in steps])
            self.place.journal(step.__name__)
            try:
                step()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.ENODEV) or not self.place.may_be_short():
                    raise
                self._mount_anew()
            time.sleep(self.rng.random() / 50)
        self._verify_all(self.directory, self._files)
        self._asking(self._unmount)

    def _asking(self, attempt: Callable[[], object]) -> None:
        until_answered(self.place, attempt, self.front.forget_connections)

    def _mount_of(self, layer: str) -> str | None:
        return next((one.mountpoint for one in self.front.pool.attachments() if one.layer == layer and one.mountpoint), None)

    def _clear_up(self) -> None:
        """What a killed worker has left goes: a snapshot, its clone, and the mount, which the server may just be taking down for it."""

        def clear() -> None:
            for name in (f"{self.layer}-clone", f"{self.layer}-snapshot"):
                self._forget(name)
            if self.layer not in self.front.names():
                self.front.clone(f"base-{self.kind}", self.layer, 0)

        self._asking(lambda: durably(self.place, self.front, clear))
        self._mount_anew()

    def _forget(self, name: str) -> None:
        if name in self.front.names():
            if self._mount_of(name):
                self.front.pool.layer(name).unmount()
            self.front.delete(name)

    def _mount(self) -> None:
        if not self._mount_of(self.layer):
            self._detach()
            self.front.pool.layer(self.layer).mount(self.directory)

    def _detach(self) -> None:
        """It was attached by somebody who has not heard that it was, or who was killed."""
        if any(one.layer == self.layer for one in self.front.pool.attachments()):
            self.front.pool.layer(self.layer).detach()

    def _unmount(self) -> None:
        if self._mount_of(self.layer):
            self.front.pool.layer(self.layer).unmount()

    def _noted(self, **files: str | None) -> None:
        """``None``: not known any more."""
        self._files = {name: digest for name, digest in {**self._files, **files}.items() if digest is not None}
        stored(self._file, self._files)

    def _some(self) -> str:
        return self.rng.choice(sorted(self._files) or ["file0"])

    def _write(self) -> None:
        name, data = f"file{self.rng.randrange(_FILES_MAX)}", self.rng.randbytes(self.rng.randrange(1, _FILE_BYTES_MAX))
        self._noted(**{name: None})
        with (self.directory / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._noted(**{name: hashlib.sha256(data).hexdigest()})

    def _rename(self) -> None:
        name, new = self._some(), f"file{self.rng.randrange(_FILES_MAX)}"
        if name not in self._files or name == new:
            return
        digest = self._files[name]
        self._noted(**{name: None, new: None})
        (self.directory / name).rename(self.directory / new)
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._noted(**{new: digest})

    def _remove(self) -> None:
        name = self._some()
        self._noted(**{name: None})
        (self.directory / name).unlink(missing_ok=True)

    def _verify_one(self) -> None:
        if self._files:
            name = self._some()
            self._verify_all(self.directory, {name: self._files[name]})

    @staticmethod
    def _verify_all(directory: Path, files: dict[str, str]) -> None:
        for name, digest in files.items():
            with (directory / name).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert hashlib.sha256(file.read()).hexdigest() == digest, f"{directory}/{name} is not what was fsynced"

    def _look_at_snapshot(self) -> None:
        """Of the mounted layer: a clone of it, mounted, has all that was fsynced before."""
        there, snapshot, clone = self.place.own / "looked-at", f"{self.layer}-snapshot", f"{self.layer}-clone"
        there.mkdir(exist_ok=True)

        def make() -> None:
            if snapshot not in self.front.names():
                self.front.snapshot(self.layer, snapshot)
                self.front.commit()  # or a killed server had it, and the next has nothing to clone
            if clone not in self.front.names():
                self.front.clone(snapshot, clone, 0)

        def forget() -> None:
            self._forget(clone)
            self._forget(snapshot)

        self._asking(lambda: durably(self.place, self.front, forget))  # those of a time when there was no space to mount it
        self._asking(lambda: durably(self.place, self.front, make))
        self._asking(lambda: self._mount_of(clone) or self.front.pool.layer(clone).mount(there))
        self._verify_all(there, self._files)
        self._asking(lambda: durably(self.place, self.front, forget))

    def _mount_anew(self) -> None:
        """If it has been out of space below, once there is some again: what was fsynced before must be there all the same."""
        while (self.place.top / "full").exists():
            time.sleep(0.1)
        self._asking(self._unmount)
        if self.kind == "xfs" and self.place.may_be_short():  # which replays its journal by mounting alone
            self._asking(self._mount)
            self._asking(self._unmount)
        self._asking(self._check)
        self._asking(self._mount)
        self._verify_all(self.directory, self._files)

    def _trim(self) -> None:
        subprocess.run(["fstrim", self.directory], check=not self.place.may_be_short(), capture_output=True)

    def _check(self) -> None:
        """The file system has no fault; where it could not be written to, it may want its journal replayed."""
        self._detach()
        layer = self.front.pool.layer(self.layer)
        device = layer.attach().device
        if self.kind == "ext4" and self.place.may_be_short():
            subprocess.run(["e2fsck", "-fp", device], check=False, capture_output=True)
        command = ["e2fsck", "-fn", device] if self.kind == "ext4" else ["xfs_repair", "-n", device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        layer.detach()
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout} {done.stderr}"


class Fio:
    """QEMU between fio, which verifies what it writes, and a layer over NBD, with siblings; it connects again after a kill."""

    def __init__(self, place: Place, front: Library, rng: random.Random) -> None:
        self.place, self.front, self.rng = place, front, rng

    def run(self) -> None:
        layer, front = f"{self.place.name}-0", self.place.own / "socket"
        while not self.place.is_over():
            until_answered(self.place, lambda: self._made(layer), self.front.forget_connections)
            front.unlink(missing_ok=True)
            options = f"driver=nbd,server.type=unix,server.path={self.place.top}/nbd,export={layer},reconnect-delay=60"
            qemu = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "qemu-nbd", "-k", str(front), "-t", "--image-opts", options])
            try:
                while not front.exists():
                    time.sleep(0.05)
                self._verified(front)
            finally:
                qemu.terminate()
                qemu.wait()

    def _made(self, layer: str) -> None:
        if layer in self.front.names():
            self.front.delete(layer)
        self.front.clone(GOLDEN, layer, GOLDEN_BYTES)
        self.front.commit()

    def _verified(self, front: Path) -> None:
        job = f"--name=v --ioengine=nbd --uri=nbd+unix:///?socket={front} --rw=randwrite --bsrange=4k-128k --size={GOLDEN_BYTES} --iodepth=8"
        job += f" --verify=crc32c --verify_backlog=64 --randseed={self.rng.randrange(1 << 31)} --rate_iops=100 --loops=3"
        done = subprocess.run(
            ["setpriv", "--pdeathsig", "KILL", "fio", *job.split()], cwd=self.place.own, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
        )
        if not self.place.may_be_short():
            assert done.returncode == 0 and "verify:" not in done.stdout, done.stdout + done.stderr
