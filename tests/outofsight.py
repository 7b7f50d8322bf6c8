"""A file system mounted where only one process sees it, as a container's is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLDER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
assert libc.mount(None, b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
source, directory = (word.encode() for word in sys.argv[1:])
assert libc.mount(source, directory, b"ext4", 0, b"discard") == 0, os.strerror(ctypes.get_errno())
with open(directory + b"/file", "w") as file:
    file.write("not synced")
print("mounted", flush=True)
sys.stdin.read()
"""


@contextmanager
def written_out_of_sight(device: str, directory: Path) -> Iterator[None]:
    """An ext4 in which a process has written ``not synced`` to ``file``, and which it has mounted until this is left."""
    command = [sys.executable, "-c", _HOLDER, device, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mounted\n"
        yield
        holder.communicate("")
