"""Verbs that take files in and give files out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ImportFailed
from . import options
from .options import opened, parse_labels
from .show import progress_bar

_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"BZh")
_SUFFIXES = (".gz", ".xz", ".zst", ".bz2", ".tgz", ".txz", ".tar", ".img", ".raw")


def import_file(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A root file system tarball, or a raw image or device.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="The layer's name. Default: the file's, without .tar.gz and the like.", show_default=False)] = None,
    size: Annotated[str, typer.Option(help="Of a tarball's file system.")] = "10G",
    fs: Annotated[str, typer.Option(help="Of a tarball: ext4 or xfs.")] = "ext4",
    raw: Annotated[bool, typer.Option("--raw", help="It is a raw image, whatever it looks like.")] = False,
    rootfs: Annotated[bool, typer.Option("--rootfs", help="It is a tarball, whatever it looks like.")] = False,
    label: options.Labels = None,
    pool: options.Pool = None,
) -> None:
    """Take in a root file system tarball as a sealed layer, or a raw image as a writable one."""
    if raw and rootfs:
        raise typer.BadParameter("--raw and --rootfs exclude each other")
    as_rootfs = rootfs or (not raw and looks_like_tarball(file))
    layer_name = name or _bare_name(file)
    labels = parse_labels(label)
    with opened(ctx, pool) as p, progress_bar(f"importing {layer_name}") as progress:
        if as_rootfs:
            p.import_rootfs(file, layer_name, size=size, filesystem=fs, labels=labels, progress=progress)
        else:
            p.import_raw(file, layer_name, labels=labels, progress=progress)


def export(
    ctx: typer.Context,
    layer: options.Layer,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to.", show_default=False)],
    pool: options.Pool = None,
) -> None:
    """Write a layer as a raw sparse image."""
    with opened(ctx, pool) as p, progress_bar(f"exporting {layer}") as progress:
        p.layer(layer).export_raw(file, progress=progress)


def looks_like_tarball(file: Path) -> bool:
    """Whether the file begins as a tar archive does (POSIX ustar, at byte 257) or as a compressed one.

    Raises ImportFailed for a directory, and OSError for what cannot be read.
    """
    if file.is_dir():
        raise ImportFailed(f"{file} is a directory: pack it with tar, or name an image file")
    with file.open("rb") as opened_file:
        head = opened_file.read(512)
    return head.startswith(_COMPRESSED) or head[257:262] == b"ustar"


def _bare_name(file: Path) -> str:
    name = file.name
    while name.endswith(_SUFFIXES):
        name = name.rpartition(".")[0]
    return name
