"""Builds the C core (csrc/) as the extension module ``thinpool._core``, by cffi in API mode.

The cdef is the part of csrc/thinpool.h between its two marks: one source of truth for C and Python. Environment:
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


def cdef() -> str:
    """The declarations that Python sees."""
    header = (HERE / "csrc" / "thinpool.h").read_text()
    return header.split("/* cdef begin */")[1].split("/* cdef end */")[0] + CALLBACKS


def sanitizer_args() -> list[str]:
    sanitizers = os.environ.get("THINPOOL_SANITIZE")
    return [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer"] if sanitizers else []


ffibuilder = FFI()
ffibuilder.cdef(cdef())
ffibuilder.set_source(
    "thinpool._core",
    '#include "thinpool.h"',
    sources=sorted(f"csrc/{path.name}" for path in (HERE / "csrc").glob("*.c")),
    depends=sorted(f"csrc/{path.name}" for path in (HERE / "csrc").glob("*.h")),
    include_dirs=["csrc"],
    extra_compile_args=COMPILE_ARGS + sanitizer_args() + (["-Werror"] if os.environ.get("THINPOOL_WERROR") else []),
    extra_link_args=["-pthread", *sanitizer_args()],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
