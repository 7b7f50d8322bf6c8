"""Trees of files in tests: what is in one, entry by entry; tars and layers to put in; what umoci makes of them."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

Entry = dict[str, object]
Made = tuple[tarfile.TarInfo, bytes]


def described(root: Path, *, whole_seconds: bool = False, without: Iterable[str] = ()) -> dict[str, Entry]:
    """Everything below a directory, and the directory itself (``""``): type and mode, owner, time, device, target, extended attributes,
    content, and which other paths are the same file."""
    skipped = set(without)
    found: dict[str, Entry] = {}
    same: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    pending = [""]
    while pending:
        path = pending.pop()
        where = os.path.join(root, path) if path else os.fspath(root)
        info = os.lstat(where)
        entry: Entry = {"mode": oct(info.st_mode), "owner": (info.st_uid, info.st_gid)}
        entry["mtime"] = info.st_mtime_ns // (10**9 if whole_seconds else 1)
        entry["xattrs"] = {key: os.getxattr(where, key, follow_symlinks=False) for key in os.listxattr(where, follow_symlinks=False)}
        if stat.S_ISDIR(info.st_mode):
            pending += [name for child in os.listdir(where) if (name := f"{path}/{child}".lstrip("/")) not in skipped]
        else:
            same[info.st_dev, info.st_ino].append(path)
            entry["links"] = info.st_nlink
        if stat.S_ISREG(info.st_mode):
            with open(where, "rb") as file:
                entry["content"] = (info.st_size, hashlib.file_digest(file, "sha256").hexdigest())
        elif stat.S_ISLNK(info.st_mode):
            entry["target"] = os.readlink(where)
        elif stat.S_ISBLK(info.st_mode) or stat.S_ISCHR(info.st_mode):
            entry["device"] = (os.major(info.st_rdev), os.minor(info.st_rdev))
        found[path] = entry
    for paths in same.values():
        for path in paths:
            found[path]["same as"] = sorted(paths)
    return found


def member(name: str, type: bytes = tarfile.REGTYPE, content: bytes = b"", pax: dict[str, str] | None = None, **fields: object) -> Made:
    """A member of a tar; ``fields`` are TarInfo's (mode, uid, gid, mtime, linkname, devmajor, devminor)."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.pax_headers = type, len(content), dict(pax or {})
    info.mtime, info.mode = 1_000_000_000, 0o755 if type == tarfile.DIRTYPE else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def sparse(name: str, its_map: str, data: bytes = b"", realsize: int = 1 << 20, **pax: str) -> Made:
    """A sparse file as PAX 1.0 has it: its map, then its data."""
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name, "GNU.sparse.realsize": str(realsize), **pax}
    return member(f"GNUSparseFile.0/{name}", content=its_map.encode().ljust(512, b"\0") + data, pax=pax)


def tar_of(members: Iterable[Made], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def umoci_unpack(directory: Path, layers: Sequence[bytes]) -> Path:
    """The root file system that umoci unpacks from an image of these layer tars."""
    directory.mkdir()
    image = f"{directory}/image:latest"
    for command in (["init", "--layout", f"{directory}/image"], ["new", "--image", image]):
        subprocess.run(["umoci", *command], check=True, capture_output=True, timeout=60)
    for number, layer in enumerate(layers):
        archive = directory / f"{number}.tar"
        archive.write_bytes(layer)
        subprocess.run(["umoci", "raw", "add-layer", "--image", image, archive], check=True, capture_output=True, timeout=60)
    subprocess.run(["umoci", "unpack", "--image", image, directory / "bundle"], check=True, capture_output=True, timeout=60)
    return directory / "bundle" / "rootfs"
