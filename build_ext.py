"""Builds the C core (csrc/) as the extension module ``thinpool._core``, and the file system library (csrc/ext4/) as
``thinpool._ext4``, by cffi in API mode.

The cdef is the part of the module's header between its two marks: one source of truth for C and Python. Environment:
``THINPOOL_WERROR=1`` makes warnings errors, ``THINPOOL_SANITIZE=address,undefined`` builds with sanitizers.
"""

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
CALLBACKS = """
extern "Python" int tp_py_fetch(void *, uint32_t, uint64_t, void *, uint64_t, uint64_t *);
extern "Python" int tp_py_commit(void *);
extern "Python" int tp_py_extend_window(void *);
extern "Python" int tp_py_fuse_lookup(void *, const char *, uint64_t *);
extern "Python" int tp_py_fuse_list(void *, uint64_t, tp_fuse_listing *);
"""
# Assertions guard the data: they stay on, whatever flags Python was built with.
COMPILE_ARGS = ["-std=gnu11", "-O2", "-g", "-pthread", "-Wall", "-Wextra", "-UNDEBUG"]


def cdef(header: str) -> str:
    """The declarations that Python sees."""
    return (HERE / "csrc" / header).read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0]


def sanitizer_args() -> list[str]:
    sanitizers = os.environ.get("THINPOOL_SANITIZE")
    return [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer"] if sanitizers else []


def builder(module: str, folder: str, header: str, callbacks: str, libraries: list[str]) -> FFI:
    """The builder of one module from all sources in a folder."""
    ffi = FFI()
    ffi.cdef(cdef(f"{folder}/{header}".removeprefix("csrc/")) + callbacks)
    ffi.set_source(
        module,
        f'#include "{header}"',
        sources=sorted(f"{folder}/{path.name}" for path in (HERE / folder).glob("*.c")),
        depends=sorted(f"{folder}/{path.name}" for path in (HERE / folder).glob("*.h")),
        include_dirs=[folder],
        libraries=libraries,
        extra_compile_args=COMPILE_ARGS + sanitizer_args() + (["-Werror"] if os.environ.get("THINPOOL_WERROR") else []),
        extra_link_args=["-pthread", *sanitizer_args()],
    )
    return ffi


ffibuilder = builder("thinpool._core", "csrc", "thinpool.h", CALLBACKS, [])
ext4builder = builder("thinpool._ext4", "csrc/ext4", "ext4.h", "", ["ext2fs", "com_err"])

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
