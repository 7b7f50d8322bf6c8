"""The soak test: for an hour everything at once on one served pool, which is killed again and again, and then looked at from all sides.

``./dev soak [MINUTES]``. Workers (soakworkers.py) change layers of their own by the library, HTTP, NBD and the command, and files on mounted file
systems, and note what must be there. Meanwhile this process, the conductor, kills the server, its keeper and the workers, has the server replaced,
lets the pool run short of space, checks it, digests it, compacts it, backs it up, sometimes so that all is held, damages it and heals it. In the last
part the server is let live, and its memory is looked at over time. At the end every byte is compared. Everything random comes from the seed that is
printed, but for when processes get to run.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import invariants
from soakplace import GOLDEN, GOLDEN_BYTES, MIB, SPARE

import thinpool
from thinpool.errors import ThinpoolError
from thinpool.server.client import RemotePool
from thinpool.server.connect import connect, take_over

CAPACITY = 2 << 30
WORKERS = {"library-a": "library", "library-b": "library", "http": "http", "nbd": "nbd", "cli": "cli", "ext4": "ext4", "xfs": "xfs", "fio": "fio"}
FILE_SYSTEM_BYTES = {"ext4": 128 * MIB, "xfs": 320 * MIB}
SAMPLE_SECONDS = 2.0
STORM_PART = 0.5  # of the time, in which the server is killed; in the rest it lives
WARM_UP_PART = 0.25  # of the rest
GROWTH_BYTES_MAX, GROWTH_PART_MAX = 8 * MIB, 0.1  # of the server's anonymous memory over the rest, and of the mean
GROWTH_COUNT_MAX = 8  # descriptors, threads
JUDGED_SECONDS = 600.0  # less says nothing: within 272 s it went from 60 to 94 MB and back, and over 810 s by 1.8 MB
START_SECONDS, END_SECONDS = 60.0, 180.0


def say(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{words} ended with {done.returncode}: {done.stdout} {done.stderr}"
    return done


def processes(*words: str) -> list[int]:
    """Those that have all of these in their command line, but for this one."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (directory / "cmdline").read_bytes().decode(errors="replace")
            if all(word in line for word in words) and int(directory.name) != os.getpid():
                found.append(int(directory.name))
    return found


@dataclass(frozen=True)
class Sample:
    """What one process takes at a time: bytes, and counts."""

    time: float
    anonymous: int
    resident: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Sample:
        status = Path(f"/proc/{pid}/status").read_text()
        figures = {name: int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1]) for name in ("RssAnon", "VmRSS", "Threads")}  # type: ignore[index]
        return cls(time.monotonic(), figures["RssAnon"] << 10, figures["VmRSS"] << 10, len(os.listdir(f"/proc/{pid}/fd")), figures["Threads"])


def growth(samples: list[Sample], what: str) -> float:
    """Over the whole time, by the line that fits best (least squares)."""
    times, values = [one.time for one in samples], [float(getattr(one, what)) for one in samples]
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((at - middle) ** 2 for at in times)
    return (times[-1] - times[0]) * sum((at - middle) * (value - mean) for at, value in zip(times, values, strict=True)) / spread if spread else 0.0


@dataclass
class Soak:
    """One run."""

    top: Path
    seed: int
    seconds: float
    counts: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.path = self.top / "pool"
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._beside: dict[str, subprocess.Popen[str]] = {}  # commands that take a while
        self._address = ""
        self._did = True  # whether the last step has not been passed over
        self._steps: list[str] = []

    @property
    def server(self) -> int:
        return int((self.path / "lock").read_text())

    @contextmanager
    def pool(self) -> Iterator[RemotePool]:
        pool = connect(self.path, server=True)
        assert isinstance(pool, RemotePool)
        try:
            yield pool
        finally:
            pool.close()

    # --- beginning ---

    def prepare(self) -> None:
        """The pool, its server, what the workers clone, and the workers."""
        thinpool.Pool.create(self.path, capacity=CAPACITY).close()
        (self.top / GOLDEN).write_bytes(self.rng.randbytes(GOLDEN_BYTES))
        (self.top / GOLDEN).chmod(0o400)
        (self.top / SPARE).write_bytes(self.rng.randbytes(2 * MIB))
        with self.pool() as pool:
            for name in (GOLDEN, SPARE):
                pool.import_raw(self.top / name, name).seal()
            for kind, size in FILE_SYSTEM_BYTES.items():
                layer = pool.create_layer(f"base-{kind}", size)
                run(f"mkfs.{kind}", "-q", layer.attach().device)
                layer.detach()
                layer.seal()
            pool.compute_digests()  # with which the spare layer gets its checksums
            pool.serve_nbd(f"unix:{self.top}/nbd")
            self._address = pool.serve_http("127.0.0.1:0")
            pool.commit()
        for name in WORKERS:
            self._start(name)

    def _start(self, name: str) -> None:
        program = Path(__file__).with_name("soakworkers.py")
        words = [sys.executable, program, WORKERS[name], name, self.top, str(self.rng.getrandbits(32)), self._address]
        with (self.top / f"{name}.log").open("ab") as log:
            self._workers[name] = subprocess.Popen(words, stdout=log, stderr=log)

    # --- while it runs ---

    def work(self) -> None:
        """The storm, then the calm."""
        began = time.monotonic()
        storm_ends, ends = began + STORM_PART * self.seconds, began + self.seconds
        steps: list[tuple[Callable[[], None], float]] = [
            (self._kill_worker, 4), (self._run_short, 1), (self._extend_by_itself, 1), (self._check, 2), (self._digest, 1), (self._back_up, 1),
            (self._hold, 1), (self._compact, 1), (self._heal, 2),
        ]  # fmt: skip
        storm: list[tuple[Callable[[], None], float]] = [*steps, (self._kill_server, 8), (self._take_over, 2), (self._kill_keeper, 1)]
        sample_at = 0.0
        while (now := time.monotonic()) < ends:
            choices = storm if now < storm_ends else steps
            (step,) = self.rng.choices([step for step, _ in choices], [weight for _, weight in choices])
            self._did = True
            self._steps.append(f"{time.strftime('%H:%M:%S')} {step.__name__.strip('_')}")
            step()
            self.counts[step.__name__.strip("_").replace("_", " ")] += self._did
            pause_ends = time.monotonic() + min(self.rng.uniform(0.2, 6.0), self.seconds / 40)
            while time.monotonic() < pause_ends:
                self._look_after()
                if time.monotonic() >= max(sample_at, storm_ends + WARM_UP_PART * (ends - storm_ends)):
                    self.samples.append(Sample.of(self.server))
                    sample_at = time.monotonic() + SAMPLE_SECONDS
                time.sleep(0.05)

    def _look_after(self) -> None:
        """Nothing has failed."""
        for name, worker in self._workers.items():
            assert worker.poll() is None, f"worker {name} ended with {worker.returncode}: {(self.top / f'{name}.log').read_text()[-3000:]}"
        for name, command in list(self._beside.items()):
            if command.poll() is not None:
                del self._beside[name]
                said, _ = command.communicate()
                # A verb that asked a server which was killed meanwhile says so.
                gone = name != "check" and "server" in said
                assert command.returncode == 0 or gone, f"thinpool {name} ended with {command.returncode}: {said}"

    def _wait_until(self, what: Callable[[], bool], seconds: float, why: str) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, why
            self._look_after()
            time.sleep(0.02)

    def _kill_server(self) -> None:
        before = self.server
        os.kill(before, signal.SIGKILL)
        with self.pool() as pool:
            pool.usage()
        assert self.server != before

    def _take_over(self) -> None:
        take_over(self.path).close()

    def _keepers(self) -> list[int]:
        return processes("keeping.keeper", str(self.path / "run"))

    def _keeper_listens_since(self) -> int:
        with suppress(FileNotFoundError):
            return (self.path / "run/keeper.sock").stat().st_mtime_ns
        return 0

    def _kill_keeper(self) -> None:
        listened = self._keeper_listens_since()
        for pid in self._keepers():
            os.kill(pid, signal.SIGKILL)
        self._wait_until(lambda: self._keeper_listens_since() not in (0, listened), START_SECONDS, "no other keeper")

    def _kill_worker(self) -> None:
        name = self.rng.choice(sorted(WORKERS))
        self._steps[-1] += f" {name}"
        self._workers[name].kill()
        self._workers[name].wait()
        time.sleep(1)  # the server still does what it had asked for
        self._start(name)

    def _asked(self, ask: Callable[[RemotePool], object]) -> None:
        with self.pool() as pool:
            ask(pool)

    def _run_short(self) -> None:
        """For a moment there is no room for anything more, and then there is again."""
        (self.top / "short").touch()
        (self.top / "full").touch()
        with self.pool() as pool:
            pool.set_policy(replace(pool.policy(), extend_at=0))
            pool.set_capacity(max(pool.usage().allocated, pool.chunk_size))
            pause_ends = time.monotonic() + self.rng.random()
            while time.monotonic() < pause_ends:
                self._look_after()
            pool.set_capacity(CAPACITY)
        (self.top / "full").unlink()
        (self.top / "short").touch()

    def _extend_by_itself(self) -> None:
        """There is little room, and the policy makes more before anybody fails; the trash may be emptied."""
        (self.top / "little").touch()
        with self.pool() as pool:
            pool.set_policy(replace(pool.policy(), extend_at=80, extend_by=20, extend_max=2 * CAPACITY))
            pool.set_capacity(pool.usage().allocated * 5 // 4)

    def _command(self, name: str, *words: str) -> None:
        self._did = name not in self._beside
        if self._did:
            command = [sys.executable, "-m", "thinpool.cli", "--pool", str(self.path), *words]
            self._beside[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def _check(self) -> None:
        self._command("check", "check", *self.rng.choice(([], ["--quick"], ["--scrub"])))

    def _digest(self) -> None:
        self._command("digest", "digest")

    def _back_up(self) -> None:
        self._command("restore-metadata", "restore-metadata", "--make")

    def _held(self) -> list[str]:
        with self.pool() as pool:
            return [backup.name for backup in pool.backups() if backup.held]

    def _hold(self) -> None:
        """All that there is now is held, or is so no more."""
        held = self._held()
        self._command("restore-metadata", "restore-metadata", *(["--drop", held[0]] if held else ["--make", "--hold"]))

    def _compact(self) -> None:
        self._did = not self._beside and not self._held()
        if self._did:
            self._command("compact", "compact")

    def _heal(self) -> None:
        """A sealed layer loses some of its bytes, and gets them back."""
        self._did = not self._beside
        if not self._did:  # what reads all of the pool would tell of them; what moves chunks might move these
            return
        image = (self.top / SPARE).read_bytes()
        with self.pool() as pool, (self.path / "data").open("r+b", buffering=0) as data:
            size = pool.chunk_size
            at = self.rng.randrange(0, len(image), size)
            lies_at = next(place for place in range(0, CAPACITY * 2, size) if os.pread(data.fileno(), size, place) == image[at : at + size])
            os.pwrite(data.fileno(), self.rng.randbytes(4096), lies_at + self.rng.randrange(0, size, 4096))
            healed = pool.heal([self.top / SPARE])
            assert (healed.chunks, healed.left, healed.differ) == (1, (), ()), healed
            layer = pool.layer(SPARE)
            assert layer.pread(layer.size, 0) == image

    # --- the end ---

    def finish(self) -> None:
        """Everybody ends his work; every byte is compared, and nothing is left."""
        (self.top / "over").touch()
        for name, worker in self._workers.items():
            status = worker.wait(END_SECONDS)
            assert status == 0, f"worker {name} ended with {status}: {(self.top / f'{name}.log').read_text()[-3000:]}"
            say("worker", name, "has ended")
        self._workers.clear()
        self._wait_until(lambda: not self._beside, END_SECONDS, f"commands do not end: {list(self._beside)}")
        with self.pool() as pool:
            assert pool.attachments() == [], "still mounted"
            self._compare(pool)
            for name in self._held():
                pool.drop_backup(name)
            pool.compute_digests()
            for kind in FILE_SYSTEM_BYTES:
                device = pool.layer(f"{kind}-0").attach().device
                run(*(("e2fsck", "-fn") if kind == "ext4" else ("xfs_repair", "-n")), device)
                pool.layer(f"{kind}-0").detach()
        self._command("check", "check", "--scrub")
        self._wait_until(lambda: not self._beside, END_SECONDS, "the check does not end")
        self._stop_server()
        with connect(self.path) as local:  # waits for what ends still
            assert isinstance(local, thinpool.Pool)
            invariants.check(local._store.records, local.chunk_size)
            assert local.usage().mode != "error"
        self._command("check", "check", "--scrub")
        self._wait_until(lambda: not self._beside, END_SECONDS, "the check does not end")

    def _compare(self, pool: RemotePool) -> None:
        """The pool has the layers that the workers noted, and each holds what they noted."""
        noted = {path.name: path for path in self.top.glob("workers/*/layers/*")}
        of_itself = {GOLDEN, SPARE, "fio-0", *(f"{prefix}{kind}{suffix}" for kind in FILE_SYSTEM_BYTES for prefix, suffix in (("base-", ""), ("", "-0")))}
        names = {layer.name for layer in pool.layers()} - of_itself
        assert {name for name in names if not name.startswith("trash/")} == set(noted), f"{sorted(names ^ set(noted))} are there and not noted, or the reverse"
        for name, path in noted.items():
            layer, content = pool.layer(name), path.read_bytes()
            assert layer.sealed == (not path.stat().st_mode & 0o200), f"{name} is sealed, or not"
            assert layer.size == len(content) and layer.pread(layer.size, 0) == content, f"{name} is not what was noted"
        self.counts["layers compared"] = len(noted)
        self.counts["bytes compared"] = sum(path.stat().st_size for path in noted.values())

    def _stop_server(self) -> None:
        os.kill(self.server, signal.SIGTERM)
        self._wait_until(lambda: not processes(str(self.path)), END_SECONDS, "processes are left")
        mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.top) in line]
        loops = [line for line in run("losetup", "-nO", "NAME,BACK-FILE").stdout.splitlines() if str(self.top) in line]
        assert not mounts and not loops, f"left behind: {mounts} {loops}"

    def judge_memory(self) -> None:
        """The server that lived to the end takes no more at the end than when it had warmed up."""
        first, last = self.samples[0], self.samples[-1]
        say(f"the last server over {last.time - first.time:.0f} s, {len(self.samples)} samples, from first to last, and growth by the line that fits best:")
        for what in ("anonymous", "resident", "descriptors", "threads"):
            unit = MIB if what in ("anonymous", "resident") else 1
            values = [getattr(one, what) / unit for one in self.samples]
            grown = growth(self.samples, what) / unit
            say(f"  {what}: {values[0]:.1f} to {values[-1]:.1f}, {min(values):.1f} to {max(values):.1f} at its ends, growth {grown:+.1f}")
        if last.time - first.time < JUDGED_SECONDS:
            return
        mean = sum(one.anonymous for one in self.samples) / len(self.samples)
        assert growth(self.samples, "anonymous") < GROWTH_BYTES_MAX + GROWTH_PART_MAX * mean, "the server's memory grows"
        for what in ("descriptors", "threads"):
            assert growth(self.samples, what) < GROWTH_COUNT_MAX, f"the server's {what} grow"

    def _tell(self) -> None:
        """What may explain a failure."""
        say("the last steps were", *self._steps[-20:])
        say("mounted are", *(line for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.top) in line))
        for log in (self.path / "server.log", *self.top.glob("workers/*/journal")):
            if log.exists():
                say(log, "ends so:", log.read_text()[-4000:])

    def clear_up(self) -> None:
        """Whatever state it is in."""
        for worker in self._workers.values():
            worker.kill()
            worker.wait()
        for command in self._beside.values():
            command.kill()
            command.communicate()
        self._workers.clear()
        self._beside.clear()
        if processes(str(self.path)):
            with suppress(ThinpoolError, OSError):
                os.kill(self.server, signal.SIGTERM)
                self._wait_until(lambda: not self._keepers(), START_SECONDS, "the keeper does not end")

    def run(self) -> None:
        say(f"soak of {self.seconds:.0f} s in {self.top}, seed {self.seed}")
        try:
            self.prepare()
            self.work()
            say(", ".join(f"{count} {what}" for what, count in sorted(self.counts.items())))
            self.finish()
            self.judge_memory()
        except BaseException:
            self._tell()
            raise
        finally:
            self.clear_up()
        say("no failure")


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev soak", description=__doc__)
    parser.add_argument("minutes", type=float, nargs="?", default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--directory", type=Path, help="where to make the pool; it is kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="thinpool-soak-") as directory:
        top = given.directory or Path(directory)
        top.mkdir(exist_ok=True)
        Soak(top, given.seed, given.minutes * 60).run()


if __name__ == "__main__":
    main()
