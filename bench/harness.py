"""What the benchmarks share: loops in C over layers and plain files, and ratios taken side by side.

These machines are noisy, so two things are never timed one after the other but in turns, many short rounds of each; the
figure is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import mmap
import os
import random
import statistics
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cffi import FFI

from thinpool.engine import _core
from thinpool.engine import _ffi as core_ffi
from thinpool.layer import Layer

HERE = Path(__file__).parent
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
_SIGNATURES = """
typedef int (*transfer)(void *, void *, uint64_t, uint64_t);
int plain_read(void *, void *, uint64_t, uint64_t);
int plain_write(void *, void *, uint64_t, uint64_t);
double run(transfer, void *, void *, uint64_t, const uint64_t *, uint64_t);
double longest(transfer, void *, void *, uint64_t, const uint64_t *, uint64_t, volatile int *);
double run_two(transfer, void **, void **, uint64_t, const uint64_t *, uint64_t);
"""


def build_loops(directory: Path) -> Any:
    """Compiles loops.c; (ffi, lib)."""
    ffi = FFI()
    ffi.cdef(_SIGNATURES)
    ffi.set_source("thinpool_bench_loops", (HERE / "loops.c").read_text(), extra_compile_args=["-O2"], extra_link_args=["-pthread"])
    path = ffi.compile(tmpdir=str(directory))
    import importlib.util

    spec = importlib.util.spec_from_file_location("thinpool_bench_loops", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loops:
    """The C loops, bound to layers and plain files."""

    def __init__(self, directory: Path) -> None:
        module = build_loops(directory)
        self._ffi, self._lib = module.ffi, module.lib
        self._buffers = [mmap.mmap(-1, MIB) for _ in range(2)]
        for buffer in self._buffers:
            buffer.write(os.urandom(MIB))

    def _target(self, target: Layer | int, verb: str) -> tuple[Any, Any]:
        """(function, handle) for a layer, or a plain file's descriptor."""
        if isinstance(target, Layer):
            function = int(core_ffi.cast("uintptr_t", core_ffi.addressof(_core, f"tp_{verb}")))
            return self._ffi.cast("transfer", function), self._ffi.cast("void *", int(core_ffi.cast("uintptr_t", target.handle.pointer)))
        return self._ffi.cast("transfer", self._ffi.addressof(self._lib, f"plain_{verb}")), self._ffi.cast("void *", target)

    def seconds(self, target: Layer | int, verb: str, length: int, offsets: array[int]) -> float:
        """Time for one transfer of ``length`` bytes at each offset."""
        move, handle = self._target(target, verb)
        source = self._ffi.cast("uint64_t *", self._ffi.from_buffer(offsets))
        took = self._lib.run(move, handle, self._ffi.from_buffer(self._buffers[0]), length, source, len(offsets))
        assert took >= 0, f"{verb} failed"
        return float(took)

    def seconds_two(self, targets: list[Any], verb: str, length: int, offsets: array[int]) -> float:
        """The same by two threads at once, one for each target."""
        bound = [self._target(target, verb) for target in targets]
        handles = self._ffi.new("void *[2]", [handle for _, handle in bound])
        buffers = [self._ffi.from_buffer(buffer) for buffer in self._buffers]
        pointers = self._ffi.new("void *[2]", [self._ffi.cast("void *", buffer) for buffer in buffers])
        source = self._ffi.cast("uint64_t *", self._ffi.from_buffer(offsets))
        took = self._lib.run_two(bound[0][0], handles, pointers, length, source, len(offsets))
        assert took >= 0, f"{verb} failed"
        return float(took)

    @contextmanager
    def longest(self, target: Layer | int, verb: str, length: int, offsets: array[int]) -> Iterator[list[float]]:
        """Transfers by a thread in C while the body runs; afterwards the list has the seconds of the one that took longest."""
        move, handle = self._target(target, verb)
        source, stop = self._ffi.cast("uint64_t *", self._ffi.from_buffer(offsets)), self._ffi.new("int *")
        buffer, worst = self._ffi.from_buffer(self._buffers[0]), list[float]()
        thread = threading.Thread(target=lambda: worst.append(self._lib.longest(move, handle, buffer, length, source, len(offsets), stop)))
        thread.start()
        try:
            yield worst
        finally:
            stop[0] = 1
            thread.join()


def random_offsets(size: int, unit: int, count: int, seed: int) -> array[int]:
    """That many offsets of whole units within ``size``."""
    rng = random.Random(seed)
    return array("Q", (rng.randrange(size // unit) * unit for _ in range(count)))


def plain_file(path: Path, size: int) -> int:
    """A descriptor of a new sparse file; its name is gone already."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    path.unlink()
    os.ftruncate(fd, size)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


def clock(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass
class Comparison:
    """Rounds of two things in turns: seconds of each."""

    ours: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)

    def round(self, ours: Callable[[], float], limit: Callable[[], float]) -> None:
        """One of each, which goes first changes."""
        if len(self.ours) % 2:
            self.limit.append(limit())
            self.ours.append(ours())
        else:
            self.ours.append(ours())
            self.limit.append(limit())

    @property
    def ratio(self) -> float:
        """How fast ours is, the limit being 1: the median over the rounds."""
        return statistics.median(limit / ours for ours, limit in zip(self.ours, self.limit, strict=True))


def compare(rounds: int, ours: Callable[[], float], limit: Callable[[], float]) -> Comparison:
    comparison = Comparison()
    for _ in range(rounds):
        comparison.round(ours, limit)
    return comparison
