"""Only what pyproject.toml cannot say: the C modules are built by build_ext.py through cffi.

The file system library needs libext2fs (Debian: libext2fs-dev). Where its headers are missing it is left out, and trees are put into file
systems by mounting them, as root.
"""

import subprocess

from setuptools import setup


def has_ext2fs() -> bool:
    """Whether its headers are there."""
    command = ["cc", "-E", "-o", "/dev/null", "-x", "c", "-"]
    try:
        return subprocess.run(command, input=b"#include <ext2fs/ext2fs.h>\n", capture_output=True, check=False).returncode == 0
    except OSError:
        return False


setup(cffi_modules=["build_ext.py:ffibuilder", *(["build_ext.py:ext4builder"] if has_ext2fs() else [])])
