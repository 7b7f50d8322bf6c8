"""Verbs of containers: ``thinpool container …``, ``cp`` and ``run``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..api import Container
from ..errors import BadName
from ..units import format_size
from . import options
from .images import container_json
from .options import opened, parse_labels
from .show import format_time, print_json, print_table, short_id

app = typer.Typer(name="container", help="Containers: thin writable layers on images.", no_args_is_help=True)

Containers = Annotated[list[str], typer.Argument(metavar="CONTAINER...", help="Containers' names.", show_default=False)]
ImageOrLayer = Annotated[str, typer.Argument(metavar="IMAGE", help="An image's name or id, or a layer's name.", show_default=False)]
Command = Annotated[list[str] | None, typer.Argument(metavar="[CMD...]", help="What to run in it. Default: what the image says.", show_default=False)]
NewName = Annotated[str | None, typer.Option("--name", help="Its name, and its layer's.", show_default=False)]
LayerSize = Annotated[str | None, typer.Option("--size", help="A larger size for it.", show_default=False)]
Place = Annotated[str, typer.Argument(metavar="SOURCE", help="A path here, or NAME:/PATH in a container.", show_default=False)]
Destination = Annotated[str, typer.Argument(metavar="DEST", help="The same; one of the two is here.", show_default=False)]


class WithCommand(TyperCommand):
    """A verb whose last words are a command: all that comes after the first word, or after ``--``.

    As with Docker, options come before the image: ``run --rm IMAGE ls -l``. They may also come after it, when ``--`` parts them from
    the command: ``run IMAGE --rm -- ls -l``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = False
        words = self.make_parser(ctx).parse_args(list(args))[1]
        behind = words[1:]
        if behind[:1] == ["--"]:
            del args[len(args) - len(behind)]
        elif behind and behind[0].startswith("-") and "--" in behind:
            ctx.allow_interspersed_args = True
        return super().parse_args(ctx, args)


@app.command("create", cls=WithCommand)
def create(
    ctx: typer.Context,
    image: ImageOrLayer,
    command: Command = None,
    name: NewName = None,
    size: LayerSize = None,
    label: options.Labels = None,
    pool: options.Pool = None,
) -> None:
    """Make a container, and print its name."""
    with opened(ctx, pool) as p:
        print(p.containers.create(image, name=name, size=size, command=command or (), labels=parse_labels(label)).name)


@app.command("ls")
def ls(ctx: typer.Context, no_trunc: options.NoTrunc = False, as_json: options.AsJson = False, pool: options.Pool = None) -> None:
    """List the containers.

    JSON: an array of name, image, image_id (null: of a plain layer), layer, created (seconds since 1970), command (an array),
    running, virtual, mapped, exclusive, shared.
    """
    with opened(ctx, pool) as p:
        found = p.containers.list()
    if as_json:
        print_json([_container_json(container) for container in found])
        return
    rows = []
    for one in found:
        status = "running" if one.running else "created"
        sizes = map(format_size, (one.usage.virtual, one.usage.exclusive, one.usage.shared))
        rows.append([one.name, short_id(one.image, whole=no_trunc), " ".join(one.command), format_time(one.created), status, *sizes])
    print_table(["NAME", "IMAGE", "COMMAND", "CREATED", "STATUS", ">VIRTUAL", ">EXCLUSIVE", ">SHARED"], rows)


@app.command("rm")
def rm(
    ctx: typer.Context,
    containers: Containers,
    force: Annotated[bool, typer.Option("--force", "-f", help="Also running ones: they are killed.")] = False,
    pool: options.Pool = None,
) -> None:
    """Remove containers; their images stay whole."""
    with opened(ctx, pool, gives_back=True) as p:
        for container in containers:
            p.containers.remove(container, force=force)


@app.command("diff")
def diff(ctx: typer.Context, container: options.Container, as_json: options.AsJson = False, pool: options.Pool = None) -> None:
    """Show the paths that a container has added (A), changed (C) and deleted (D).

    JSON: an array of kind ("A", "C" or "D") and path.
    """
    with opened(ctx, pool) as p:
        changes = p.containers.diff(container)
    if as_json:
        print_json([asdict(change) for change in changes])
        return
    for change in changes:
        print(f"{change.kind} {change.path}")


@app.command("cp")
def cp(ctx: typer.Context, source: Place, destination: Destination, pool: options.Pool = None) -> None:
    """Copy files out of a container, an image or a layer, or into a container: cp web:/etc/motd . Reading needs no root."""
    taken, given = _place(source), _place(destination)
    with opened(ctx, pool) as p:
        if isinstance(taken, tuple) and isinstance(given, Path):
            p.containers.copy_out(*taken, given)
        elif isinstance(taken, Path) and isinstance(given, tuple):
            p.containers.copy_in(taken, *given)
        else:
            raise BadName("of SOURCE and DEST one must be NAME:/PATH, in a container, and the other a path here")


@app.command("reset")
def reset(ctx: typer.Context, containers: Containers, pool: options.Pool = None) -> None:
    """Put containers back to what their image is."""
    with opened(ctx, pool, gives_back=True) as p:
        for container in containers:
            p.containers.reset(container)


@app.command("resize")
def resize(
    ctx: typer.Context,
    container: options.Container,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Like 20G.", show_default=False)],
    pool: options.Pool = None,
) -> None:
    """Grow a container's layer and its file system, also while it runs."""
    with opened(ctx, pool) as p:
        p.containers.resize(container, size)


@app.command("inspect")
def inspect(ctx: typer.Context, containers: Containers, pool: options.Pool = None) -> None:
    """Print all there is to say about containers, as a JSON array."""
    with opened(ctx, pool) as p:
        print_json([container_json(p, container) for container in containers])


def _container_json(container: Container) -> dict[str, Any]:
    fields = asdict(container)
    return {**fields, **fields.pop("usage")}


def _place(given: str) -> tuple[str, str] | Path:
    """A container and a path in it, or a path here: one that begins with ``/`` or ``.``, or has no ``:/``."""
    name, colon, path = given.partition(":/")
    return (name, "/" + path) if colon and not given.startswith(("/", ".")) else Path(given)
