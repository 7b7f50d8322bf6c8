"""A base layer from a root file system tarball."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..api import Progress, Size
from ..catalog import PARTIAL_LABEL
from ..errors import ImportFailed
from ..sharing import share_equal_chunks
from ..units import parse_size
from .blank import FILESYSTEM_LABEL, blank_layer
from .filling import filling
from .tarball import unpack

if TYPE_CHECKING:
    from ..layer import Layer
    from ..pool import Pool


def import_rootfs(
    pool: Pool,
    path: Path,
    name: str,
    *,
    size: Size = "10G",
    filesystem: str = "ext4",
    labels: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Layer:
    """See :meth:`thinpool.Pool.import_rootfs`: a clone of the empty file system, filled, sealed, and only then named."""
    if not path.is_file():
        raise ImportFailed(f"cannot read {path}: {'it is not a file' if path.exists() else 'no such file'}")
    pool.require_free(name)  # before the work, not after it
    blank = blank_layer(pool, filesystem, parse_size(size))
    layer = blank.clone(f"thinpool/import/{uuid.uuid4().hex}", labels={PARTIAL_LABEL: "1"})
    try:
        with filling(pool, layer, filesystem) as tree:
            unpack(path, tree, progress=progress)
        share_equal_chunks(pool, layer, blank)
        layer.seal()
        layer.rename(name, labels={FILESYSTEM_LABEL: filesystem, "thinpool.source": path.name, **(labels or {})})
        pool.commit()
    except BaseException:
        layer.delete()
        raise
    return layer
