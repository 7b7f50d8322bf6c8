"""File systems of layers: made once per type and size, kept empty as a sealed layer, and cloned from then on.

mkfs runs on a sparse file, which needs no root; its import skips everything that is zero, so that the kept layer
takes a few chunks. Layers are named ``thinpool/blank/TYPE/BYTES``, and labelled, so that listings can leave them out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from ..api import LayerAPI
from ..catalog import PARTIAL_LABEL
from ..errors import BadSize, LayerExists, LayerNotFound, ToolFailed
from ..poolfiles import MKFS_PREFIX

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool

BLANK_LABEL = "thinpool.blank"
FILESYSTEM_LABEL = "thinpool.filesystem"
_SIZE_MIN = {"ext4": 16 << 20, "xfs": 300 << 20}
_NAMESPACE = uuid.UUID("6b1bd0c4-5d1d-4a41-9f8a-0d7a8b4a2c11")
# All of them, whatever mke2fs.conf(5) of this host says, so that each kernel mounts what any host made. Left out is orphan_file, whose 2 MiB the
# kernel reads a block at a time whenever it mounts a file system, and so each time that a container starts.
_EXT4_FEATURES = (
    "none,sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr,has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize"
)
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _mkfs_command(filesystem: str, size: int, path: Path) -> list[str]:
    """How a thin layer wants it:

    - the same UUID and hash seed each time, so that equal content makes equal chunks;
    - ext4: no reserve for root, of which a container has no use; inode tables and journal as good as zeroed already (they are holes),
      or the kernel would write them in the background of each clone; a small journal, for a container's layer comes to
      hold all of it; bitmaps and inode tables side by side, so that they fill few chunks;
    - no discard of what is a hole.
    """
    identity = str(uuid.uuid5(_NAMESPACE, f"{filesystem}/{size}"))
    if filesystem == "xfs":
        return ["mkfs.xfs", "-q", "-f", "-K", "-m", f"uuid={identity}", str(path)]
    extended = f"nodiscard,lazy_itable_init=0,lazy_journal_init=0,packed_meta_blocks=1,hash_seed={identity},root_owner=0:0"
    journal = ["-J", "size=16"] if size >= 1 << 30 else []
    return ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-O", _EXT4_FEATURES, *journal, "-U", identity, "-E", extended, str(path)]


_FIXED_TIME = str(0x40000000)
"""What mkfs takes for the present: the same file system is made each time, in every pool."""


def run_tool(command: list[str]) -> None:
    """Runs a program of the host. Raises :class:`~thinpool.errors.ToolFailed` with what it said, or where it is missing."""
    program = shutil.which(command[0], path=_SEARCH_PATH)
    if program is None:
        raise ToolFailed(f"{command[0]} is not installed (Debian: e2fsprogs for ext4, xfsprogs for XFS)")
    environment = {"PATH": _SEARCH_PATH, "E2FSPROGS_FAKE_TIME": _FIXED_TIME} if command[0].startswith("mkfs") else {"PATH": _SEARCH_PATH}
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, env=environment)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ToolFailed(f"{command[0]} failed: {said[-1] if said else f'exit status {done.returncode}'}")


def blank_layer(pool: Pool, filesystem: str, size: int) -> Layer:
    """The sealed layer with an empty file system of that type and size in bytes; made when it is first asked for.

    Raises BadSize for a type that is not known or a size it cannot have, ToolFailed where mkfs fails.
    """
    if filesystem not in _SIZE_MIN:
        raise BadSize(f"no file system type {filesystem!r}: there are {' and '.join(_SIZE_MIN)}")
    if size < _SIZE_MIN[filesystem] or size % 4096:
        raise BadSize(f"an {filesystem} file system has at least {_SIZE_MIN[filesystem] >> 20} MiB, in whole blocks of 4 KiB, not {size} bytes")
    name = f"thinpool/blank/{filesystem}/{size}"
    try:
        return pool.layer(name)
    except LayerNotFound:
        pass
    with tempfile.TemporaryDirectory(prefix=MKFS_PREFIX, dir=pool.path) as directory:
        image = Path(directory) / "image"
        image.touch(mode=0o600)
        os.truncate(image, size)
        run_tool(_mkfs_command(filesystem, size, image))
        labels = {BLANK_LABEL: "1", FILESYSTEM_LABEL: filesystem}
        layer = pool.import_raw(image, f"thinpool/mkfs/{uuid.uuid4().hex}", labels={**labels, PARTIAL_LABEL: "1"})
    layer.seal()
    try:
        layer.rename(name, labels=labels)  # whoever finds it by that name finds it complete
    except LayerExists:  # somebody else was quicker
        layer.delete()
        return pool.layer(name)
    return layer


def grow_ext4(layer: LayerAPI) -> None:
    """Lets an ext4 file system that is not mounted fill its layer. Needs root.

    Offline, for growing a mounted one asks for CAP_SYS_RESOURCE, which root in a restricted environment may not have; forced,
    for a fresh clone of a sealed layer, clean though it is, counts as not checked. Raises ToolFailed.
    """
    device = layer.attach().device
    try:
        run_tool(["resize2fs", "-f", device])
    finally:
        layer.detach()


def grow_mounted_ext4(device: str) -> None:
    """Lets a mounted ext4 fill its device. The kernel asks for CAP_SYS_RESOURCE. Raises ToolFailed."""
    try:
        run_tool(["resize2fs", device])
    except ToolFailed as error:
        raise ToolFailed(f"{error}; the layer has its new size: stop the container and resize it again for its file system") from error


def grow_xfs(mountpoint: Path) -> None:
    """Lets a mounted XFS fill its layer. Raises ToolFailed."""
    run_tool(["xfs_growfs", str(mountpoint)])
