"""Verbs of containers: ``thinpool container …``, ``cp`` and ``run``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..api import Container, PoolAPI
from ..errors import BadName
from ..units import format_size
from . import options
from .exits import NOT_RUN, is_expected
from .images import container_json
from .options import opened, parse_labels
from .show import format_time, print_json, print_table, short_id, shortened

app = typer.Typer(name="container", help="Containers: thin writable layers on images.", no_args_is_help=True)

Containers = Annotated[list[str], typer.Argument(metavar="CONTAINER...", help="Containers' names.", show_default=False)]
ImageOrLayer = Annotated[str, typer.Argument(metavar="IMAGE", help="An image's name or id, or a layer's name.", show_default=False)]
Command = Annotated[list[str] | None, typer.Argument(metavar="[CMD...]", help="What to run in it. Default: what the image says.", show_default=False)]
NewName = Annotated[str | None, typer.Option("--name", help="Its name, and its layer's.", show_default=False)]
LayerSize = Annotated[str | None, typer.Option("--size", help="A larger size for it.", show_default=False)]
Place = Annotated[str, typer.Argument(metavar="SOURCE", help="A path here, or NAME:/PATH in a container.", show_default=False)]
Destination = Annotated[str, typer.Argument(metavar="DEST", help="The same; one of the two is here.", show_default=False)]
Runtime = Annotated[
    str, typer.Option(envvar="THINPOOL_RUNTIME", help="crun, runc, another OCI runtime, or builtin. Default: the first there is.", show_default=False)
]
_COMMAND_LENGTH = 24


class WithCommand(options.UsageCode):
    """A verb whose last words are a command: all that comes after the first word, or after ``--``.

    As with Docker, options come before the image: ``run --rm IMAGE ls -l``. They may also come after it, when ``--`` parts them from
    the command: ``run IMAGE --rm -- ls -l``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = False
        behind = list(self.make_parser(ctx).parse_args(list(args))[0].get("command") or ())
        if behind[:1] == ["--"]:
            del args[len(args) - len(behind)]
        elif behind and behind[0].startswith("-") and "--" in behind:
            ctx.allow_interspersed_args = True
        return super().parse_args(ctx, args)


class Run(WithCommand):
    """As Docker has it: whatever keeps the command from running is 125, for any other code may be the command's own."""

    usage_code = NOT_RUN


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
        command = shortened(" ".join(one.command), _COMMAND_LENGTH, whole=no_trunc)
        rows.append([one.name, short_id(one.image, whole=no_trunc), command, format_time(one.created), status, *sizes])
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


def run(
    ctx: typer.Context,
    image: ImageOrLayer,
    command: Command = None,
    remove: Annotated[bool, typer.Option("--rm", help="Remove the container when its command ends.")] = False,
    name: NewName = None,
    size: LayerSize = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME[=VALUE]", help="A variable; may be given again.", show_default=False)] = None,
    user: Annotated[str | None, typer.Option("--user", "-u", metavar="USER[:GROUP]", help="As whom.", show_default=False)] = None,
    workdir: Annotated[str | None, typer.Option("--workdir", "-w", metavar="DIR", help="Where in it.", show_default=False)] = None,
    entrypoint: Annotated[str | None, typer.Option(help="In place of the image's.", show_default=False)] = None,
    hostname: Annotated[str | None, typer.Option(help="Default: the container's name.", show_default=False)] = None,
    runtime: Runtime = "",
    copies: Annotated[int, typer.Option("--copies", "-n", min=1, max=1000, help="So many containers at once.")] = 1,
    pool: options.Pool = None,
) -> None:
    """Run a command in a new container; its status is the command's. Needs root.

    With --copies N it runs in N containers at once, each with its number in THINPOOL_COPY.
    """
    from ..containers.run import run_container

    def work(p: PoolAPI) -> int:
        settings: dict[str, Any] = {"user": user, "workdir": workdir, "entrypoint": entrypoint, "hostname": hostname, "runtime": runtime, "copies": copies}
        return run_container(p, image, command or (), name=name, remove=remove, size=size, environment=_environment(env), **settings)

    _run(ctx, pool, work)


@app.command("start", cls=Run)
def start(ctx: typer.Context, container: options.Container, command: Command = None, runtime: Runtime = "", pool: options.Pool = None) -> None:
    """Run a command in a container that is there; its status is the command's. Needs root."""
    from ..containers.run import start_container

    _run(ctx, pool, lambda p: start_container(p, container, command or (), environment=_environment(None), runtime=runtime))


def _environment(given: list[str] | None) -> dict[str, str]:
    """``NAME=VALUE``, or ``NAME`` for the value that it has here; and the terminal's type."""
    environment = {"TERM": os.environ["TERM"]} if "TERM" in os.environ else {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not name:
            raise typer.BadParameter(f"a variable is NAME=VALUE, not {pair!r}", param_hint="--env")
        if equals or name in os.environ:
            environment[name] = value if equals else os.environ[name]
    return environment


def _run(ctx: typer.Context, pool: Path | None, work: Callable[[PoolAPI], int]) -> None:
    from .app import report

    try:
        with opened(ctx, pool, server=True) as p:
            status = work(p)
    except Exception as error:
        if not is_expected(error):
            raise
        report(error)
        raise typer.Exit(NOT_RUN) from None
    raise typer.Exit(status)


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
            taken.lstat()
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
    usage = fields.pop("usage")
    return {**fields, **usage}


def _place(given: str) -> tuple[str, str] | Path:
    """A container and a path in it, or a path here: one that begins with ``/`` or ``.``, or has no ``:/``."""
    name, colon, path = given.partition(":/")
    return (name, "/" + path) if colon and not given.startswith(("/", ".")) else Path(given)
