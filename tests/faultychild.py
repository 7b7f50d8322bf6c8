"""Runs the fault script on a real pool, again and again, under tests/preload/failing_calls.c; started by test_fault_injection.py.

Arguments: a directory, an errno, and whether all calls fail from the n-th on. Prints the calls that failed, one a run.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import shutil
import sys
from pathlib import Path

import faultscript
import invariants
from faultscript import CHUNK, Run

from thinpool import Pool

_shim = ctypes.CDLL(None)
_shim.faults_failed_call.restype = ctypes.c_char_p


class Faults:
    """The preloaded library."""

    def __init__(self, fault: int) -> None:
        self.fault = fault

    @property
    def failed_call(self) -> str:
        return bytes(_shim.faults_failed_call()).decode()

    def counting(self, on: bool) -> None:
        _shim.faults_pause(not on)


def once(path: Path, at: int, fault: int, *, go_on: bool) -> str:
    """One run with a fault at one call; the pool that is left opens, and all that was flushed is there."""
    faults = Faults(fault)
    with Pool.create(path, CHUNK, capacity=2048 * CHUNK) as pool:  # small, as all of it is checked
        state = faultscript.prepare(pool)
    pool = Pool.open(path, background=False)
    run = Run(pool, state, faults)
    _shim.faults_arm(at, fault, go_on)
    try:
        run.run()
        failed_call = faults.failed_call
    finally:
        _shim.faults_disarm()
        pool.close()
    with Pool.open(path, background=False) as pool:
        Run.check(pool, run.since)
        invariants.check(pool._store.records, CHUNK)
        pool.layer("base").pwrite(b"works", 0)
    shutil.rmtree(path)
    return failed_call


def main() -> None:
    directory, fault, go_on = Path(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3]))
    logging.disable()
    for at in itertools.count(1):
        try:
            failed_call = once(directory / "pool", at, fault, go_on=go_on)
        except BaseException as error:
            error.add_note(f"call {at}: {_shim.faults_failed_call()!r}")
            raise
        if not failed_call:
            break
        print(failed_call)


main()
