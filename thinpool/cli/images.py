"""Verbs of container images, by Docker's names: taking in and giving away, listings, names, removal."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..api import Credentials, Image, PoolAPI, Removed
from ..errors import ContainerNotFound, ImageNotFound
from ..units import format_size
from . import options
from .options import opened
from .show import NONE, familiar_name, format_time, print_json, print_table, progress_bar, short_id, shortened

Reference = Annotated[str, typer.Argument(metavar="IMAGE", help="An image's name, or the beginning of its id.", show_default=False)]
References = Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Images' names, or the beginnings of their ids.", show_default=False)]
InRegistry = Annotated[str, typer.Argument(metavar="IMAGE", help="Like debian:12 or localhost:5000/team/app:1.", show_default=False)]
Platform = Annotated[str | None, typer.Option(metavar="OS/ARCH", help="Which of several. Default: this machine's.", show_default=False)]
BaseSize = Annotated[str, typer.Option(help="Of the file system that containers will see.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Plain HTTP also for a registry on another machine.")]
_CREATED_BY_LENGTH = 45


def load(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A docker save archive, an OCI layout, or a root file system tarball.", show_default=False)],
    tag: Annotated[str | None, typer.Option(metavar="IMAGE", help="Its name; of several images in the file, the one to take.", show_default=False)] = None,
    platform: Platform = None,
    size: BaseSize = "10G",
    pool: options.Pool = None,
) -> None:
    """Take in an image from a file or a directory."""
    file.stat()
    with opened(ctx, pool) as p, progress_bar(f"loading {file.name}") as progress:
        image = p.images.load(file, tag, platform=platform, size=size, progress=progress)
    names = image.references if tag is None else (tag,)
    print(*(f"Loaded image: {familiar_name(name)}" for name in names) if names else (f"Loaded image ID: {image.id}",), sep="\n")


def pull(
    ctx: typer.Context, reference: InRegistry, platform: Platform = None, size: BaseSize = "10G", insecure: Insecure = False, pool: options.Pool = None
) -> None:
    """Fetch an image from a registry; only layers that the pool lacks are fetched."""
    known = docker_credentials(reference)
    with opened(ctx, pool) as p, progress_bar(f"pulling {reference}") as progress:
        image = p.images.pull(reference, platform=platform, credentials=known, insecure=insecure, size=size, progress=progress)
    print(image.id)


def push(ctx: typer.Context, reference: Reference, insecure: Insecure = False, pool: options.Pool = None) -> None:
    """Give an image to the registry that its name says, and print its digest there."""
    known = docker_credentials(reference)
    with opened(ctx, pool) as p, progress_bar(f"pushing {reference}") as progress:
        print(p.images.push(reference, credentials=known, insecure=insecure, progress=progress))


def save(
    ctx: typer.Context,
    references: References,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to; it must not exist yet.", show_default=False)],
    form: Annotated[Literal["docker-archive", "oci-archive", "oci"], typer.Option("--format", help="oci: a directory.")] = "docker-archive",
    pool: options.Pool = None,
) -> None:
    """Write images to a file, for other programs or other pools."""
    with opened(ctx, pool) as p, progress_bar(f"saving {output.name}") as progress:
        p.images.save(references, output, form=form, progress=progress)


def commit(
    ctx: typer.Context,
    container: options.Container,
    reference: Annotated[str | None, typer.Argument(metavar="[IMAGE]", help="The new image's name.", show_default=False)] = None,
    author: Annotated[str, typer.Option("--author", "-a", help="Who made it.", show_default=False)] = "",
    message: Annotated[str, typer.Option("--message", "-m", help="Its comment in the history.", show_default=False)] = "",
    pool: options.Pool = None,
) -> None:
    """Make an image of a container, and print its id."""
    with opened(ctx, pool) as p, progress_bar(f"committing {container}") as progress:
        print(p.images.commit(container, reference, author=author, message=message, progress=progress).id)


def images(ctx: typer.Context, no_trunc: options.NoTrunc = False, as_json: options.AsJson = False, pool: options.Pool = None) -> None:
    """List the images, the newest first.

    JSON: an array of id, references (an array of full names), digest (of the manifest, or null), platform, created (seconds since
    1970), layers (an array of layers' names, base first), blobs (kept archives of its layers), virtual, mapped, exclusive, shared.
    """
    with opened(ctx, pool) as p:
        found = p.images.list()
    if as_json:
        print_json([_image_json(image) for image in found])
        return
    rows: list[list[str]] = []
    for image in found:
        sizes = map(format_size, (image.usage.virtual, image.usage.shared, image.usage.exclusive))
        about = [short_id(image.id, whole=no_trunc), format_time(image.created), *sizes]
        rows.extend([familiar_name(name), *about] for name in image.references or (NONE,))
    print_table(["REFERENCE", "ID", "CREATED", ">VIRTUAL", ">SHARED", ">EXCLUSIVE"], rows)


def history(ctx: typer.Context, reference: Reference, no_trunc: options.NoTrunc = False, as_json: options.AsJson = False, pool: options.Pool = None) -> None:
    """Show the steps by which an image was made, the last one first, and what each takes.

    JSON: an array of created (seconds since 1970, or null), created_by, comment, layer (a name; null: it changed no file), diff_id,
    size, shared, exclusive.
    """
    with opened(ctx, pool) as p:
        steps = p.images.history(reference)[::-1]
    if as_json:
        print_json([asdict(step) for step in steps])
        return
    rows = []
    for step in steps:
        made_by = shortened(step.created_by, _CREATED_BY_LENGTH, whole=no_trunc)
        rows.append([format_time(step.created), made_by, *map(format_size, (step.size, step.shared, step.exclusive)), step.comment])
    print_table(["CREATED", "CREATED BY", ">SIZE", ">SHARED", ">EXCLUSIVE", "COMMENT"], rows)


def tag(
    ctx: typer.Context,
    source: Reference,
    target: Annotated[str, typer.Argument(metavar="NAME", help="The further name.", show_default=False)],
    pool: options.Pool = None,
) -> None:
    """Give an image one more name."""
    with opened(ctx, pool) as p:
        p.images.tag(source, target)


def untag(ctx: typer.Context, reference: Reference, pool: options.Pool = None) -> None:
    """Take a name of an image away; the image stays, for its id."""
    with opened(ctx, pool) as p:
        p.images.untag(reference)


def inspect(
    ctx: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Containers or images.", show_default=False)],
    pool: options.Pool = None,
) -> None:
    """Print all there is to say about images or containers, as a JSON array."""
    with opened(ctx, pool) as p:
        print_json([_inspected(p, name) for name in names])


def rmi(
    ctx: typer.Context,
    references: References,
    force: Annotated[bool, typer.Option("--force", "-f", help="Also where containers were made from it; they stay whole.")] = False,
    pool: options.Pool = None,
) -> None:
    """Remove names of images, and with its last name an image and what only it has."""
    with opened(ctx, pool, gives_back=True) as p:
        for reference in references:
            _print_removed(p.images.remove(reference, force=force))


def gc(ctx: typer.Context, pool: options.Pool = None) -> None:
    """Remove images without a name or container, and layers that no image needs."""
    with opened(ctx, pool, gives_back=True) as p:
        removed = p.images.gc()
    _print_removed(removed)
    print(f"Total reclaimed space: {format_size(removed.bytes)}")


def container_json(pool: PoolAPI, name: str) -> dict[str, Any]:
    """What ``inspect`` says of a container. Raises ContainerNotFound."""
    container = pool.containers.get(name)
    return {
        "Name": container.name,
        "Image": container.image,
        "ImageId": container.image_id,
        "Layer": container.layer,
        "Created": container.created,
        "Running": container.running,
        "Command": list(container.command),
        "Config": pool.containers.configuration(name),
        "Usage": asdict(container.usage),
        "Limits": asdict(pool.layer(container.layer).limits),
    }


def _inspected(pool: PoolAPI, name: str) -> dict[str, Any]:
    try:
        return container_json(pool, name)
    except ContainerNotFound:
        pass
    try:
        return pool.images.inspect(name)
    except ImageNotFound:
        raise ImageNotFound(f"no container and no image is named {name!r}") from None


def _image_json(image: Image) -> dict[str, Any]:
    fields = asdict(image)
    usage = fields.pop("usage")
    return {**fields, **usage}


def _print_removed(removed: Removed) -> None:
    for name in removed.references:
        print(f"Untagged: {familiar_name(name)}")
    for deleted in (*removed.images, *removed.layers):
        print(f"Deleted: {deleted}")


def docker_credentials(reference: str) -> Credentials:
    """Those of Docker's configuration, where DOCKER_CONFIG says; none is none, and not some other user's."""
    from ..images.credentials import credentials_for
    from ..images.reference import Reference as ImageName

    directory = os.environ.get("DOCKER_CONFIG")
    known = credentials_for(ImageName.parse(reference).domain, Path(directory) / "config.json" if directory else None)
    return known or Credentials()
